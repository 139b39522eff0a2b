"""How far a result may be from the exact one.

Rule: the largest error against float64 is at most twice that of the same op written in plain PyTorch in the same dtype,
plus ATOL: about one unit in the last place of a value around 1, for cases in which the plain op happens to be exact.
Where terms much larger than the result cancel, ATOL is taken relative to the terms (`magnitude`), and where an operand
was rounded to a coarser dtype than the result's, it is that dtype's (`dtype`).
"""

import torch

ATOL = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}

# (residual, branch): the residual may be wider.
DTYPE_PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float32),
]


def error(actual, exact):
    """Largest absolute error; infinite when only one of the two is finite at some place."""
    difference = (actual.double() - exact.double()).abs()
    same = (actual.double() == exact.double()) | (actual.isnan() & exact.isnan())
    difference = torch.where(same, 0.0, difference).nan_to_num(nan=float("inf"))
    return difference.max().item() if difference.numel() else 0.0


def assert_as_exact(actual, plain, exact, what="", magnitude=1.0, dtype=None):
    """`actual` keeps the rule; `plain` is the plain-PyTorch result, `exact` the one computed in float64."""
    assert actual.shape == plain.shape, (what, actual.shape, plain.shape)
    assert actual.dtype == plain.dtype, (what, actual.dtype, plain.dtype)
    allowed = 2 * error(plain, exact) + ATOL[dtype or actual.dtype] * max(magnitude, 1.0)
    assert error(actual, exact) <= allowed, f"{what}: error {error(actual, exact):.3g}, allowed {allowed:.3g}"
