"""What is compared in `benchmarks.convergence`: tasks, methods, and which methods stand in which group.

A **task** is a model, data and the size of a run. A **method** is how the model is patched. A **point** is one line of
a group's table: a method at a drop rate and a batch size.

Every group holds the two controls that a figure of ours has to face: published DropBP, and undropped training with a
smaller batch whose step takes the same time (`Point.as_fast_as`: the batch size follows from the rows of
`benchmarks.convergence_timing`) or the same backward FLOPs (`Point.batch_size`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from dropbp_kernels.cli.builtin import Recipe

Options = dict[str, Any]  # of apply_dropbp; under "coreset" those of CoresetSelector
BUILTIN = Recipe()


@dataclass(frozen=True)
class Task:
    """What is trained on what. learning_rates: by adapter, chosen by the same small sweep for all methods."""

    data: str
    seq_len: int
    batch_size: int
    steps: int
    learning_rates: dict[str, float]
    recipe: Recipe = BUILTIN

    @property
    def model(self) -> str:
        return f"byte Llama, {self.recipe.num_hidden_layers} blocks, width {self.recipe.hidden_size}"


@dataclass(frozen=True)
class Point:
    """One line of a table. batch_size None: that of the task; as_fast_as: the point whose step time it matches.

    adapter: where a group compares adapters; None: that of the command line.
    """

    method: str
    drop_rate: float = 0.0
    batch_size: int | None = None
    as_fast_as: tuple[str, float] | None = None
    adapter: str | None = None

    def __str__(self) -> str:
        if self.as_fast_as is not None:
            return f"{self.method}, as fast as {label(*self.as_fast_as)}"
        of_adapter = f", {self.adapter}" if self.adapter else ""
        return (
            label(self.method, self.drop_rate) + of_adapter + (f", batch {self.batch_size}" if self.batch_size else "")
        )


def label(method: str, drop_rate: float) -> str:
    return f"{method} {drop_rate:g}" if drop_rate else method


@dataclass(frozen=True)
class Group:
    task: Task
    points: tuple[Point, ...]


def _published(rate: float) -> Options:
    return {"sampler": "published", "dropped_runs": "detach", "keep_one": False}


# None: the model stays unpatched.
METHODS: dict[str, Callable[[float], Options] | None] = {
    "undropped": None,
    "published": _published,
    "branch": lambda rate: {},
    "cyclic": lambda rate: {"sampler": "cyclic"},
    "sample": lambda rate: {"granularity": "sample"},
    "sample, aligned": lambda rate: {"granularity": "sample", "aligned": True},
    "token": lambda rate: {"granularity": "token"},
    "token, scaled": lambda rate: {"granularity": "token", "grad_scale": (1 - rate) ** -0.5},
    "token, unbiased": lambda rate: {"granularity": "token", "grad_scale": "unbiased"},
    "target plan": lambda rate: {"context": "inference"},
    "target plan, one_hop": lambda rate: {"context": "inference", "context_gradient": "one_hop"},
    "coreset, one fixed direction": lambda rate: {"coreset": {"features": "spsa", "directions": 1, "fixed": True}},
    "coreset, eight directions": lambda rate: {"coreset": {"features": "spsa", "directions": 8}},
    "coreset, exact": lambda rate: {"coreset": {"features": "exact"}},
    "coreset, stratified": lambda rate: {"coreset": {"method": "stratified"}},
    "coreset, random": lambda rate: {"coreset": {"method": "random"}},
}

TARGETS = Task("builtin:docstrings", 192, 8, 60, {"lora": 8e-3, "full": 1e-3})
TARGETS_LONG = Task("summaries", 512, 4, 40, {"lora": 8e-3, "full": 1e-3})
TEXT = Task("builtin:docs", 48, 12, 50, {"lora": 8e-3, "full": 1e-3, "paca": 4e-3})
MIXTURE = Task("mixture", 32, 32, 40, {"lora": 8e-3, "full": 1e-3})
TINY = Recipe(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, steps=2, seq_len=32)


def _target_points(published_rate: float) -> tuple[Point, ...]:
    """published_rate: the nominal rate at which published DropBP keeps as many backward FLOPs as the target plan.

    context_gradient="full" is missing: it is undropped training to rounding (tests/test_target_plans.py).
    """
    return (
        Point("undropped"),
        Point("target plan"),
        Point("target plan, one_hop"),
        Point("published", published_rate),
        Point("undropped", as_fast_as=("target plan", 0.0)),
    )


def _plan_points(rates: tuple[float, ...]) -> tuple[Point, ...]:
    """The rows of the table of plans. Plans by branches take one time, plans by rows another: a control for each."""
    points = [Point("undropped")]
    for rate in rates:
        points += [
            Point("published", rate),
            Point("branch", rate),
            Point("cyclic", rate),
            Point("sample", rate),
            Point("sample, aligned", rate),
            Point("token", rate),
            Point("token, scaled", rate),
            Point("token, unbiased", rate),
            Point("undropped", as_fast_as=("branch", rate)),
            Point("undropped", as_fast_as=("sample", rate)),
            Point("undropped", batch_size=max(1, round((1 - rate) * TEXT.batch_size))),
        ]
    return tuple(points)


GROUPS = {
    "targets": Group(TARGETS, _target_points(0.4)),
    "targets_long": Group(TARGETS_LONG, _target_points(0.75)),
    "plans": Group(TEXT, _plan_points((0.75, 0.5, 0.875))),
    "paca": Group(
        TEXT,
        (
            Point("undropped", adapter="lora"),
            Point("undropped", adapter="paca"),
            Point("undropped", adapter="full"),
            Point("published", 0.5, adapter="lora"),
            Point("branch", 0.5, adapter="lora"),
            Point("branch", 0.5, adapter="paca"),
        ),
    ),
    "coreset": Group(
        MIXTURE,
        (
            Point("undropped"),
            *(Point(method) for method in METHODS if method.startswith("coreset")),
            Point("published", 0.5),
            Point("undropped", as_fast_as=("coreset, exact", 0.0)),
            Point("undropped", batch_size=MIXTURE.batch_size // 2),
        ),
    ),
}


def group_of(name: str, scale: str) -> Group:
    """The group of that name; at scale "tiny" it takes seconds, to see every line of code run."""
    group = GROUPS[name]
    if scale == "full":
        return group
    task = replace(group.task, batch_size=8, seq_len=32, steps=2, recipe=TINY)
    one_of_each = {(point.method, point.adapter, point.as_fast_as is None): point for point in reversed(group.points)}
    points = [replace(point, batch_size=point.batch_size and 2) for point in reversed(one_of_each.values())]
    return Group(task, tuple(points))
