"""What all ops have in common, held for every entry of op_cases.py; what an op computes is tested in its own file.

raw ops            opcheck; the reference's numbers in every backend, every element written; the same bits every time
public functions   gradcheck; one compilation for all row counts, forward and backward; no second derivative; nothing
                   recorded without gradients; inductor's results
"""

import ctypes
import inspect
import itertools
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from op_cases import PUBLIC, RAW, Tensors, assert_as_the_reference, call
from torch._dynamo.testing import CompileCounterWithBackend

from dropbp_kernels import ops
from dropbp_kernels.ops.schema import SCHEMAS

# NumPy, in Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

DTYPES = [(torch.float32, torch.bfloat16), (torch.float64, torch.float64)]
RAW_CASES = [pytest.param(op, name, id=f"{op}-{name}") for op, cases in RAW.items() for name in cases]
ROW_COUNTS = (10, 13, 16, 31, 64)  # no other size is 10, which dynamo would take to stay equal
public = pytest.mark.parametrize("use", [pytest.param(use, id=name) for name, use in PUBLIC.items()])


def differentiable(*names):
    return [pytest.param(use, id=name) for name, use in PUBLIC.items() if all(getattr(use, n) for n in names)]


def test_every_op_is_here():
    assert list(RAW) == [name for stem in SCHEMAS.values() for name in stem]
    assert {use.function for use in PUBLIC.values()} == set(ops.__all__)


# Raw ops.


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
@pytest.mark.parametrize(("op", "name"), RAW_CASES)
def test_opcheck(backend, device, op, name, layout):
    """All of it for the reference. What is traced is the fake, one for all backends, so of the others only that they
    return what it says and write into nothing else."""
    arguments = RAW[op][name](Tensors(4, 6, layout=layout, device=device))
    utilities = {} if backend == "reference" else {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(getattr(torch.ops.dropbp_kernels, op), arguments, **utilities)


@pytest.mark.parametrize(("op", "name"), RAW_CASES)
def test_fakes_know_float64(op, name):
    """Whose statistics are float64 as well."""
    arguments = RAW[op][name](Tensors(4, 6, torch.float64, torch.float64))
    torch.library.opcheck(getattr(torch.ops.dropbp_kernels, op), arguments, test_utils="test_faketensor")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_memory_that_compiled_kernels_ask_for_is_poisoned(poisoned):
    libtorch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    handle, memory, size, stride = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int64(50), ctypes.c_int64(1)
    of_float, on_cpu = libtorch.aoti_torch_dtype_float32(), libtorch.aoti_torch_device_type_cpu()
    sizes = ctypes.c_int64(1), ctypes.byref(size), ctypes.byref(stride)
    assert libtorch.aoti_torch_empty_strided(*sizes, of_float, on_cpu, 0, ctypes.byref(handle)) == 0
    assert libtorch.aoti_torch_get_data_ptr(handle, ctypes.byref(memory)) == 0
    assert min((ctypes.c_float * 50).from_address(memory.value)) > 1e38
    libtorch.aoti_torch_delete_tensor_object(handle)


@pytest.mark.parametrize(("wide", "narrow"), DTYPES)
@pytest.mark.parametrize(("op", "name"), RAW_CASES)
def test_agrees_with_the_reference_and_writes_every_element(backend, device, poisoned, op, name, wide, narrow):
    for rows, width, layout in ((5, 70, "contiguous"), (11, 6, "sliced")):
        arguments = RAW[op][name](Tensors(rows, width, wide, narrow, layout, device))
        assert_as_the_reference(op, arguments, call(getattr(torch.ops.dropbp_kernels, op), arguments))


@pytest.mark.parametrize(("op", "name"), RAW_CASES)
def test_repeats_bit_for_bit(backend, device, op, name):
    """In C++ also on one and three threads, with work for all of them and many blocks of partial sums."""
    many = 153 if op == "l1_distances" else 601  # whose work is the square of it, and the number of its blocks as odd
    rows, counts = (many, (1, 3)) if backend == "cpp" else (13, (torch.get_num_threads(),))
    function, arguments = getattr(torch.ops.dropbp_kernels, op), RAW[op][name](Tensors(rows, 130, device=device))
    expected, threads = call(function, arguments), torch.get_num_threads()
    try:
        for count in counts:
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(call(function, arguments), expected, strict=True))
    finally:
        torch.set_num_threads(threads)
    assert_as_the_reference(op, arguments, expected)


# Public functions.


def outputs_of(function, inputs):
    outputs = function(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def leaves_of(inputs):
    return [tensor for tensor in inputs if isinstance(tensor, torch.Tensor) and tensor.requires_grad]


def gradients_of(outputs, inputs):
    """Where outputs require any the gradients of all leaves among the inputs; None for a leaf that gets none."""
    losses = [output.square().sum() for output in outputs if output.requires_grad]
    leaves = leaves_of(inputs)
    return torch.autograd.grad(sum(losses), leaves, allow_unused=True) if losses else [None] * len(leaves)


def public_inputs(use, rows, width=6, **options):
    """Streams, branches and weights in one dtype, as leaves of a graph."""
    dtype = options.pop("dtype", torch.float32)
    return use.make(Tensors(rows, width, dtype, dtype, needs_grad=True, **options))


@pytest.mark.parametrize("use", differentiable("has_gradient", "is_exact"))
def test_gradcheck(backend, device, use):
    inputs = public_inputs(use, 4, 4, dtype=torch.float64, device=device)
    grads = gradients_of(outputs_of(use.run, inputs), inputs)
    # What gets no gradient is a constant.
    constant = {id(leaf) for leaf, grad in zip(leaves_of(inputs), grads, strict=True) if grad is None}
    inputs = [value.detach() if id(value) in constant else value for value in inputs]
    assert leaves_of(inputs)
    places = [place for place, output in enumerate(outputs_of(use.run, inputs)) if output.requires_grad]

    def run(*inputs):  # its constants would be differentiated too
        outputs = outputs_of(use.run, inputs)
        return tuple(outputs[place] for place in places)

    # Along random directions in place of every element where an interpreter would take seconds.
    torch.autograd.gradcheck(run, inputs, fast_mode=backend == "triton")


def compile_once(function):
    """One graph, forward and backward, for all sizes: what would compile a second time raises."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")


@pytest.mark.parametrize("function", ops.__all__)
@torch._dynamo.config.patch(error_on_recompile=True)
def test_five_row_counts_are_one_compilation(function):
    """All uses of a function in one graph: most of what a compilation takes is the same for one and for twenty."""
    uses = {name: use for name, use in PUBLIC.items() if use.function == function}

    def run(inputs):
        return {name: outputs_of(use.run, inputs[name]) for name, use in uses.items()}

    compiled = compile_once(run)
    for rows in ROW_COUNTS:
        inputs = {name: public_inputs(use, rows, 24) for name, use in uses.items()}
        outputs, expected = compiled(inputs), run(inputs)
        for name in uses:
            torch.testing.assert_close(outputs[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")
        grads, expected_grads = (
            gradients_of(itertools.chain(*results.values()), list(itertools.chain(*inputs.values())))
            for results in (outputs, expected)
        )
        names = [name for name in uses for _ in leaves_of(inputs[name])]
        for name, ours, theirs in zip(names, grads, expected_grads, strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")
        found = {name for name, grad in zip(names, grads, strict=True) if grad is not None}
        assert found == {name for name, use in uses.items() if use.has_gradient}


@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_guard_on_the_rows_would_be_seen():
    compiled = compile_once(lambda x: x + 1 if x.shape[0] > 20 else x - 1)
    compiled(torch.ones(ROW_COUNTS[0], 24))
    with pytest.raises(torch._dynamo.exc.RecompileError):
        compiled(torch.ones(ROW_COUNTS[-1], 24))


# new_residual, whose gradients are 1, of which the branch's is scaled.
SCALED = {
    "add": lambda *tensors, grad_scale: ops.gated_residual_add(*tensors, grad_scale=grad_scale),
    "add at rows": lambda *tensors, grad_scale: ops.gated_residual_add(
        *tensors, rows=torch.arange(4), grad_scale=grad_scale
    ),
    "permuted add": lambda residual, kept, grad_scale: ops.permuted_residual_add(
        residual, kept, kept[:0], torch.arange(4), grad_scale=grad_scale
    ),
    "rms norm": lambda *tensors, grad_scale: ops.gated_residual_rms_norm(
        *tensors, torch.ones(6), grad_scale=grad_scale
    )[1],
    "layer norm, dropped": lambda *tensors, grad_scale: ops.gated_residual_layer_norm(
        *tensors, torch.ones(6), next_kept=False, grad_scale=grad_scale
    )[1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", SCALED.values(), ids=SCALED)
def test_a_new_grad_scale_is_no_new_compilation(function, dtype):
    """Unbiased gates have one for each drop rate. The first is a constant of a graph, the second makes it an input."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for scale in (1.0, 2.0, 4.0, 1.25):
        residual, branch = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, dtype=dtype, requires_grad=True)
        compiled(residual, branch, grad_scale=scale).sum().backward()
        assert torch.equal(residual.grad, torch.ones_like(residual))
        assert torch.equal(branch.grad, torch.full_like(branch, scale))
    assert counter.frame_count == 2


# What is ours is how ops are called, not the loops between them: these need no vectors, nor a compiler's trial of each
# instruction set. Workers that compile would import torch.
@torch._inductor.config.patch({"cpp.vec_isa_ok": False, "compile_threads": 1})
def test_inductor_matches_eager():
    """A use of every differentiable function, all in one graph, which is compiled once."""
    chosen = {use.function: name for name, use in reversed(PUBLIC.items()) if use.has_gradient and use.has_backward}
    uses = {name: PUBLIC[name] for name in chosen.values()}
    inputs = {name: public_inputs(use, 7) for name, use in uses.items()}

    def run(inputs):
        return [outputs_of(use.run, inputs[name]) for name, use in uses.items()]

    torch.compiler.reset()
    results = []
    for function in (run, torch.compile(run, fullgraph=True)):
        outputs = function(inputs)
        losses = [o.square().sum() for group in outputs for o in group if o.requires_grad]
        leaves = [leaf for values in inputs.values() for leaf in leaves_of(values)]
        grads = torch.autograd.grad(sum(losses), leaves, allow_unused=True)
        results.append((outputs, [grad for grad in grads if grad is not None]))
    torch.testing.assert_close(*results)


@public
def test_nothing_is_recorded_without_grad_mode(use):
    with torch.no_grad():
        outputs = outputs_of(use.run, public_inputs(use, 5))
    assert not any(output.requires_grad for output in outputs)


@pytest.mark.parametrize("use", differentiable("has_gradient", "has_backward"))
def test_second_derivative_is_refused(use):
    inputs = public_inputs(use, 5)
    leaves = leaves_of(inputs)
    losses = [output.square().sum() for output in outputs_of(use.run, inputs) if output.requires_grad]
    grads = torch.autograd.grad(sum(losses), leaves, create_graph=True, allow_unused=True)
    total = sum(grad.sum() for grad in grads if grad is not None)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)  # PyTorch's own takes it for zero here
    with pytest.raises(RuntimeError, match="once_differentiable"):
        total.backward()


def test_every_differentiable_function_is_checked():
    """A function whose uses were all marked as exceptions would pass unseen."""
    assert all(inspect.isfunction(getattr(ops, name)) for name in ops.__all__)
    expected = set(ops.__all__) - {"column_restore", "column_update", "l1_distances"}
    for names in (("has_gradient", "is_exact"), ("has_gradient", "has_backward")):
        assert {use.values[0].function for use in differentiable(*names)} == expected
