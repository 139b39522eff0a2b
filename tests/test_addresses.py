"""Addresses beyond 2^31 elements, in every backend, mostly on memory that nobody touches; streams and graphs on a GPU.

C++ CPU   the compiler finds every narrowing of a 64-bit index, and test_gated_residual_add.py runs 2^31 + 2^11 elements
CUDA      flat kernels run on the host, one thread at places beyond 2^31 and 2^32 (cuda_index_arithmetic.cpp)
Triton    test_triton.py reads the compiled kernels: no product of 32 bits is left but those of columns
GPU       a real run over more than 2^31 elements, a graph replayed, two streams at once
"""

import shutil
import subprocess
from pathlib import Path

import cuda_host
import pytest
import torch

from dropbp_kernels.ops import gated_residual_add, gated_residual_rms_norm

ROOT = Path(__file__).resolve().parent.parent
STABLE_ABI = f"-DTORCH_TARGET_VERSION={2 << 56 | 11 << 48}ULL"
needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang++, whose warning this is")
@pytest.mark.parametrize("source", sorted(path.name for path in (ROOT / "csrc" / "cpu").glob("*.cpp")))
def test_no_index_of_the_cpu_kernels_is_narrowed(source):
    torch_headers = Path(torch.__file__).parent / "include"
    flags = ["-fsyntax-only", "-std=c++17", "-Werror=shorten-64-to-32", STABLE_ABI, "-isystem", str(torch_headers)]
    done = subprocess.run(["clang++", *flags, str(ROOT / "csrc" / "cpu" / source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_compiler_would_see_a_narrowed_index(tmp_path):
    if shutil.which("clang++") is None:
        pytest.skip("needs clang++")
    (tmp_path / "narrow.cpp").write_text("long f(long i, long w) { int at = i * w; return at; }\n")
    command = ["clang++", "-fsyntax-only", "-Werror=shorten-64-to-32", str(tmp_path / "narrow.cpp")]
    assert subprocess.run(command, capture_output=True).returncode != 0


@pytest.mark.skipif(not cuda_host.can_build(), reason="needs g++ and CUDA's headers")
def test_cuda_kernels_address_beyond_2_32(tmp_path):
    program = cuda_host.build("cuda_index_arithmetic.cpp", tmp_path)
    done = subprocess.run([program], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("the system reserves no 100 GB of addresses")
    assert done.returncode == 0, done.stdout


# ---- on a GPU: written without one, run nowhere yet


class TestGpu:
    pytestmark = needs_gpu

    def inputs(self, rows=64, width=4096, dtype=torch.bfloat16):
        return [torch.randn(rows, width, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2)]

    @pytest.mark.parametrize("op", ["add", "norm"])
    def test_a_graph_replays_forward_and_backward(self, op):
        residual, branch = self.inputs()
        weight = torch.ones(4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)

        def step():
            if op == "add":
                output = gated_residual_add(residual, branch, grad_scale=2.0)
                return [output, *torch.autograd.grad(output.sum(), (residual, branch))]
            normed, new_residual = gated_residual_rms_norm(residual, branch, weight)
            gradients = torch.autograd.grad((normed * new_residual).sum(), (residual, branch, weight))
            return [normed, new_residual, *gradients]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            residual.copy_(torch.randn_like(residual))
            branch.copy_(torch.randn_like(branch))
        graph.replay()
        torch.cuda.synchronize()
        for ours, theirs in zip(captured, step(), strict=True):
            assert torch.equal(ours, theirs)

    def test_two_streams_at_once(self):
        """Each stream's work uses its own data; what one stream allocates is never the other's."""
        weight = torch.ones(4096, device="cuda", dtype=torch.bfloat16)
        given = [self.inputs(rows=2048) for _ in range(2)]
        expected = [gated_residual_rms_norm(*pair, weight)[0].detach() for pair in given]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(2)]
        results = [[], []]
        for _ in range(10):
            for stream, pair, found in zip(streams, given, results, strict=True):
                with torch.cuda.stream(stream):
                    found.append(gated_residual_rms_norm(*pair, weight)[0].detach())
        torch.cuda.synchronize()
        for found, right in zip(results, expected, strict=True):
            assert all(torch.equal(result, right) for result in found)

    def test_more_than_2_31_elements(self):
        width, rows = 4096, 2**19 + 8
        if torch.cuda.mem_get_info()[0] < 10 * 2 * rows * width:
            pytest.skip("needs 45 GB of GPU memory")
        residual = torch.zeros(rows, width, device="cuda", dtype=torch.bfloat16)
        branch = torch.zeros_like(residual)
        residual[-1], branch[-1] = 3.0, 1.0
        total = gated_residual_add(residual, branch)
        assert total[-1].eq(4).all()
        assert not total[:8].any()
        residual.requires_grad_()
        normed, new_residual = gated_residual_rms_norm(residual, branch, torch.ones_like(branch[0]))
        assert new_residual[-1].eq(4).all()
        torch.testing.assert_close(normed[-1].float(), torch.ones(width, device="cuda"))
        (grad,) = torch.autograd.grad(new_residual, residual, branch)
        assert grad[-1].eq(1).all()
