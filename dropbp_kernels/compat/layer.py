"""`DropBP` as published: detaches the branch's output with probability p. See the package's docstring."""

import random

from torch import Tensor, nn


class DropBP(nn.Module):
    """Pass the input on; in training, with probability p, without a gradient.

    Attributes: p (drop rate), flops (of the branch, any unit), count (calls that dropped), is_detach (whether the last
    call dropped; True before the first).

    Shapes: any.
    Dtypes: any.
    Errors: none.
    Cost:   one number of Python's global generator per call in training.
    Source: github.com/WooSunghyeon/dropbp, its layer of the same name.
    """

    def __init__(self, flops: float, p: float = 0):
        super().__init__()
        self.p = p
        self.flops = flops
        self.count = 0
        self.is_detach = True

    def forward(self, input: Tensor) -> Tensor:
        # p = 1 drops unless the draw is exactly 0; evaluation draws nothing. Runs must consume numbers as published.
        self.is_detach = self.training and random.random() > 1 - self.p
        if not self.is_detach:
            return input
        self.count += 1
        return input.detach()
