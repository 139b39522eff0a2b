"""Triton kernel of l1_distances: a program sums a tile of TILE x TILE pairs, COLUMNS columns at a time.

No tensor core takes absolute differences: what a tile saves is reading, each value TILE times less often.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import WIDEST, Config, LaunchTable, Row
from .rows import device_guard, jit_kernel, wide_of

COLUMNS = 8  # of a step: TILE * TILE * COLUMNS sums are in registers, added up at the end

# block: the pairs of a tile. 32 x 32 x 8 sums in 128 threads: 127 registers (sm_90, Triton 3.6).
_DISTANCES = LaunchTable(
    "l1_distances", [Row(WIDEST, Config(block=1024, num_warps=4))], lambda to: launch_l1_distances(to.x)
)


@jit_kernel
def _l1_distances_kernel(
    features_ptr,  # (num_rows, width)
    distances_ptr,  # (num_rows, num_rows)
    num_rows,
    width,
    blocks_per_row,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # I/O: read 2 * TILE rows for each tile + write distances
    program = tl.program_id(0).to(tl.int64)  # offsets pass 2^31 elements
    rows = (program // blocks_per_row) * TILE + tl.arange(0, TILE)
    others = (program % blocks_per_row) * TILE + tl.arange(0, TILE)
    columns = tl.arange(0, COLUMNS)
    # One for each column of a step: to add columns up, threads exchange more than they sum.
    sums = tl.zeros((TILE, TILE, COLUMNS), dtype=WIDE)
    for start in range(0, width, COLUMNS):
        at = start + columns
        is_column = at[None, :] < width
        left_mask, right_mask = (rows[:, None] < num_rows) & is_column, (others[:, None] < num_rows) & is_column
        left = tl.load(features_ptr + rows[:, None] * width + at[None, :], mask=left_mask, other=0.0).to(WIDE)
        right = tl.load(features_ptr + others[:, None] * width + at[None, :], mask=right_mask, other=0.0).to(WIDE)
        sums += tl.abs(left[:, None, :] - right[None, :, :])
    mask = (rows[:, None] < num_rows) & (others[None, :] < num_rows)
    tl.store(distances_ptr + rows[:, None] * num_rows + others[None, :], tl.sum(sums, axis=2), mask=mask)


def launch_l1_distances(features: Tensor) -> Tensor:
    features = features.contiguous()
    num_rows, width = features.shape
    dtype, wide = wide_of(features.dtype)
    distances = torch.empty(num_rows, num_rows, dtype=dtype, device=features.device)
    if num_rows == 0:
        return distances
    config = _DISTANCES.at(width, features.device)
    tile = 1 << (config.block.bit_length() - 1) // 2
    blocks_per_row = triton.cdiv(num_rows, tile)
    with device_guard(features):
        _l1_distances_kernel[(blocks_per_row * blocks_per_row,)](
            features,
            distances,
            num_rows,
            width,
            blocks_per_row,
            WIDE=wide,
            TILE=tile,
            COLUMNS=COLUMNS,
            **config.options,
        )
    return distances
