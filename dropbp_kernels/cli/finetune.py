"""dropbp-kernels finetune: its options, checked. What is then done stands in `finetuning`."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .. import samplers
from ..choices import ALLOCATIONS, CONTEXT_GRADIENTS, GRANULARITIES, MISSING_GRAD
from ..schedules import SCHEDULES
from . import checkpoint
from .documents import BUILTIN
from .errors import UserError, require_packages
from .output import choose_folder
from .settings import ADAPTERS, CONTEXTS, DTYPES, RATES, Settings, parse_grad_scale, resolve, settings_of

# What it needs beyond the package itself; `pip install 'dropbp_kernels[finetune]'` brings all of it.
PACKAGES = ("transformers", "peft", "safetensors", "rich", "tqdm", "matplotlib")
EXAMPLES = """examples:
  dropbp-kernels finetune                                   the built-in model and task, several ways compared
  dropbp-kernels finetune --drop-rate 0.75                  branches dropped in place of tokens without a loss, compared
  dropbp-kernels finetune --data builtin:docs --drop-rate 0.5
  dropbp-kernels finetune --data notes.txt --no-compare     one run of ours
  dropbp-kernels finetune --coreset 0.5 --drop-rate 0       half of each batch, chosen by its gradients
  dropbp-kernels finetune --model owner/llama --data chats.jsonl --seq-len 1024 --batch-size 4
  dropbp-kernels finetune --resume runs/finetune-20250101-120000
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a causal language model with DropBP",
        description="Fine-tune a causal language model with DropBP. On the built-in one, several ways are compared.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # what is not given comes from Settings, or from the checkpoint
        allow_abbrev=False,
    )

    def add(name: str, text: str, values: Sequence[str] = (), **options: Any) -> None:
        default = getattr(Settings, name.lstrip("-").replace("-", "_"))
        parser.add_option(name, text, default, values, **options)

    add("--model", "'builtin', a Hugging Face hub id, or a local checkpoint folder")
    add(
        "--data",
        f"{', '.join(BUILTIN)}, a .txt or .jsonl file, or a folder of those; keys of .jsonl: text, or prompt "
        "and completion, or messages",
    )
    add("--adapter", "LoRA or PaCA on all linear layers, or train everything", ADAPTERS)
    add("--lora-rank", "rank of LoRA; how many columns PaCA trains of each weight", type=int)
    rate = "share of the branches' backward to drop, 0 <= drop rate < 1 (default: 0.75; 0 where context is inference)"
    add("--drop-rate", rate, type=float)
    add(
        "--context",
        "how tokens without a loss run; inference: without a backward; auto: that, where data have such tokens, the "
        "model can do it, and no branches or examples are asked to be dropped",
        CONTEXTS,
    )
    add("--context-gradient", "what to keep of what --context inference leaves out", CONTEXT_GRADIENTS)
    add(
        "--target-windows",
        "cut the labelled tokens of each sample into N runs; a step trains on one, the others run as inference (best "
        "with --context-gradient one_hop)",
        type=int,
    )
    add("--coreset", "train on this share of each batch, chosen by its gradients, 0 < coreset <= 1", type=float)
    rates = "equal, rising with depth, allocated after a tenth of the steps, or by another run's calibration.json"
    add("--rates", rates, (*RATES, "FILE"))
    add("--allocation", "how rates are made from sensitivities", ALLOCATIONS)
    add("--sampler", "how plans are drawn", tuple(samplers.SAMPLERS))
    add("--granularity", "what a branch keeps its share of: steps, samples or tokens", GRANULARITIES)
    add("--schedule", "the drop rate over the run, with a share of it as in recovery:0.2", tuple(SCHEDULES))
    add("--grad-scale", "factor on the gradient entering a kept branch", type=parse_grad_scale, metavar="X|unbiased")
    add("--missing-grad", "what the optimizer does with a parameter whose branch was dropped", MISSING_GRAD)
    parser.add_argument(
        "--fused",
        action="store_true",
        help="fuse norms, MLPs and LoRA layers as apply_dropbp(..., fused=True) does, with --compare in every run",
    )
    add("--steps", "optimizer steps", type=int)
    add("--batch-size", "rows of a batch", type=int)
    add("--seq-len", "most tokens of a row", type=int)
    add("--learning-rate", "peak of the learning rate (default: by model and adapter)", type=float)
    add("--dtype", "auto: bfloat16 on a GPU, else float32", DTYPES)
    add("--device", "auto, cpu, cuda, cuda:1, ...", metavar="DEVICE")
    add("--seed", "seed of data order, adapter and drop plans", type=int)
    parser.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help="compare with no dropping, with a smaller batch of equal time, with published DropBP and with a target "
        "plan where the data have tokens without a loss (default: with the built-in model only)",
    )
    add("--save-every", "steps between checkpoints; 0: only when interrupted", type=int)
    parser.add_argument("--output", metavar="DIR", help="output folder (default: a new one under runs/)")
    parser.add_argument("--resume", metavar="DIR", help="go on from the checkpoint in this output folder")
    parser.add_argument("--pretrain-steps", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    require_packages("finetune", PACKAGES)
    given = vars(args)
    explicit = {field.name: given[field.name] for field in fields(Settings) if field.name in given}
    resumed: dict[str, Any] | None = None
    if "resume" in given:
        folder, resumed = checkpoint.load(given["resume"])
        if "output" in given and Path(given["output"]).resolve() != folder.resolve():
            raise UserError(f"--output: a resumed run writes to the folder of its checkpoint, {folder}")
        settings = settings_of(resumed["settings"], explicit)
    else:
        settings = Settings(**explicit)
    settings = resolve(settings)
    if resumed is None:
        folder = choose_folder("finetune", given.get("output"), "; to go on with the run in it, use --resume")
    from .finetuning import finetune

    return finetune(settings, folder, resumed)
