"""How much is measured: sizes, dtypes and time, by device and scale."""

import time
from dataclasses import dataclass, field

import torch

SCALES = ("full", "quick", "tiny")
# (rows, width). CPU: 64K to 8M elements. GPU: 64M elements at each width, since 8M move in 15 us there.
_SIZES = {
    ("cpu", "full"): [(256, 256), (256, 1024), (1024, 1024), (1024, 4096), (2048, 4096)],
    ("cpu", "quick"): [(256, 256), (1024, 4096)],
    ("cuda", "full"): [(16384, 4096), (8192, 8192), (65536, 1024), (4096, 16384), (2048, 4096)],
    ("cuda", "quick"): [(16384, 4096)],
}
_SECONDS_PER_CASE = {"full": 0.5, "quick": 0.3, "tiny": 0.0}
_MIN_ROUNDS = {"full": 9, "quick": 7, "tiny": 2}


@dataclass
class Settings:
    """What every benchmark is given.

    scale: full, quick or tiny (seconds, to see every code path run). deadline: no case starts after it, on the clock of
    time.monotonic; num_left_out counts them. commit: what rows name where there is no git checkout. chosen_sizes,
    chosen_dtypes: these alone, in place of the scale's. is_wide: whole steps on a CPU run a model three times as wide.
    """

    device: torch.device
    scale: str = "full"
    commit: str = ""
    chosen_sizes: tuple[tuple[int, int], ...] = ()
    chosen_dtypes: tuple[torch.dtype, ...] = ()
    is_wide: bool = False
    deadline: float = float("inf")
    num_left_out: int = field(default=0, init=False)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        if self.chosen_sizes:
            return list(self.chosen_sizes)
        return [(16, 64)] if self.scale == "tiny" else _SIZES[self.device.type, self.scale]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        if self.chosen_dtypes:
            return self.chosen_dtypes
        return (torch.bfloat16,) if self.scale == "tiny" else (torch.bfloat16, torch.float32)

    @property
    def seconds(self) -> float:
        return _SECONDS_PER_CASE[self.scale]

    @property
    def min_rounds(self) -> int:
        return _MIN_ROUNDS[self.scale]

    @property
    def copy_bytes(self) -> int | None:
        return 1 << 20 if self.scale == "tiny" else None

    def has_time(self) -> bool:
        """Whether to start another case; counts it as left out otherwise."""
        if time.monotonic() < self.deadline:
            return True
        self.num_left_out += 1
        return False
