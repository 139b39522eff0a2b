"""One training step without weights, data or a GPU: which bytes are live when, and how many FLOPs it takes.

    make_fake(model)                                 # a model on the meta device: shapes and dtypes only
    segments = simulate(step, blocks, tag)           # a list of `Segment`, cut where blocks begin and end
    cost = total(extend(segments, {1: 29}))          # block 1 stands for itself and 29 others like it

The step runs the model's real code, gates and autograd included, on fake tensors: operators give results that have a
shape and no data. So what is live at the peak is counted, not estimated; only operators that need to see values (the
routing of a mixture of experts) cannot run. Blocks that are alike leave alike segments, so a few of them are enough.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .measure import PeakLiveBytes

GRADIENTS = "gradients"
Origin = tuple[str, int, int]  # tag, the block in whose segment it was allocated (-1: in none), num_passes then
Mark = tuple[str, int]  # ("forward" or "backward", number of the block it begins with)
BEGIN, HEAD, LOSS = ("begin", -1), ("head", -1), ("loss", -1)  # before the blocks, after them, the loss's backward


@dataclass(frozen=True)
class Segment:
    """What happens between two marks. change: live bytes at its end, less those at its begin, by origin; high: the
    same at the moment when most was live; flops: of all matrix products in it; num_passes: through all blocks so far.
    """

    mark: Mark
    change: Counter[Origin]
    high: Counter[Origin]
    flops: float
    num_passes: int


@dataclass(frozen=True)
class Cost:
    """What a step takes: the peak of live bytes, what it consists of, and FLOPs (recomputation counts as backward)."""

    peak_bytes: int
    peak_by_tag: dict[str, int]
    forward_flops: float
    backward_flops: float


def make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Give a model on the meta device fake parameters and buffers that say they are on the CPU; ties stay ties.

    The CPU because fake CUDA tensors need a torch with CUDA; shapes and dtypes of what is saved are the same there.
    """
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            with mode:
                new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
                if isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[id(tensor)] = new
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]


class _Timeline(PeakLiveBytes):
    """Live bytes and FLOPs, cut into segments by `mark`."""

    def __init__(self, tag: Callable[[Tensor], str]) -> None:
        super().__init__(lambda tensor: (tag(tensor), self._mark[1], self.num_passes))
        self.num_passes = 0
        self.segments: list[Segment] = []
        self.in_backward = False
        self._open(BEGIN)

    def mark(self, mark: Mark) -> None:
        self._close()
        self.num_passes += mark == HEAD
        self._open(mark)

    def end(self) -> list[Segment]:
        self._close()
        return self.segments

    def retag(self, tensor: Tensor, tag: Any) -> None:
        """As in PeakLiveBytes; the tensor now belongs to where we are."""
        super().retag(tensor, (tag, self._mark[1], self.num_passes))

    def _open(self, mark: Mark) -> None:
        self._mark, self._begin, self._flops = mark, self.live_by_tag.copy(), 0.0
        self.peak_bytes, self.peak_by_tag = self.live_bytes, self.live_by_tag.copy()  # from here on

    def _close(self) -> None:
        change, high = _difference(self.live_by_tag, self._begin), _difference(self.peak_by_tag, self._begin)
        self.segments.append(Segment(self._mark, change, high, self._flops, self.num_passes))

    def _ran(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if (formula := _flop_formulas().get(func._overloadpacket)) is not None:
            self._flops += formula(*args, **kwargs, out_val=result)


def _sum(one: Counter[Origin], other: Counter[Origin]) -> Counter[Origin]:
    return Counter({tag: one[tag] + other[tag] for tag in one.keys() | other.keys()})  # + would leave out what is < 0


def _difference(end: Counter[Origin], begin: Counter[Origin]) -> Counter[Origin]:
    return Counter({tag: end[tag] - begin[tag] for tag in end.keys() | begin.keys()})


@functools.cache
def _flop_formulas() -> dict[Any, Callable[..., float]]:
    """Formulas by operator, of (*args, out_val=result): torch's own, and those of the CPU's flash attention."""
    # Here and not above: it imports Triton where that is installed.
    from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

    def shapes(*tensors: Tensor) -> list[tuple[int, ...]]:
        """With the first one's heads: grouped keys are as much work, and torch 2.11's formulas know none."""
        num_heads = tensors[0].shape[1]
        return [(tensor.shape[0], num_heads, *tensor.shape[2:]) for tensor in tensors]

    def forward(*args: Any, **kwargs: Any) -> float:
        return sdpa_flop_count(*shapes(*args[:3]))

    def backward(*args: Any, **kwargs: Any) -> float:
        return sdpa_backward_flop_count(*shapes(*args[:4]))

    return {
        **flop_registry,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: forward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def simulate(
    step: Callable[[], Tensor], model: nn.Module, blocks: Sequence[nn.Module], tag: Callable[[Tensor], str]
) -> list[Segment]:
    """Run `step` (a forward that returns the loss) and its backward; return what happened, cut at the blocks.

    Gradients of the model's parameters get the tag GRADIENTS, whatever else is allocated that of `tag`. Call it inside
    the FakeTensorMode of the model. The model has no gradients and no hooks of ours afterwards.
    """
    timeline = _Timeline(tag)
    with _marks(timeline, blocks), _gradients_tagged(timeline, model), timeline:
        loss = step()
        timeline.in_backward = True
        timeline.mark(LOSS)
        if loss.requires_grad:
            loss.backward()
        del loss
        segments = timeline.end()
    return segments


@contextmanager
def _marks(timeline: _Timeline, blocks: Sequence[nn.Module]) -> Iterator[None]:
    def entering(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if not timeline.in_backward:  # a recomputed block belongs to the backward around it
                timeline.mark(("forward", number))

        return hook

    def left(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if timeline.in_backward:
                return
            if number == len(blocks) - 1:
                timeline.mark(HEAD)
            stream = output[0] if isinstance(output, tuple) else output
            if stream.requires_grad:  # its gradient arrives when the backward of this block begins
                stream.register_hook(lambda grad: timeline.mark(("backward", number)))

        return hook

    with ExitStack() as hooks:
        for number, block in enumerate(blocks):
            hooks.enter_context(block.register_forward_pre_hook(entering(number)))
            hooks.enter_context(block.register_forward_hook(left(number)))
        yield


@contextmanager
def _gradients_tagged(timeline: _Timeline, model: nn.Module) -> Iterator[None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        timeline.retag(parameter.grad, GRADIENTS)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(hook) for parameter in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.grad = None


def extend(segments: Sequence[Segment], num_more: Mapping[int, int]) -> list[Segment]:
    """The segments of a deeper model, in which num_more[i] more blocks like block i follow block i.

    Exact when those blocks would do what block i does: same shapes, same plan entries, and neighbours like its own.
    What a block leaves to a later pass (the keys of a stage) is freed outside of all blocks: there it counts for each.
    """

    def of_all(counted: Counter[Origin], num_passes: int) -> Counter[Origin]:
        return Counter(
            {
                (tag, block, then): num_bytes * (1 + (num_more.get(block, 0) if then < num_passes - 1 else 0))
                for (tag, block, then), num_bytes in counted.items()
            }
        )

    longer = []
    for segment in segments:
        if segment.mark[1] < 0:
            change, high = (of_all(counted, segment.num_passes) for counted in (segment.change, segment.high))
            longer.append(replace(segment, change=change, high=high))
        else:
            longer += [segment] * (1 + num_more.get(segment.mark[1], 0))
    return longer


def total(segments: Sequence[Segment]) -> Cost:
    """Add up the segments of a step."""
    live: Counter[Origin] = Counter()
    peak_bytes, peak = 0, live
    flops = {True: 0.0, False: 0.0}
    is_backward = False
    for segment in segments:
        is_backward |= segment.mark == LOSS
        flops[is_backward] += segment.flops
        if live.total() + segment.high.total() > peak_bytes:
            peak = _sum(live, segment.high)
            peak_bytes = peak.total()
        live = _sum(live, segment.change)
    by_tag: Counter[str] = Counter()
    for (tag, *_), num_bytes in sorted(peak.items()):
        by_tag[tag] += num_bytes
    by_tag = Counter({tag: num_bytes for tag, num_bytes in by_tag.items() if num_bytes})
    return Cost(peak_bytes, by_tag, flops[False], flops[True])
