"""How a run of `benchmarks.convergence` is made: a model patched by the method of a point, before its first step."""

import random
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dropbp_kernels import DropBPHandler, apply_dropbp, remove_dropbp
from dropbp_kernels.cli import builtin, models
from dropbp_kernels.cli.data import IGNORED
from dropbp_kernels.cli.settings import Settings
from dropbp_kernels.cli.training import Run
from dropbp_kernels.coreset import CoresetSelector
from dropbp_kernels.integrations.checkpointing import set_checkpointing
from dropbp_kernels.schedules import factor_at, get_schedule

from . import convergence_data
from .convergence_methods import METHODS, Options, Point, Task
from .convergence_simulated import QueryRows, loss_gradient_norms

PACA_RANK = 16  # 221,184 trained parameters of the built-in model; LoRA of rank 8 has 217,088
MAX_RATE = 0.95  # of a schedule whose mean is the drop rate; only a run of a few steps meets it


def make_run(task: Task, adapter: str, point: Point, batch_size: int, learning_rate: float, seed: int) -> Run:
    settings, data = _settings(task, adapter, learning_rate, seed), convergence_data.load(task.data, task.seq_len, seed)
    model = models.load_model(settings, data)
    if adapter == "paca":
        model = _with_paca(model, seed)
    if task.checkpointed:
        set_checkpointing(model, {"use_reentrant": False})
    make_options = METHODS[point.method]
    if make_options is None:
        return Run(point.method, model, None, batch_size, data, settings)
    options = dict(make_options(point.drop_rate))
    if "coreset" in options:
        return CoresetRun(point.method, model, None, batch_size, data, settings, options=options["coreset"])
    if (allocation := options.pop("calibrate", None)) is not None:
        settings = replace(settings, rates="sensitivity", allocation=allocation)
    if (simulated := options.pop("simulated", None)) is not None:
        plan = QueryRows(model, point.drop_rate, **simulated)
        return SimulatedRun(point.method, model, None, batch_size, data, settings, plan=plan, drop_rate=point.drop_rate)
    if (branch_share := options.pop("window", None)) is not None:
        handler = patch(model, 1.0 - branch_share, task, seed, options)
        num_windows = round(branch_share / (1.0 - point.drop_rate))
        return WindowRun(point.method, model, handler, batch_size, data, settings, num_windows=num_windows)
    handler = patch(model, options.pop("drop_rate", point.drop_rate), task, seed, options)
    return Run(point.method, model, handler, batch_size, data, settings)


class CoresetRun(Run):
    """A run whose steps train on a part of each batch, chosen inside the step so that it counts into its time."""

    def __init__(self, *args: Any, options: Mapping[str, Any]):
        super().__init__(*args)
        seed = self.settings.seed
        self.selector = CoresetSelector(self.model, keep=0.5, sources=self.data.counts, seed=seed, **options)

    def loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        if self.model.training:
            batch, _ = self.selector.subset({"input_ids": input_ids, "labels": labels}, self.data.sources)
            input_ids, labels = batch["input_ids"], batch["labels"]
        return super().loss(input_ids, labels)


class SimulatedRun(Run):
    """A run under a simulated plan, drawn anew for each training batch. Choosing by loss costs a forward more."""

    def __init__(self, *args: Any, plan: QueryRows, drop_rate: float):
        super().__init__(*args)
        self.plan = plan
        self.drop_rate = drop_rate
        self.num_drawn = 0

    def step(self, step: int) -> None:
        if self.settings.rates == "sensitivity" and step == self.settings.steps // 10:
            ids, labels = self.data.batch(step, self.batch_size)
            handler = apply_dropbp(self.model, self.drop_rate)
            calls = [lambda: super(SimulatedRun, self).loss(ids, labels)]
            self.plan.drop_rates = handler.calibrate(calls, allocation=self.settings.allocation)
            remove_dropbp(self.model)
        super().step(step)

    def loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        if not self.model.training:
            return super().loss(input_ids, labels)
        scores = None
        if self.plan.chosen == "loss":
            with torch.no_grad():
                scores = loss_gradient_norms(self.model(input_ids=input_ids).logits, labels)
        seed, self.num_drawn = self.settings.seed, self.num_drawn + 1
        self.plan.draw(tuple(input_ids.shape), seed=seed, step=self.num_drawn, scores=scores)
        loss = super().loss(input_ids, labels)
        self.plan.clear()
        return loss


class WindowRun(Run):
    """A run whose batches have their loss on one of num_windows stretches of the sequence, another in every step."""

    def __init__(self, *args: Any, num_windows: int):
        super().__init__(*args)
        self.num_windows = num_windows
        self.random = random.Random(f"window:{self.settings.seed}")
        self.numbers: list[int] = []  # of the windows of the steps so far

    def loss(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        if self.model.training:
            self.numbers.append(self.random.randrange(self.num_windows))
            labels = in_window(labels, self.num_windows, self.numbers[-1])
        return super().loss(input_ids, labels)


def in_window(labels: Tensor, num_windows: int, number: int) -> Tensor:
    """The labels (B, S) of one of num_windows stretches of the columns that hold any; the others have no loss."""
    columns = (labels != IGNORED).any(dim=0).nonzero().flatten()
    window = columns.tensor_split(num_windows)[number]
    kept = torch.full_like(labels, IGNORED)
    kept[:, window] = labels[:, window]
    return kept


def _settings(task: Task, adapter: str, learning_rate: float, seed: int) -> Settings:
    folder = builtin.ensure_pretrained(task.recipe, torch.device("cpu"))
    return Settings(
        model=str(folder),
        data=task.data,
        adapter="lora" if adapter == "lora" else "full",
        steps=task.steps,
        batch_size=task.batch_size,
        seq_len=task.seq_len,
        learning_rate=learning_rate,
        dtype="float32",
        device="cpu",
        seed=seed,
        compare=False,
    )


def _with_paca(model: nn.Module, seed: int) -> nn.Module:
    """The model with PaCA on all linear layers, of about as many trained parameters as the command line's LoRA."""
    from peft import get_peft_model

    from dropbp_kernels.paca import PacaConfig

    config = PacaConfig(r=PACA_RANK, alpha=64, target_modules="all-linear", seed=seed, task_type="CAUSAL_LM")
    return get_peft_model(model, config).train()


def patch(model: nn.Module, drop_rate: float, task: Task, seed: int, options: Options) -> DropBPHandler:
    """drop_rate: the share of the branches' backward FLOPs that the whole run is to drop, whatever the options."""
    attention_rate = options.pop("attention_rate", None)
    if (schedule := get_schedule(options.get("schedule"))) is not None:
        mean = statistics.mean(factor_at(schedule, step, task.steps) for step in range(task.steps))
        drop_rate = min(drop_rate / mean, MAX_RATE)
        options["total_steps"] = task.steps
    handler = apply_dropbp(model, drop_rate, seed=seed, **options)
    if attention_rate is not None:
        for gate in handler.gates.values():
            gate.seq_len = task.seq_len  # attention costs what it costs at this length; no call has shown it yet
        handler.set_drop_rates(rates_by_kind(handler, attention_rate))
    return handler


def rates_by_kind(handler: DropBPHandler, attention_rate: float) -> list[float]:
    """attention_rate for attention branches; for the others the rate that drops handler.drop_rate of all FLOPs."""
    is_attention = ["attention" in name.rpartition(".")[2] for name in handler.gates]
    flops = handler.flops()
    of_attention = sum(cost for cost, is_of_kind in zip(flops, is_attention, strict=True) if is_of_kind)
    other_rate = (handler.drop_rate * sum(flops) - attention_rate * of_attention) / (sum(flops) - of_attention)
    return [attention_rate if is_of_kind else other_rate for is_of_kind in is_attention]
