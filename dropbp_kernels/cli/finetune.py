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
  dropbp-kernels finetune                                   built-in model and data, several ways compared
  dropbp-kernels finetune --drop-rate 0.75                  the same, dropping branches
  dropbp-kernels finetune --data builtin:docs --drop-rate 0.5
  dropbp-kernels finetune --data notes.txt --no-compare     one run, nothing compared
  dropbp-kernels finetune --coreset 0.5 --drop-rate 0       half of each batch, chosen by its gradients
  dropbp-kernels finetune --model owner/llama --data chats.jsonl --seq-len 1024 --batch-size 4
  dropbp-kernels finetune --resume runs/finetune-20250101-120000
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a causal language model with DropBP",
        description="Fine-tune a causal language model with parts of the backward left out. By default tokens without\n"
        "a loss run like inference; where nearly every token has a loss, branches (the attention or the MLP\n"
        "of a block) are dropped at random. On the built-in model several ways are compared.",
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
        "how tokens without a loss (prompts) run; inference: without a backward; off: like all others; auto: inference "
        "where data have such tokens and the model can do it, unless branches or examples are asked to be dropped",
        CONTEXTS,
    )
    add(
        "--context-gradient",
        "how far gradients flow into tokens that --context inference runs: not at all, into the projections of their "
        "keys and values, or fully",
        CONTEXT_GRADIENTS,
    )
    add(
        "--target-windows",
        "cut the labelled tokens of each sample into N windows; a step trains on one, the others run like inference "
        "(best with --context-gradient one_hop)",
        type=int,
    )
    add(
        "--target-keep",
        "train a step on this share of the labelled tokens, drawn at random, 0 < target keep <= 1; the others run like "
        "inference (best with --context-gradient one_hop)",
        type=float,
    )
    add("--coreset", "train on this share of each batch, chosen by gradients, 0 < coreset <= 1", type=float)
    rates = (
        "drop rates of the branches: equal; rising with depth; by how sensitive the gradient is to each, measured "
        "after a tenth of the steps; or from another run's calibration.json"
    )
    add("--rates", rates, (*RATES, "FILE"))
    add("--allocation", "how rates are made from sensitivities", ALLOCATIONS)
    add("--sampler", "how the branches that a step drops are drawn", tuple(samplers.SAMPLERS))
    add(
        "--granularity",
        "what is dropped: whole branches; or in every branch a share of the samples, or in MLPs of the tokens",
        GRANULARITIES,
    )
    add(
        "--schedule",
        "how the drop rate changes over the run; recovery:0.2 does so in a fifth of it",
        tuple(SCHEDULES),
    )
    add(
        "--grad-scale",
        "factor on the gradient entering a kept branch; unbiased: 1 / (1 - drop rate)",
        type=parse_grad_scale,
        metavar="X|unbiased",
    )
    add(
        "--missing-grad",
        "what the optimizer does with a parameter whose branch was dropped: skip it, or take a gradient of zero",
        MISSING_GRAD,
    )
    parser.add_argument(
        "--fused",
        action="store_true",
        help="fuse norms, MLPs and LoRA layers as apply_dropbp(..., fused=True) does, with --compare in every run",
    )
    add("--steps", "optimizer steps", type=int)
    add("--batch-size", "samples in a batch", type=int)
    add("--seq-len", "most tokens in a sample", type=int)
    add("--learning-rate", "peak of the learning rate (default: by model and adapter)", type=float)
    add("--dtype", "auto: bfloat16 on a GPU, else float32", DTYPES)
    add("--device", "auto, cpu, cuda, cuda:1, ...", metavar="DEVICE")
    add("--seed", "seed of data order, adapter and drop plans", type=int)
    parser.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help="also train with nothing dropped, with a smaller batch of equal time, with published DropBP and, where "
        "data have tokens without a loss, with these run like inference (default: with the built-in model only)",
    )
    add("--save-every", "steps between checkpoints; 0: only when interrupted", type=int)
    parser.add_argument("--output", metavar="DIR", help="output folder (default: a new one under runs/)")
    parser.add_argument("--resume", metavar="DIR", help="continue from the checkpoint in this output folder")
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
