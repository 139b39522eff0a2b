"""What only a GPU can show: its streams and graphs, its allocator and profiler, 2^31 elements, a kernel that stops.

Written without a GPU and run nowhere yet. Results are compared in the other files, whose backends include a GPU's where
there is one.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import PUBLIC, RAW, Tensors

from benchmarks import boundary
from dropbp_kernels import DropBP, _backend
from dropbp_kernels.ops import gated_residual_add, gated_residual_rms_norm
from dropbp_kernels.ops.raw import raw

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
ROOT = Path(__file__).resolve().parent.parent
on_both = pytest.mark.parametrize("backend", ["triton", "cuda"], indirect=True)
RAW_CASES = [pytest.param(op, name, id=f"{op}-{name}") for op, cases in RAW.items() for name in cases]
USES = [pytest.param(use, id=name) for name, use in PUBLIC.items()]


def tensors_of(values):
    return [value for value in values if isinstance(value, torch.Tensor)]


def results_of(use, inputs):
    """Outputs, and the gradients of all leaves where the outputs have any."""
    outputs = use.run(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    leaves = [value for value in tensors_of(inputs) if value.requires_grad]
    losses = [output.square().sum() for output in outputs if output.requires_grad]
    grads = torch.autograd.grad(sum(losses), leaves, allow_unused=True) if losses else ()
    return [tensor.detach() for tensor in (*outputs, *grads) if tensor is not None]


# ---- streams and graphs


@on_both
@pytest.mark.parametrize("use", USES)
def test_a_graph_replays_forward_and_backward(backend, use):
    torch.manual_seed(0)
    shape = Tensors(12, 64, torch.float32, torch.float32, device=GPU, needs_grad=True)
    inputs, others = use.make(shape), use.make(shape)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles kernels, and finds out once what a graph may not wait for
        for _ in range(2):
            results_of(use, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results_of(use, inputs)
    with torch.no_grad():
        for tensor, other in zip(tensors_of(inputs), tensors_of(others), strict=True):
            tensor.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip(captured, results_of(use, others), strict=True):
        torch.testing.assert_close(ours, theirs)


@on_both
@pytest.mark.parametrize(("op", "name"), RAW_CASES)
def test_runs_on_the_current_stream(backend, op, name):
    """Behind a stream that sleeps: on another one the op would read what its inputs held before."""
    function, make = getattr(raw, op), RAW[op][name]
    right, late = make(Tensors(12, 64, device=GPU)), make(Tensors(12, 64, device=GPU))
    expected = [tensor.clone() for tensor in tensors_of(right)]
    first = function(*late)  # compiles, so that the stream still sleeps when the second call is launched
    late = make(Tensors(12, 64, device=GPU))
    for tensor in tensors_of(late):
        tensor.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # cycles: some 30 ms
        for tensor, value in zip(tensors_of(late), expected, strict=True):
            tensor.copy_(value)
        found = function(*late)
        found = [] if found is None else [found] if isinstance(found, torch.Tensor) else list(found)
        found += tensors_of(late)
        torch.cuda.current_stream().synchronize()
    del first
    results = function(*right)
    results = [] if results is None else [results] if isinstance(results, torch.Tensor) else list(results)
    for ours, theirs in zip(found, results + tensors_of(right), strict=True):
        assert torch.equal(ours, theirs)


def test_two_streams_at_once():
    """Each stream's work uses its own data; what one stream allocates is never the other's."""
    weight = torch.ones(4096, device=GPU, dtype=torch.bfloat16)
    given = [[torch.randn(2048, 4096, device=GPU, dtype=torch.bfloat16) for _ in range(2)] for _ in range(2)]
    expected = [gated_residual_rms_norm(*pair, weight)[0] for pair in given]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(2)], [[], []]
    for _ in range(10):
        for stream, pair, found in zip(streams, given, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(gated_residual_rms_norm(*pair, weight)[0])
    torch.cuda.synchronize()
    for found, right in zip(results, expected, strict=True):
        assert all(torch.equal(result, right) for result in found)


@on_both
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_gpu_of_its_tensors(backend):
    residual, branch, weight = (torch.randn(shape, device="cuda:1") for shape in ((8, 64), (8, 64), (64,)))
    normed, total = gated_residual_rms_norm(residual, branch, weight)  # the current device is cuda:0
    assert torch.equal(total, residual + branch)
    expected = torch.nn.functional.rms_norm(total, (64,), weight, 1e-6)
    torch.testing.assert_close(normed, expected)


# ---- what a dropped branch costs, and what kernels allocate


def test_a_dropped_boundary_starts_no_kernel_and_allocates_nothing_in_backward():
    counts = boundary.boundary_counts(GPU, 256, 1024)
    free = [entry for entry in counts if entry["must_be_free"]]
    assert len(free) == 6
    assert all(boundary.is_free(entry) for entry in free), free
    kept = next(entry for entry in counts if entry["state"] == "kept, then kept")
    assert (kept["forward_kernels"], kept["backward_kernels"]) == (1, 1)
    assert kept["backward_allocated_bytes"] == 256 * 1024 * 2


def test_the_gate_of_a_dropped_branch_adds_one_kernel_forward_and_none_backward():
    gate, weight = DropBP(), torch.randn(512, 512, device=GPU, requires_grad=True)
    residual = torch.randn(256, 512, device=GPU, requires_grad=True)
    gate.kept = False
    grad, count = torch.ones_like(residual), boundary.count_kernels

    def forward():
        return gate.residual_add(residual, lambda x: x @ weight)

    forward()
    with torch.no_grad():
        of_branch = count(lambda: residual @ weight, GPU)
    assert count(forward, GPU) == of_branch + 1
    output = forward()
    assert count(lambda: torch.autograd.grad(output, residual, grad), GPU) == 0
    output = forward()
    assert boundary.count_allocated(lambda: torch.autograd.grad(output, residual, grad), GPU) == 0


@on_both
def test_a_norm_allocates_its_results_and_bounded_sums(backend):
    rows, width = 8192, 1024
    residual, branch, new = (torch.randn(rows, width, device=GPU, dtype=torch.bfloat16) for _ in range(3))
    weight, rstd = torch.ones(width, device=GPU, dtype=torch.bfloat16), torch.ones(rows, device=GPU)
    allocated = boundary.count_allocated

    def forward():
        return raw.gated_residual_rms_norm(residual, branch, weight, 1e-6, False)

    def backward(trains_weight, rows=rows):
        tensors = branch[:rows], residual[:rows], new[:rows], weight, rstd[:rows]
        return raw.gated_residual_rms_norm_backward(*tensors, False, trains_weight)

    forward(), backward(True), backward(False)
    assert allocated(forward, GPU) == 2 * residual.nbytes + rstd.nbytes
    assert allocated(lambda: backward(False), GPU) == residual.nbytes
    sums = allocated(lambda: backward(True), GPU) - residual.nbytes
    assert sums < 16 << 20
    half = allocated(lambda: backward(True, rows // 2), GPU) - residual.nbytes // 2
    assert sums == half  # the GPU decides their number, not the rows


# ---- indices


def test_more_than_2_31_elements():
    width, rows = 4096, 2**19 + 8
    if torch.cuda.mem_get_info()[0] < 10 * 2 * rows * width:
        pytest.skip("needs 45 GB of GPU memory")
    residual = torch.zeros(rows, width, device=GPU, dtype=torch.bfloat16)
    branch = torch.zeros_like(residual)
    residual[-1], branch[-1] = 3.0, 1.0
    total = gated_residual_add(residual, branch)
    assert total[-1].eq(4).all()
    assert not total[:8].any()
    residual.requires_grad_()
    normed, new_residual = gated_residual_rms_norm(residual, branch, torch.ones_like(branch[0]))
    assert new_residual[-1].eq(4).all()
    torch.testing.assert_close(normed[-1].float(), torch.ones(width, device=GPU))
    (grad,) = torch.autograd.grad(new_residual, residual, branch, retain_graph=True)
    assert grad[-1].eq(1).all()
    (grad,) = torch.autograd.grad((normed, new_residual), residual, (2 * branch, branch))  # by the norm's kernel
    torch.testing.assert_close(grad[-1].float(), torch.ones(width, device=GPU))  # an even row's norm has none


WRONG_INDICES = {
    "rows": "raw.gated_residual_add(x, x[:2], wrong)",
    "rows backward": "raw.gated_residual_add_backward(x, wrong, None, 2.0, x.dtype)",
    "permutation": "raw.permuted_residual_add(x[:2], x[:1], x[1:2], wrong)",
    "permutation of a norm": "raw.permuted_norm(x[:2], x[0], None, wrong, 1, 1e-6, False, False, x.dtype)",
    "index": "raw.partial_gather(x, wrong)",
    "index of columns": "raw.column_update_(x, x[:, :2], wrong, 1.0)",
}


@pytest.mark.parametrize("call", WRONG_INDICES.values(), ids=WRONG_INDICES)
@pytest.mark.parametrize("bad", [64, -1])
def test_a_wrong_index_stops_the_program_with_a_message(call, bad):
    """In a process of its own: after such a stop nothing runs on the GPU in the process that met it."""
    if (reason := _backend.why_not("cuda", "gated_residual_add")) is not None:
        pytest.skip(f"cuda: {reason}")
    code = (
        "import torch\nfrom dropbp_kernels.ops.raw import raw\n"
        f"x, wrong = torch.zeros(3, 8, device='cuda'), torch.tensor([0, {bad}], device='cuda')\n"
        f"{call}\ntorch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "dropbp_kernels:0: index out of range" in done.stderr
    assert "device-side assert" in done.stderr
