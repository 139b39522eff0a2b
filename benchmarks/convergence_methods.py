"""What is compared in `benchmarks.convergence`: tasks, methods, and which methods stand in which group.

A **task** is a model, data and the size of a run. A **method** is how the model is patched. A **point** is one line of
a table: a method at a drop rate and a batch size. A **group** is the points of one table.

Every group holds the controls that a figure of ours has to face: published DropBP, and undropped training with smaller
batches, of the same backward FLOPs and of the same time (the column `undropped_batch` of timings says which).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dropbp_kernels.cli.builtin import Recipe

# Of apply_dropbp; with "schedule", the drop rate is the mean of the run. And some of our own, see `convergence_runs`:
# "coreset": options of CoresetSelector; "calibrate": the allocation of rates by sensitivity, after a tenth of the
# steps; "attention_rate": of all attention branches, where the MLPs' is the rate that drops as many FLOPs in all;
# "simulated": options of `convergence_simulated.QueryRows`; "window": the loss is on a part of the sequence,
# another one in every step, and this share of the branches is kept; "drop_rate": of branches, where tokens are dropped.
Options = dict[str, Any]
BUILTIN = Recipe()


@dataclass(frozen=True)
class Task:
    """What is trained on what.

    learning_rates: by adapter, chosen by the same small sweep for all methods.
    checkpointed: whether blocks are computed again in the backward, as transformers does it.
    """

    data: str
    seq_len: int
    batch_size: int
    steps: int
    learning_rates: dict[str, float]
    recipe: Recipe = BUILTIN
    checkpointed: bool = False

    @property
    def model(self) -> str:
        how = ", checkpointed" if self.checkpointed else ""
        return f"byte Llama, {self.recipe.num_hidden_layers} blocks, width {self.recipe.hidden_size}{how}"


@dataclass(frozen=True)
class Point:
    """One line of a table. batch_size, learning_rate None: that of the task.

    adapter: where a group compares adapters; None: that of the command line.
    published_rate: of the published DropBP it is compared with; None: its own drop_rate.
    """

    method: str
    drop_rate: float = 0.0
    batch_size: int | None = None
    adapter: str | None = None
    learning_rate: float | None = None
    published_rate: float | None = None

    @property
    def name(self) -> str:
        """The first cell of its line."""
        of_adapter = f", {self.adapter}" if self.adapter else ""
        at = f", learning rate {self.learning_rate:g}" if self.learning_rate else ""
        return label(self.method, self.drop_rate) + of_adapter + at

    def __str__(self) -> str:
        return self.name + (f", batch {self.batch_size}" if self.batch_size else "")


def is_simulated(method: str, drop_rate: float) -> bool:
    """Whether the method's work is not saved: its backward costs, by hand, what that of `token` costs."""
    make_options = METHODS[method]
    return make_options is not None and "simulated" in make_options(drop_rate)


def label(method: str, drop_rate: float) -> str:
    return f"{method} {drop_rate:g}" if drop_rate else method


@dataclass(frozen=True)
class Group:
    """The points of one table. rows_of: the group of the same task under whose name its runs are recorded, too."""

    task: Task
    points: tuple[Point, ...]
    rows_of: str | None = None


def _published(rate: float) -> Options:
    return {"sampler": "published", "dropped_runs": "detach", "keep_one": False}


def last_branches(rates: Sequence[float], flops: Sequence[float], seed: int, step: int) -> tuple[bool, ...]:
    """A sampler: the same branches in every step, those nearest to the loss."""
    return _first(reversed(range(len(rates))), rates, flops, step)


def lowest_rates(rates: Sequence[float], flops: Sequence[float], seed: int, step: int) -> tuple[bool, ...]:
    """A sampler: the same branches in every step, those of the lowest rates, and of equal rates the last."""
    return _first(sorted(reversed(range(len(rates))), key=lambda branch: rates[branch]), rates, flops, step)


def _first(order: Iterable[int], rates: Sequence[float], flops: Sequence[float], step: int) -> tuple[bool, ...]:
    """The first branches of `order`, as far as the FLOPs reach that the rates keep.

    The branch that they do not pay for wholly is kept in as many steps as they pay for.
    """
    left = math.fsum((1.0 - rate) * cost for rate, cost in zip(rates, flops, strict=True))
    kept = [False] * len(rates)
    for branch in order:
        share = max(0.0, min(1.0, left / flops[branch]))
        # 1e-9: a share that is 1 up to rounding is 1.
        kept[branch] = math.floor((step + 1) * share + 1e-9) > math.floor(step * share + 1e-9)
        left -= share * flops[branch]
    return tuple(kept)


def _query_rows(**options: Any) -> Callable[[float], Options]:
    return lambda rate: {"simulated": options}


_ALIGNED: Options = {"granularity": "sample", "aligned": True}
_ONE_HOP: Options = {"context": "inference", "context_gradient": "one_hop"}

# None: the model stays unpatched.
METHODS: dict[str, Callable[[float], Options] | None] = {
    "undropped": None,
    "published": _published,
    "branch": lambda rate: {},
    "cyclic": lambda rate: {"sampler": "cyclic"},
    "sample": lambda rate: {"granularity": "sample"},
    "sample, aligned": lambda rate: _ALIGNED,
    "sample, aligned by 2 blocks": lambda rate: {"granularity": "sample", "aligned": 2},
    "token": lambda rate: {"granularity": "token"},
    "token, scaled": lambda rate: {"granularity": "token", "grad_scale": (1 - rate) ** -0.5},
    "token, unbiased": lambda rate: {"granularity": "token", "grad_scale": "unbiased"},
    "published, by sensitivity": lambda rate: {**_published(rate), "calibrate": "published"},
    "sample, aligned, by sensitivity": lambda rate: {**_ALIGNED, "calibrate": "optimal"},
    "token, by sensitivity": lambda rate: {"granularity": "token", "calibrate": "optimal"},
    "published, warm-up": lambda rate: {**_published(rate), "schedule": "warmup"},
    "sample, aligned, warm-up": lambda rate: {**_ALIGNED, "schedule": "warmup"},
    "published, recovery": lambda rate: {**_published(rate), "schedule": "recovery:0.2"},
    "sample, aligned, recovery": lambda rate: {**_ALIGNED, "schedule": "recovery:0.2"},
    "token, attention 0.5": lambda rate: {"granularity": "token", "attention_rate": 0.5},
    "token, attention 0.9": lambda rate: {"granularity": "token", "attention_rate": 0.9},
    "last branches": lambda rate: {"sampler": last_branches},
    "most sensitive branches": lambda rate: {"sampler": lowest_rates, "calibrate": "variance"},
    "query rows": _query_rows(),
    "query rows, one_hop": _query_rows(context="one_hop"),
    "query rows, by sensitivity": lambda rate: {"simulated": {"context": "one_hop"}, "calibrate": "optimal"},
    "query rows, largest output": _query_rows(context="one_hop", chosen="output"),
    "query rows, aligned": _query_rows(aligned=True),
    "query rows, aligned, one_hop": _query_rows(aligned=True, context="one_hop"),
    "query rows, aligned, by sensitivity": lambda rate: {
        "simulated": {"aligned": True, "context": "one_hop"},
        "calibrate": "optimal",
    },
    "query rows, aligned, largest loss": _query_rows(aligned=True, context="one_hop", chosen="loss"),
    "query rows, aligned, one_hop, last half": _query_rows(aligned=True, context="one_hop", last=0.5),
    "target plan, drawn": lambda rate: {"context": "inference", "target_keep": 1.0 - rate, "drop_rate": 0.0},
    "target plan, drawn, one_hop": lambda rate: {**_ONE_HOP, "target_keep": 1.0 - rate, "drop_rate": 0.0},
    "target plan, a window": lambda rate: {"context": "inference", "window": 1.0},
    "target plan, a window, one_hop": lambda rate: {**_ONE_HOP, "window": 1.0},
    "target plan, a window, one_hop, last half": lambda rate: {**_ONE_HOP, "window": 0.5, "sampler": last_branches},
    "target plan": lambda rate: {"context": "inference"},
    "target plan, one_hop": lambda rate: _ONE_HOP,
    "target plan, sample": lambda rate: {"context": "inference", "granularity": "sample"},
    "target plan, token": lambda rate: {"context": "inference", "granularity": "token"},
    "coreset, one fixed direction": lambda rate: {"coreset": {"features": "spsa", "directions": 1, "fixed": True}},
    "coreset, eight directions": lambda rate: {"coreset": {"features": "spsa", "directions": 8}},
    "coreset, exact": lambda rate: {"coreset": {"features": "exact"}},
    "coreset, stratified": lambda rate: {"coreset": {"method": "stratified"}},
    "coreset, random": lambda rate: {"coreset": {"method": "random"}},
}

TARGETS = Task("builtin:docstrings", 192, 8, 60, {"lora": 8e-3, "full": 1e-3})
TARGETS_LONG = Task("summaries", 512, 4, 40, {"lora": 8e-3, "full": 1e-3})
TEXT = Task("builtin:docs", 48, 12, 50, {"lora": 8e-3, "full": 1e-3, "paca": 4e-3})
DEEP = replace(TEXT, recipe=Recipe(hidden_size=96, intermediate_size=256, num_hidden_layers=24))
MIXTURE = Task("mixture", 32, 32, 40, {"lora": 8e-3, "full": 1e-3})
TINY = Recipe(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, steps=2, seq_len=32)


def _target_points(published_rates: dict[float, float], *smaller: int) -> tuple[Point, ...]:
    """published_rates: by drop rate of the target rows, that at which published DropBP keeps as many backward FLOPs.

    context_gradient="full" is missing: it is undropped training to rounding (tests/test_target_gradients.py).
    """
    points = [Point("undropped")]
    for rate, published in published_rates.items():
        methods = ("target plan, sample", "target plan, token") if rate else ("target plan", "target plan, one_hop")
        points += [Point(method, rate, published_rate=published) for method in methods]
        points.append(Point("published", published))
    return (*points, *_smaller(*smaller))


def _at(rate: float, *methods: str) -> tuple[Point, ...]:
    return tuple(Point(method, rate) for method in methods)


def _smaller(*batch_sizes: int, adapter: str | None = None) -> tuple[Point, ...]:
    """Undropped training with fewer examples."""
    return tuple(Point("undropped", batch_size=size, adapter=adapter) for size in batch_sizes)


_ROW_PLANS = ("published", "branch", "sample", "sample, aligned", "token")
_CHOSEN = tuple(
    method for method in METHODS if method.startswith(("last", "most sensitive", "query rows", "target plan, a window"))
)
_WINDOWS = ("target plan, a window", "target plan, a window, one_hop")
_PARTS = (*_WINDOWS, "target plan, drawn, one_hop")
_CORESETS = tuple(Point(method) for method in METHODS if method.startswith("coreset"))
# As fast as plans by rows, as plans by branches; of the backward FLOPs of rate 0.75, of published DropBP at 0.75.
_SMALLER_TEXTS = _smaller(8, 5, 3, 2)

GROUPS = {
    "targets": Group(TARGETS, _target_points({0.0: 0.4, 0.5: 0.7, 0.75: 0.85}, 7, 6, 4, 2, 1)),
    # Published at 0.75 has the plans' backward FLOPs, at 0.5 their time.
    "targets_long": Group(TARGETS_LONG, (*_target_points({0.0: 0.75}, 3, 2, 1), Point("published", 0.5))),
    "plans": Group(
        TEXT,
        (
            Point("undropped"),
            *_at(0.75, *_ROW_PLANS, "cyclic", "token, scaled", "token, unbiased"),
            *_SMALLER_TEXTS,
        ),
    ),
    "rates": Group(
        TEXT,
        (
            Point("undropped"),
            *_at(0.5, *_ROW_PLANS, "token, by sensitivity", *_CHOSEN),
            *_at(0.875, *_ROW_PLANS, "token, by sensitivity", *_CHOSEN),
            *_smaller(8, 6, 5, 3, 2, 1),
        ),
        rows_of="plans",
    ),
    "variations": Group(
        TEXT,
        (
            Point("undropped"),
            *_at(0.75, "published", "published, by sensitivity", "published, warm-up", "published, recovery"),
            *_at(0.75, "sample, aligned", "sample, aligned, by sensitivity", "sample, aligned, warm-up"),
            *_at(0.75, "sample, aligned, recovery", "sample, aligned by 2 blocks"),
            *_at(0.75, "token", "token, by sensitivity", "token, attention 0.5", "token, attention 0.9"),
            *_SMALLER_TEXTS,
        ),
        rows_of="plans",
    ),
    "chosen": Group(
        TEXT,
        (
            Point("undropped"),
            *_at(0.75, "published", "token", "token, by sensitivity", *_CHOSEN),
            *_SMALLER_TEXTS,
        ),
        rows_of="plans",
    ),
    "parts": Group(
        TEXT,
        (
            Point("undropped"),
            *_at(0.5, "published", *_PARTS),
            *_at(0.75, "published", "target plan, drawn", "query rows, aligned, one_hop", *_PARTS),
            *_at(0.875, "published", *_PARTS),
            *_smaller(8, 7, 6, 5, 4, 3, 2),
        ),
    ),
    "parts_checkpointed": Group(
        replace(TEXT, checkpointed=True),
        (
            Point("undropped"),
            *_at(0.5, "published", *_WINDOWS),
            *_at(0.75, "published", *_WINDOWS),
            *_smaller(8, 7, 6, 5, 4),
        ),
    ),
    "deep": Group(
        DEEP,
        (Point("undropped"), *_at(0.75, "published", "branch", "sample, aligned", "token", *_CHOSEN), *_SMALLER_TEXTS),
    ),
    "paca": Group(
        TEXT,
        (
            *(Point("undropped", adapter=adapter) for adapter in ("lora", "paca", "full")),
            Point("published", 0.5, adapter="lora"),
            *(Point("branch", 0.5, adapter=adapter) for adapter in ("lora", "paca")),
            *_smaller(9, 7, adapter="lora"),  # as fast as full fine-tuning, and as PaCA
        ),
    ),
    "coreset": Group(MIXTURE, (Point("undropped"), *_CORESETS, *_smaller(16))),
    "coreset64": Group(replace(MIXTURE, batch_size=64), (Point("undropped"), *_CORESETS, *_smaller(32))),
}


def group_of(name: str, scale: str) -> Group:
    """The group of that name; at scale "tiny" it takes seconds, to see every line of code run."""
    group = GROUPS[name]
    if scale == "full":
        return group
    task = replace(group.task, batch_size=8, seq_len=32, steps=2, recipe=TINY)
    one_of_each = {(point.method, point.adapter): point for point in reversed(group.points)}
    points = [replace(point, batch_size=None) for point in reversed(one_of_each.values())]
    return replace(group, task=task, points=tuple(points))
