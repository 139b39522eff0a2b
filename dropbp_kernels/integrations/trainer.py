"""DropBP in transformers' `Trainer` and TRL's trainers: one callback.

from dropbp_kernels import DropBPCallback

callback = DropBPCallback(drop_rate=0.75, rates="sensitivity")
trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])
trainer.train()
print(callback.handler.report())
"""

import inspect
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..allocation import depth_linear_rates
from ..choices import ALLOCATIONS, MISSING_GRAD, check_choice
from ..gates import find_gates
from ..handler import DropBPHandler, check_drop_rate
from ..missing_grad import fill_missing_gradients
from ..sensitivity import DEFINITIONS
from .checkpointing import is_reentrant
from .meters import PlanMeter, TimeMeter, saved_bytes_by_branch
from .row_batches import stop_telling, tell_gates_of_batches
from .swapping import is_sharded
from .trainer_batches import stop_telling_of_batches, tell_of_batches
from .transformers import apply_dropbp, check_options, patched_with, remove_dropbp

try:
    from transformers.modeling_utils import PreTrainedModel
    from transformers.trainer import Trainer
    from transformers.trainer_callback import CallbackHandler, ExportableState, TrainerCallback
except ImportError as error:
    raise ImportError("DropBPCallback: needs transformers: pip install 'dropbp_kernels[trainer]'") from error

RATES = ("uniform", "depth_linear", "sensitivity")
PLANS = ("optimizer_step", "micro_batch")
LOG_PREFIX = "dropbp_"


class DropBPCallback(TrainerCallback, ExportableState):
    """Patches the Trainer's model, draws a plan for each optimizer step, logs what was dropped, resumes exactly.

    Args:
        drop_rate: share of the branches' backward work to drop, 0 <= drop_rate < 1.
        rates: how drop_rate is shared out among the branches (attention or MLP of a block). "uniform": all get it.
            "depth_linear": rates rise from the input to the output. "sensitivity": by what dropping each branch does
            to the gradient, measured once. The path of a calibration's .json file: by what was measured earlier.
        calibrate_at: after which share of the optimizer steps sensitivity is measured, 0 <= calibrate_at < 1 (at least
            one step); on the last micro-batch of that step, after its update, when no gradient is accumulated.
        plan: "optimizer_step" draws one plan for all micro-batches of a step, "micro_batch" one for each.
        definition: of the sensitivity, "norm" or "element".
        allocation: how rates are made from sensitivities: "published", "optimal" or "variance" (see `allocate`).
        missing_grad: what the optimizer does with parameters that no micro-batch of a step gave a gradient: "skip" them
            (PyTorch's way) or take it for "zero", so that weight decay, momentum and Adam's moments act.
        loss: (model, inputs) -> the loss that calibration differentiates. Needed where the model itself returns none,
            as with `compute_loss_func` or label smoothing, or not the one that is trained on, as under DPO and GRPO.
        labels: inputs -> the labels of a batch, int64 (batch, seq_len), not shifted, for context="inference" where the
            model is called without them, as with `compute_loss_func`. Logits of tokens without a label are then zero.
        measure: also log forward, backward and step time and the peak of memory, and print their means at the end.
        remove_at_end: take the patch off the model when training ends; left on, it drops no branch until the next one.
        options: those of `apply_dropbp`. A model that has gates already, its own or from `apply_dropbp`, keeps them;
            options of the patch must then be those it was patched with. A schedule spans the whole training.

    Attributes: handler, the `DropBPHandler` of the model, None until the Trainer is made.
    Logs:       dropbp_drop_rate and dropbp_flops_kept (realised since the last log), dropbp_bytes_not_saved (for a
                micro-batch), dropbp_tokens_per_second (padding counts, all processes), and with measure
                dropbp_forward_ms, dropbp_backward_ms, dropbp_step_ms, dropbp_peak_memory_mib.
    Errors:     ValueError for an argument out of range, a model that cannot be patched (when the Trainer is made; the
                model is unchanged then) or is patched with other options, a second DropBPCallback, DDP without
                find_unused_parameters, or a checkpoint of other settings.
    Cost:       one more forward in the first step, to count bytes; calibration takes one forward, and half a backward
                per branch, on a micro-batch, with the memory of an undropped one (with reentrant checkpointing 1 +
                num_branches forwards and backwards).
    """

    def __init__(
        self,
        drop_rate: float,
        *,
        rates: str = "uniform",
        calibrate_at: float = 0.1,
        plan: str = "optimizer_step",
        definition: str = "norm",
        allocation: str = "published",
        missing_grad: str = "skip",
        loss: Callable[[nn.Module, dict[str, Any]], Tensor] | None = None,
        labels: Callable[[dict[str, Any]], Tensor] | None = None,
        measure: bool = False,
        remove_at_end: bool = False,
        **options: Any,
    ):
        check_drop_rate(drop_rate)
        check_drop_rate(calibrate_at, "calibrate_at")
        check_options(options, apply_dropbp, DropBPHandler)
        if not (isinstance(rates, str) and rates.endswith(".json")):
            check_choice("rates", rates, RATES)
        check_choice("plan", plan, PLANS)
        check_choice("definition", definition, DEFINITIONS)
        check_choice("allocation", allocation, ALLOCATIONS)
        check_choice("missing_grad", missing_grad, MISSING_GRAD)
        if labels is not None and not callable(labels):
            raise TypeError(f"labels: expected a function of a batch's inputs, got {type(labels).__name__}")
        if labels is not None and options.get("context") != "inference":
            raise ValueError(f'labels: expected None without context="inference", got {labels!r}')
        self.drop_rate = drop_rate
        self.rates = rates
        self.calibrate_at = calibrate_at
        self.plan = plan
        self.definition = definition
        self.allocation = allocation
        self.missing_grad = missing_grad
        self.loss = loss
        self.labels = labels
        self.measure = measure
        self.remove_at_end = remove_at_end
        self.options = options
        self.handler: DropBPHandler | None = None
        self._patched: nn.Module | None = None
        self._told_by: Trainer | None = None  # of labels, while it trains by target plans
        self._is_calibrated = False
        self._inputs: dict[str, Any] | None = None  # of the last forward, while a probe waits for them
        self._labels_told: Tensor | None = None  # of these, to a target plan
        self._capture: Any = None
        self._plans: PlanMeter | None = None
        self._times: TimeMeter | None = None

    # ---- the model

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        functions = [
            name
            for name, value in [*self.options.items(), ("loss", self.loss), ("labels", self.labels)]
            if callable(value)
        ]
        if functions and args.restore_callback_states_from_checkpoint:
            raise ValueError(
                f"restore_callback_states_from_checkpoint: expected False, since {functions[0]} is a function and the "
                "Trainer would make the callback again without it, got True; DropBPCallback resumes without that"
            )
        self._go_first()
        self._attach(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._go_first()
        _check_parallel(args, model, self.drop_rate)
        self._stop()  # what a run that broke off left
        self._attach(model)
        self._is_calibrated = False
        steps = state.max_steps * (args.gradient_accumulation_steps if self.plan == "micro_batch" else 1)
        self._handler().total_steps = self.options.get("total_steps") or steps
        name = type(self).__name__
        if state.global_step > 0:
            self._resume(state.stateful_callbacks.get(name), state.global_step)
        state.stateful_callbacks.setdefault(name, self.state())  # the Trainer writes into the entry it expects to find
        self._plans = PlanMeter(self._handler())
        self._times = TimeMeter(model) if self.measure else None
        if (targets := self._handler().targets) is not None and (trainer := _calling_trainer()) is not None:
            tell_of_batches(trainer, targets, self.labels)
            self._told_by = trainer

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._times is not None and state.is_world_process_zero:
            print(f"DropBP: {self._times.summary()}")
        self._stop()
        handler = self._handler()
        handler.set_plan([True] * len(handler.gates))  # for a loop after this one, that knows of no plan
        if self.remove_at_end and self._patched is not None:
            remove_dropbp(self._patched)
            self._patched = None

    def _attach(self, model: nn.Module) -> None:
        """A handler for the model, unless it has one that drew no plan; the model is patched unless it has gates."""
        gates = list(find_gates(model).values())
        if self.handler is not None and self.handler.num_steps == 0 and list(self.handler.gates.values()) == gates:
            return  # with the rates that somebody may have given it since the Trainer was made
        if not gates:
            self.handler = apply_dropbp(model, self.drop_rate, **self.options)
            self._patched = model
        else:
            self.handler = self._handler_of_gates(model)
        if self.rates == "depth_linear":
            self.handler.set_drop_rates(depth_linear_rates(self.handler.flops(), self.drop_rate))
        elif self.rates.endswith(".json"):
            self.handler.use_calibration(self.rates, allocation=self.allocation)

    def _handler_of_gates(self, model: nn.Module) -> DropBPHandler:
        """A handler for gates that the model has already. What only patching can do must be what was done then."""
        of_handler = inspect.signature(DropBPHandler).parameters
        patched = patched_with(model)
        for name, value in self.options.items():
            if name in of_handler:
                continue
            if patched is None:
                raise ValueError(f"{name}: expected no option of apply_dropbp for a model with gates of its own")
            if patched.get(name, value) != value:
                raise ValueError(
                    f"{name}: expected {patched[name]!r}, with which the model is patched, got {value!r}; call "
                    "remove_dropbp(model) before, to have it patched anew"
                )
        handler = DropBPHandler(
            model, self.drop_rate, **{name: value for name, value in self.options.items() if name in of_handler}
        )
        if patched is not None and handler.granularity != "branch":
            stop_telling(model)
            tell_gates_of_batches(model)
        return handler

    def _handler(self) -> DropBPHandler:
        if self.handler is None:
            raise RuntimeError("DropBPCallback: expected a Trainer that has begun to train, got none")
        return self.handler

    def _stop(self) -> None:
        self._stop_capture()
        if self._plans is not None:
            self._plans.close()  # it still has means to be read
        if self._times is not None:
            self._times.close()
        self._times = None
        if self._told_by is not None:
            stop_telling_of_batches(self._told_by)
        self._told_by = None

    # ---- plans

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._draw_plan()
        if self._plans is None:
            return
        if self._plans.bytes_per_token is None or self._calibrates_after(state.global_step + 1, state.max_steps):
            self._capture = model.register_forward_pre_hook(self._keep_inputs, with_kwargs=True)
        self._plans.start_step()
        if self._times is not None:
            self._times.begin("step")

    def _draw_plan(self) -> None:
        """The handler's next step. In it a batch without a target has a backward, as the Trainer runs that of each."""
        handler = self._handler()
        handler.step()
        if handler.targets is not None:
            handler.targets.zero_gradient = True

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end_micro_batch()
        if self.plan == "micro_batch":
            self._draw_plan()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._end_micro_batch()
        if self.missing_grad == "zero":
            fill_missing_gradients(model.parameters())

    def _end_micro_batch(self) -> None:
        if self._times is not None:
            self._times.end("backward")
        if self._plans is not None:
            self._plans.count_micro_batch()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._times is not None:
            self._times.end("step")
        if self._plans is not None:
            self._plans.end_step()
        inputs, labels = self._inputs, self._labels_told
        self._stop_capture()
        targets = self._handler().targets
        if inputs is not None:
            if targets is not None:
                targets.labels = labels  # of that call, which has a part of the batch where samples ran apart
            with nullcontext() if self._times is None else self._times.paused():
                self._probe(model, inputs, state)
        if targets is not None:
            targets.zero_gradient = False

    # ---- probes: between two optimizer steps, on the last micro-batch, with everything left as found

    def _keep_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        targets = self._handler().targets
        if targets is not None and targets.is_anchor:
            return
        if not (torch.is_grad_enabled() or (targets is not None and targets.is_inference)):
            return
        if any(isinstance(value, nn.Module) for value in args):  # a loss of TRL's that is called in place of forward
            if self.rates == "sensitivity" and not self._is_calibrated:
                raise ValueError(
                    'rates: expected "uniform", "depth_linear" or the file of a calibration, because the trainer does '
                    "not call the model's own forward, so calibration has no inputs for it (TRL's DistillationTrainer "
                    "calls the decoder by itself), got 'sensitivity'"
                )
            return
        # Names of the class, since a forward that somebody put in its place for a while may have others.
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        self._inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        self._labels_told = None if targets is None else targets.labels

    def _stop_capture(self) -> None:
        self._inputs = self._labels_told = None
        if self._capture is not None:
            self._capture.remove()
        self._capture = None

    def _calibrates_after(self, num_steps: int, max_steps: int) -> bool:
        """Whether it is calibrated once so many optimizer steps are done."""
        if self.rates != "sensitivity" or self._is_calibrated:
            return False
        return num_steps >= round(self.calibrate_at * max_steps)

    def _probe(self, model: nn.Module, inputs: dict[str, Any], state: Any) -> None:
        handler = self._handler()
        if self._plans is not None and self._plans.bytes_per_token is None:
            gate = next(iter(handler.gates.values()))
            num_tokens = max(1, gate.batch_size * gate.seq_len)
            awaits_loss = self.rates == "sensitivity" and not self._is_calibrated  # whether it is there is seen now
            num_bytes = saved_bytes_by_branch(
                handler, lambda: self._loss(model, inputs) if awaits_loss else model(**inputs)
            )
            self._plans.bytes_per_token = [size / num_tokens for size in num_bytes]
        if self._calibrates_after(state.global_step, state.max_steps):
            # A reentrant checkpoint knows no backward from within: there every branch takes a forward and a backward.
            handler.calibrate(
                lambda: self._loss(model, inputs),
                definition=self.definition,
                allocation=self.allocation,
                method="published" if is_reentrant(model.modules()) else "exact",
            )
            self._is_calibrated = True

    def _loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self.loss is not None:
            return self.loss(model, inputs)
        output = model(**inputs)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None:
            raise ValueError(
                f"loss: expected a function (model, inputs) -> loss, because calibration found none in the model's "
                f"{type(output).__name__} (inputs: {', '.join(inputs)}), got None"
            )
        return loss

    # ---- logs

    def _go_first(self) -> None:
        """Move to the front of the Trainer's callbacks, so that what is added to its logs reaches all that report them.

        The Trainer tells its callbacks neither of itself nor of each other, and puts those that report before those of
        the user; the list is found in the frame of the `CallbackHandler` that makes this call.
        """
        frame = sys._getframe(2)
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler) and self in caller.callbacks:
            if (number := sum(isinstance(callback, DropBPCallback) for callback in caller.callbacks)) > 1:
                raise ValueError(f"callbacks: expected one DropBPCallback, got {number}, which would all draw plans")
            caller.callbacks.remove(self)
            caller.callbacks.insert(0, self)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs or self._plans is None:  # evaluation, or the summary at the end
            return
        values = self._plans.read(args.world_size)
        if self._times is not None:
            values.update(self._times.read())
        named = {LOG_PREFIX + name: value for name, value in values.items()}
        logs.update(named)
        state.log_history[-1].update(named)

    # ---- checkpoints

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into trainer_state.json: the arguments, and where the handler stands."""
        return {
            "args": self._settings(),
            "attributes": {
                "saved_state": None if self.handler is None else self.handler.state_dict(),
                "_is_calibrated": self._is_calibrated,
            },
        }

    def _settings(self) -> dict[str, Any]:
        """The arguments that JSON can hold; a function stands there as its name."""
        names = "drop_rate rates calibrate_at plan definition allocation missing_grad measure remove_at_end"
        settings = {name: getattr(self, name) for name in names.split()} | self.options
        return json.loads(json.dumps(settings, default=lambda value: getattr(value, "__qualname__", repr(value))))

    def _resume(self, saved: dict[str, Any] | None, global_step: int) -> None:
        """Go on where the checkpoint stands, also when the Trainer restores no callbacks (its default)."""
        state = None if saved is None else saved["attributes"]["saved_state"]
        if saved is None or state is None:
            warnings.warn(
                f"DropBPCallback: the checkpoint at step {global_step} holds no state of it; plans start anew",
                stacklevel=2,
            )
            return
        ours = self._settings()
        for name in sorted((set(ours) | set(saved["args"])) - {"measure", "remove_at_end"}):
            if ours.get(name) != saved["args"].get(name):
                raise ValueError(
                    f"{name}: expected {saved['args'].get(name)!r}, with which the checkpoint was trained, got "
                    f"{ours.get(name)!r}; start a new run to change it"
                )
        self._handler().load_state_dict(state)
        self._is_calibrated = saved["attributes"]["_is_calibrated"]


def _calling_trainer() -> Trainer | None:
    """The Trainer that runs, found like its callbacks in the frames of the call; None where somebody else calls."""
    frame = sys._getframe(1)
    while frame.f_back is not None and not isinstance(frame.f_locals.get("self"), Trainer):
        frame = frame.f_back
    found = frame.f_locals.get("self")
    return found if isinstance(found, Trainer) else None


def _check_parallel(args: Any, model: nn.Module, drop_rate: float) -> None:
    """Refuse replicas, whose gates nobody tells, and DDP that would stop at a dropped branch for want of a gradient."""
    if args.parallel_mode.value == "not_distributed":
        raise ValueError(
            f"n_gpu: expected one GPU in a process, got {args.n_gpu}, which the Trainer would run as replicas "
            "(DataParallel); launch the script with torchrun, or let it see one GPU (CUDA_VISIBLE_DEVICES)"
        )
    if args.torch_compile:
        warnings.warn(
            "torch_compile: the Trainer compiles the whole model, one graph for each plan it meets, which soon takes "
            "longer than it saves; compile block by block instead (for block in model.model.layers: block.compile())",
            stacklevel=2,
        )
    if args.parallel_mode.value != "distributed" or drop_rate == 0.0 or args.deepspeed_plugin or is_sharded(model):
        return
    if (getattr(model, "tp_size", None) or 1) > 1:  # tensor parallel, which accelerate wraps in no DDP
        return
    finds_unused = args.ddp_find_unused_parameters
    if finds_unused is None:  # the Trainer's own choice then, which is another one for what PEFT has wrapped
        checkpoints = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        finds_unused = not (checkpoints and isinstance(model, PreTrainedModel))
    if not finds_unused:
        raise ValueError(
            "ddp_find_unused_parameters: expected True, since a dropped branch leaves its parameters without gradient, "
            "got False (without PEFT the Trainer's own choice under gradient checkpointing). Pass it to "
            "TrainingArguments, and checkpoint with use_reentrant=False."
        )
