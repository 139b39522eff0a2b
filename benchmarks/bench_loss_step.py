"""The output head and its cross entropy, forward and backward: whole logits, ours by slices, torch's operator.

unfused  F.cross_entropy(linear(hidden, weight).float(), target), as transformers' models do
chunked  losses.linear_cross_entropy
torch    F.linear_cross_entropy with its default options, where torch has it (2.13)

Every round runs each way once. The loss is compared with the one in float64, the gradient of hidden too.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropbp_kernels.losses import linear_cross_entropy
from dropbp_kernels.measure import PeakLiveBytes

from .rows import Machine, machine
from .settings import Settings
from .timing import Timing, in_turn, milliseconds

# (rows, width, classes): on a CPU a small model's head, on a GPU that of Llama-3-8B.
SIZES = {"tiny": (40, 16, 100), "cpu": (2048, 512, 32000), "cuda": (8192, 4096, 128256)}
NUM_ROUNDS = {"full": 3, "quick": 2, "tiny": 1}


@dataclass(frozen=True)
class LossStepRow(Machine):
    """One way at one dtype. results/README.md says what each column means."""

    way: str
    dtype: str
    rows: int
    width: int
    classes: int
    trained_weight: bool
    num_samples: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    speedup_vs_unfused: float
    peak_live_bytes: int
    loss_error: float
    gradient_error: float

    HEADER: ClassVar[str] = (
        f"{'way':<8} {'dtype':<9} {'weight':<8} {'median':>10} {'p20-p80':>17} {'speed-up':>8} {'peak live':>11} "
        f"{'loss error':>11} {'gradient':>9}"
    )

    def __str__(self) -> str:
        return (
            f"{self.way:<8} {self.dtype:<9} {'trained' if self.trained_weight else 'frozen':<8} "
            f"{self.median_ms:>7.1f} ms {f'{self.p20_ms:.0f}-{self.p80_ms:.0f} ms':>17} "
            f"{self.speedup_vs_unfused:>8.2f} {self.peak_live_bytes / 2**20:>7.1f} MiB {self.loss_error:>11.1e} "
            f"{self.gradient_error:>9.1e}"
        )


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ways() -> dict[str, Loss]:
    """Each way to the mean loss of (hidden, weight, target), those that this torch has."""
    found: dict[str, Loss] = {
        "unfused": lambda hidden, weight, target: F.cross_entropy(F.linear(hidden, weight).float(), target),
        "chunked": linear_cross_entropy,
    }
    if hasattr(F, "linear_cross_entropy"):
        found["torch"] = lambda hidden, weight, target: F.linear_cross_entropy(
            hidden, weight, target, options=nn.LinearCrossEntropyOptions()
        )
    return found


def run(settings: Settings) -> Iterator[list[LossStepRow]]:
    """One list of rows, a row for each way, for each dtype and with a frozen and a trained weight."""
    where = machine(settings.device, settings.commit)
    sizes = SIZES["tiny" if settings.scale == "tiny" else settings.device.type]
    for dtype in settings.dtypes:
        for trained in (False, True):
            if settings.has_time():
                yield _rows(settings, where, sizes, dtype, trained)


def _rows(
    settings: Settings, where: Machine, sizes: tuple[int, int, int], dtype: torch.dtype, trained: bool
) -> list[LossStepRow]:
    num_rows, width, num_classes = sizes
    torch.manual_seed(0)
    hidden = torch.randn(num_rows, width, device=settings.device).to(dtype).requires_grad_()
    weight = (torch.randn(num_classes, width, device=settings.device) / width**0.5).to(dtype).requires_grad_(trained)
    target = torch.randint(num_classes, (num_rows,), device=settings.device)
    exact_loss, exact_grad = _exact(hidden, weight, target)

    def step(loss_of: Loss) -> Tensor:
        hidden.grad = weight.grad = None
        loss = loss_of(hidden, weight, target)
        loss.backward()
        return loss.detach()

    all_ways, counted = ways(), {}
    for way, loss_of in all_ways.items():  # also the warm-up
        with PeakLiveBytes() as live:
            loss = step(loss_of)
        grad: Any = hidden.grad
        errors = (loss - exact_loss).abs() / exact_loss, (grad.double() - exact_grad).norm() / exact_grad.norm()
        counted[way] = (live.peak_bytes, *(float(error) for error in errors))
    runs = {
        way: lambda loss_of=loss_of: milliseconds(lambda: step(loss_of), settings.device)
        for way, loss_of in all_ways.items()
    }
    times = {way: Timing(samples) for way, samples in in_turn(runs, NUM_ROUNDS[settings.scale]).items()}
    return [
        LossStepRow(
            **asdict(where),
            way=way,
            dtype=str(dtype).removeprefix("torch."),
            rows=num_rows,
            width=width,
            classes=num_classes,
            trained_weight=trained,
            num_samples=len(timing.samples_ms),
            median_ms=timing.median_ms,
            p20_ms=timing.p20_ms,
            p80_ms=timing.p80_ms,
            speedup_vs_unfused=times["unfused"].median_ms / timing.median_ms,
            peak_live_bytes=counted[way][0],
            loss_error=counted[way][1],
            gradient_error=counted[way][2],
        )
        for way, timing in times.items()
    ]


def _exact(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of hidden in float64, by 256 rows so that it fits."""
    wide, loss, grads = weight.detach().double(), hidden.new_zeros((), dtype=torch.float64), []
    for part, of_part in zip(hidden.detach().double().split(256), target.split(256), strict=True):
        part.requires_grad_()
        part_loss = F.cross_entropy(F.linear(part, wide), of_part, reduction="sum") / len(target)
        grads.append(torch.autograd.grad(part_loss, part)[0])
        loss += part_loss.detach()
    return loss, torch.cat(grads)
