"""Why a plan learns as it does: how far its gradients are from those of the whole batch, by noise and by bias.

    python -m benchmarks.convergence_gradients

One model (that of the group "plans", a few undropped steps into its run), one batch at a time. For each method, over
many plans of the same batch, the cosine between the gradient of all trained parameters and that of the undropped batch:
that of single plans, and that of the mean over the plans. Noise averages out, a bias does not: with enough plans the
mean of an unbiased estimate points where the undropped gradient does. Undropped training on a share of the batch's
examples, drawn anew each time, is beside them.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dropbp_kernels import remove_dropbp
from dropbp_kernels.cli.training import Run

from .convergence_methods import METHODS, Point, Task, group_of
from .convergence_runs import make_run, patch
from .convergence_simulated import QueryRows
from .rows import RESULTS, Machine, append_rows, machine

FILE = "convergence_gradients.csv"
FEWER = "undropped, a share of the batch"
PLANS = (
    *("published", "branch", "sample", "sample, aligned by 2 blocks", "sample, aligned", "token", "token, unbiased"),
    *("last branches", "query rows", "query rows, one_hop", "query rows, aligned", "query rows, aligned, one_hop"),
)
RATES = (0.5, 0.75, 0.875)
STEPS_BEFORE = 25  # so that LoRA's B is no longer zero


@dataclass(frozen=True)
class GradientRow(Machine):
    """One method. results/README.md says what each column means."""

    group: str
    model: str
    data: str
    seq_len: int
    batch_size: int
    steps_before: int
    method: str
    drop_rate: float
    num_batches: int
    num_plans: int
    cosine: float
    cosine_of_mean: float
    norm_over_undropped: float

    def __str__(self) -> str:
        cosines = f"cosine {self.cosine:.3f}, of the mean {self.cosine_of_mean:.3f}"
        return f"{self.method:<32} {self.drop_rate:<6g} {cosines}, norm {self.norm_over_undropped:.2f}"


def gradient(run: Run, ids: Tensor, labels: Tensor) -> Tensor:
    """Of all trained parameters, as one vector; zeros where a parameter has none."""
    parameters = list(run.parameters.values())
    loss = run.loss(ids, labels)
    if not loss.requires_grad:
        return torch.zeros(sum(parameter.numel() for parameter in parameters))
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(parameters, found, strict=True)
    return torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in pairs])


def plans_of(run: Run, task: Task, method: str, rate: float, place: int, num: int) -> Iterator[Tensor]:
    """The gradients of `num` plans on batch `place` of the run's data."""
    ids, labels = run.data.batch(STEPS_BEFORE + place, task.batch_size)
    draw = random.Random(f"{place}")
    if method == FEWER:
        for _ in range(num):
            rows = draw.sample(range(len(ids)), round((1 - rate) * len(ids)))
            yield gradient(run, ids[rows], labels[rows])
        return
    make_options: Callable[[float], dict] | None = METHODS[method]
    assert make_options is not None
    options = dict(make_options(rate))
    if "simulated" in options:
        plan = QueryRows(run.model, rate, **options["simulated"])
        for step in range(num):
            plan.draw((len(ids), ids.shape[1]), seed=place, step=step)
            yield gradient(run, ids, labels)
        plan.remove()
        return
    handler = patch(run.model, rate, task, place, options)
    for _ in range(num):
        handler.step()
        yield gradient(run, ids, labels)
    remove_dropbp(run.model)


def measure(run: Run, task: Task, method: str, rate: float, num_batches: int, num_plans: int) -> tuple[float, ...]:
    """(cosine of single plans, cosine of their mean, their norm over the undropped one), means over the batches."""
    found = []
    for place in range(num_batches):
        whole = gradient(run, *run.data.batch(STEPS_BEFORE + place, task.batch_size))
        total, cosines, norms = torch.zeros_like(whole), [], []
        for one in plans_of(run, task, method, rate, place, num_plans):
            total += one
            cosines.append(cosine_similarity(one, whole, dim=0).item())
            norms.append((one.norm() / whole.norm()).item())
        of_mean = cosine_similarity(total, whole, dim=0).item()
        found.append((statistics.mean(cosines), of_mean, statistics.mean(norms)))
    return tuple(map(statistics.mean, zip(*found, strict=True)))


def table(rows: list[dict[str, str]], group: str) -> str:
    """The newest row of each method, as Markdown.

    By noise alone, the cosine c of one plan becomes (1 + (c^-2 - 1) / n)^-1/2 for the mean of n.
    """
    newest = {(row["drop_rate"], row["method"]): row for row in rows if row["group"] == group}
    out = [
        "| method | cosine of one plan | of the mean (plans) | of the mean, if only noise | norm of one plan |",
        "|---|--:|--:|--:|--:|",
    ]
    for (rate, method), row in newest.items():
        one, of_mean, norm = (float(row[name]) for name in ("cosine", "cosine_of_mean", "norm_over_undropped"))
        by_noise = (1 + (one**-2 - 1) / int(row["num_plans"])) ** -0.5
        out.append(
            f"| {method} {rate} | {one:.2f} | {of_mean:.2f} ({row['num_plans']}) | {by_noise:.2f} | {norm:.2f} |"
        )
    return "\n".join(out) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence_gradients", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--group", choices=("plans", "deep"), default="plans", help="whose model and data")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--plans", type=int, default=32, help="of each batch")
    parser.add_argument("--methods", nargs="+", choices=(*PLANS, FEWER), default=(*PLANS, FEWER))
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--steps", type=int, default=STEPS_BEFORE, help="undropped, before the measurement")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--scale", choices=("full", "tiny"), default="full", help="tiny: to see every code path run")
    options = parser.parse_args(arguments)
    task, where = group_of(options.group, options.scale).task, machine(torch.device("cpu"))
    run = make_run(task, "lora", Point("undropped"), task.batch_size, task.learning_rates["lora"], 0)
    for step in range(options.steps):
        run.step(step)
    for rate in options.rates:
        for method in options.methods:
            cosine, of_mean, norm = measure(run, task, method, rate, options.batches, options.plans)
            row = GradientRow(
                **asdict(where),
                group=options.group,
                model=task.model,
                data=task.data,
                seq_len=task.seq_len,
                batch_size=task.batch_size,
                steps_before=options.steps,
                method=method,
                drop_rate=rate,
                num_batches=options.batches,
                num_plans=options.plans,
                cosine=cosine,
                cosine_of_mean=of_mean,
                norm_over_undropped=norm,
            )
            append_rows(options.out / FILE, [row])
            print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
