"""dropbp-kernels plan: what a fine-tuning would take, before there is a GPU: memory, relative time, what fits.

Peaks are counted on a simulated step (`planning`). Time is by FLOPs alone: a forward and a backward take what their
matrix products and attention take, at one speed; launches, norms and the optimizer are left out. It is therefore given
relative to the step that drops nothing and checkpoints nothing.
"""

import argparse
import json
import re
from typing import Any

from .builtin import NAME
from .documents import check_data_path
from .errors import UserError, require_packages
from .model_config import load_config, shipped
from .plan_setting import ADAPTERS, CHECKPOINTS, IN_FOUR_BITS, OPTIMIZERS, Setting
from .plan_tables import GiB, show

EXAMPLES = """examples:
  dropbp-kernels plan --model llama-2-7b --gpu-memory 24
  dropbp-kernels plan --model llama-2-70b --adapter qlora --drop-rate 0.875 --gpu-memory 80
  dropbp-kernels plan --model path/to/config.json --seq-len 8192 --checkpoint kept --json
  dropbp-kernels plan --model llama-3-8b --seq-len 8192 --target-share 0.0625
  dropbp-kernels plan --model path/to/model --data chats.jsonl --batch-size 4
"""
DTYPES = ("bfloat16", "float16", "float32")
FUSED_LOSSES = ("auto", "off", "chunked")
RESERVE_GIB = 1.0  # CUDA context, cuBLAS workspaces and what the allocator cannot use


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="predict memory and step time of fine-tuning, without a GPU and without weights",
        description="Predict peak memory and relative step time of fine-tuning with DropBP, without a GPU and without\n"
        "weights. With --gpu-memory also what fits, and which setting to take (minutes for a 7B model).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    names = ", ".join([NAME, *shipped()])
    add = parser.add_option
    add("--model", f"{names}, a config.json, its folder, or a Hugging Face hub id", required=True)
    add("--seq-len", "tokens in a sample", 2048, type=int)
    add("--batch-size", "samples in a micro-batch", 1, type=int)
    add("--adapter", "LoRA or PaCA on all linear layers, q: over a 4-bit base; or train everything", "lora", ADAPTERS)
    add("--lora-rank", "rank of LoRA; how many columns PaCA trains of each weight", 8, type=int)
    add("--drop-rate", "share of the branches' backward to drop, 0 <= drop rate < 1", 0.75, type=float)
    add(
        "--checkpoint",
        "gradient checkpointing: of whole blocks, as in transformers; of kept branches; or that with MLPs in slices",
        "none",
        CHECKPOINTS,
    )
    add("--dtype", "of weights and activations", "bfloat16", DTYPES)
    add("--adapter-dtype", "of what the adapter trains; PEFT's own choice is float32", "float32", DTYPES)
    add("--optimizer", "the optimizer whose state is counted", "adamw", OPTIMIZERS)
    parser.add_argument(
        "--gradient-accumulation",
        action="store_true",
        help="count gradients that stay from one micro-batch to the next",
    )
    add("--gpu-memory", "memory of the GPU in GiB: also find what fits", metavar="GIB")
    add("--reserve", "GiB of it that tensors cannot have", RESERVE_GIB, type=float)
    add("--fused-loss", "as in apply_dropbp; chunked: the logits are never stored whole", "auto", FUSED_LOSSES)
    parser.add_argument("--fused", action="store_true", help="as in apply_dropbp: norms, MLPs and LoRA save less")
    add(
        "--target-share",
        "share of a sample's tokens with a loss: also predict steps that run the others like inference",
        type=float,
    )
    add("--data", "as for finetune: take --target-share and --seq-len from these data, as their batches are padded")
    add("--tokenizer", "for --data: a hub id or folder, or 'builtin' for bytes (default: --model)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    budget = _check(args)
    require_packages("plan", ("transformers", "peft", "rich", "tqdm"))
    config = load_config(args.model)
    import torch

    from .plan_report import by_target_share, make_report, measure_data
    from .planning import StepModel

    data = None
    if args.data is not None:
        data = measure_data(args.data, args.tokenizer or args.model, args.seq_len, args.batch_size)
        args.seq_len, args.target_share = data["seq_len"], data["by_batch_size"][str(args.batch_size)]["targets"]
    model = StepModel(
        config,
        args.adapter,
        args.lora_rank,
        getattr(torch, args.dtype),
        getattr(torch, args.adapter_dtype),
        args.optimizer,
        args.gradient_accumulation,
    )
    resident = model.weight_bytes + model.optimizer_bytes
    if budget is not None and resident >= budget:
        smaller = IN_FOUR_BITS.get(args.adapter)
        hint = f"; --adapter {smaller} takes less" if smaller else ""
        raise UserError(
            f"--gpu-memory {args.gpu_memory}: weights and optimizer state alone take {resident / GiB:.1f} GiB, and "
            f"{budget / GiB:.1f} GiB are left after the reserve of {args.reserve:g} GiB{hint}"
        )
    asked = Setting(
        args.batch_size, args.seq_len, args.drop_rate, args.checkpoint, fused_loss=args.fused_loss, fused=args.fused
    )
    report = make_report(model, asked, budget)
    report = {"model": args.model, "options": _options(args), **report}
    if args.target_share is not None:
        report["target_plans"] = by_target_share(model, asked, args.target_share)
    if data is not None:
        report["data"] = data
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
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
        if (tokenizer := args.tokenizer or args.model) in shipped():
            raise UserError(
                f"--tokenizer: expected one with --data, since {tokenizer} is a config alone; builtin: bytes"
            )
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
