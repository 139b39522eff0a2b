"""torch.compile with rows that change: one graph forward and backward, compiled once for five row counts."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dropbp_kernels import ops

WIDTH, ROW_COUNTS = 24, (6, 9, 16, 31, 64)


def leaf(rows):
    return torch.randn(rows, WIDTH, requires_grad=True)


def chosen(rows):
    """A third of the rows."""
    return torch.randperm(rows)[: rows // 3]


def add(num_rows, is_kept=True, rows=None, row_scale=None, **options):
    """(function, arguments), where a dropped branch is a constant."""

    def run(residual, branch, rows, row_scale):
        branch = branch * 2 if is_kept else branch.detach() * 2
        scale = {} if row_scale is None else {"grad_scale": row_scale}
        return ops.gated_residual_add(residual.sin(), branch, rows=rows, **scale, **options).cos()

    return run, [leaf(num_rows), leaf(num_rows if rows is None else len(rows)), rows, row_scale]


def norm(num_rows, is_kept=True, next_kept=True, casting="llama"):
    def run(residual, branch, weight):
        branch = branch * 2 if is_kept else branch.detach() * 2
        normed, new_residual = ops.gated_residual_rms_norm(
            residual.sin(), branch, weight, next_kept=next_kept, casting=casting
        )
        return normed.cos() + new_residual

    return run, [leaf(num_rows), leaf(num_rows), torch.ones(WIDTH, requires_grad=True)]


CASES = {
    "add": add,
    "add, dropped": lambda n: add(n, is_kept=False),
    "add in place": lambda n: add(n, inplace=True),
    "add in place, dropped": lambda n: add(n, is_kept=False, inplace=True),
    "add, scaled": lambda n: add(n, grad_scale=4.0),
    "add, scaled rows": lambda n: add(n, row_scale=torch.rand(n)),
    "add at rows": lambda n: add(n, rows=chosen(n)),
    "add at rows, dropped": lambda n: add(n, is_kept=False, rows=chosen(n)),
    "add at rows, scaled rows": lambda n: add(n, rows=chosen(n), row_scale=torch.rand(n // 3)),
    "norm": norm,
    "norm, gemma": lambda n: norm(n, casting="gemma"),
    "norm, kept then dropped": lambda n: norm(n, next_kept=False),
    "norm, dropped then kept": lambda n: norm(n, is_kept=False),
    "norm, dropped then dropped": lambda n: norm(n, is_kept=False, next_kept=False),
}


def results(function, arguments):
    output = function(*arguments)
    wanted = [tensor for tensor in arguments if tensor is not None and tensor.requires_grad]
    return output, *torch.autograd.grad(output.square().sum(), wanted, allow_unused=True)


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_five_row_counts_are_one_compilation(make):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")  # traces forward and backward
    compiled = None
    for num_rows in ROW_COUNTS:
        run, arguments = make(num_rows)
        if compiled is None:
            compiled = torch.compile(run, fullgraph=True, backend=counter)
            for tensor in arguments:
                if tensor is not None and tensor.shape != (WIDTH,):
                    torch._dynamo.mark_dynamic(tensor, 0)
        for ours, theirs in zip(results(compiled, arguments), results(run, arguments), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 1


def test_a_guard_on_the_rows_would_be_seen():
    """The counter counts: a function that asks for the number of rows compiles anew."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: x + 1 if x.shape[0] > 10 else x - 1, fullgraph=True, backend=counter)
    for num_rows in ROW_COUNTS:
        compiled(torch.ones(num_rows, WIDTH))
    assert counter.frame_count > 1


@pytest.mark.slow
def test_inductor_compiles_once_too():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = None
    for num_rows in ROW_COUNTS:
        run, arguments = add(num_rows, grad_scale=4.0)
        compiled = compiled or torch.compile(run, fullgraph=True, backend=counter, dynamic=True)
        for ours, theirs in zip(results(compiled, arguments), results(run, arguments), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 1
