"""The target plan of a batch: which tokens need a backward, and in which order the others can run without one.

A **target row** is a token whose logits enter the loss: its *next* token has a label. Every other token is **context**:
it serves targets through its keys and values only. Rows run in stages, each by itself:

    stage 0   context before the first target of its document    no autograd
    stage 1   the targets that follow                            autograd
    stage 2   context between these and later targets            no autograd
    ...

A row may attend to what its document holds before it; all of that is in earlier stages or in its own. Rows that no
later target could see (after the last target, in samples without a target, padding) are in no stage: they do not run.

Many small stages are slow. In place of these, all context can run in one stage, and with it the targets that it sees;
then all targets run in a second one, with autograd. These see the second run of what runs twice only.

A step may train on a part of the targets; the others are context then. The part is a window, one run of each sample's
targets, or drawn at random: such targets stand everywhere among the context, so there are two stages. A share of the
context may be kept as well, at random: it runs once more with the targets that follow.
"""

import math
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .choices import TURNS, check_choice
from .permutation import draw_num_kept, draw_permutation

IGNORED = -100  # the label of a token without a loss, as PyTorch and transformers have it
_RULE = "_dropbp_targets"
# A pass of the decoder over fewer rows takes as long on a GPU, which waits for the calls of the host, and holds little
# (200 MiB at a width of 4096): by calls and widths, not measured on one. On a CPU, context 1,024 rows at a time made a
# checkpointed step of the size in benchmarks/steps.py a tenth longer.
PASS_ROWS = 2048
_CONTEXT, _TARGETS = -1, -2  # stand for these where rows of branches are drawn: no branch has such a number


@dataclass
class TargetRule:
    """What the target plans of a model follow: options of apply_dropbp, and what its handler was told in `step`.

    labels: of the batches until the next step, where the model is called without any.
    num_target: targets of the last batch since the step; None: no batch yet. was_dense: whether it had nothing to save.
        num_tokens: all its tokens, padding included.
    without_gradient: which samples of the batch of now have a loss without a gradient, bool (B,), as the training loop
        knows; None: it knows of none.
    is_inference: whether such samples run now: by a plan, though without autograd.
    is_anchor: whether one token runs now, for gradients of zero and no output.
    zero_gradient: whether until the next step the loss of a batch without a target has a graph all the same, for a
        training loop that runs its backward come what may.
    """

    context_gradient: str = "none"
    context_keep: float = 0.0
    shared_context: bool = False
    target_windows: int = 1
    target_keep: float = 1.0
    seed: int = 0
    step: int = 0
    labels: Tensor | None = None
    num_target: int | None = None
    was_dense: bool = False
    num_tokens: int = 0
    without_gradient: Tensor | None = None
    is_inference: bool = False
    is_anchor: bool = False
    zero_gradient: bool = False
    has_warned: bool = False
    has_warned_of_labels: bool = False
    has_warned_of_embeds: bool = False

    @property
    def trained_share(self) -> float:
        """The share of the labels that a step trains on, the others being context."""
        return self.target_keep / self.target_windows

    @property
    def trains_on_part_by(self) -> str | None:
        """The option for which a step trains on a part of the labels, None where it trains on all."""
        if self.target_windows > 1:
            return "target_windows"
        return "target_keep" if self.target_keep < 1.0 else None

    def put_on(self, decoder: nn.Module) -> None:
        """Let this be the rule of `decoder`."""
        vars(decoder)[_RULE] = self

    @staticmethod
    def of(model: nn.Module) -> "TargetRule | None":
        """The rule of `model` or of the decoder inside, None where it has none."""
        return next((vars(module)[_RULE] for module in model.modules() if _RULE in vars(module)), None)

    @staticmethod
    def on(decoder: nn.Module) -> "TargetRule":
        """The rule that was put on `decoder`."""
        rule: TargetRule = vars(decoder)[_RULE]
        return rule

    @staticmethod
    def take_off(decoder: nn.Module) -> None:
        """Undo `put_on`."""
        vars(decoder).pop(_RULE, None)


@dataclass(frozen=True)
class Stage:
    """Rows of each sample that run together, in their order, padded on the right to the longest.

    rows: int64 (B, L), places along the sequence; 0 where padding. is_row: bool (B, L), False where padding.
    is_target: whether these are target rows, and kept context. is_prefix: whether they are the first rows of one
    document in every sample, so that a causal mask does: what stands on the right is seen by nobody.
    targets: the columns that hold targets, int64 (B, T), and where these are no padding, bool (B, T); None: all.
    runs_again: whether some of the rows ran in an earlier stage: from now on they are seen as they are here.
    num_rows: how many rows each sample has here, numbers of the host.
    samples: of context that samples share, those that run for all, int64 (U,); None: every sample runs.
    sample_of: whose keys each sample takes, int64 (B,), indices into samples.
    """

    rows: Tensor
    is_row: Tensor
    is_target: bool
    is_prefix: bool
    num_rows: tuple[int, ...]
    targets: tuple[Tensor, Tensor] | None = None
    runs_again: bool = False
    samples: Tensor | None = None
    sample_of: Tensor | None = None

    def gather(self, values: Tensor) -> Tensor:
        """values (B, S, ...) of these rows: (B, L, ...)."""
        return _take(values, self.rows)

    def running(self, values: Tensor) -> Tensor:
        """Of values (B, ...) those of the samples that run: (B, ...) or (U, ...)."""
        return values if self.samples is None else values.index_select(0, self.samples)

    def of_targets(self, values: Tensor) -> Tensor:
        """Of values (B, L, ...) of these rows those of the targets: (B, T, ...)."""
        return values if self.targets is None else _take(values, self.targets[0])

    @property
    def padded_share(self) -> float:
        """The share of the stage's rows that are padding; of a context that samples share, not known."""
        return 0.0 if self.samples is not None else 1.0 - sum(self.num_rows) / max(1, self.rows.numel())

    def real_rows(self) -> Tensor:
        """The flattened stage's rows that are no padding, int64, their number known on the host."""
        order = self.is_row.flatten().to(torch.int8).argsort(descending=True, stable=True)
        return order[: sum(self.num_rows)]

    def slices(self, width: int) -> "list[Stage]":
        """The same rows in stages of at most `width` columns each, as even as can be."""
        num_rows = self.rows.shape[1]
        width = math.ceil(num_rows / math.ceil(num_rows / width))
        return [
            replace(
                self,
                rows=self.rows[:, start : start + width],
                is_row=self.is_row[:, start : start + width],
                is_prefix=self.is_prefix and start == 0,
                num_rows=tuple(min(max(count - start, 0), width) for count in self.num_rows),
            )
            for start in range(0, num_rows, width)
        ]


@dataclass(frozen=True, eq=False)
class StagedRows:
    """The rows of a batch that run with autograd, by the stages in which they do: what plans by rows draw from.

    stages: these stages, in their order. seq_len: of the batch.
    """

    stages: tuple[Stage, ...]
    seq_len: int


def _take(values: Tensor, index: Tensor) -> Tensor:
    shape = index.shape
    return values.gather(1, index.reshape(*shape, *(1,) * (values.dim() - 2)).expand(*shape, *values.shape[2:]))


@dataclass(frozen=True)
class TargetPlan:
    """The stages of a batch and what each row needs to know.

    stages: in the order in which they run; the last one is a target stage.
    documents: int64 (B, S), which document a row belongs to.
    shift_labels: int64 (B, S), the label that a row's logits are compared with.
    num_context, num_target, num_skipped: how many rows run without autograd, predict a label, and do not run; padding
        is not counted. num_again: how many of the first run once more, with autograd.
    is_packed: whether a sample holds several documents.
    """

    stages: tuple[Stage, ...]
    documents: Tensor
    shift_labels: Tensor
    num_context: int
    num_target: int
    num_skipped: int
    num_again: int
    is_packed: bool

    @property
    def is_dense(self) -> bool:
        """Whether there is nothing to save: no context, and no sample that runs skips more than its last row."""
        num_running = sum(count > 0 for stage in self.stages[:1] for count in stage.num_rows)
        return self.num_context == 0 and self.num_skipped <= num_running

    def staged_rows(self, *, with_context: bool) -> StagedRows:
        """The rows that run with autograd: those of target stages, or of context stages too."""
        return StagedRows(
            tuple(stage for stage in self.stages if stage.is_target or with_context), self.documents.shape[1]
        )

    @property
    def head_rows(self) -> tuple[Tensor, Tensor]:
        """The rows whose logits enter the loss, in the order in which they run: places (B, T), and is_row (B, T)."""
        stages = [stage for stage in self.stages if stage.is_target]
        is_row = [stage.is_row if stage.targets is None else stage.targets[1] for stage in stages]
        return torch.cat([stage.of_targets(stage.rows) for stage in stages], 1), torch.cat(is_row, 1)

    def to_places(self, values: Tensor, width: int) -> Tensor:
        """values (B, T, ...) of `head_rows` at their places, (B, width, ...); zeros elsewhere."""
        rows, is_row = self.head_rows
        index = rows.reshape(*rows.shape, *(1,) * (values.dim() - 2)).expand_as(values)
        values = values.masked_fill(~is_row.reshape(*rows.shape, *(1,) * (values.dim() - 2)), 0)
        summed = values.to(torch.int8) if values.dtype == torch.bool else values
        # Added, since padded rows all have place 0.
        placed = summed.new_zeros(rows.shape[0], width, *values.shape[2:]).scatter_add(1, index, summed)
        return placed.to(values.dtype)

    def with_shared_context(self, tokens: Tensor, position_ids: Tensor) -> "TargetPlan":
        """The same plan, where samples that begin with the same context run it once.

        Shapes: tokens int64 (B, S); position_ids int64 (B, S) or (1, S).
        Cost:   compared on the host; tokens are waited for.
        """
        first = self.stages[0] if self.stages else None
        if first is None or first.is_target:
            return self
        places, documents = first.rows, first.gather(self.documents)
        same = [first.gather(tokens), first.gather(position_ids.expand_as(self.documents))]
        same += [places - places[:, :1], documents - documents[:, :1]]  # who attends to whom
        rows = torch.stack([torch.where(first.is_row, values, -1) for values in same], dim=-1).flatten(1).cpu()
        distinct, sample_of = rows.unique(dim=0, return_inverse=True)
        num_samples, num_distinct = len(rows), len(distinct)
        if num_distinct == num_samples:
            return self
        samples = torch.full((num_distinct,), num_samples).scatter_reduce(
            0, sample_of, torch.arange(num_samples), "amin"
        )
        device = first.rows.device
        shared = replace(first, samples=samples.to(device), sample_of=sample_of.to(device))
        num_saved = int(first.is_row.sum()) - int(shared.running(first.is_row).sum())
        return replace(self, stages=(shared, *self.stages[1:]), num_context=self.num_context - num_saved)

    def with_slices(self, max_rows: int) -> "TargetPlan":
        """The same plan with context stages cut along the sequence, so that at most max_rows rows run at a time.

        One column of every sample runs at least; padding counts.
        """
        stages: list[Stage] = []
        for stage in self.stages:
            num_samples, num_columns = stage.running(stage.rows).shape
            width = max(1, max_rows // num_samples)
            stages += [stage] if stage.is_target or num_columns <= width else stage.slices(width)
        return replace(self, stages=tuple(stages))


def plan_targets(
    labels: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    context_keep: float = 0.0,
    target_windows: int = 1,
    target_keep: float = 1.0,
    turns: str = "auto",
    seed: int = 0,
    step: int = 0,
) -> TargetPlan:
    """The target plan of a batch.

    Shapes: labels int64 (B, S), -100 where there is no loss, not shifted; attention_mask (B, S), 0 where padding, on
            either side; position_ids int64 (B, S) or (1, S): without attention_mask, a place where they do not go up by
            one starts a new document (packed sequences).
    context_keep: share of the context rows that run once more, with autograd; which, is a pure function of (seed, step)
            and the batch: the first of them in one random order of all places.
    target_windows: into how many runs of equal length the targets of each sample are cut. Those of one run stay
            targets: the same run for all samples, another one in each of so many steps, in an order by the seed.
    target_keep: share of the targets, of those of a window, that stay targets: drawn at random for each sample, a pure
            function of (seed, step) and the batch; one of the batch at least.
    turns: "apart": two stages for each turn of a conversation, in which a row runs once; "together": two for all, of
            which the first runs the targets that context sees, too; "auto": the way that runs fewer rows, padding
            included, where a pass counts as PASS_ROWS at least. Drawn targets run together in any case.
    Errors: ValueError when shapes do not fit, a padded row predicts a label, or turns is unknown.
    Cost:   planned on the host; labels are waited for once a batch.
    """
    check_choice("turns", turns, TURNS)
    if labels.dim() != 2:
        raise ValueError(f"labels: expected shape (batch, seq_len), got {tuple(labels.shape)}")
    for name, tensor in (("attention_mask", attention_mask), ("position_ids", position_ids)):
        if tensor is not None and tuple(tensor.shape) not in (tuple(labels.shape), (1, labels.shape[1])):
            raise ValueError(f"{name}: expected labels' shape {tuple(labels.shape)}, got {tuple(tensor.shape)}")
    device, labels = labels.device, labels.detach().cpu()
    shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    is_target = shift_labels != IGNORED
    is_real = torch.ones_like(is_target) if attention_mask is None else attention_mask.cpu().expand_as(labels) != 0
    if (is_target & ~is_real).any():
        sample, row = (is_target & ~is_real).nonzero()[0].tolist()
        raise ValueError(
            f"labels: expected {IGNORED} after every padded row, but in sample {sample} the padding at place {row} "
            f"predicts label {int(shift_labels[sample, row])}"
        )
    if target_windows > 1:
        is_target &= _window_of_targets(is_target, target_windows) == _window_of_step(target_windows, seed, step)
    if target_keep < 1.0:
        is_target = _share_of_targets(is_target, target_keep, seed, step)
    shift_labels = shift_labels.masked_fill(~is_target, IGNORED)
    documents = torch.zeros_like(labels)
    if attention_mask is None and position_ids is not None and labels.shape[1] > 1:
        steps = position_ids.detach().cpu().expand_as(labels).diff(dim=1)
        documents[:, 1:] = (steps != 1).cumsum(1)

    # The stages in which a row runs for the first and for the last time: an even one is context, an odd one targets.
    first = last = _stage_numbers(is_target, is_real, documents)
    if target_keep < 1.0 or (turns != "apart" and (last > 1).any()):
        again = _two_stages(is_target, runs=last >= 0, documents=documents)
        if target_keep < 1.0 or turns == "together" or _cost(*again) < _cost(first, last):
            first, last = again
    if context_keep > 0.0:
        is_context = (last >= 0) & ~is_target
        num_kept = draw_num_kept(int(is_context.sum()), 1.0 - context_keep, seed=seed, step=step, branch=_CONTEXT)
        order = draw_permutation(last.numel(), seed=seed, step=step, branch=_CONTEXT)
        last = last.clone()
        last.view(-1)[order[is_context.flatten()[order]][:num_kept]] += 1
    stages = []
    for number in range(int(last.max()) + 1 if last.numel() else 0):
        runs_again = (last == number) & (first < number)
        chosen = runs_again | (first == number)
        if chosen.any():
            stages.append(_stage(chosen, is_target, documents, number % 2 == 1, bool(runs_again.any()), device))
    return TargetPlan(
        tuple(stages),
        documents.to(device),
        shift_labels.to(device),
        num_context=int(((first >= 0) & (first % 2 == 0)).sum()),
        num_target=int(is_target.sum()),
        num_skipped=int((is_real & (last < 0)).sum()),
        num_again=int((first < last).sum()),
        is_packed=bool(documents.any()),
    )


def _window_of_targets(is_target: Tensor, num_windows: int) -> Tensor:
    """The window of every target, int64 (B, S): of n targets of a sample the i-th is in window i * num_windows // n."""
    order = is_target.cumsum(1) - 1
    return order * num_windows // is_target.sum(1, keepdim=True).clamp(min=1)


def _window_of_step(num_windows: int, seed: int, step: int) -> int:
    """Every window once in num_windows steps, in a random order."""
    turn, place = divmod(step, num_windows)
    return random.Random(f"target_windows:{seed}:{turn}").sample(range(num_windows), num_windows)[place]


def _share_of_targets(is_target: Tensor, share: float, seed: int, step: int) -> Tensor:
    """Which targets are drawn, bool (B, S): `share` of each sample's, up to rounding, which adds up over the batch."""
    order = draw_permutation(is_target.numel(), seed=seed, step=step, branch=_TARGETS)
    turn = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).view_as(is_target)
    turn = turn.masked_fill(~is_target, len(order))
    if not is_target.any():
        return is_target
    # Counts between the marks of one ruler that begins at random: each is right on average, and so is their sum.
    so_far = torch.nn.functional.pad(is_target.sum(1).cumsum(0), (1, 0)).double()
    counts = (so_far * share + random.Random(f"target_keep:{seed}:{step}").random()).floor().diff()
    is_drawn = turn.argsort(1).argsort(1) < counts.unsqueeze(1)
    return is_drawn if is_drawn.any() else turn == turn.min()


def _two_stages(is_target: Tensor, runs: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last stage of every row (B, S), where all context of a document runs before its targets."""
    last = torch.where(runs, is_target.long(), -1)
    return last - (is_target & _stands_before(runs & ~is_target, documents)).long(), last


def _cost(first: Tensor, last: Tensor) -> int:
    """Rows that the stages run, padding included, no stage counted below PASS_ROWS."""
    numbers = torch.arange(int(last.max()) + 1).view(-1, 1, 1)
    width = ((first == numbers) | (last == numbers)).sum(2).amax(1)  # of each stage
    return int((width * len(first)).clamp(min=PASS_ROWS)[width > 0].sum())


def _stage_numbers(is_target: Tensor, is_real: Tensor, documents: Tensor) -> Tensor:
    """The stage of every row (B, S): 2 x (turns of its document before it) + is_target; -1 where a row does not run."""
    runs = is_target | (is_real & _stands_before(is_target, documents))
    places = torch.arange(is_target.shape[1]).expand_as(documents)
    starts = torch.ones_like(is_target)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = torch.where(starts, places, 0).cummax(1).values  # of the row's document

    # The last real row before each row; where it was a target of the same document and this is context, a turn begins.
    before = torch.full_like(places, -1)
    before[:, 1:] = torch.where(is_real, places, -1).cummax(1).values[:, :-1]
    after_target = is_target.gather(1, before.clamp(min=0)) & (before >= first)
    turns = (is_real & ~is_target & after_target).cumsum(1)
    turns = turns - turns.gather(1, first)  # no turn begins at the first row of a document
    return torch.where(runs, 2 * turns + is_target, -1)


def _stands_before(rows: Tensor, documents: Tensor) -> Tensor:
    """Whether one of `rows`, bool (B, S), stands behind each row in its document."""
    ends = torch.ones_like(rows)
    ends[:, :-1] = documents[:, 1:] != documents[:, :-1]
    num_rows = rows.shape[1]
    last = torch.where(ends, torch.arange(num_rows).expand_as(documents), num_rows - 1).flip(1).cummin(1).values.flip(1)
    so_far = rows.cumsum(1)
    return so_far.gather(1, last) > so_far


def _stage(
    chosen: Tensor, is_target: Tensor, documents: Tensor, runs_targets: bool, runs_again: bool, device: torch.device
) -> Stage:
    rows, is_row = _columns(chosen)
    width = rows.shape[1]
    is_first = (rows == torch.arange(width)) & (documents.gather(1, rows) == documents[:, :1])
    is_prefix = bool((is_first | ~is_row).all())
    targets = None
    if runs_targets and (chosen & ~is_target).any():
        columns, is_column = _columns(is_row & is_target.gather(1, rows))
        targets = columns.to(device), is_column.to(device)
    num_rows = tuple(chosen.sum(1).tolist())
    return Stage(rows.to(device), is_row.to(device), runs_targets, is_prefix, num_rows, targets, runs_again)


def _columns(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Where each sample's chosen ones stand, in order, padded on the right with 0: (B, L), and what is no padding."""
    counts = chosen.sum(1)
    width = int(counts.max())
    columns = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
    is_column = torch.arange(width) < counts.unsqueeze(1)
    return torch.where(is_column, columns, 0), is_column
