"""What ranks tell each other: tensors only. Without torch.distributed, or alone in it, everything is local."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class Ranks:
    """The ranks of `group` (None: all there are) and their collectives. Not created before the first is needed."""

    def __init__(self, group: "dist.ProcessGroup | None" = None):
        self.group = group
        is_on = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size(group) if is_on else 1
        self.rank = dist.get_rank(group) if is_on else 0

    def gather(self, rows: Tensor) -> list[Tensor]:
        """The tensors (n_r, ...) of all ranks, which may differ in their first dimension; in order of rank."""
        if self.size == 1:
            return [rows]
        counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device), group=self.group)
        lengths = [int(count) for count in counts]
        padded = torch.cat([rows, rows.new_zeros(max(lengths) - len(rows), *rows.shape[1:])])
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.group)
        return [part[:length] for part, length in zip(parts, lengths, strict=True)]

    def gather_columns(self, rows: Tensor, fill: int) -> Tensor:
        """The tensors (n, S_r) of all ranks below each other, filled up on the right where one is wider."""
        if self.size == 1:
            return rows
        if rows.dim() > 1:
            width = torch.tensor([rows.shape[1]], device=rows.device)
            dist.all_reduce(width, op=dist.ReduceOp.MAX, group=self.group)
            rows = F.pad(rows, (*[0, 0] * (rows.dim() - 2), 0, int(width) - rows.shape[1]), value=fill)
        return torch.cat(self.gather(rows))

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks; the same bits on all of them."""
        if self.size > 1:
            dist.all_reduce(value, group=self.group)
        return value
