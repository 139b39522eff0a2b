"""How well SPSA tells examples apart, against their exact gradients, by the number of directions.

    python -m benchmarks.coreset_agreement            rows to results/coreset_agreement.csv, picture to docs/

The built-in model with LoRA, batches of the mixture in `coreset_data`. For each batch all pairwise L1 distances between
the features of its examples; then Spearman's rank correlation between those of an estimate and those of the exact
gradients in float32. And the picks: facility location by the estimate's distances, judged by the exact ones, where 0 is
the mean of random picks and 1 the picks by the exact distances themselves.

fresh   other directions in every step
fixed   the same directions in every step, as published: what one step gets wrong all steps get wrong
exact   exact gradients, in the dtype of the row
"""

import argparse
import copy
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dropbp_kernels.coreset import CoresetSelector, facility_location
from dropbp_kernels.coreset.projection import find_projection, linear_shape
from dropbp_kernels.coreset.scoring import Scorer, as_scoring

from .coreset_data import Mixture
from .rows import RESULTS, Machine, append_rows, machine, read_rows

DIRECTIONS = (1, 2, 4, 8, 16, 32, 64)
NUM_STEPS = 16  # over which the distances of one batch are averaged, with one direction in each
SETTINGS = ((torch.float32, 1e-3), (torch.bfloat16, 1e-3), (torch.bfloat16, 0.1))  # dtype, epsilon
COLOURS = ("#0072B2", "#E69F00", "#009E73")
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "coreset_agreement.png"


@dataclass(frozen=True)
class AgreementRow(Machine):
    """One kind of feature. results/README.md says what each column means."""

    model: str
    dtype: str
    batch_size: int
    seq_len: int
    kind: str
    epsilon: float
    directions: int
    steps: int
    num_batches: int
    rank_correlation: float
    rank_correlation_min: float
    rank_correlation_max: float
    picks_quality: float

    def __str__(self) -> str:
        return (
            f"{self.dtype:<9} {self.kind:<6} epsilon {self.epsilon:<5g} {self.directions:>3} directions, "
            f"mean of {self.steps:>2} steps: "
            f"rank correlation {self.rank_correlation:.3f} ({self.rank_correlation_min:.3f} to "
            f"{self.rank_correlation_max:.3f}), "
            f"picks {self.picks_quality:.2f}"
        )


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's, of two vectors; ties, which only equal examples have, are broken by place."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1])


def distances(features: Tensor) -> Tensor:
    return torch.cdist(features, features, p=1)


class Judge:
    """Compares distances with the exact ones of a batch."""

    def __init__(self, exact: Tensor, num_picks: int):
        self.exact, self.num_picks = exact, num_picks
        self.pairs = torch.triu_indices(len(exact), len(exact), 1)
        generator = random.Random(0)
        draws = [generator.sample(range(len(exact)), num_picks) for _ in range(100)]
        self.random = statistics.fmean(map(self.covered, draws))
        self.best = self.covered(self.picks(exact))

    def picks(self, found: Tensor) -> list[int]:
        return facility_location(found.max() - found, self.num_picks)[0].tolist()

    def covered(self, picks: list[int]) -> float:
        """The mean exact distance of an example to its nearest pick."""
        return float(self.exact[:, picks].amin(1).mean())

    def __call__(self, found: Tensor) -> tuple[float, float]:
        correlation = rank_correlation(found[tuple(self.pairs)], self.exact[tuple(self.pairs)])
        return correlation, (self.random - self.covered(self.picks(found))) / (self.random - self.best)


def estimates(
    model: nn.Module, batch: dict[str, Tensor], step: int, epsilon: float
) -> Iterator[tuple[str, int, int, Tensor]]:
    """(kind, directions, steps, distances) of everything that is compared with the exact distances."""
    yield "exact", 0, 1, distances(CoresetSelector(model).score(batch)[1])
    selector = CoresetSelector(model, features="spsa", directions=max(DIRECTIONS), epsilon=epsilon)
    selector.step = step
    single = spsa_by_direction(selector, batch)  # the mean of the first k is what k directions give
    for count in DIRECTIONS:
        yield "fresh", count, 1, distances(torch.stack(single[:count]).mean(0))
    yield "fresh", 1, NUM_STEPS, torch.stack([distances(one) for one in single[:NUM_STEPS]]).mean(0)
    # The weights do not move here, so all steps of a fixed direction give the same distances: their mean is the first.
    yield "fixed", 1, NUM_STEPS, distances(single[0])


def spsa_by_direction(selector: CoresetSelector, batch: dict[str, Tensor]) -> list[Tensor]:
    """The estimate (B, P) of each direction alone."""
    projection = find_projection(selector.model)
    scorer = Scorer(selector.model, projection)
    directions = selector._draw_directions(linear_shape(projection.linear), scorer.device)
    size = len(batch["input_ids"])
    slopes = torch.empty(size, len(directions))
    with as_scoring(selector.model):
        for rows, inputs in scorer.micro_batches(batch, range(size), None):
            slopes[rows] = scorer.spsa(inputs, directions, selector.epsilon)[1]
    return [slopes[:, [place]] * direction.flatten() for place, direction in enumerate(directions)]


def run(
    model: nn.Module,
    name: str,
    batch_size: int,
    seq_len: int,
    num_batches: int,
    settings: Sequence[tuple[torch.dtype, float]] = SETTINGS,
) -> list[AgreementRow]:
    """The rows of all kinds of features at each (dtype, epsilon), means over the batches."""
    mixture = Mixture(seq_len, seed=0)
    models = {dtype: copy.deepcopy(model).to(dtype) for dtype, _ in settings}
    found: dict[tuple[str, float, str, int, int], list[tuple[float, float]]] = {}
    for number in range(num_batches):
        ids, labels, _ = mixture.batch(number, batch_size)
        batch = {"input_ids": ids, "labels": labels}
        judge = Judge(distances(CoresetSelector(model).score(batch)[1]), batch_size // 2)
        for dtype, epsilon in settings:
            for kind, count, steps, ours in estimates(models[dtype], batch, number, epsilon):
                key = str(dtype).removeprefix("torch."), epsilon, kind, count, steps
                found.setdefault(key, []).append(judge(ours))
    where = asdict(machine(torch.device("cpu")))
    return [
        AgreementRow(
            **where,
            model=name,
            dtype=dtype,
            batch_size=batch_size,
            seq_len=seq_len,
            kind=kind,
            epsilon=epsilon,
            directions=count,
            steps=steps,
            num_batches=num_batches,
            rank_correlation=statistics.fmean(correlation for correlation, _ in values),
            rank_correlation_min=min(correlation for correlation, _ in values),
            rank_correlation_max=max(correlation for correlation, _ in values),
            picks_quality=statistics.fmean(quality for _, quality in values),
        )
        for (dtype, epsilon, kind, count, steps), values in found.items()
    ]


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Rank correlation and quality of the picks against the number of directions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    newest = {(row["dtype"], row["epsilon"], row["kind"], row["directions"], row["steps"]): row for row in rows}
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    columns = (("rank_correlation", "rank correlation of distances"), ("picks_quality", "picks: 0 random, 1 exact"))
    for axis, (column, title) in zip(axes, columns, strict=True):
        for (dtype, epsilon), colour in zip(SETTINGS, COLOURS, strict=True):
            where = str(dtype).removeprefix("torch."), f"{epsilon:.6g}"
            label = f"{where[0]}, epsilon {epsilon:g}"
            chosen = [row for key, row in newest.items() if (*key[:3], key[4]) == (*where, "fresh", "1")]
            chosen.sort(key=lambda row: int(row["directions"]))
            places = [int(row["directions"]) for row in chosen]
            axis.plot(places, [float(row[column]) for row in chosen], "o-", color=colour, label=f"SPSA, {label}")
            for kind, marker in (("fresh", "s"), ("fixed", "x")) if dtype == torch.float32 else ():
                if (row := newest.get((*where, kind, "1", str(NUM_STEPS)))) is not None:
                    name = f"1 {kind} direction a step, mean of {NUM_STEPS} steps"
                    axis.plot([1], [float(row[column])], marker, color=colour, label=name, markersize=8)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("directions")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle("SPSA features against exact gradients", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def builtin_model() -> tuple[nn.Module, str]:
    """The pretrained built-in model with LoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from dropbp_kernels.cli import builtin

    recipe = builtin.Recipe()
    model = AutoModelForCausalLM.from_pretrained(builtin.ensure_pretrained(recipe, torch.device("cpu")))
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    return model, f"byte Llama, {recipe.num_hidden_layers} blocks, width {recipe.hidden_size}, LoRA"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coreset_agreement", description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=3, help="batches to take the mean over (default: 3)")
    parser.add_argument("--batch-size", type=int, default=48, help="examples of a batch (default: 48)")
    parser.add_argument("--seq-len", type=int, default=128, help="bytes of a row (default: 128)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where the picture goes")
    options = parser.parse_args(arguments)
    model, name = builtin_model()
    rows = run(model, name, options.batch_size, options.seq_len, options.batches)
    append_rows(options.out / "coreset_agreement.csv", rows)
    print("\n".join(map(str, rows)))
    draw(read_rows(options.out / "coreset_agreement.csv"), options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
