"""What `dropbp-kernels plan` finds out: settings side by side, what fits a budget, the target share of a data set."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

from ..target_share import count_targets
from . import progress
from .data import load_data
from .errors import UserError
from .models import load_tokenizer
from .plan_setting import CHECKPOINTS, Setting
from .planning import Prediction, StepModel
from .settings import Settings

DROP_RATES = (0.0, 0.5, 0.75, 0.875)  # that are compared, as far as they do not exceed the asked one
TARGET_SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)  # that are compared with the asked one
SEQ_LEN_STEP = 64
LONGEST = 1 << 22
# A slice of a step in slices is simulated as long as any other: seconds for each 10,000 tokens, minutes for what fits a
# large GPU. Their peak lies on a line from two slices on, so what is longer than this is read off it.
MOST_IN_SLICES = 8192
COUNTED_BATCH_SIZES = (1, 2, 4, 8, 16)
MAX_COUNTED_ROWS = 1024
ASSUMPTIONS = (
    "peak bytes of tensors (the allocator's rounding and a CUDA context come on top: the reserve)",
    "memory-efficient attention, no padding, one sequence a row",
    "the plan of the balanced sampler at equal drop rates that needs most memory",
    "step time by FLOPs of matrix products and attention alone",
)


def make_report(model: StepModel, asked: Setting, budget: int | None) -> dict[str, Any]:
    """The asked setting and those to compare it with; with a budget also what fits, and what to take."""
    rates = sorted({asked.drop_rate, *(rate for rate in DROP_RATES if rate < asked.drop_rate)})
    settings = [replace(asked, drop_rate=rate, checkpoint=checkpoint) for rate in rates for checkpoint in CHECKPOINTS]
    undropped = replace(asked, drop_rate=0.0, checkpoint="none")
    rows = []
    with progress.bar("simulating settings", len(settings)) as bar:
        for setting in settings:
            prediction = model.predict(setting)
            row = _row(prediction, model.predict(undropped))
            if budget is not None:
                row["fits"] = prediction.peak_bytes <= budget
                longest = longest_seq_len(model, setting, budget)
                num_tokens = longest * setting.batch_size
                row["longest_seq_len"] = longest
                row["largest_batch_size"] = largest_batch_size(model, setting, budget, num_tokens)
            rows.append(row)
            bar.update()
    report = {
        "num_parameters": model.num_parameters,
        "num_trained": model.num_trained,
        "asked": next(row for row in rows if row["setting"] == asdict(asked)),
        "settings": rows,
        "assumptions": list(ASSUMPTIONS),
    }
    if budget is not None:
        report["budget_bytes"] = budget
        report["recommended"] = recommend(rows)
    return report


def by_target_share(model: StepModel, asked: Setting, share: float) -> list[dict[str, Any]]:
    """Steps by target plan with nothing dropped, next to the undropped step without one; the asked share among them."""
    undropped = replace(asked, drop_rate=0.0)
    rows = []
    for each in (None, *sorted({share, *TARGET_SHARES})):
        try:
            rows.append(_row(model.predict(replace(undropped, target_share=each)), model.predict(undropped)))
        except ValueError as error:
            raise UserError(f"--target-share: {error}") from error
    return rows


def _row(prediction: Prediction, undropped: Prediction) -> dict[str, Any]:
    return {
        "setting": asdict(prediction.setting),
        "peak_bytes": prediction.peak_bytes,
        "bytes": prediction.by_tag,
        "forward_flops": prediction.forward_flops,
        "backward_flops": prediction.backward_flops,
        "relative_step_time": prediction.flops / undropped.flops,
    }


def longest_seq_len(model: StepModel, setting: Setting, budget: int) -> int:
    """The longest sequence, in steps of 64 tokens, whose step fits at this batch size; 0: none does."""
    asked = -(-setting.seq_len // SEQ_LEN_STEP)
    return SEQ_LEN_STEP * _largest(
        _peak(model, lambda n: replace(setting, seq_len=n * SEQ_LEN_STEP), setting.batch_size * SEQ_LEN_STEP),
        budget,
        guesses=(asked, 2 * asked),
        limit=LONGEST // SEQ_LEN_STEP,
    )


def largest_batch_size(model: StepModel, setting: Setting, budget: int, num_tokens: int) -> int:
    """The largest batch whose step fits at this sequence length; 0: none does. num_tokens: about how many would fit."""
    return _largest(
        _peak(model, lambda n: replace(setting, batch_size=n), setting.seq_len),
        budget,
        guesses=(setting.batch_size, max(1, num_tokens // setting.seq_len)),
        limit=max(1, LONGEST // setting.seq_len),
    )


def _peak(model: StepModel, setting_at: Callable[[int], Setting], num_tokens: int) -> Callable[[int], int]:
    """Peak bytes of setting_at(n), which has n times num_tokens; of long steps in slices off a line."""

    def predicted(n: int) -> int:
        return model.predict(setting_at(n)).peak_bytes

    bound = max(2, MOST_IN_SLICES // num_tokens)
    if setting_at(1).checkpoint != "sliced":
        return predicted
    half = bound // 2

    def peak(n: int) -> int:
        if n <= bound:
            return predicted(n)
        return predicted(bound) + (predicted(bound) - predicted(half)) * (n - bound) // (bound - half)

    return peak


def _largest(peak: Callable[[int], int], budget: int, guesses: tuple[int, int], limit: int) -> int:
    """The largest n <= limit with peak(n) <= budget, 0 without one; peak rises, nearly linearly: so by secants."""
    low, high = 0, limit + 1  # peak(low) fits, peak(high) does not
    last = None
    guess, then = (min(guess, limit) for guess in guesses)
    while high - low > 1:
        found = peak(guess)
        if found <= budget:
            low = guess
        else:
            high = guess
        target = then
        if last is not None and found != last[1] and guess != last[0]:
            target = guess + math.floor((budget - found) * (guess - last[0]) / (found - last[1]))
        last = guess, found
        # Next to where it fitted or did not: the answer is there if the secant was right.
        guess = min(max(target, low + 1), high - 1)
    return low


def recommend(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Of the settings that fit: `gentlest`, which drops least and of those takes least time, and `fastest`.

    None fits: `longest`, the setting that takes the longest sequence; it may be 0 tokens.
    """
    rows = list(rows)
    fitting = [row for row in rows if row["fits"]]
    if not fitting:
        return {"longest": max(rows, key=lambda row: (row["longest_seq_len"], -row["relative_step_time"]))}
    return {
        "gentlest": min(fitting, key=lambda row: (row["setting"]["drop_rate"], row["relative_step_time"])),
        "fastest": min(fitting, key=lambda row: (row["relative_step_time"], row["peak_bytes"])),
    }


def measure_data(name: str, tokenizer: str, seq_len: int, batch_size: int) -> dict[str, Any]:
    """The rows of a data set as `finetune` pads them: length of a batch, and what a target plan runs, by batch size."""
    settings = Settings(model=tokenizer)
    data = load_data(name, load_tokenizer(settings), seq_len, seed=0, note=lambda line: None)
    num_rows = min(len(data.train), MAX_COUNTED_ROWS)
    found = {}
    for size in sorted({batch_size, *COUNTED_BATCH_SIZES}):
        if size > num_rows:
            continue
        batches = [data.batch(step, size)[1] for step in range(num_rows // size)]
        share = count_targets({"labels": labels} for labels in batches)
        found[str(size)] = {
            "seq_len": share.num_rows // share.num_batches // size,
            "targets": share.targets,
            "forward": share.forward,
            "backward": share.backward,
            "passes": share.passes,
            "relative_step_time": {"lora": share.step_time(1.0), "full": share.step_time(2.0)},
        }
    if str(batch_size) not in found:
        raise UserError(f"--batch-size: expected at most {num_rows}, the rows of --data, got {batch_size}")
    return {**data.summary(), "seq_len": found[str(batch_size)]["seq_len"], "by_batch_size": found}
