"""What Adam would make of an example's gradient, and which of its coordinates are worth comparing."""

from typing import Any

import torch
from torch import Tensor

EPS = 1e-8


class AdamMoments:
    """Running moments of a gradient (P,), and the update that Adam would take from each of several gradients.

    m_i = (beta1 m + (1 - beta1) g_i) / (1 - beta1^t),   v_i = (beta2 v + (1 - beta2) g_i^2) / (1 - beta2^t)
    normalise(g)_i = m_i / (sqrt(v_i) + eps)

    Source: CoLM (arXiv 2407.19580), section 4.2.
    """

    def __init__(self, betas: tuple[float, float]):
        self.betas = betas
        self.step = 0
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def normalise(self, grads: Tensor) -> Tensor:
        """grads (n, P) as Adam's next updates, (n, P)."""
        beta1, beta2 = self.betas
        step = self.step + 1
        first, second = (1 - beta1) * grads, (1 - beta2) * grads.square()
        if self.first is not None and self.second is not None:
            first, second = first.add_(self.first, alpha=beta1), second.add_(self.second, alpha=beta2)
        scale = second.div_(1 - beta2**step).sqrt_().add_(EPS)
        return first.div_(1 - beta1**step).div_(scale)

    def update(self, grad: Tensor) -> None:
        """Take in a gradient (P,)."""
        beta1, beta2 = self.betas
        if self.first is None or self.second is None:
            self.first, self.second = torch.zeros_like(grad), torch.zeros_like(grad)
        self.first = beta1 * self.first + (1 - beta1) * grad
        self.second = beta2 * self.second + (1 - beta2) * grad.square()
        self.step += 1

    def check(self, num_coordinates: int) -> None:
        """Raise ValueError when the moments are those of another projection."""
        if self.first is not None and len(self.first) != num_coordinates:
            raise ValueError(
                f"projection: expected the {len(self.first)} weights that the moments are of, got {num_coordinates}"
            )

    def to(self, device: torch.device) -> None:
        if self.first is not None and self.second is not None:
            self.first, self.second = self.first.to(device), self.second.to(device)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "first": self.first, "second": self.second}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.first, self.second = state["step"], state["first"], state["second"]


def largest_coordinates(mean: Tensor, num_coordinates: int | None) -> Tensor:
    """The places of the largest entries of mean (P,) by magnitude, in order of place; None: all."""
    if num_coordinates is None or num_coordinates >= len(mean):
        return torch.arange(len(mean), device=mean.device)
    return mean.abs().topk(num_coordinates).indices.sort().values
