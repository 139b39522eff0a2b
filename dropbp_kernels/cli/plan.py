"""dropbp-kernels plan: what a fine-tuning would take, before there is a GPU: memory, relative time, what fits.

Peaks are counted on a simulated step (`planning`). Time is by FLOPs alone: a forward and a backward take what their
matrix products and attention take, at one speed; launches, norms and the optimizer are left out. It is therefore given
relative to the step that drops nothing and checkpoints nothing.
"""

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

import torch

from . import progress
from .builtin import NAME
from .data import check_data_path
from .errors import UserError, require_packages
from .model_config import load_config, shipped
from .planning import ADAPTERS, CHECKPOINTS, OPTIMIZERS, Prediction, Setting, StepModel
from .target_tables import measure_data, tables

EXAMPLES = """examples:
  dropbp-kernels plan --model llama-2-7b --gpu-memory 24
  dropbp-kernels plan --model llama-2-70b --adapter qlora --drop-rate 0.875 --gpu-memory 80
  dropbp-kernels plan --model path/to/config.json --seq-len 8192 --checkpoint kept --json
  dropbp-kernels plan --model llama-3-8b --seq-len 8192 --target-share 0.0625
  dropbp-kernels plan --model path/to/model --data chats.jsonl --batch-size 4
"""
DTYPES = ("bfloat16", "float16", "float32")
FUSED_LOSSES = ("auto", "off", "chunked")
TARGET_SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)  # that are compared with the asked one
DROP_RATES = (0.0, 0.5, 0.75, 0.875)  # that are compared, as far as they do not exceed the asked one
RESERVE_GIB = 1.0  # CUDA context, cuBLAS workspaces and what the allocator cannot use
SEQ_LEN_STEP = 64
LONGEST = 1 << 22
GiB = 2**30
ASSUMPTIONS = (
    "peak bytes of tensors (the allocator's rounding and a CUDA context come on top: the reserve)",
    "memory-efficient attention, no padding, one sequence a row",
    "the plan of the balanced sampler at equal drop rates that needs most memory",
    "step time by FLOPs of matrix products and attention alone",
)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="predict memory and step time of a fine-tuning, without a GPU and without weights",
        description="Predict peak memory and relative step time of a fine-tuning with DropBP, without a GPU and "
        "without weights; with --gpu-memory also what fits, and which setting to take.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(name: str, default: Any, text: str, **options: Any) -> None:
        parser.add_argument(name, default=default, help=f"{text} (default: {default})", **options)

    names = ", ".join([NAME, *shipped()])
    parser.add_argument("--model", required=True, help=f"{names}, a config.json, its folder, or a Hugging Face hub id")
    add("--seq-len", 2048, "tokens of a row", type=int)
    add("--batch-size", 1, "rows of a micro-batch", type=int)
    add(
        "--adapter",
        "lora",
        f"{', '.join(ADAPTERS)}: LoRA on all linear layers, over a 4-bit base, PaCA, or train everything",
    )
    add("--lora-rank", 8, "rank of LoRA; how many columns PaCA trains of each weight", type=int)
    add("--drop-rate", 0.75, "share of the branches' backward to drop, 0 <= drop rate < 1", type=float)
    add("--checkpoint", "none", f"{', '.join(CHECKPOINTS)}: gradient checkpointing")
    add("--dtype", "bfloat16", f"of weights and activations: {', '.join(DTYPES)}")
    add("--adapter-dtype", "float32", f"of what the adapter trains (PEFT's own choice is float32): {', '.join(DTYPES)}")
    add("--optimizer", "adamw", f"whose state is counted: {', '.join(OPTIMIZERS)}")
    parser.add_argument(
        "--gradient-accumulation", action="store_true", help="gradients stay from one micro-batch to the next"
    )
    parser.add_argument("--gpu-memory", metavar="GIB", help="memory of the GPU in GiB: also find what fits")
    add("--reserve", RESERVE_GIB, "GiB of it that tensors cannot have", type=float)
    add("--fused-loss", "auto", f"{', '.join(FUSED_LOSSES)}: as in apply_dropbp")
    parser.add_argument(
        "--target-share", type=float, help="share of a row's tokens that carry a loss: compare target plans too"
    )
    parser.add_argument(
        "--data", help="as for finetune: take --target-share and --seq-len from this, as its batches are padded"
    )
    parser.add_argument("--tokenizer", help="for --data: a hub id or folder, or 'builtin' for bytes (default: --model)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    budget = _check(args)
    require_packages("plan", ("transformers", "peft", "rich", "tqdm"))
    data = None
    if args.data is not None:
        data = measure_data(args.data, args.tokenizer or args.model, args.seq_len, args.batch_size)
        args.seq_len, args.target_share = data["seq_len"], data["by_batch_size"][str(args.batch_size)]["targets"]
    model = StepModel(
        load_config(args.model),
        args.adapter,
        args.lora_rank,
        getattr(torch, args.dtype),
        getattr(torch, args.adapter_dtype),
        args.optimizer,
        args.gradient_accumulation,
    )
    resident = model.weight_bytes + model.optimizer_bytes
    if budget is not None and resident >= budget:
        hint = "" if args.adapter == "qlora" else "; --adapter qlora takes less" if model.can_be_four_bit else ""
        raise UserError(
            f"--gpu-memory {args.gpu_memory}: weights and optimizer state alone take {resident / GiB:.1f} GiB, and "
            f"{budget / GiB:.1f} GiB are left after the reserve of {args.reserve:g} GiB{hint}"
        )
    asked = Setting(args.batch_size, args.seq_len, args.drop_rate, args.checkpoint, fused_loss=args.fused_loss)
    report = make_report(model, asked, budget)
    report = {"model": args.model, "options": _options(args), **report}
    if args.target_share is not None:
        report["target_plans"] = by_target_share(model, asked, args.target_share)
    if data is not None:
        report["data"] = data
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _show(report)
    return 0


def _check(args: argparse.Namespace) -> int | None:
    """Check the options; return the bytes that tensors may take, None without --gpu-memory."""
    choices = {
        "adapter": ADAPTERS,
        "checkpoint": CHECKPOINTS,
        "dtype": DTYPES,
        "adapter_dtype": DTYPES,
        "optimizer": OPTIMIZERS,
        "fused_loss": FUSED_LOSSES,
    }
    for name, allowed in choices.items():
        if (value := getattr(args, name)) not in allowed:
            raise UserError(f"--{name.replace('_', '-')}: expected one of {', '.join(allowed)}, got {value!r}")
    for name in ("seq_len", "batch_size", "lora_rank"):
        if (value := getattr(args, name)) < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if args.target_share is not None and args.data is not None:
        raise UserError("--target-share: expected none with --data, which has one of its own")
    if args.target_share is not None and not 0.0 < args.target_share <= 1.0:
        raise UserError(f"--target-share: expected 0 < target share <= 1, got {args.target_share}")
    if args.tokenizer is not None and args.data is None:
        raise UserError("--tokenizer: expected --data with it")
    if args.data is not None:
        check_data_path(args.data)
    if not 0.0 <= args.drop_rate < 1.0:
        raise UserError(f"--drop-rate: expected 0 <= drop_rate < 1, got {args.drop_rate}")
    if not 0.0 <= args.reserve < float("inf"):
        raise UserError(f"--reserve: expected GiB >= 0, got {args.reserve}")
    if args.gpu_memory is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GiB|GB|G)?", args.gpu_memory.strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= args.reserve:
        raise UserError(
            f"--gpu-memory: expected GiB, as in 24 or 80, and more than the reserve of {args.reserve:g}, "
            f"got {args.gpu_memory!r}"
        )
    return round((float(match[1]) - args.reserve) * GiB)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    left_out = ("command", "run", "model", "json")
    return {name: value for name, value in vars(args).items() if name not in left_out}


# ---- what is found out


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
        lambda n: model.predict(replace(setting, seq_len=n * SEQ_LEN_STEP)).peak_bytes,
        budget,
        guesses=(asked, 2 * asked),
        limit=LONGEST // SEQ_LEN_STEP,
    )


def largest_batch_size(model: StepModel, setting: Setting, budget: int, num_tokens: int) -> int:
    """The largest batch whose step fits at this sequence length; 0: none does. num_tokens: about how many would fit."""
    return _largest(
        lambda n: model.predict(replace(setting, batch_size=n)).peak_bytes,
        budget,
        guesses=(setting.batch_size, max(1, num_tokens // setting.seq_len)),
        limit=max(1, LONGEST // setting.seq_len),
    )


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


# ---- what is shown


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    options, asked = report["options"], report["asked"]
    console = Console()
    if not console.is_terminal:  # a log has room, and rich would take it for 80 columns
        console = Console(width=120)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    say(
        f"{report['model']}, {report['num_parameters'] / 1e9:.2f} billion parameters, {options['adapter']}: batch "
        f"{options['batch_size']} x {options['seq_len']} tokens, {_words(asked['setting'])}"
    )
    parts = Table()
    parts.add_column("live at the peak")
    parts.add_column("GiB", justify="right")
    for tag, num_bytes in asked["bytes"].items():
        parts.add_row(tag, f"{num_bytes / GiB:.2f}")
    parts.add_row("peak", f"{asked['peak_bytes'] / GiB:.2f}", style="bold")
    console.print(parts)

    say("Step time is by FLOPs, relative to dropping and checkpointing nothing.")
    is_bounded = "budget_bytes" in report
    table = Table()
    bounded = ("fits", "longest sequence", "largest batch") if is_bounded else ()
    for name in ("drop rate", "checkpoint", "peak, GiB", "step time", *bounded):
        table.add_column(name, justify="right")
    for row in report["settings"]:
        setting = row["setting"]
        cells = [f"{setting['drop_rate']:g}", setting["checkpoint"], f"{row['peak_bytes'] / GiB:.2f}"]
        cells.append(f"{row['relative_step_time']:.2f}")
        if is_bounded:
            cells += ["yes" if row["fits"] else "no", f"{row['longest_seq_len']:,}", f"{row['largest_batch_size']:,}"]
        table.add_row(*cells, style="bold" if row is asked else None)
    console.print(table)
    for title, rows in tables(report):
        say(title)
        table = Table()
        for name in rows[0]:
            table.add_column(name, justify="right")
        for shown in rows:
            table.add_row(*shown.values())
        console.print(table)
    for line in [*_advice(report), f"Assumed: {'; '.join(report['assumptions'])}."]:
        say(line)


def _advice(report: dict[str, Any]) -> list[str]:
    if "recommended" not in report:
        return []
    recommended = report["recommended"]
    if "longest" in recommended:
        row = recommended["longest"]
        if not row["longest_seq_len"]:
            return ["No setting fits, not even 64 tokens at this batch size."]
        return [
            f"No setting fits {row['setting']['seq_len']} tokens. The longest sequence, {row['longest_seq_len']:,} "
            f"tokens, fits with {_words(row['setting'])}."
        ]
    gentlest, fastest = recommended["gentlest"], recommended["fastest"]
    named = {"Fastest": fastest} if gentlest is fastest else {"Dropping least": gentlest, "Fastest": fastest}
    return [
        f"{name}: {_words(row['setting'])}: {row['peak_bytes'] / GiB:.1f} GiB, "
        f"{row['relative_step_time']:.2f} of the time."
        for name, row in named.items()
    ]


def _words(setting: dict[str, Any]) -> str:
    checkpoint = setting["checkpoint"]
    return f"drop rate {setting['drop_rate']:g}, " + (
        "no checkpointing" if checkpoint == "none" else f'checkpoint="{checkpoint}"'
    )
