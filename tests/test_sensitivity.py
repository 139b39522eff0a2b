"""Sensitivities as published: the numbers, what the probes see, and that all is left as found."""

import random
import subprocess
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dropbp_kernels import DropBP, DropBPHandler
from dropbp_kernels.sensitivity import compute_sensitivity

# Recorded from compute_sensitivity of the published package (commit 7170a63, float32) on the net below.
PUBLISHED = {
    "norm": [1.2920525074005127, 3.892169713973999, 1.226001501083374],
    "element": [1.2920525074005127, 4.300225257873535, 1.506898045539856],
}


class Gate(nn.Module):
    """The least a gate can be: it detaches when it is not kept, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.kept = True
        self.num_calls = 0

    def forward(self, x):
        self.num_calls += 1
        return x if self.kept else x.detach()


class Net(nn.Module):
    """Three residual branches; weights from sines, so no generator has a say in the numbers."""

    def __init__(self, dropout=0.0, dtype=torch.float32):
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(4, 4, dtype=dtype) for _ in range(3)])
        self.dropout = nn.Dropout(dropout)
        self.gates = nn.ModuleList([Gate() for _ in range(3)])
        for number, parameter in enumerate(self.parameters()):
            values = torch.sin(torch.arange(parameter.numel()) * (1.3 + number))
            parameter.data = 0.5 * values.view_as(parameter).to(dtype)

    def forward(self, x):
        for linear, gate in zip(self.linears, self.gates, strict=True):
            x = gate(self.dropout(torch.tanh(linear(x)))) + x
        return x


def handler_of(model):
    gates = {name: module for name, module in model.named_modules() if isinstance(module, Gate)}
    return SimpleNamespace(model=model, gates=gates)


def backprop_of(model, dtype=torch.float32):
    x = torch.cos(torch.arange(24.0)).view(6, 4).to(dtype)
    return lambda: model(x).square().mean().backward()


@pytest.mark.parametrize("definition", ["norm", "element"])
def test_equals_the_published_code(definition):
    model = Net()
    sensitivities = compute_sensitivity(handler_of(model), backprop_of(model), definition)
    assert sensitivities == pytest.approx(PUBLISHED[definition], rel=1e-5)
    assert all(type(sensitivity) is float for sensitivity in sensitivities)
    # A backprop that clears gradients itself, as the published package asks for, gives the same.
    clearing = lambda: (model.zero_grad(), backprop_of(model)())  # noqa: E731
    assert compute_sensitivity(handler_of(model), clearing, definition) == sensitivities


@pytest.mark.parametrize("definition", ["norm", "element"])
def test_the_package_s_own_gates_give_the_same_numbers(definition):
    model = Net()
    model.gates = nn.ModuleList([DropBP() for _ in range(3)])

    def forward(x):
        for linear, gate in zip(model.linears, model.gates, strict=True):
            x = gate.residual_add(x, lambda x, linear=linear: torch.tanh(linear(x)))
        return x

    model.forward = forward
    handler = DropBPHandler(model, 0.5)
    plan = handler.step().kept
    sensitivities = compute_sensitivity(handler, backprop_of(model), definition)
    assert sensitivities == pytest.approx(PUBLISHED[definition], rel=1e-5)
    assert tuple(gate.kept for gate in model.gates) == plan
    assert not any(gate.was_called for gate in model.gates)


def test_norm_is_the_default():
    model = Net()
    handler = handler_of(model)
    expected = compute_sensitivity(handler, backprop_of(model), "norm")
    assert compute_sensitivity(handler, backprop_of(model)) == expected


@pytest.mark.parametrize("definition", ["norm", "element"])
def test_by_hand(definition):
    """y = x + a x, z = y + b y, loss = z with x = 1, a = 2, b = 3: dL/da = 1 + b = 4, dL/db = 1 + a = 3.

    Without branch a: (none, 3), S = 16. Without branch b: (1, none), S = (4 - 1)^2 + 9 = 18. Scalars, so both
    definitions are the same number.
    """
    model = nn.Module()
    model.a, model.b = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([3.0]))
    model.gate_a, model.gate_b = Gate(), Gate()

    def backprop():
        x = torch.ones(1)
        y = x + model.gate_a(model.a * x)
        (y + model.gate_b(model.b * y)).sum().backward()

    assert compute_sensitivity(handler_of(model), backprop, definition) == [16.0, 18.0]


def test_element_sees_a_gradient_that_turns_and_norm_does_not():
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(2))
    model.gate = Gate()

    def backprop():  # gradient (1, 0) when kept, (0, 1) when dropped
        model.w.grad = torch.tensor([1.0, 0.0]) if model.gate.kept else torch.tensor([0.0, 1.0])

    assert compute_sensitivity(handler_of(model), backprop, "norm") == [0.0]
    assert compute_sensitivity(handler_of(model), backprop, "element") == pytest.approx([2.0])


def snapshot(model):
    return {
        "grads": [None if p.grad is None else (id(p.grad), p.grad.clone().tolist()) for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "gates": [(gate.kept, gate.num_calls) for gate in model.gates],
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("definition", ["norm", "element"])
@pytest.mark.parametrize("raises_at", [None, 1, 2, 4])
def test_everything_is_left_as_found(definition, raises_at):
    model = Net(dropout=0.5)
    backprop_of(model)()  # accumulated gradients ...
    model.linears[0].bias.grad = None  # ... on some parameters
    model.gates[1].kept = False
    model.linears[1].eval()
    before = snapshot(model)
    num_calls = 0

    def backprop():
        nonlocal num_calls
        num_calls += 1
        random.random(), np.random.rand()
        backprop_of(model)()
        if num_calls == raises_at:
            raise KeyError("batch")
        model.eval()

    if raises_at is None:
        compute_sensitivity(handler_of(model), backprop, definition)
        assert num_calls == 4
    else:
        with pytest.raises(KeyError, match="batch"):
            compute_sensitivity(handler_of(model), backprop, definition)
    assert snapshot(model) == before


def test_every_probe_sees_the_same_random_numbers_and_its_own_plan():
    model = Net(dropout=0.5)
    seen = []

    def backprop():
        backprop_of(model)()
        numbers = random.random(), np.random.rand(), torch.rand(1).item()
        seen.append((numbers, tuple(gate.kept for gate in model.gates)))

    sensitivities = compute_sensitivity(handler_of(model), backprop)
    assert len({numbers for numbers, _ in seen}) == 1
    T, F = True, False
    assert [plan for _, plan in seen] == [(T, T, T), (F, T, T), (T, F, T), (T, T, F)]
    assert compute_sensitivity(handler_of(model), backprop) == sensitivities


@pytest.mark.parametrize(("definition", "expected"), [("norm", 6), ("element", 6 + 4)])
def test_at_most_one_extra_set_of_gradients_is_held(definition, expected):
    """Six gradients without dropping; four with one branch dropped, and "element" holds the six besides."""
    model = Net()
    handler = handler_of(model)
    made, most = [], 0

    def backprop():
        nonlocal most
        backprop_of(model)()
        made.extend(weakref.ref(parameter.grad) for parameter in model.parameters() if parameter.grad is not None)
        most = max(most, sum(ref() is not None for ref in made))

    compute_sensitivity(handler, backprop, definition)
    assert most == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model = Net(dtype=dtype)
    sensitivities = compute_sensitivity(handler_of(model), backprop_of(model, dtype), "norm")
    rel = 1e-6 if dtype is torch.float64 else 0.1
    assert sensitivities == pytest.approx(PUBLISHED["norm"], rel=rel)


def test_half_precision_gradients_do_not_overflow():
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(100, dtype=torch.float16))
    model.gate = Gate()

    def backprop():
        model.w.grad = torch.full_like(model.w, 3e4 if model.gate.kept else 2e4)

    assert compute_sensitivity(handler_of(model), backprop, "norm") == pytest.approx([(10 * 1e4) ** 2], rel=1e-3)


def test_gradients_are_recorded_also_inside_no_grad():
    model = Net()
    with torch.no_grad():
        assert compute_sensitivity(handler_of(model), backprop_of(model)) == pytest.approx(PUBLISHED["norm"], rel=1e-5)
        assert not torch.is_grad_enabled()


def test_a_branch_that_holds_all_gradients_may_be_dropped():
    model = Net()
    x = torch.ones(2, 4)
    model.gates = nn.ModuleList([Gate()])
    model.linears = model.linears[:1]

    def backprop():
        loss = model(x).square().mean()
        if loss.requires_grad:
            loss.backward()

    (sensitivity,) = compute_sensitivity(handler_of(model), backprop, "element")
    backprop()
    assert sensitivity == pytest.approx(sum(p.grad.square().sum().item() for p in model.parameters()), rel=1e-5)


def test_bad_input():
    model = Net()
    with pytest.raises(ValueError, match="definition: expected one of norm, element, got 'max'"):
        compute_sensitivity(handler_of(model), backprop_of(model), "max")
    with pytest.raises(ValueError, match="handler: expected at least one gate, got none"):
        compute_sensitivity(handler_of(nn.Linear(2, 2)), lambda: None)
    with pytest.raises(RuntimeError, match="expected gradients on the model's parameters, but it left none"):
        compute_sensitivity(handler_of(model), lambda: model(torch.ones(1, 4)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("definition", ["norm", "element"])
def test_gradients_that_are_not_finite_are_refused(value, definition):
    model = Net()
    before = snapshot(model)
    x = torch.full((1, 4), value)
    with pytest.raises(RuntimeError, match=r"finite gradients, but the sensitivity of branch 'gates\.0' is (nan|inf)"):
        compute_sensitivity(handler_of(model), lambda: model(x).sum().backward(), definition)
    assert snapshot(model) == before


def test_an_optimizer_step_in_backprop_is_refused():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def backprop():
        backprop_of(model)()
        optimizer.step()

    with pytest.raises(
        RuntimeError, match=r"a forward and a backward only, but it changed parameter 'linears\.0\.weight'"
    ):
        compute_sensitivity(handler_of(model), backprop)


def test_progress_bar(capsys, monkeypatch):
    model = Net()
    compute_sensitivity(handler_of(model), backprop_of(model))
    assert capsys.readouterr().err == ""
    pytest.importorskip("tqdm")
    compute_sensitivity(handler_of(model), backprop_of(model), progress=True)
    assert "3/3" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    compute_sensitivity(handler_of(model), backprop_of(model), progress=True)
    assert capsys.readouterr().err == ""


def test_numpy_is_not_needed():
    """Only what is loaded is saved: without NumPy the measurement runs and does not import it."""
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "import torch; from types import SimpleNamespace\n"
        "from dropbp_kernels.sensitivity import compute_sensitivity\n"
        "model = torch.nn.Linear(1, 1); gate = SimpleNamespace(kept=True)\n"
        "run = lambda: model(torch.ones(1, 1)).sum().backward() if gate.kept else None\n"
        "print(compute_sensitivity(SimpleNamespace(model=model, gates={'gate': gate}), run))\n"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert result.stdout == "[2.0]\n", result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_the_generators_of_the_gpu_are_left_as_found():
    model = Net(dropout=0.5).cuda()
    x = torch.cos(torch.arange(24.0)).view(6, 4).cuda()
    before = torch.cuda.get_rng_state()
    first = compute_sensitivity(handler_of(model), lambda: model(x).square().mean().backward())
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert compute_sensitivity(handler_of(model), lambda: model(x).square().mean().backward()) == pytest.approx(first)
