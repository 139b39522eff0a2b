"""The published package's names: a script written against it gives the same numbers, bit for bit."""

import contextlib
import io
import random
import re
import subprocess
from pathlib import Path

import forks
import numpy as np
import pytest
import torch

from dropbp_kernels import compat
from dropbp_kernels.compat.handler import DropBPHandler, setup_seed
from dropbp_kernels.compat.layer import DropBP

# A training script against the published package, after the example of its README: blocks with two gates, a plan per
# step, sensitivities at 10 % of the steps, and the check for a step without gradient. Weights and data come from
# sines, so its numbers depend on no generator of torch.
SCRIPT = """
import random

import numpy as np
import torch
from torch import nn
from dropbp.handler import DropBPHandler
from dropbp.layer import DropBP


class Block(nn.Module):
    def __init__(self, hidden_size, sequence_length):
        super().__init__()
        self.norm_1 = nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.norm_2 = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.GELU(), nn.Linear(4 * hidden_size, hidden_size)
        )
        attn_flops = 8 * hidden_size**2 + 4 * hidden_size * sequence_length
        mlp_flops = 16 * hidden_size**2
        self.dropbp_attn = DropBP(flops=attn_flops)
        self.dropbp_mlp = DropBP(flops=mlp_flops)

    def attn(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out(torch.softmax(q @ k.transpose(1, 2) / x.shape[-1] ** 0.5, dim=-1) @ v)

    def forward(self, x):
        h = self.attn(self.norm_1(x))
        x = self.dropbp_attn(h) + x
        h = self.mlp(self.norm_2(x))
        x = self.dropbp_mlp(h) + x
        return x


random.seed(1)
np.random.seed(2)
max_iter, drop_rate = 30, 0.5
model = nn.Sequential(*[Block(16, 12) for _ in range(4)])
for number, parameter in enumerate(model.parameters()):
    values = torch.sin(torch.arange(parameter.numel()) * (1.7 + number))
    parameter.data = 0.3 * values.view_as(parameter) + (1.0 if parameter.dim() == 1 else 0.0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
handler = DropBPHandler(model, drop_rate)
handler.set_initial_drop_rate(drop_rate)
losses, plans, skipped = [], [], 0
for step in range(max_iter):
    data = torch.sin(torch.arange(2 * 12 * 16) * (0.1 + step)).view(2, 12, 16)
    target = torch.cos(data)
    handler.set_dropped_layers()

    def backprop():
        loss = nn.functional.mse_loss(model(data), target)
        optimizer.zero_grad()
        loss.backward()

    if step == int(max_iter * 0.1):
        sensitivities, drop_rates = handler.sensitivity_based_drop_bp(backprop, drop_rate)
    plans.append([float(module.p) for module in model.modules() if isinstance(module, DropBP)])
    loss = nn.functional.mse_loss(model(data), target)
    non_grad = handler.detact_non_grad()
    optimizer.zero_grad()
    if not non_grad:
        loss.backward()
    else:
        skipped += 1
    optimizer.step()
    losses.append(loss.item())
counts = handler.extract_count()
element_sensitivities = handler.compute_sensitivity(backprop, gradnorm=False)
random_tail = (random.random(), float(np.random.rand()))
"""

# Recorded from this very script run with the published package (commit 7170a63, torch 2.13 CPU, NumPy 2.4), float32.
PUBLISHED_LOSSES = """
    52.874359 42.807343 18.907925 16.836720 8.601936 1.817461 6.605856 1.316352 2.214957 2.500277 1.314201 1.271402
    0.611314 0.610136 0.949386 0.529532 1.475000 1.969547 0.576248 0.833250 0.621464 0.645243 0.979151 1.165426
    0.631857 0.914660 1.853413 0.890915 1.987779 1.139410
"""
PUBLISHED_PLANS = """
    11011110 11001010 01010111 -------- 10101111 00101110 00011011 00111010 10001111 10001011 00101011 00011011
    00101110 00111111 10101011 00011111 00011011 00011111 00001111 10011010 00011110 00001111 00101011 00111110
    00101110 10111010 00001111 10101110 00101011 00001111
"""
PUBLISHED_SENSITIVITIES = [
    971.7665405273438,
    2922.835205078125,
    689.2255859375,
    862.6591186523438,
    138.45123291015625,
    546.4869995117188,
    88.7542953491211,
    601.2451171875,
]
PUBLISHED_ELEMENT_SENSITIVITIES = [
    14.444385528564453,
    35.84258270263672,
    4.489531517028809,
    23.06508445739746,
    2.287468910217285,
    21.85395050048828,
    3.518017530441284,
    8.70004653930664,
]
PUBLISHED_RATES = [
    0.30000001192092896,
    0.10000000149011612,
    0.5,
    0.4000000059604645,
    0.9000000953674316,
    0.6000000238418579,
    0.9000000953674316,
    0.5,
]
PUBLISHED_COUNTS = [10, 4, 15, 14, 30, 19, 31, 19]
PUBLISHED_NEXT_RANDOM_NUMBERS = (0.03566109275876472, 0.07684954930080312)


def sed(script, folder):
    """What the command that README and the package's text name makes of a script."""
    (command,) = re.findall(r"`(sed .*)`", (Path(__file__).parent.parent / "README.md").read_text())
    assert command in " ".join(compat.__doc__.split())
    (folder / "train.py").write_text(script)
    subprocess.run(command, shell=True, cwd=folder, check=True)
    return (folder / "train.py").read_text()


@pytest.fixture
def global_generators_restored():
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])


pytestmark = pytest.mark.usefixtures("global_generators_restored")


def test_a_script_for_the_published_package_gives_the_same_numbers(tmp_path):
    results: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(sed(SCRIPT, tmp_path), "script", "exec"), results)

    plans = ["".join(str(int(p)) for p in plan) for plan in results["plans"]]
    # In the step of the calibration the gates hold the new rates, not a plan, and draw for themselves.
    assert results["plans"][3] == PUBLISHED_RATES
    plans[3] = "--------"
    assert plans == PUBLISHED_PLANS.split()
    assert results["drop_rates"].tolist() == PUBLISHED_RATES
    assert results["drop_rates"].dtype == np.float32
    assert results["counts"] == PUBLISHED_COUNTS
    assert results["random_tail"] == PUBLISHED_NEXT_RANDOM_NUMBERS  # as many draws as the published package, no more
    assert results["skipped"] == 0
    # Kernels of other CPUs and torch versions round differently, and 30 steps of training spread it.
    assert results["losses"] == pytest.approx([float(loss) for loss in PUBLISHED_LOSSES.split()], rel=1e-3)
    assert [float(s) for s in results["sensitivities"]] == pytest.approx(PUBLISHED_SENSITIVITIES, rel=1e-3)
    assert [float(s) for s in results["element_sensitivities"]] == pytest.approx(
        PUBLISHED_ELEMENT_SENSITIVITIES, rel=1e-2
    )
    assert len(re.findall(r"^gate \d: sensitivity ", printed.getvalue(), flags=re.MULTILINE)) == 16


class Net(torch.nn.Module):
    def __init__(self, num_gates=2):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 3) for _ in range(num_gates)])
        self.gates = torch.nn.ModuleList([DropBP(flops=1000 * (index + 1)) for index in range(num_gates)])

    def forward(self, x):
        for layer, gate in zip(self.layers, self.gates, strict=True):
            x = gate(layer(x)) + x
        return x


def test_layer_defaults_and_evaluation():
    gate = DropBP(7)
    assert (gate.p, gate.flops, gate.count, gate.is_detach) == (0, 7, 0, True)
    x = torch.ones(2, requires_grad=True)
    assert gate(x) is x
    assert (gate.count, gate.is_detach) == (0, False)
    gate.p = 1
    assert not gate(x).requires_grad
    assert (gate.count, gate.is_detach) == (1, True)
    gate.eval()
    state = random.getstate()
    assert gate(x) is x
    assert random.getstate() == state
    assert (gate.count, gate.is_detach) == (1, False)


def test_one_number_per_training_call_whatever_p():
    gate, x = DropBP(1), torch.ones(1)
    random.seed(5)
    for p in (0, 0.5, 1, 0):
        gate.p = p
        gate(x)
    drawn = random.random()
    random.seed(5)
    assert [random.random() for _ in range(5)][-1] == drawn


def test_handler_defaults():
    model = Net()
    handler = DropBPHandler(model, 0.25)
    assert (handler.p, handler.num_layers, handler.drop_rates) == (0.25, 2, [0.25, 0.25])
    assert [gate.p for gate in model.gates] == [0, 0]
    handler.set_initial_drop_rate()
    assert [gate.p for gate in model.gates] == [0.25, 0.25]
    handler.set_initial_drop_rate(0)
    assert [gate.p for gate in model.gates] == [0, 0]
    handler.set_diverse_drop_rate([0.5, 1], print_log=True)
    assert [gate.p for gate in model.gates] == [0.5, 1]
    assert handler.extract_flops() == [1000, 2000]
    assert handler.extract_count() == [0, 0]


def test_detact_non_grad_tells_a_step_without_gradient():
    model = Net()
    handler = DropBPHandler(model, 0.5)
    assert handler.detact_non_grad()
    for plan, expected in [([1, 1], True), ([0, 1], False)]:
        handler.set_diverse_drop_rate(plan)
        model(torch.ones(1, 3))
        assert handler.detact_non_grad() is expected


def test_setup_seed_seeds_all_generators():
    drawn = []
    for _ in range(2):
        setup_seed(526)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]


def test_bad_input():
    with pytest.raises(RuntimeError, match=r"at least one dropbp_kernels\.compat"):
        DropBPHandler(torch.nn.Linear(2, 2), 0.5).set_dropped_layers()
    handler = DropBPHandler(Net(), 0.5)
    with pytest.raises(ValueError, match="p_list: expected one rate for each of the 2 gates, got 3"):
        handler.set_diverse_drop_rate([0, 0, 0])
    x = torch.ones(1, 3)

    def backprop():
        handler.model.zero_grad()
        handler.model(x).sum().backward()

    with pytest.raises(ValueError, match=r"drop_rate: expected less than 0.9"):
        handler.sensitivity_based_drop_bp(backprop, 0.95)


def test_without_numpy_the_import_says_so():
    code = "import sys; sys.modules['numpy'] = None; import dropbp_kernels.compat.handler"
    result = forks.run(code)
    assert result.returncode != 0
    assert "draws plans with NumPy, which is not installed" in result.stderr
