"""dropbp-kernels profile: what each branch of a model does in one step, and whether dropped ones really do nothing.

branches.csv   one row per branch: kept, saved bytes, forward and backward time, backward functions, FLOPs
branches.png   the same as a picture
"""

import argparse
import csv
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..choices import DROPPED_RUNS
from .errors import UserError, one_line, require_packages
from .model_config import load_config
from .output import choose_folder, console, make_folder

if TYPE_CHECKING:
    from .tracing import BranchTrace

FAULTS = 1  # exit code
MiB = 2**20


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "profile",
        help="what each branch does in one step, and whether dropped ones do nothing",
        description="Run one step of a model with random weights. Show time, saved bytes and FLOPs of each branch (the "
        "attention or the MLP of a block), and check with a profiler trace that dropped branches have no backward and "
        "save nothing (exit code 1 if they do).",
        allow_abbrev=False,
    )
    add = parser.add_option
    add("--model", "as for plan: a name, a config.json, its folder, or a hub id", required=True)
    add("--drop-rate", "share of the branches' backward to drop, 0 <= drop rate < 1", 0.75, type=float)
    add("--lora-rank", "rank of LoRA on all linear layers; 0: train everything", 8, type=int)
    add("--batch-size", "samples in the batch", 2, type=int)
    add("--seq-len", "tokens in a sample", 128, type=int)
    add(
        "--dropped-runs",
        "how dropped branches run: like inference, or as published, with autograd and detached afterwards",
        "inference",
        DROPPED_RUNS,
    )
    add("--seed", "seed of weights, tokens and of which branches are dropped", 0, type=int)
    add(
        "--target-share",
        "share of tokens with a loss, the last of each sample; the others run like inference",
        type=float,
    )
    add("--output", "output folder (default: a new one under runs/)", metavar="DIR")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    _check(args)
    require_packages("profile", ("transformers", "peft", "rich", "matplotlib"))
    folder = choose_folder("profile", args.output)
    branches, share_saved = _trace(args)
    make_folder(folder)
    with open(folder / "branches.csv", "w", newline="") as file:
        rows = [asdict(branch) for branch in branches]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(branches, folder / "branches.png")
    _show(branches)
    print(f"written to {folder}: branches.csv, branches.png")
    if share_saved is not None:
        print(
            f"target plan: {args.target_share:.1%} of the tokens are targets; the step saves {share_saved:.1%} of the "
            "bytes that it saves where all are"
        )
    faults = [fault for branch in branches if (fault := branch.fault())]
    for fault in faults:
        print(f"NOT AS PLANNED: {fault}")
    if not faults:
        num_dropped = sum(not branch.kept for branch in branches)
        print(f"as planned: {num_dropped} dropped branches ran no backward and saved nothing")
    return FAULTS if faults else 0


def _check(args: argparse.Namespace) -> None:
    for name, least in (("lora_rank", 0), ("batch_size", 1), ("seq_len", 2)):
        if (value := getattr(args, name)) < least:
            raise UserError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    if not 0.0 <= args.drop_rate < 1.0:
        raise UserError(f"--drop-rate: expected 0 <= drop_rate < 1, got {args.drop_rate}")
    if args.target_share is not None and not 0.0 < args.target_share <= 1.0:
        raise UserError(f"--target-share: expected 0 < target share <= 1, got {args.target_share}")
    if args.dropped_runs not in DROPPED_RUNS:
        raise UserError(f"--dropped-runs: expected {' or '.join(DROPPED_RUNS)}, got {args.dropped_runs!r}")


def _trace(args: argparse.Namespace) -> tuple[list["BranchTrace"], float | None]:
    """The branches, and with a target plan the bytes that a step saves over those it saves where all are targets."""
    import torch
    from transformers import AutoModelForCausalLM

    from ..integrations.transformers import apply_dropbp
    from ..measure import saved_bytes
    from ..targets import IGNORED
    from .tracing import trace_branches

    config = load_config(args.model)
    config.use_cache = False
    context = None if args.target_share is None else "inference"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    try:
        model: Any = AutoModelForCausalLM.from_config(config)
        if args.lora_rank:
            from peft import LoraConfig, get_peft_model

            with warnings.catch_warnings():  # of names on their way out, and of transposed weights
                warnings.filterwarnings("ignore", message=".*(gradient_checkpointing|fan_in_fan_out)")
                model = get_peft_model(model, LoraConfig(r=args.lora_rank, target_modules="all-linear"))
        model = model.to(device).train()
        handler = apply_dropbp(model, args.drop_rate, seed=args.seed, dropped_runs=args.dropped_runs, context=context)
    except (ValueError, KeyError) as error:
        raise UserError(f"--model {args.model}: {one_line(error)}") from error
    handler.step()
    tokens = torch.randint(config.get_text_config().vocab_size, (args.batch_size, args.seq_len), device=device)

    labels = tokens.clone()
    if args.target_share is not None:
        labels[:, : -max(1, round(args.target_share * args.seq_len))] = IGNORED

    def step() -> None:
        model(input_ids=tokens, labels=labels).loss.backward()
        model.zero_grad()

    branches = trace_branches(handler, step)
    if args.target_share is None:
        return branches, None
    saved = []
    for asked in (labels, tokens):
        with saved_bytes() as counted:
            model(input_ids=tokens, labels=asked)
        saved.append(counted.num_bytes)
    return branches, saved[0] / saved[1]


def draw(branches: Sequence["BranchTrace"], path: Path) -> None:
    """A picture: time, saved bytes and FLOPs of each branch, in model order; dropped ones pale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.5 + 0.18 * len(branches)), layout="constrained")
    FigureCanvasAgg(figure)
    places = range(len(branches))
    colors = ["#D55E00" if branch.kept else "#E8C4AE" for branch in branches]
    times, saved, flops = figure.subplots(1, 3, sharey=True)
    forward = [branch.forward_ms for branch in branches]
    times.barh(places, forward, color="#56B4E9", label="forward")
    times.barh(places, [branch.backward_ms for branch in branches], left=forward, color="#D55E00", label="backward")
    times.set_xlabel("ms")
    times.legend(frameon=False, fontsize=8)
    saved.barh(places, [branch.saved_bytes / MiB for branch in branches], color=colors)
    saved.set_xlabel("MiB saved for backward")
    flops.barh(places, [branch.flops / 1e9 for branch in branches], color=colors)
    flops.set_xlabel("GFLOPs, forward (pale: dropped)")
    times.set_yticks(places, [branch.name for branch in branches], fontsize=6)
    times.set_ylim(len(branches) - 0.4, -0.6)
    figure.savefig(path, dpi=150)


def _show(branches: Sequence["BranchTrace"]) -> None:
    from rich.table import Table

    table = Table()
    for place, name in enumerate(
        ("branch", "plan", "saved, MiB", "forward, ms", "backward, ms", "backward functions", "GFLOPs")
    ):
        table.add_column(name, justify="left" if place < 2 else "right")
    for branch in branches:
        table.add_row(
            branch.name,
            "kept" if branch.kept else "dropped",
            f"{branch.saved_bytes / MiB:.2f}",
            f"{branch.forward_ms:.2f}",
            f"{branch.backward_ms:.2f}",
            str(branch.num_backward),
            f"{branch.flops / 1e9:.3g}",
            style=None if branch.kept else "dim",
        )
    console(width=140).print(table)
