"""Progress bars."""

import sys
from typing import Any

LOG_INTERVAL_S = 15.0


def bar(description: str, total: int, initial: int = 0) -> Any:
    """A tqdm bar of steps; where stderr is no terminal it writes a line now and then, not ten a second."""
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else LOG_INTERVAL_S
    return tqdm(
        desc=description,
        total=total,
        initial=initial,
        unit="step",
        dynamic_ncols=True,
        mininterval=interval,
        maxinterval=max(10.0, interval),
    )
