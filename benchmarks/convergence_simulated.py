"""Plans by tokens whose attentions keep queries, simulated: the gradients are exact, no work is saved.

Every branch sends a gradient for a share of the tokens of the batch. An attention does so for these tokens' queries,
which see the keys and values of all tokens. The package has no such plan for its row plans, so it is made by `detach`
on a model of transformers: what is left out is computed and cut off. By hand, its backward costs what that of a plan
of granularity "token" costs: each product of a branch has its share of rows, and scores their share of queries.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dropbp_kernels.permutation import draw_permutation

CHOICES = ("random", "loss", "output")


class QueryRows:
    """Cuts the graph of every Llama block of `model` where its plan says so; without a plan nothing is cut.

    Args:
        drop_rate: of the branches together, until `drop_rates` is set, one for each branch.
        last: the share of the branches that are not dropped wholly, which are those nearest to the loss.
        context: what keys and values of tokens that an attention drops contribute: "none", or "one_hop", the gradient
            of the projections, whose input is then a constant.
        aligned: whether all branches draw the same order of tokens and keep its first ones.
        chosen: which tokens are kept: "random"; "loss", those of the highest scores that `draw` is given; "output",
            of an MLP those whose output is largest beside the stream, and random ones of an attention.
    """

    def __init__(
        self,
        model: nn.Module,
        drop_rate: float,
        *,
        last: float = 1.0,
        context: str = "none",
        aligned: bool = False,
        chosen: str = "random",
    ):
        if chosen not in CHOICES:
            raise ValueError(f"chosen: expected one of {', '.join(CHOICES)}, got {chosen!r}")
        blocks = [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]
        num_last = round(2 * last * len(blocks))
        kept_share = (1.0 - drop_rate) * 2 * len(blocks) / num_last
        self.drop_rates = [1.0] * (2 * len(blocks) - num_last) + [1.0 - kept_share] * num_last
        self.aligned = aligned
        self.chosen = chosen
        self.kept: Tensor | None = None  # bool (branches, B, S); None: everything
        self._stream: Tensor | None = None
        self._hooks = []
        for number, block in enumerate(blocks):
            attention, mlp = 2 * number, 2 * number + 1
            cut_input = partial(self._cut_input, attention)
            self._hooks.append(block.self_attn.register_forward_pre_hook(cut_input, with_kwargs=True))
            ends = [(block.self_attn, attention), (block.mlp, mlp)]
            if context == "none":
                ends += [(block.self_attn.k_proj, attention), (block.self_attn.v_proj, attention)]
            self._hooks += [module.register_forward_hook(partial(self._cut_output, branch)) for module, branch in ends]
            self._hooks.append(block.post_attention_layernorm.register_forward_pre_hook(self._note_stream))

    def draw(self, shape: tuple[int, int], *, seed: int, step: int, scores: Tensor | None = None) -> None:
        """Draw which tokens of a batch of that shape are kept. scores (B, S): of each token, for "loss"."""
        num_branches, num_rows = len(self.drop_rates), shape[0] * shape[1]
        if scores is not None:
            orders = scores.flatten().argsort(descending=True, stable=True).expand(num_branches, -1)
        else:
            branch = torch.zeros(num_branches, dtype=torch.int64) if self.aligned else torch.arange(num_branches)
            orders = draw_permutation(num_rows, seed=seed, step=step, branch=branch)
        is_kept = (
            torch.arange(num_rows) < torch.tensor([self._num_kept(b, num_rows) for b in range(num_branches)])[:, None]
        )
        self.kept = torch.empty_like(is_kept).scatter_(1, orders, is_kept).view(num_branches, *shape)

    def clear(self) -> None:
        """Keep everything from now on."""
        self.kept = self._stream = None

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()

    def _num_kept(self, branch: int, num_rows: int) -> int:
        return round((1.0 - self.drop_rates[branch]) * num_rows)

    def _note_stream(self, module: nn.Module, args: Any) -> None:
        if self.kept is not None and self.chosen == "output":
            self._stream = args[0].detach()

    def _cut_input(self, branch: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.kept is None:
            return None
        return args, {**kwargs, "hidden_states": self._cut(branch, kwargs["hidden_states"])}

    def _cut_output(self, branch: int, module: nn.Module, args: Any, output: Any) -> Any:
        if self.kept is None:
            return None
        if isinstance(output, tuple):
            return self._cut(branch, output[0]), *output[1:]
        if self._stream is not None and branch % 2:
            scores = (output.detach().norm(dim=-1) / self._stream.norm(dim=-1)).flatten()
            kept = torch.zeros_like(scores, dtype=torch.bool)
            kept[scores.topk(self._num_kept(branch, len(scores))).indices] = True
            self.kept = self.kept.clone()  # autograd holds the rows of branches before this one
            self.kept[branch] = kept.view(output.shape[:2])
        return self._cut(branch, output)

    def _cut(self, branch: int, x: Tensor) -> Tensor:
        assert self.kept is not None
        return torch.where(self.kept[branch, ..., None], x, x.detach())


def loss_gradient_norms(logits: Tensor, labels: Tensor) -> Tensor:
    """The norm of the gradient of each token's loss at its logits, up to a factor: (B, S), 0 where there is no loss.

    Shapes: logits (B, S, V); labels int64 (B, S), not shifted, negative where there is no loss.
    """
    targets = torch.cat((labels[:, 1:], labels.new_full((len(labels), 1), -1)), dim=1)
    gradient = logits.softmax(dim=-1)
    gradient.scatter_add_(2, targets.clamp(min=0)[..., None], gradient.new_full((*targets.shape, 1), -1.0))
    return gradient.norm(dim=-1).masked_fill(targets < 0, 0.0)
