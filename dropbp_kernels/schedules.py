"""How the drop rates change over a run: one factor on all of them, from the step and the number of steps.

A schedule is a pure function ``(step, total_steps) -> factor`` with 0 <= factor <= 1; the rates of a step are the
branches' own times the factor. Named ones take the share of the run in which they act, as in "recovery:0.2":

=========  =========================================================  =============
schedule   factor                                                     default share
=========  =========================================================  =============
warmup     rises from 0 to 1 in the first share of the run            0.1
cosine     falls from 1 to 0 along half a cosine in the last share    1.0
recovery   1, then 0 (nothing is dropped) in the last share           0.1
=========  =========================================================  =============
"""

import functools
import math
from collections.abc import Callable

Schedule = Callable[[int, int], float]


def warmup(step: int, total_steps: int, share: float = 0.1) -> float:
    """Rises evenly from 0 at the first step to 1 after `share` of the run."""
    return min(1.0, step / (share * total_steps))


def cosine(step: int, total_steps: int, share: float = 1.0) -> float:
    """1, then down to 0 at the end along half a cosine, which takes the last `share` of the run."""
    done = (step - (1.0 - share) * total_steps) / (share * total_steps)
    return 0.5 * (1.0 + math.cos(math.pi * min(max(done, 0.0), 1.0)))


def recovery(step: int, total_steps: int, share: float = 0.1) -> float:
    """1, then 0 in the last `share` of the run."""
    return 1.0 if step < round((1.0 - share) * total_steps) else 0.0


SCHEDULES: dict[str, Callable[..., float]] = {"warmup": warmup, "cosine": cosine, "recovery": recovery}


def get_schedule(schedule: str | Schedule | None) -> Schedule | None:
    """The schedule of a name, or of a name and a share as in "warmup:0.05"; None and callables as they are.

    Errors: ValueError for an unknown name or a share outside (0, 1]; TypeError for anything else.
    """
    if schedule is None or callable(schedule):
        return schedule
    if not isinstance(schedule, str):
        raise TypeError(f"schedule: expected None, a name or a callable, got {type(schedule).__name__}")
    name, colon, text = schedule.partition(":")
    if name not in SCHEDULES:
        raise ValueError(f"schedule: expected a callable or one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if not colon:
        return SCHEDULES[name]
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0.0 < share <= 1.0:
        raise ValueError(f"schedule: expected a share of the run in (0, 1] after {name!r}, got {text!r}")
    return functools.partial(SCHEDULES[name], share=share)


def factor_at(schedule: Schedule, step: int, total_steps: int | None) -> float:
    """What `schedule` makes of the drop rates at `step`; after the last step it is that of the last.

    Errors: ValueError when total_steps is not known, or the factor is outside [0, 1]; TypeError when it is no number.
    """
    if total_steps is None:
        raise ValueError("total_steps: expected the number of steps of the run, which a schedule needs, got None")
    factor = schedule(min(step, total_steps - 1), total_steps)
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        raise TypeError(f"schedule: expected a function that returns a number, got {factor!r} at step {step}")
    if not 0.0 <= factor <= 1.0:
        raise ValueError(f"schedule: expected a factor in [0, 1], got {factor} at step {step}")
    return float(factor)
