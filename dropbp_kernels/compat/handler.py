"""`DropBPHandler` as published, on NumPy's global generator. See the package's docstring."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..allocation import allocate
from .layer import DropBP

try:
    import numpy as np
except ImportError as error:
    raise ImportError(
        "dropbp_kernels.compat draws plans with NumPy, which is not installed: pip install numpy"
    ) from error

CALIBRATION_SEED = 526


def setup_seed(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class DropBPHandler:
    """Sets the p of all `compat.layer.DropBP` modules of a model.

    Errors: RuntimeError when a plan is drawn for a model without gates; ValueError of `set_diverse_drop_rate` for a
            wrong number of rates and of `allocation.allocate` for sensitivities or rates it cannot work with.
    Source: github.com/WooSunghyeon/dropbp, its handler of the same name.
    """

    def __init__(self, model: nn.Module, drop_rate: float):
        self.model = model
        self.p = drop_rate
        self.num_layers = len(self._gates())
        self.drop_rates: Any = [drop_rate] * self.num_layers

    def _gates(self) -> list[DropBP]:
        return [module for module in self.model.modules() if isinstance(module, DropBP)]

    def set_initial_drop_rate(self, p: float | None = None) -> None:
        """Give every gate the same p, the handler's drop rate by default."""
        for gate in self._gates():
            gate.p = self.p if p is None else p

    def set_diverse_drop_rate(self, p_list: Sequence[float], print_log: bool = False) -> None:
        """Give every gate its own p, in model order."""
        if len(p_list) != self.num_layers:
            raise ValueError(f"p_list: expected one rate for each of the {self.num_layers} gates, got {len(p_list)}")
        for number, (gate, p) in enumerate(zip(self._gates(), p_list, strict=True), start=1):
            gate.p = p
            if print_log:
                print(f"gate {number}: p = {p}")

    def sensitivity_based_drop_bp(
        self, backprop: Callable[[], Any], target_probability: float = 0.5, min_rate: float = 0, gradnorm: bool = True
    ) -> tuple[list[Any], Any]:
        """Measure sensitivities and set the rates from them; return both (a list, and a float32 array)."""
        sensitivities = self.compute_sensitivity(backprop, gradnorm=gradnorm)
        rates = allocate(
            [float(sensitivity) for sensitivity in sensitivities],
            self.extract_flops(),
            target_probability,
            min_rate=min_rate,
        )
        self.drop_rates = np.asarray(rates, dtype=np.float32)
        print(self.drop_rates)
        self.set_diverse_drop_rate(self.drop_rates)
        return sensitivities, self.drop_rates

    def set_dropped_layers(self) -> None:
        """Draw the plan of a step: every p becomes 0 or 1.

        Each gate is drawn with its own rate; then, while the share of dropped gates is below the handler's drop rate,
        more are dropped in order of decreasing rate.
        """
        if self.num_layers == 0:
            raise RuntimeError("model: expected at least one dropbp_kernels.compat.layer.DropBP module, found none")
        plan = [int(np.random.rand() < rate) for rate in self.drop_rates]
        for index in sorted(range(self.num_layers), key=lambda index: self.drop_rates[index], reverse=True):
            if sum(plan) / self.num_layers >= self.p:
                break
            plan[index] = 1
        self.set_diverse_drop_rate(plan)

    def compute_gradient(self, backprop: Callable[[], Any], gradnorm: bool = True) -> list[Any]:
        """Seed all generators, run backprop; return each parameter's gradient (or its norm), 0 where it has none."""
        setup_seed(CALIBRATION_SEED)
        backprop()
        grads = [parameter.grad for parameter in self.model.parameters()]
        return [0 if grad is None else grad.norm() if gradnorm else grad for grad in grads]

    def compute_sensitivity(self, backprop: Callable[[], Any], gradnorm: bool = True) -> list[Any]:
        """The sensitivity of each gate; backprop must clear the gradients. Leaves only the last gate dropped."""
        self.set_initial_drop_rate(0)
        undropped = self.compute_gradient(backprop, gradnorm)
        sensitivities = []
        for index in range(self.num_layers):
            self.set_diverse_drop_rate([int(other == index) for other in range(self.num_layers)])
            squares = [(a - b) ** 2 for a, b in zip(undropped, self.compute_gradient(backprop, gradnorm), strict=True)]
            sensitivity = sum(square.sum() if isinstance(square, torch.Tensor) else square for square in squares)
            sensitivities.append(sensitivity)
            print(f"gate {index + 1}: sensitivity {sensitivity}")
        return sensitivities

    def extract_flops(self) -> list[float]:
        """The flops of each gate."""
        return [gate.flops for gate in self._gates()]

    def extract_count(self) -> list[int]:
        """How often each gate has dropped."""
        return [gate.count for gate in self._gates()]

    def detact_non_grad(self) -> bool:
        """Whether the last call of every gate dropped (spelt as published)."""
        return all(gate.is_detach for gate in self._gates())
