"""What a fine-tuning step would take: the model of a config, without weights, run on fake tensors.

Nothing is loaded and no GPU is asked for. The model is built on the meta device, gated as `apply_dropbp` gates it, cut
to a few of its blocks where they are alike, and one step of it is simulated (`..simulation`).
"""

import contextlib
import functools
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ..integrations.checkpointing import set_checkpointing
from ..integrations.target_plans import with_plan
from ..integrations.transformers import apply_dropbp, remove_dropbp
from ..simulation import GRADIENTS, Cost, extend, make_fake, simulate, total
from ..targets import IGNORED, TargetPlan, plan_targets
from . import four_bit
from .errors import UserError, first_line
from .plan_setting import IN_FOUR_BITS, Setting

LOGITS, ACTIVATIONS = "logits", "activations"
Plan = list[tuple[bool, ...]]  # for each block, which of its branches are kept
# Blocks simulated of each run of equal ones: its first, its last, and one between them that stands for all others.
NUM_OF_A_RUN = 3


@dataclass(frozen=True)
class Prediction:
    """What a setting takes. peak_bytes is the sum of by_tag: weights, optimizer, gradients, activations, logits."""

    setting: Setting
    peak_bytes: int
    by_tag: dict[str, int]
    forward_flops: float
    backward_flops: float

    @property
    def flops(self) -> float:
        return self.forward_flops + self.backward_flops


class StepModel:
    """A causal LM with its adapter, of which only shapes exist.

    Args: config of transformers. adapter: one of ADAPTERS. dtype: of the frozen weights and the activations.
    lora_rank: of LoRA, or how many columns PaCA trains of each weight.
    adapter_dtype: of what the adapter trains; None: float32, as PEFT does. accumulation: gradients of all trained
    parameters stay from one micro-batch to the next. use_cache: keep keys and values, as configs ask for and trainers
    switch off. cut: simulate few of the blocks where they are alike.
    Errors: UserError when transformers or PEFT cannot build it, or `apply_dropbp` cannot gate it.
    """

    def __init__(
        self,
        config: Any,
        adapter: str = "lora",
        lora_rank: int = 8,
        dtype: torch.dtype = torch.bfloat16,
        adapter_dtype: torch.dtype | None = None,
        optimizer: str = "adamw",
        accumulation: bool = False,
        use_cache: bool = False,
        cut: bool = True,
    ):
        config.use_cache = use_cache
        self.model = _on_meta(config, adapter, lora_rank, dtype, adapter_dtype)
        self.vocab_size = config.get_text_config().vocab_size
        self.accumulation = accumulation
        self._count(adapter, optimizer)
        self._find_blocks(config)
        self.cut = cut and self.are_alike
        if self.cut:  # as many runs as a block has branches and one: all kept, ..., none
            self._set_num_blocks(min(len(self.blocks), (max(self.num_gates) + 1) * NUM_OF_A_RUN))
        self.mode = FakeTensorMode(allow_non_fake_inputs=False)
        make_fake(self.model, self.mode)
        if adapter in IN_FOUR_BITS.values():
            four_bit.mark(self.model)
        self._predicted: dict[Setting, Prediction] = {}

    def _count(self, adapter: str, optimizer: str) -> None:
        parameters, buffers = list(self.model.parameters()), list(self.model.buffers())
        self.num_parameters = sum(parameter.numel() for parameter in parameters)
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self.num_trained = sum(parameter.numel() for parameter in trained)
        self.gradient_bytes = sum(parameter.nbytes for parameter in trained)
        self.weight_bytes = sum(tensor.nbytes for tensor in parameters + buffers)
        if adapter in IN_FOUR_BITS.values():
            self.weight_bytes -= four_bit.saved_bytes(self.model)
        self.optimizer_bytes = {"adamw": 2 * self.gradient_bytes, "adamw8bit": 2 * self.num_trained, "sgd": 0}[
            optimizer
        ]

    def _find_blocks(self, config: Any) -> None:
        """The blocks that have gates, in order, the list that holds them, and whether they are all alike."""
        try:
            handler = apply_dropbp(self.model, 0.0)
        except ValueError as error:
            raise UserError(f"--model: {error}") from error
        names = list(dict.fromkeys(name.rpartition(".")[0] for name in handler.gates))
        gates_of = [[name for name in handler.gates if name.rpartition(".")[0] == block] for block in names]
        remove_dropbp(self.model)
        self.blocks = [self.model.get_submodule(name) for name in names]
        self.num_gates = [len(gates) for gates in gates_of]
        holders = {name.rpartition(".")[0] for name in names}
        self._holder = holders.pop() if len(holders) == 1 else None
        kinds = getattr(config.get_text_config(), "layer_types", None) or [None] * len(names)
        looks = {(repr(block), kind) for block, kind in zip(self.blocks, kinds, strict=False)}
        all_in_one = self._holder is not None and len(self.model.get_submodule(self._holder)) == len(names)  # type: ignore[arg-type]
        self.are_alike = all_in_one and len(looks) == 1

    def _set_num_blocks(self, num: int) -> None:
        assert self._holder is not None
        parent, _, name = self._holder.rpartition(".")
        setattr(self.model.get_submodule(parent), name, nn.ModuleList(self.blocks[:num]))

    # ---- one step

    def predict(self, setting: Setting) -> Prediction:
        """Peak memory and FLOPs of a step.

        The plan is the one of `worst_plans` that needs most; other plans of the balanced sampler need a little less.
        Errors: UserError when the model cannot run on fake tensors.
        """
        if setting not in self._predicted:
            costs = [self.cost(setting, plan) for plan in worst_plans(self.num_gates, setting.drop_rate)]
            cost = max(costs, key=lambda cost: cost.peak_bytes)
            by_tag = {"weights": self.weight_bytes, "optimizer": self.optimizer_bytes, **cost.peak_by_tag}
            if self.accumulation:
                by_tag[GRADIENTS] = self.gradient_bytes
            peak = sum(by_tag.values())
            self._predicted[setting] = Prediction(setting, peak, by_tag, cost.forward_flops, cost.backward_flops)
        return self._predicted[setting]

    def cost(self, setting: Setting, plan: Plan) -> Cost:
        """The simulated step under a plan: for each block, the entries of its branches."""
        shown = _shown(plan) if self.cut else list(range(len(plan)))
        if self.cut:
            self._set_num_blocks(len(shown))
        kept = [entry for number in shown for entry in plan[number]]
        num_more = {
            place: after - number - 1
            for place, (number, after) in enumerate(zip(shown, [*shown[1:], len(plan)], strict=True))
        }
        targets = self._target_plan(setting)
        with self._as_set(setting, kept), self.mode, _one_sequence_a_row(), _readable_errors():
            tokens = torch.zeros(setting.batch_size, setting.seq_len, dtype=torch.int64)
            labels = tokens if targets is None else with_plan(torch.zeros_like(tokens), targets)
            if self.accumulation:
                for parameter in self.model.parameters():
                    if parameter.requires_grad:
                        parameter.grad = torch.empty_like(parameter)
            segments = simulate(
                lambda: self.model(input_ids=tokens, labels=labels).loss,
                self.model,
                self.blocks[: len(shown)],
                self._tag,
            )
        return total(extend(segments, num_more))

    def _target_plan(self, setting: Setting) -> TargetPlan | None:
        """Made of values, which fake labels do not have."""
        if setting.target_share is None:
            return None
        labels = torch.zeros(setting.batch_size, setting.seq_len, dtype=torch.int64)
        labels[:, : -setting.num_targets] = IGNORED
        plan = plan_targets(labels)
        fake = self.mode.from_tensor
        stages = [replace(stage, rows=fake(stage.rows), is_row=fake(stage.is_row)) for stage in plan.stages]
        return replace(plan, stages=tuple(stages), documents=fake(plan.documents), shift_labels=fake(plan.shift_labels))

    def _tag(self, tensor: Tensor) -> str:
        return LOGITS if tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size else ACTIVATIONS

    @contextlib.contextmanager
    def _as_set(self, setting: Setting, kept: Sequence[bool]) -> Iterator[None]:
        model: Any = self.model
        by_branch = setting.checkpoint if setting.checkpoint in ("kept", "sliced") else None
        handler = apply_dropbp(
            model,
            setting.drop_rate,
            dropped_runs=setting.dropped_runs,
            fused_loss=setting.fused_loss,
            fused=setting.fused,
            checkpoint=by_branch,
            context=None if setting.target_share is None else "inference",
        )
        try:
            handler.set_plan(kept)
            # There is no noise to repeat, and a fake generator has no state.
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            if by_branch:
                for gate in handler.gates.values():
                    gate.checkpoint = functools.partial(checkpoint, **options)
            if setting.checkpoint == "block":
                set_checkpointing(model, options)
            yield
        finally:
            if setting.checkpoint == "block":
                set_checkpointing(model, None)
                model.disable_input_require_grads()  # switched on with it; left on, it costs later settings FLOPs
            remove_dropbp(model)


def worst_plans(num_gates: Sequence[int], drop_rate: float) -> list[Plan]:
    """The plans among which is the one that needs most memory: for each block, the entries of its branches.

    The balanced sampler keeps, of all branches and of each kind, the expected number rounded down or up. Here as many
    as it ever keeps are kept, in the first blocks, so that all they save is live while the dropped ones run. Where not
    every kind can be rounded up at once there is a plan for each choice.
    """
    depth, num_kinds = len(num_gates), max(num_gates)
    share = 1.0 - drop_rate
    fewest = math.floor(depth * share + 1e-9)
    num_kept = math.ceil(sum(num_gates) * share - 1e-9)  # never 0
    num_up = min(num_kinds, max(0, num_kept - num_kinds * fewest))
    return [
        [tuple(number < fewest + (kind in up) for kind in range(num)) for number, num in enumerate(num_gates)]
        for up in itertools.combinations(range(num_kinds), num_up)
    ]


def _shown(plan: Plan) -> list[int]:
    """Which blocks are simulated: of each run of equal entries the first, the second and the last."""
    shown: list[int] = []
    for number in range(len(plan)):
        is_first = number == 0 or plan[number] != plan[number - 1]
        is_last = number == len(plan) - 1 or plan[number] != plan[number + 1]
        is_second = not is_first and (number == 1 or plan[number - 1] != plan[number - 2])
        if is_first or is_second or is_last:
            shown.append(number)
    return shown


def _on_meta(
    config: Any, adapter: str, lora_rank: int, dtype: torch.dtype, adapter_dtype: torch.dtype | None
) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about initialisation: there is nothing to initialise
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
            if adapter == "full":
                return model.train()
            from peft import LoraConfig, get_peft_model

            kind: Any = LoraConfig
            if adapter in ("paca", "qpaca"):
                from ..paca import PacaConfig

                kind = PacaConfig
            wanted = kind(r=lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(model, wanted, autocast_adapter_dtype=False)
    except (ValueError, KeyError, AttributeError, RuntimeError, ZeroDivisionError, TypeError) as error:
        raise UserError(
            f"--model: transformers cannot build a causal LM of this config: {first_line(error)}"
        ) from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(adapter_dtype or torch.float32)
    return model.train()


def _one_sequence_a_row() -> Any:
    """transformers looks into position ids for packed sequences; fake ones have no values, and here are none packed.

    Taken as packed, every block would get a mask of seq_len x seq_len.
    """
    from transformers import masking_utils

    return mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None)


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(
            f"--model: its forward looks at values ({error.func}), as a mixture of experts does to route tokens; "
            "without weights there are none"
        ) from error
