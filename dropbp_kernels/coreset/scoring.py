"""One number, or one gradient, for each example of a batch, by a forward that is pure inference.

Examples run in micro-batches of similar length, in eval mode, under no_grad, with all gates of DropBP open and nothing
of the model changed: a perturbation is added to the output of the linear, W x + eps Z x, so weights need no restoring.
What comes before the block of the linear runs once; only that block and what follows it runs for each perturbation.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autocast import without_autocast
from ..gates import find_gates
from ..targets import IGNORED
from .projection import Projection

# What a gate notes about calls that are none of the training's.
_NOTES = ("kept", "was_called", "batch_size", "seq_len", "unstepped")

Loss = Callable[[Any, dict[str, Any]], Tensor]


def causal_lm_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy of each example over its own labelled tokens, in float32: (n, S, C), (n, S) -> (n,).

    labels[i, j] is what logits[i, j] are compared with: already shifted. An example without labels has loss 0. Neither
    padding nor the other examples enter, unlike in a mean over the batch or over its padded width.
    """
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    return losses.sum(1) / (labels != IGNORED).sum(1).clamp(min=1)


class Scorer:
    """Runs micro-batches of a batch through the model and returns what each example's loss and gradient is.

    loss: (output of the model, inputs of the micro-batch with labels) -> losses (n,), each of its own example alone.
        None: `causal_lm_losses`.
    """

    def __init__(self, model: nn.Module, projection: Projection, loss: Loss | None = None):
        self.model, self.projection, self.loss = model, projection, loss
        self.device = next(model.parameters()).device
        base: Any = getattr(model, "get_base_model", lambda: model)()  # PEFT's forward takes **kwargs
        parameters = inspect.signature(base.forward).parameters
        self._options: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
        self._keeps_logits = loss is None and "logits_to_keep" in parameters

    def micro_batches(
        self, batch: Mapping[str, Any], rows: Sequence[int], max_tokens: int | None
    ) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """rows, the longest first, cut so that no piece holds more than max_tokens, padding included; and their inputs.

        max_tokens None: an eighth of the batch, so that scoring needs less memory than training on half of it.
        Inputs are on the model's device and without the columns that none of the rows needs.
        """
        lengths = self._lengths(batch)
        if max_tokens is None:
            max_tokens = sum(lengths) // 8
        pieces: list[list[int]] = []
        for row in sorted(rows, key=lambda row: -lengths[row]):
            if not pieces or (len(pieces[-1]) + 1) * lengths[pieces[-1][0]] > max_tokens:
                pieces.append([])
            pieces[-1].append(row)
        for piece in pieces:
            yield piece, self._inputs(batch, piece, lengths[piece[0]])

    def _inputs(self, batch: Mapping[str, Any], rows: Sequence[int], longest: int) -> dict[str, Any]:
        width = self._width(batch)
        chosen = take_rows(batch, rows)
        for name, value in chosen.items():
            if isinstance(value, Tensor):
                is_sequence = value.dim() > 1 and value.shape[:2] == (len(rows), width)
                chosen[name] = (value[:, :longest] if is_sequence else value).to(self.device)
        return chosen

    def _width(self, batch: Mapping[str, Any]) -> int:
        names = ("labels", "attention_mask", "input_ids")
        return next((batch[name].shape[1] for name in names if name in batch and batch[name].dim() == 2), -1)

    def _lengths(self, batch: Mapping[str, Any]) -> list[int]:
        """How many columns of each row its loss depends on.

        A causal model: up to its last label; any other: up to its last token that is not masked.
        """
        if self.loss is None:
            wanted = batch["labels"] != IGNORED
        elif "attention_mask" in batch and batch["attention_mask"].dim() == 2:
            wanted = batch["attention_mask"] != 0
        else:
            return [max(1, self._width(batch))] * batch_size_of(batch)
        places = torch.arange(1, wanted.shape[1] + 1, device=wanted.device)
        return (wanted * places).amax(1).clamp(min=1).tolist()

    # ---- forwards

    def losses(self, inputs: dict[str, Any]) -> Tensor:
        """The loss of each example of a micro-batch, (n,) float32."""
        if self.loss is not None:
            return self.loss(self.model(**{**inputs, **self._options}), inputs).float()
        given = {name: value for name, value in inputs.items() if name != "labels"}
        labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
        options = dict(self._options)
        if self._keeps_logits:  # the head is most of a small model: only for columns that some row has a label for
            columns = (labels != IGNORED).any(0).nonzero().squeeze(1)
            options["logits_to_keep"], labels = columns, labels[:, columns]
        output = self.model(**{**given, **options})
        logits = output["logits"] if isinstance(output, dict) else getattr(output, "logits", output)
        return causal_lm_losses(logits if isinstance(logits, Tensor) else logits[0], labels)

    def exact(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Losses (n,), and the gradient of each by the linear's weight, (n, out * in) float32.

        Autograd begins at the linear's output. The gradient of the sum of losses by that output holds those of all
        examples side by side; times the linear's input it is that by the weight, which needs no backward.
        """
        calls: list[tuple[Tensor, Tensor]] = []

        def begin_graph(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            torch.set_grad_enabled(True)  # until the no_grad around this forward ends
            leaf = output.detach().requires_grad_()
            calls.append((args[0].detach(), leaf))
            return leaf.clone()  # may be written to

        hook = self.projection.linear.register_forward_hook(begin_graph)
        try:
            with torch.no_grad():
                losses = self.losses(inputs)
        finally:
            hook.remove()
        if not losses.requires_grad:
            raise ValueError(f"projection: expected a linear that the loss depends on, {self.projection.name} is none")
        grads = torch.autograd.grad(losses.sum(), [leaf for _, leaf in calls])
        features: Any = 0.0
        for (x, _), grad in zip(calls, grads, strict=True):
            if x.shape[0] != len(losses):
                raise ValueError(
                    f"projection: expected one whose input is (batch, ..., width), but {self.projection.name} got "
                    f"{tuple(x.shape)} for {len(losses)} examples"
                )
            rows = grad.float().reshape(len(losses), -1, grad.shape[-1])
            with without_autocast(self.device.type):
                features = features + rows.mT @ x.float().reshape(len(losses), -1, x.shape[-1])
        return losses.detach(), features.flatten(1)

    @torch.no_grad()
    def spsa(self, inputs: dict[str, Any], directions: Sequence[Tensor], epsilon: float) -> tuple[Tensor, Tensor]:
        """Losses (n,), and how each changes along each of the directions (out, in): (n, len(directions)) float32.

        (loss at W + epsilon Z - loss at W - epsilon Z) / (2 epsilon), two replays for each direction.
        """
        with _Replay(self.projection.blocks) as replay:
            losses = self.losses(inputs)
            replay.begin()
            changes = []
            for direction in directions:
                sides = []
                for sign in (1.0, -1.0):
                    with _perturbed(self.projection.linear, direction, sign * epsilon):
                        sides.append(self.losses(inputs))
                changes.append((sides[0] - sides[1]) / (2 * epsilon))
        return losses, torch.stack(changes, 1)


@contextmanager
def _perturbed(linear: nn.Module, direction: Tensor, epsilon: float) -> Iterator[None]:
    """The linear computes W x + epsilon * direction x."""

    def perturb(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + epsilon * F.linear(args[0], direction.to(args[0].dtype)).to(output.dtype)

    hook = linear.register_forward_hook(perturb)
    try:
        yield
    finally:
        hook.remove()


class _Replay:
    """Lets a model run again from its last block of `blocks` on, with the inputs that this block had.

    The model's own forward does it, so that whatever it does around its blocks is done: blocks before the last one pass
    on what they are given, and the last one is given what it got the first time.
    """

    def __init__(self, blocks: Sequence[nn.Module]):
        self.blocks = blocks
        self._calls: list[tuple[Any, Any]] = []
        self._rests: dict[int, tuple[Any, ...] | None] = {}  # what a block returned beside the hidden states
        self._hooks: list[Any] = []
        self._replaced: list[nn.Module] = []
        self._is_replaying = False

    def __enter__(self) -> "_Replay":
        if self.blocks:
            *before, last = self.blocks
            self._hooks = [block.register_forward_hook(self._note_output) for block in before]
            self._hooks.append(last.register_forward_pre_hook(self._inputs_of_last, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for block in self._replaced:
            del block.forward

    def begin(self) -> None:
        """The first forward is done."""
        if not self.blocks:
            return
        *before, last = self.blocks
        if len(self._calls) != 1:
            raise ValueError(
                f"projection: expected its {type(last).__name__} to run once, ran {len(self._calls)} times"
            )
        self._is_replaying = True
        for index, block in enumerate(before):
            # One that already has a forward of its own, as accelerate's offloading sets it, runs as it is.
            if "forward" not in vars(block) and id(block) in self._rests:
                self._hooks[index].remove()
                block.forward = _passes_on(self._rests[id(block)])
                self._replaced.append(block)

    def _note_output(self, block: nn.Module, args: Any, output: Any) -> None:
        self._rests[id(block)] = output[1:] if isinstance(output, tuple) else None

    def _inputs_of_last(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if not self._is_replaying:
            self._calls.append((args, kwargs))
        return self._calls[0]


def _passes_on(rest: tuple[Any, ...] | None) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else next(iter(kwargs.values()))
        return hidden if rest is None else (hidden, *rest)

    return forward


@contextmanager
def as_scoring(model: nn.Module) -> Iterator[None]:
    """Inside, the model runs in eval mode with every gate of DropBP kept; afterwards it is as before."""
    training = [module for module in model.modules() if module.training]
    gates = [(gate, {name: getattr(gate, name) for name in _NOTES}) for gate in find_gates(model).values()]
    model.eval()
    for gate, _ in gates:
        gate.kept, gate.unstepped = True, None
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for gate, notes in gates:
            for name, value in notes.items():
                setattr(gate, name, value)


def batch_size_of(batch: Mapping[str, Any]) -> int:
    """The number of examples: the length of the batch's first tensor.

    Errors: TypeError for a batch that is no mapping with a tensor in it.
    """
    values = batch.values() if isinstance(batch, Mapping) else ()
    first = next((value for value in values if isinstance(value, Tensor) and value.dim()), None)
    if first is None:
        raise TypeError(f"batch: expected a mapping of names to tensors, got {type(batch).__name__}")
    return first.shape[0]


def take_rows(batch: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """These examples of the batch. What has no entry for each example stays as it is."""
    size = batch_size_of(batch)
    chosen: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == size:
            value = value[torch.as_tensor(rows, dtype=torch.int64, device=value.device)]
        elif isinstance(value, list | tuple) and len(value) == size:
            value = type(value)(value[row] for row in rows)
        chosen[name] = value
    return chosen
