"""The steps of a fine-tuning: one or several runs side by side, on the same stream of data.

Everything random in a step is a pure function of (seed, step): the batch, the drop plan, the dropout noise. So a
checkpoint needs no generator state, and runs that are compared differ only where they are meant to.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..coreset import CoresetSelector
from ..handler import DropBPHandler
from ..missing_grad import fill_missing_gradients
from ..targets import IGNORED
from . import progress
from .builtin import scheduled
from .data import Data
from .errors import UserError
from .settings import Settings

MAX_GRAD_NORM = 1.0
WEIGHT_DECAY = 0.0
HEARD = b"\ninterrupted: the step under way is finished and a checkpoint written; Ctrl-C again to stop at once\n"
NUM_VALIDATIONS = 3  # after the one before the first step


@dataclass
class History:
    """What one run has seen so far; one entry per step, times in seconds. validation: (steps done, loss)."""

    train_loss: list[float] = field(default_factory=list)
    forward_s: list[float] = field(default_factory=list)
    backward_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    calibration_s: float = 0.0


class Run:
    """One model on its way: model, handler (None: nothing is dropped), optimizer and history."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        handler: DropBPHandler | None,
        batch_size: int,
        data: Data,
        settings: Settings,
        coreset: CoresetSelector | None = None,
    ):
        self.name = name
        self.model = model
        self.handler = handler
        self.batch_size = batch_size
        self.data = data
        self.settings = settings
        self.device = torch.device(settings.device)
        self.history = History()
        self.coreset = coreset
        self.num_tokens = 0
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert settings.learning_rate is not None
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.learning_rate,
            weight_decay=WEIGHT_DECAY,
            fused=self.device.type in ("cpu", "cuda"),
        )

    def loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over the labelled tokens of a batch, which is moved to the device."""
        with self._autocast():
            return self.model(input_ids=input_ids.to(self.device), labels=labels.to(self.device)).loss

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.settings.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.settings.torch_dtype())

    def chosen(self, batch: Sequence[Tensor], *, is_trial: bool = False) -> list[Tensor]:
        """The rows of a batch that are trained on: those of its coreset, or all. A trial leaves no trace."""
        if self.coreset is None:
            return list(batch)
        state = self.coreset.state_dict()
        with self._autocast():
            subset, _ = self.coreset.subset(dict(zip(("input_ids", "labels"), batch, strict=True)))
        if is_trial:
            self.coreset.load_state_dict(state)
        return list(subset.values())

    def step(self, step: int) -> None:
        """One optimizer step on batch `step`."""
        torch.manual_seed(self.settings.seed * 1_000_003 + step)  # dropout, where the model has any
        batch = [tensor.to(self.device) for tensor in self.data.batch(step, self.batch_size)]
        if self.handler is not None and self._is_calibration_due(step):
            self._calibrate(batch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * scheduled(step, self.settings.steps)  # type: ignore[operator]

        start = self.now()
        if self.handler is not None:
            self.handler.step()
        batch = self.chosen(batch)
        loss = self.loss(*batch)
        forward_done = self.now()
        if loss.requires_grad:  # the published way of drawing plans may drop every branch
            loss.backward()
        backward_done = self.now()
        if self.settings.missing_grad == "zero":
            fill_missing_gradients(self.parameters.values())
        nn.utils.clip_grad_norm_(self.parameters.values(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        done = self.now()

        history = self.history
        history.forward_s.append(forward_done - start)
        history.backward_s.append(backward_done - forward_done)
        history.step_s.append(done - start)
        history.train_loss.append(loss.item())
        self.num_tokens += batch[0].numel()
        if not history.train_loss[-1] < float("inf"):
            raise UserError(
                f"{self.name}: the loss is {history.train_loss[-1]} at step {step}; "
                f"lower --learning-rate (now {self.settings.learning_rate})"
            )

    def now(self) -> float:
        """A clock that waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _is_calibration_due(self, step: int) -> bool:
        assert self.handler is not None
        is_late_enough = step >= self.settings.steps // 10
        return self.settings.rates == "sensitivity" and is_late_enough and self.handler.calibration is None

    def _calibrate(self, batch: Sequence[Tensor]) -> None:
        assert self.handler is not None
        start = self.now()
        self.handler.calibrate(lambda: self.loss(*batch), allocation=self.settings.allocation)
        self.history.calibration_s += self.now() - start

    @torch.no_grad()
    def validate(self, step: int) -> float:
        """Mean loss over all labelled validation tokens, after `step` steps."""
        self.model.eval()
        total, num_tokens = 0.0, 0
        for input_ids, labels in self.data.validation_batches(self.settings.batch_size):
            num = int((labels[:, 1:] != IGNORED).sum())
            total += self.loss(input_ids, labels).item() * num
            num_tokens += num
        self.model.train()
        self.history.validation.append((step, total / num_tokens))
        return total / num_tokens

    def state_dict(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "parameters": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "handler": None if self.handler is None else self.handler.state_dict(),
            "coreset": None if self.coreset is None else self.coreset.state_dict(),
            "history": asdict(self.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.handler is not None:
            self.handler.load_state_dict(state["handler"])
        if self.coreset is not None:
            self.coreset.load_state_dict(state["coreset"])
        self.history = History(**state["history"])


def train(
    runs: Sequence[Run], settings: Settings, first_step: int, save: Callable[[int], Any], note: Callable[[str], None]
) -> int:
    """Run the steps from first_step on, all runs in turn at each of them; return how many steps are done.

    The runs take turns in who comes first, so that none always finds the caches as the same other left them.
    Ctrl-C ends after the step under way, with every run at the same step; `save` was called then.
    """
    steps = settings.steps
    validate_every = max(1, -(-steps // NUM_VALIDATIONS))
    done = first_step
    with progress.bar("fine-tuning", steps, first_step) as bar, _until_interrupted() as interrupted:
        if not runs[0].history.validation:
            _validate(runs, 0, note)
        start = time.perf_counter()
        while done < steps and not interrupted.is_set():
            for index in range(len(runs)):
                runs[(done + index) % len(runs)].step(done)
            done += 1
            bar.set_postfix_str(_postfix(runs, time.perf_counter() - start), refresh=False)
            bar.update()
            if done == steps or done % validate_every == 0:
                _validate(runs, done, note)
            if settings.save_every and done % settings.save_every == 0 and done < steps:
                save(done)
        if done < steps:
            save(done)
    return done


def _validate(runs: Sequence[Run], step: int, note: Callable[[str], None]) -> None:
    asked = runs if step else runs[:1]  # before the first step they are all the same model
    for run in asked:
        run.validate(step)
    for run in runs[len(asked) :]:
        run.history.validation.append(runs[0].history.validation[0])
    losses = [f"{run.name} {run.history.validation[-1][1]:.4f}" for run in runs]
    note(f"validation loss after {step} steps: {', '.join(losses)}")


def _postfix(runs: Sequence[Run], seconds: float) -> str:
    tokens_per_s = sum(run.num_tokens for run in runs) / seconds
    return f"loss {runs[-1].history.train_loss[-1]:.3f}, {tokens_per_s:,.0f} tokens/s"


@contextlib.contextmanager
def _until_interrupted() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, and says so; the second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals are for the main thread
        return

    def handle(signum: int, frame: Any) -> None:
        event.set()
        os.write(2, HEARD)  # to stderr; not print, which may stand in the middle of another
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
