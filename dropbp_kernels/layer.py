"""The gate of one residual branch: x + branch(x), with or without a backward for the branch.

    x = self.gate_attention.residual_add(x, lambda x: self.attention(self.norm_1(x)))
    x = self.gate_mlp.residual_add(x, lambda x: self.mlp(self.norm_2(x)))

Pass the norm inside the branch: it belongs to it, and a dropped branch must not save the norm's input either.

A kept branch runs as written. A dropped branch runs like inference, under ``no_grad``: it builds no graph and saves
nothing, and x + constant gives the residual stream its gradient unchanged. The gate only reads its plan entry (`kept`);
a `DropBPHandler` draws the plan of a step and writes it into all gates of a model.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .autocast import is_autocast_on
from .by_rows import RowSplit
from .choices import DROPPED_RUNS, check_choice
from .ops.gated_residual_add import gated_residual_add
from .padding import run_without_padding
from .row_plan import Batch, ChosenRows, Rows, RowsOfBranch
from .slicing import Records, run_in_slices
from .targets import StagedRows

# What a plan holds for a branch: kept, dropped, or which of its rows are kept.
Entry = bool | RowsOfBranch | ChosenRows

# Runs a branch and keeps its input alone; the rest is computed again in the backward, up to the last tensor it needs.
checkpoint_branch: Callable[..., Any] = partial(checkpoint, use_reentrant=False)


def as_inference(device_type: str) -> AbstractContextManager[None]:
    """How a dropped branch runs: under no_grad, and without autocast's cache of cast weights.

    The cache would hold a copy of every trained weight of the branch until the autocast region ends, behind the loss.
    """
    is_cached = is_autocast_on(device_type) and torch.is_autocast_cache_enabled()
    return _without_cast_cache() if is_cached else torch.no_grad()


@contextmanager
def _without_cast_cache() -> Iterator[None]:
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_autocast_cache_enabled(True)


def add_branch(residual: Tensor, output: Tensor, grad_scale: float = 1.0) -> Tensor:
    """residual + the output of a branch; a branch wider than the residual promotes it, as x + y does.

    Errors: TypeError for a branch that returned no tensor.
    """
    if not isinstance(output, Tensor):
        raise TypeError(f"branch: expected it to return a tensor, got {type(output).__name__}")
    if output.dtype is not residual.dtype:  # float32 norms give wider branches
        residual = residual.to(torch.promote_types(residual.dtype, output.dtype))
    return gated_residual_add(residual, output, grad_scale=grad_scale)


class Unstepped(Protocol):
    """Who is told of training calls until a handler has drawn plans (`gates.UnsteppedCalls`)."""

    def note_call(self) -> None:
        """The gate was called with gradients enabled, and not for a probe."""


class Watch(Protocol):
    """Who looks at a branch from its gate, while a calibration runs."""

    def entered(self, residual: Tensor) -> Tensor:
        """What the branch shall read in place of `residual`: the same values."""

    def returned(self, output: Any) -> Any:
        """What shall enter the stream in place of a kept branch's `output`: the same values."""


class DropBP(nn.Module):
    """The gate of one droppable residual branch. It has no parameters and no buffers, so state_dict keys do not change.

    Args:
        flops: forward FLOPs of the branch as a function of (batch_size, seq_len), or None when unknown
            (if so, it has to be for all gates of a model).
        modules: the modules that make up the branch, norm included; they tell a handler whether the branch has anything
            to train. They stay where they are: the gate does not register them. Empty: unknown, taken as trainable.
        grad_scale: factor on the gradient entering the branch when it is kept; 1 is DropBP as published.
        dropped_runs: how a dropped branch runs. "inference" (default): under no_grad. "detach": with autograd and
            detached afterwards, as the published code does; the same gradients, nothing saved. Kept as a control.
        per_token: whether the branch processes tokens independently, as an MLP does and an attention does not. If so,
            a plan of granularity "token" keeps a share of its tokens, else a share of the samples.

    Attributes:
        kept: the gate's entry of the plan: a bool or, in a plan by rows (samples or tokens), which rows are kept; True
            until a handler says otherwise.
        num_samples, is_real: the batch size of the model and which of its tokens, bool (batch, seq), are not padding,
            where somebody knows and tells the gate; 0 and None: unknown, and all are real.
        stage: while a stage of a target plan runs with autograd, all stages that do and the number of this one; else
            None.
        real_rows: the tokens of a stage that are no padding, int64 (K,), where a branch per token runs on these alone;
            None: it runs on all.
        records: gives, by name, the lists in which somebody keeps what modules inside the branch return (transformers:
            router logits), by default none; what a call by rows adds there twice is put together.
        checkpoint: None, or the function(branch, residual) that runs a kept branch in training mode so that it saves
            its input alone: `checkpoint_branch`, or what transformers was told to use.
        slice_tokens: how many tokens at most a checkpointed or a dropped branch takes at a time; 0: all.
        watch: None, or who is shown what a branch is given and what a kept one returns (`Watch`, of a calibration).
        unstepped: None, or who looks out for a training loop that draws no plans; of a model's first gate.
        was_called: whether the gate was called with gradients enabled since the handler last drew a plan.
        batch_size, seq_len: the first two dimensions of the residual in the last such call, 0 before it.

    Source: DropBP (arXiv 2402.17812), section 3; the module D of a block.
    """

    def __init__(
        self,
        flops: Callable[[int, int], float] | None = None,
        *,
        modules: Sequence[nn.Module] = (),
        grad_scale: float = 1.0,
        dropped_runs: str = "inference",
        per_token: bool = False,
    ):
        super().__init__()
        check_choice("dropped_runs", dropped_runs, DROPPED_RUNS)
        if flops is not None and not callable(flops):
            raise TypeError(f"flops: expected a function (batch_size, seq_len) -> FLOPs, or None, got {flops!r}")
        if isinstance(modules, nn.Module) and not isinstance(modules, nn.Sequential | nn.ModuleList):
            raise TypeError(f"modules: expected a list of modules, got one {type(modules).__name__}")
        self.flops = flops
        self.modules_of_branch = tuple(modules)  # a tuple, so that nn.Module does not register them
        self.grad_scale = grad_scale
        self.dropped_runs = dropped_runs
        self.per_token = per_token
        self.kept: Entry = True
        self.num_samples = 0
        self.is_real: Tensor | None = None
        self.stage: tuple[StagedRows, int] | None = None
        self.real_rows: Tensor | None = None
        self.records: Records = dict
        self.checkpoint: Callable[..., Any] | None = None
        self.slice_tokens = 0
        self.watch: Watch | None = None
        self.unstepped: Unstepped | None = None
        self.was_called = False
        self.batch_size = 0
        self.seq_len = 0

    def forward(self, residual: Tensor, branch: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Same as `residual_add`; here so that module hooks and `torch.compile` of the gate work."""
        return self.residual_add(residual, branch, *args, **kwargs)

    def residual_add(self, residual: Tensor, branch: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return residual + branch(residual, ...); in a dropped branch only the residual gets a gradient.

        Where the plan differs from row to row, the branch is called twice, with the dropped and with the kept rows, and
        must process rows independently. What it needs of each sample (a mask, positions) is passed through args and
        kwargs, which are taken apart like the residual: tensors whose first dimension is the batch, of three or more
        dimensions (docs/row_plans.md). Tokens are passed as a batch of one sample.

        Shapes: residual (batch, ..., D); branch maps it to the same shape.
        Dtypes: those of `ops.gated_residual_add`; a branch wider than the residual promotes it, as x + y does.
        Errors: those of `ops.gated_residual_add`; ValueError when the plan was made for another number of rows, or the
                branch returns another number than it was given.
        Cost:   kept: the branch and one add. Dropped: the branch under no_grad and one add; 0 bytes saved, 0 autograd
                nodes of its own (the residual's add is one node that saves nothing and runs no backward kernel). By
                rows: the branch in two calls, one copy of the residual's rows, one add; saves what kept rows save.
        Source: DropBP (arXiv 2402.17812), x + D(f(norm(x))).
        """
        if isinstance(branch, Tensor):
            raise TypeError("branch: expected a function of the residual, which the gate calls, got what it returns")
        split = self.split(residual)
        if split is None:
            return add_branch(residual, self.run(residual, branch, *args, **kwargs), self.grad_scale)
        return self.add_rows(split, split.take(residual), branch, *args, **kwargs)

    def add_rows(
        self,
        split: RowSplit,
        rows: tuple[Tensor, Tensor, Tensor],
        branch: Callable[..., Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As `residual_add`, for a call that is taken apart already: rows are (kept, dropped, residual).

        So a norm that reads rows through a permutation (`ops.permuted_norm`) can stand before the branch.
        """
        kept, dropped, residual = rows
        of_row = split.row_shape(residual)[1:]  # of samples of one token the norm's rows have a dimension more
        parts = [
            (split.shaped(part[:count].reshape(count, *of_row)),)
            for part, count in ((kept, len(split.kept)), (dropped, len(split.dropped)))
        ]
        return split.add(residual, *self.run_rows(split, branch, args, kwargs, parts), grad_scale=self.grad_scale)

    def run(self, residual: Tensor, branch: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return branch(residual, ...) without the add, for blocks that fuse the add into the next norm.

        The only place where a gate chooses how a whole branch runs: as written, checkpointed or like inference. By
        rows `run_rows` does, and what it returns is put together here: grad_scale is the add's.
        """
        split = self.split(residual)
        if split is not None:
            kept, dropped, _ = split.take(residual)
            parts = ((split.shaped(kept),), (split.shaped(dropped),))
            output: Tensor = split.merge(*self.run_rows(split, branch, args, kwargs, parts))
            return output
        if torch.is_grad_enabled():
            self.note_call(residual)
        if self.watch is not None:
            residual = self.watch.entered(residual)
        entry = self.entry(residual)
        if entry or self.dropped_runs == "detach":
            output = self.without_padding(self.as_kept(branch) if entry else branch)(residual, *args, **kwargs)
            return self.shown(output) if entry else output.detach()
        with as_inference(residual.device.type):
            output = self.without_padding(self.as_dropped(branch))(residual, *args, **kwargs)
        # Its input, or what it closes over, has a graph that the branch did not make.
        return output.detach() if isinstance(output, Tensor) and output.requires_grad else output

    def as_kept(self, branch: Callable[..., Any]) -> Callable[..., Any]:
        """`branch` as a kept one runs: as written, or checkpointed, in slices where the gate has them.

        Without gradients, as the context of a target plan runs in training, the slices alone are left.
        """
        if self.checkpoint is None or not self.training:
            return branch
        # What is computed again is the branch alone, never the gate: a plan drawn since then changes nothing.
        return self.as_dropped(partial(self.checkpoint, branch) if torch.is_grad_enabled() else branch)

    def as_dropped(self, branch: Callable[..., Any]) -> Callable[..., Any]:
        """`branch` as a dropped one runs, under `as_inference`: in slices where the gate has them."""
        return partial(run_in_slices, branch, self.slice_tokens, self.records) if self.slice_tokens else branch

    def without_padding(self, branch: Callable[..., Any]) -> Callable[..., Any]:
        """`branch` as it runs on all rows of a stage: on those that are no padding, where these are few."""
        if self.real_rows is None or self.watch is not None:
            return branch
        return partial(run_without_padding, branch, self.real_rows)

    def run_rows(
        self, split: RowSplit, branch: Callable[..., Any], args: Any, kwargs: Any, parts: Any = ((), ())
    ) -> tuple[Any, Any]:
        """What the branch makes of the kept and of the dropped rows of a plan that differs from row to row.

        args and kwargs are those of a whole call, which are taken apart here; parts are arguments before them that
        are apart already. The dropped rows run first: what they need in passing is freed before the kept rows save
        anything.
        """
        records = self.records()
        begin = {name: len(values) for name, values in records.items()}
        is_inference = self.dropped_runs == "inference"
        try:
            with as_inference(split.batch.device.type) if is_inference else nullcontext():
                args_dropped, kwargs_dropped = split.arguments((args, kwargs), split.dropped)
                run = self.as_dropped(branch) if is_inference else branch
                dropped = run(*parts[1], *args_dropped, **kwargs_dropped)
            middle = {name: len(values) for name, values in records.items()}
            args, kwargs = split.arguments((args, kwargs), split.kept)
            kept = self.as_kept(branch)(*parts[0], *args, **kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            # A compiled op (csrc/checks.h) and a CPU's allocator say so in a RuntimeError.
            lacks_memory = any(words in str(error) for words in ("out of memory", "can't allocate memory"))
            lacks_memory |= isinstance(error, torch.OutOfMemoryError)
            if sys.version_info >= (3, 11) and not lacks_memory:
                error.add_note(
                    f"The gate ran its branch by rows: {len(split.dropped)} dropped and {len(split.kept)} kept ones. "
                    "What a branch needs of each sample (a mask, positions) is to be passed through the gate, as "
                    "residual_add(x, branch, mask), not to be closed over; floats (batch, width) as (batch, 1, width)."
                )
            raise
        for name, values in records.items():
            of_dropped, of_kept = values[begin[name] : middle[name]], values[middle[name] :]
            values[begin[name] :] = map(split.merge, of_kept, of_dropped)
        return kept, dropped

    def entry(self, stream: Tensor) -> bool | Rows:
        """The plan entry for a call on `stream`: whether the branch is kept, or the rows of it that are.

        Without gradients it is kept, unread: so torch.compile makes one graph of it for all plans.
        """
        if not torch.is_grad_enabled():
            return True
        if isinstance(self.kept, bool):
            return self.kept
        rows = self.kept.rows(self.batch_of(stream), per_token=self.per_token)
        return rows if 0 < rows.num_kept < rows.num_rows else rows.num_kept > 0

    def split(self, stream: Tensor) -> RowSplit | None:
        """How to take a call on `stream` apart; None where the branch is kept or dropped as a whole."""
        if not torch.is_grad_enabled() or isinstance(self.kept, bool):
            return None
        entry = self.entry(stream)
        if isinstance(entry, bool):
            return None
        self.note_call(stream)
        return RowSplit(entry, self.batch_of(stream), stream)

    def batch_of(self, stream: Tensor) -> Batch:
        """The batch of which `stream`, (batch, seq, ..., D) or flattened to (batch * seq, D), holds the tokens."""
        if self.stage is not None:
            staged, number = self.stage
            num_samples, seq_len = staged.stages[number].rows.shape
            if tuple(stream.shape[:2]) != (num_samples, seq_len) and stream.shape[0] != num_samples * seq_len:
                raise ValueError(
                    f"stream: expected the rows of a stage, ({num_samples}, {seq_len}, ...), got {tuple(stream.shape)}"
                )
            return Batch(num_samples, seq_len, stream.device, None, staged, number)
        num_samples, seq_len = stream.shape[0], stream.shape[1] if stream.dim() > 2 else 1
        if stream.dim() == 2 and self.num_samples and num_samples % self.num_samples == 0:
            num_samples, seq_len = self.num_samples, num_samples // self.num_samples
        is_real = self.is_real
        if is_real is not None and tuple(is_real.shape) != (num_samples, seq_len):
            is_real = None
        return Batch(num_samples, seq_len, stream.device, is_real)

    def shown(self, output: Any) -> Any:
        """`output` of a kept branch, once whoever watches the gate has seen it."""
        return output if self.watch is None else self.watch.returned(output)

    def note_call(self, residual: Tensor) -> None:
        """Note that the branch runs on `residual`, with gradients enabled.

        Written and never read here: a counter would make torch.compile guard on it and recompile every step.
        """
        shape = residual.shape
        notes = {"was_called": True, "batch_size": shape[0], "seq_len": shape[1] if len(shape) > 2 else 1}
        if torch.compiler.is_compiling():
            for name, value in notes.items():
                setattr(self, name, value)
            return
        if self.unstepped is not None:
            self.unstepped.note_call()
        vars(self).update(notes)  # nn.Module looks for parameters whenever an attribute is set: 3 us each

    def refresh(self) -> None:
        """Called before a plan is set. A gate that is tied to modules finds them again here; this one has none."""

    @property
    def is_checkpointable(self) -> bool:
        """Whether `checkpoint` can make the kept branch save no more than its input; so it is where `run` runs it."""
        return True

    @property
    def records_graph(self) -> bool:
        """Whether autograd records the branch, or may record some of its rows, under the present plan."""
        return torch.is_grad_enabled() and (bool(self.kept) or self.dropped_runs == "detach")

    def is_trainable(self) -> bool:
        """Whether the branch has a parameter to train, as far as the gate knows its modules."""
        if not self.modules_of_branch:
            return True
        return any(p.requires_grad for module in self.modules_of_branch for p in module.parameters())

    def extra_repr(self) -> str:
        kept = self.kept if isinstance(self.kept, bool) else f"{self.kept.kept_share:.3g} of the rows"
        return f"kept={kept}" + (f", grad_scale={self.grad_scale:g}" if self.grad_scale != 1.0 else "")
