"""DropBPHandler: the options of DropBP on a model, the plan of each step, the drop rates, the state to resume from.

    handler = DropBPHandler(model, drop_rate=0.75)
    for batch in loader:
        handler.step()                      # draws the plan of this step, before the forward
        loss = model(**batch).loss
        loss.backward(); optimizer.step(); optimizer.zero_grad()

A plan is a pure function of (seed, step), so it is the same on every rank, after a resume and in a recompute.
"""

import copy
import math
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .calibration import Calibration, check_branches
from .choices import DROPPED_RUNS, GRANULARITIES, check_choice
from .exact_sensitivity import measure_sensitivity
from .gates import DEFAULT_SEQ_LEN, check_called, check_engine, check_model, find_gates, flops_of, look_out_for_steps
from .layer import checkpoint_branch
from .plan import DropPlan, as_entry, draw_plan, set_plan
from .report import Books, Report
from .row_plan import RowsOfBranch
from .samplers import Sampler, get_sampler
from .schedules import Schedule, factor_at, get_schedule
from .sensitivity import mean_over_ranks
from .slicing import SLICE_TOKENS
from .targets import TargetRule

STATE_VERSION = 1
CHECKPOINTS = (None, "kept", "sliced")


def check_drop_rate(drop_rate: float, name: str = "drop_rate") -> float:
    """Return drop_rate as a float, or raise TypeError/ValueError unless it is a number with 0 <= drop_rate < 1."""
    if isinstance(drop_rate, bool) or not isinstance(drop_rate, int | float | numbers.Real):  # NumPy's too
        raise TypeError(f"{name}: expected a number with 0 <= {name} < 1, got {drop_rate!r}")
    if not 0.0 <= drop_rate < 1.0:
        raise ValueError(f"{name}: expected 0 <= {name} < 1, got {drop_rate}")
    return float(drop_rate)


class DropBPHandler:
    """Draws the plan of each step: which branches of a model are kept and which are dropped.

    Args:
        model: a module that contains `DropBP` gates, one for each branch.
        drop_rate: target share of backward work to drop, 0 <= drop_rate < 1; every branch starts with it.
        sampler: how a plan is drawn: "balanced" (equal FLOPs every step), "bernoulli", "cyclic", "published", or a
            callable like those in `samplers`.
        schedule: how the drop rates change over the run: None, "warmup", "cosine" or "recovery", with the share of the
            run in which they do as in "recovery:0.2", or a callable like those in `schedules`. It needs total_steps,
            the number of steps of the run, which may also be set later, before the first step.
        grad_scale: factor on the gradient entering a kept branch, or "unbiased" for 1/(1 - drop_rate of the branch).
        seed: seed of the plans; ranks that share it draw the same plans.
        keep_one: keep at least one branch that has trainable parameters, so that a step is never lost.
        strict: raise in `step` when a gate was not called since the last one.
        dropped_runs: how dropped branches run, see `DropBP`.
        checkpoint: None, or "kept": kept branches save only their inputs and are recomputed in the backward (by torch's
            non-reentrant checkpoint, dropout included). Dropped branches save nothing either way. "sliced": as "kept",
            and branches that process tokens independently (MLPs), kept or dropped, take a slice of the tokens at a
            time: less lives at once, values are the same up to rounding, and dropout draws other numbers.
        granularity: what a plan drops. "branch": whole branches. "sample": in every branch a share of the samples of
            the batch. "token": a share of the tokens where a branch processes them independently (MLPs; see `DropBP`),
            of the samples elsewhere. The sampler then rounds shares that are not whole numbers of rows, and keep_one
            sees to it that some branch keeps each sample, as far as shares reach.
        aligned: which branches keep the same rows (samples or tokens): False, each its own; True, all; n, those of n
            consecutive blocks.

    Errors: ValueError without gates (the message names the module types found), for a drop_rate outside [0, 1) or an
    unknown sampler; TypeError for arguments of a wrong type. The model is unchanged then.
    Source: DropBP (arXiv 2402.17812), section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        drop_rate: float,
        *,
        sampler: str | Sampler = "balanced",
        schedule: str | Schedule | None = None,
        total_steps: int | None = None,
        grad_scale: float | str = 1.0,
        seed: int = 0,
        keep_one: bool = True,
        strict: bool = True,
        dropped_runs: str = "inference",
        checkpoint: str | None = None,
        granularity: str = "branch",
        aligned: bool | int = False,
    ):
        check_model(model)
        gates = find_gates(model)
        if not gates:
            found = ", ".join(sorted({type(m).__name__ for m in model.modules()}))
            raise ValueError(
                f"model: expected at least one DropBP gate, got none; module types found: {found}. "
                "Use apply_dropbp(model, ...) for a supported family, or put gates into your blocks."
            )
        is_number = isinstance(grad_scale, int | float) and not isinstance(grad_scale, bool)
        if grad_scale != "unbiased" and not (is_number and math.isfinite(float(grad_scale))):
            raise ValueError(f'grad_scale: expected a finite number or "unbiased", got {grad_scale!r}')
        check_choice("dropped_runs", dropped_runs, DROPPED_RUNS)
        if checkpoint not in CHECKPOINTS:
            raise ValueError(f'checkpoint: expected None, "kept" or "sliced", got {checkpoint!r}')
        is_count = isinstance(total_steps, int | float) and total_steps is not True and total_steps % 1 == 0
        if total_steps is not None and not (is_count and total_steps >= 1):  # an infinite one has no remainder
            raise ValueError(f"total_steps: expected a number of steps, at least 1, got {total_steps!r}")
        check_choice("granularity", granularity, GRANULARITIES)
        if isinstance(seed, bool) or not isinstance(seed, int | numbers.Integral):
            raise TypeError(f"seed: expected an integer, got {seed!r}")
        for name, value in (("keep_one", keep_one), ("strict", strict)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected True or False, got {value!r}")
        if not isinstance(aligned, int) or aligned < 0:
            raise ValueError(f"aligned: expected True, False or a number of blocks, got {aligned!r}")
        if aligned and granularity == "branch":
            raise ValueError(
                f'aligned: expected False with granularity "branch", which keeps all rows, got {aligned!r}'
            )
        self.model = model
        self.gates = gates
        self.granularity = granularity
        self.aligned = aligned
        self.drop_rate = check_drop_rate(drop_rate)
        self.sampler = get_sampler(sampler)
        self.schedule = get_schedule(schedule)
        self.total_steps = total_steps
        self.grad_scale = grad_scale
        self.seed = int(seed)
        self.keep_one = keep_one
        self.strict = strict
        self.num_steps = 0
        self.calibration: Calibration | None = None
        self._books = Books([0] * len(gates), [0] * len(gates))
        self._awaits_call = False
        # At one shape: a plan must not depend on that of a batch, which ranks and resumed runs do not share. Refuses
        # gates of which only some know their FLOPs, before any is told something.
        self._flops_of_plans = flops_of(gates, (1, DEFAULT_SEQ_LEN))
        self.targets = TargetRule.of(model)
        for gate in gates.values():
            gate.dropped_runs = dropped_runs
            gate.checkpoint = checkpoint_branch if checkpoint else None
            gate.slice_tokens = SLICE_TOKENS if checkpoint == "sliced" and gate.per_token else 0
        self.drop_rates = [self.drop_rate] * len(gates)
        self.set_plan([True] * len(gates))
        self._tell_targets()
        self._look_out_for_steps()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.gates)} branches, drop_rate={self.drop_rate:g}, step {self.num_steps})"

    # ---- plans

    def step(self, labels: Tensor | None = None, *, without_gradient: Tensor | None = None) -> DropPlan:
        """Draw the plan of the next step and set it; call once per optimizer step, before the forward.

        If blocks are wrapped in a `torch.utils.checkpoint` of your own, call it after the backward of the step before:
        they are recomputed by the plan of that moment, and torch does not always notice. The handler's `checkpoint` and
        transformers' checkpointing recompute by the plan of their forward.

        labels: for a model patched with context="inference" that is called without labels, because the caller computes
            the loss: int64 (batch, seq_len), not shifted, -100 where there is no loss. They hold until the next step;
            with several micro-batches per optimizer step call `step` before each.
        without_gradient: for such a model, bool (batch,): samples whose values the loss takes without a gradient, such
            as completions with an advantage of zero. They run apart, without autograd. It holds as labels do, and has
            no effect where a call has images, or FSDP or ZeRO-3 gather weights.
        Errors: RuntimeError in strict mode when a gate was not called with gradients enabled since the last `step`;
            ValueError for labels where no context is to be told from targets; RuntimeError for a plan that drops
            under DeepSpeed's ZeRO-3 (see `gates.check_engine`). The plan stays then.
        """
        if labels is not None and self.targets is None:
            raise ValueError('labels: expected None, since the model was not patched with context="inference"')
        if labels is not None and not isinstance(labels, Tensor):
            raise TypeError(f"labels: expected an int64 tensor, got {type(labels).__name__}")
        if without_gradient is not None:
            self._check_without_gradient(without_gradient)
        if self._awaits_call:
            self._check_last_step()
        plan = self.draw(self.num_steps)
        self._put_plan(plan, self.rates_at(self.num_steps))
        self._books.open(self.plan)
        for gate in self.gates.values():
            gate.was_called = False
        self._look_out_for_steps()
        self.num_steps += 1
        self._awaits_call = True
        self._tell_targets(labels, without_gradient)
        return self.plan

    def _check_without_gradient(self, is_without: Any) -> None:
        if self.targets is None:
            raise ValueError(
                'without_gradient: expected None, since the model was not patched with context="inference"'
            )
        if not (isinstance(is_without, Tensor) and is_without.dtype == torch.bool and is_without.dim() == 1):
            found = (
                f"{is_without.dtype} {tuple(is_without.shape)}" if isinstance(is_without, Tensor) else repr(is_without)
            )
            raise TypeError(f"without_gradient: expected a tensor of bools, one for each sample, got {found}")

    def _look_out_for_steps(self) -> None:
        """Have a loop warned of that forgets `step`, where plans differ from step to step (`gates.UnsteppedCalls`).

        Only until the second `step`: who has called it twice calls it in the loop.
        """
        for gate in self.gates.values():
            gate.unstepped = None
        draws = self.drop_rate > 0.0
        if self.targets is not None:
            draws = draws or self.targets.context_keep > 0.0 or self.targets.trained_share < 1.0
        if draws and self.num_steps == 0:
            look_out_for_steps(self.model, self.gates)

    def _tell_targets(self, labels: Tensor | None = None, without_gradient: Tensor | None = None) -> None:
        if self.targets is not None:
            self.targets.without_gradient = without_gradient
            self.targets.seed, self.targets.step, self.targets.labels = self.seed, self.num_steps - 1, labels
            self.targets.num_target, self.targets.was_dense, self.targets.num_tokens = None, False, 0
            self.targets.zero_gradient = False

    def draw(self, step: int) -> DropPlan:
        """The plan of `step`: a pure function of (seed, step), the rates and the branches' FLOPs; changes nothing.

        Errors: TypeError or ValueError when a sampler or schedule of the user's returns something else than it should.
        """
        return self._draw(step, self.rates_at(step))

    def _draw(self, step: int, rates: Sequence[float]) -> DropPlan:
        return draw_plan(
            self.gates,
            rates,
            self._flops_of_plans,
            sampler=self.sampler,
            granularity=self.granularity,
            aligned=self.aligned,
            keep_one=self.keep_one,
            seed=self.seed,
            step=step,
        )

    def set_plan(self, kept: Sequence[Any]) -> DropPlan:
        """Set a plan by hand until the next `step`: for each branch a bool, True = kept, or a bool tensor over rows.

        Rows are the samples of the next batch or, for a branch that processes tokens independently, its tokens. It does
        not count as a step.
        Errors: ValueError for a wrong length, TypeError for other entries, RuntimeError as in `step`; the old plan
            stays.
        """
        if not isinstance(kept, Sequence):
            raise TypeError(
                f"plan: expected a list with one entry for each of the {len(self.gates)} branches, got "
                f"{type(kept).__name__}"
            )
        entries = tuple(map(as_entry, kept))
        drawn = next((entry.plan for entry in entries if isinstance(entry, RowsOfBranch)), None)
        if drawn is None:
            self._put_plan(DropPlan(entries, seed=self.seed), self.drop_rates)
        else:  # rows that were drawn and are put back stay those of their step, at its rates
            self._put_plan(DropPlan(entries, drawn.step, drawn.seed), drawn.drop_rates)
        for gate in self.gates.values():
            gate.unstepped = None
        return self.plan

    def _put_plan(self, plan: DropPlan, rates: Sequence[float]) -> None:
        """Tell the gates of `plan` and, for grad_scale="unbiased", of the rates that it was drawn with."""
        check_engine(self.model, plan.kept)
        set_plan(self.gates, plan.kept)
        for gate, rate in zip(self.gates.values(), rates, strict=True):
            gate.grad_scale = 1.0 / (1.0 - rate) if self.grad_scale == "unbiased" else float(self.grad_scale)
        self.plan, self._plan_rates = plan, list(rates)

    def _check_last_step(self) -> None:
        """Whether every gate was called, in strict mode; warn, once, where labels told no context from targets."""
        rule = self.targets
        if self.strict and (rule is None or rule.num_target != 0):  # a batch without a target runs without autograd
            check_called(self.gates)
        if rule is None or rule.has_warned_of_labels:
            return
        if rule.num_target is None and any(gate.was_called for gate in self.gates.values()):
            found = (
                "no labels were seen in a training step; call the model with labels, or give them to step(labels=...) "
                "or, as a function, to DropBPCallback(labels=...); with an adapter that calls the model's forward "
                "(PEFT's AdaLora) patch after get_peft_model"
            )
        elif self.num_steps == 1 and rule.num_target and rule.was_dense and rule.context_gradient != "full":
            found = (
                "every token of the first step has a label; expected -100 where there is no loss (TRL's SFTTrainer: "
                "assistant_only_loss=True, or data of prompt and completion), or target_windows above 1"
            )
        else:
            return
        rule.has_warned_of_labels = True
        warnings.warn(f"context: all tokens ran with a backward, since {found}", UserWarning, stacklevel=3)

    # ---- rates

    def set_drop_rates(self, drop_rates: Sequence[float]) -> None:
        """Give every branch its own drop rate, in model order; the next plan is the first to follow them.

        Errors: ValueError for a wrong length or a rate outside [0, 1), TypeError for one that is no number; no rate is
        changed then.
        """
        if not isinstance(drop_rates, Sequence):
            raise TypeError(
                f"drop_rates: expected a list with one for each of the {len(self.gates)} branches, got "
                f"{type(drop_rates).__name__}"
            )
        if len(drop_rates) != len(self.gates):
            raise ValueError(
                f"drop_rates: expected one for each of the {len(self.gates)} branches, got {len(drop_rates)}"
            )
        self.drop_rates = [check_drop_rate(rate) for rate in drop_rates]

    def rates_at(self, step: int) -> list[float]:
        """The drop rates in force at `step`: `drop_rates` times the schedule's factor."""
        if self.schedule is None:
            return self.drop_rates
        factor = factor_at(self.schedule, step, self.total_steps)
        return [factor * rate for rate in self.drop_rates]

    def flops(self) -> list[float]:
        """Forward FLOPs of each branch at the shape it last saw (before that 1 x 512 tokens).

        All alike when no gate knows its FLOPs. Errors: ValueError when only some do; the message names one that lacks.
        """
        return flops_of(self.gates)

    def calibrate(
        self,
        loss: Callable[[], Any] | Sequence[Callable[[], Any]],
        *,
        definition: str = "norm",
        method: str = "exact",
        allocation: str = "published",
        min_rate: float = 0.0,
        progress: bool = False,
    ) -> list[float]:
        """Measure how much of the gradient is lost when each branch is dropped, and set the drop rates from that.

        Returns the rates, in model order; `calibration` then holds what was measured.

        loss: runs the forward on a fixed batch and returns the loss (no backward); or one such function for each of
            several micro-batches, whose gradients are summed.
        definition: "norm" compares the norm of each parameter's gradient, "element" all its elements (see
            `sensitivity`).
        method: "exact" shares one forward among all branches; "estimate" takes one backward in all; "published" runs
            forward and backward for every branch, and its functions may run the backward themselves.
        allocation, min_rate: how rates are made from that, and the lowest rate of a branch (see `allocate`).
        progress: whether to show a progress bar.

        Gradients, RNG state, train/eval mode and plan are left as found. Where torch.distributed runs, every rank calls
        this on its own batch and all take the mean of the sensitivities, so that they draw the same plans.
        Errors: those of `measure_sensitivity` and `allocate`; the rates are unchanged then.
        Cost:   that of `exact_sensitivity`, `estimate_sensitivity` or `compute_sensitivity`.
        Source: DropBP (arXiv 2402.17812), section 3.3.
        """
        for gate in self.gates.values():
            gate.refresh()
        sensitivities = mean_over_ranks(measure_sensitivity(self, loss, definition, method, progress))
        measured = Calibration(
            branches=tuple(self.gates),
            sensitivities=tuple(sensitivities),
            flops=tuple(mean_over_ranks(self.flops())),  # ranks whose batches differ in length must allocate alike
            definition=definition,
            method=method,
            drop_rate=self.drop_rate,
            min_rate=min_rate,
            allocation=allocation,
        )
        return self.use_calibration(measured)

    def use_calibration(self, calibration: Calibration | str | Path, *, allocation: str | None = None) -> list[float]:
        """Set the drop rates from an earlier calibration, or from a file of `Calibration.save`; return the rates.

        Its sensitivities and FLOPs are allocated anew, for this handler's drop_rate, by the method that it names or by
        `allocation`; so a file serves other drop rates, too, and gives the same rates for the same one.
        Errors: ValueError when it is of a model with other branches or no calibration, and those of `allocate`; the
                rates are unchanged then.
        """
        if not isinstance(calibration, Calibration):
            calibration = Calibration.load(calibration)
        check_branches(calibration.branches, list(self.gates), "calibration")
        calibration = calibration.reallocated(self.drop_rate, allocation or calibration.allocation)
        self.set_drop_rates(calibration.drop_rates)
        self.calibration = calibration
        return list(calibration.drop_rates)

    # ---- books

    def report(self) -> Report:
        """What was dropped so far: realised rate and FLOPs kept, overall and per branch (`branches`, model order).

        A dict; `print` and rich show it as a table, `draw(path)` as a picture. Counts are those of steps or, under
        plans that differ from row to row, of rows: samples or tokens, of all micro-batches of a step (in a model that
        was not patched by `apply_dropbp`, of the first).
        """
        return self._books.report(list(self.gates), self.drop_rate, self.drop_rates, self.flops(), self.num_steps)

    def state_dict(self) -> dict[str, Any]:
        """Rates, calibration, step, seed and counts, as plain Python values; also good as a JSON file."""
        num_kept, num_rows = zip(*self._books.counts(), strict=True)
        return {
            "version": STATE_VERSION,
            "branches": list(self.gates),
            "drop_rate": self.drop_rate,
            "drop_rates": list(self.drop_rates),
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "num_steps": self.num_steps,
            "total_steps": self.total_steps,
            "seed": self.seed,
            "granularity": self.granularity,
            "aligned": self.aligned,
            "plan": [entry if isinstance(entry, bool) else entry.as_list() for entry in self.plan],
            "plan_step": self.plan.step,
            "plan_rates": list(self._plan_rates),
            "num_kept": list(num_kept),
            "num_rows": list(num_rows),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where the handler that saved `state` stood; its total_steps count where none are given here.

        Errors: ValueError when the state is of another version, of a model with other branches or of another
                granularity; those of `draw` and `set_plan`. Nothing is changed then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected what state_dict returned, got {type(state).__name__}")
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"state: expected version {STATE_VERSION}, got {state.get('version')!r}")
        newer = ("granularity", "aligned", "num_rows", "total_steps", "plan_rates")  # what older states lack
        needed = [name for name in self.state_dict() if name not in newer]
        if missing := [name for name in needed if name not in state]:
            raise ValueError(f"state: expected the keys {', '.join(needed)}; it lacks {', '.join(missing)}")
        check_branches(state["branches"], list(self.gates), "state")
        for name, default in (("granularity", "branch"), ("aligned", False)):
            if (theirs := state.get(name, default)) != getattr(self, name):
                raise ValueError(f"state: expected {name} {getattr(self, name)!r}, as this handler has, got {theirs!r}")
        loaded = copy.copy(self)  # so that a state that fails half-way leaves this handler as it is
        loaded.set_drop_rates(state["drop_rates"])
        loaded.drop_rate = check_drop_rate(state["drop_rate"])
        measured = state["calibration"]
        loaded.calibration = None if measured is None else Calibration.from_dict(measured, "state")
        loaded.num_steps, loaded.seed = state["num_steps"], state["seed"]
        loaded.total_steps = self.total_steps or state.get("total_steps")
        loaded._books = Books(state["num_kept"], state.get("num_rows", [loaded.num_steps] * len(self.gates)))
        loaded._awaits_call = False
        step, entries = state["plan_step"], state["plan"]
        rates = state.get("plan_rates") or (loaded.rates_at(step) if step >= 0 else loaded.drop_rates)
        if None in entries:  # rows, which are drawn again
            drawn = loaded._draw(step, rates)
            entries = [again if entry is None else entry for entry, again in zip(entries, drawn, strict=True)]
        loaded._put_plan(DropPlan(tuple(map(as_entry, entries)), step, loaded.seed), rates)
        if step == loaded.num_steps - 1:  # the plan of the step that runs
            loaded._books.reopen(loaded.plan)
        vars(self).update(vars(loaded))
        self._tell_targets()
