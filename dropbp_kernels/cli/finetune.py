"""dropbp-kernels finetune: options, the order of events, and what is left in the output folder.

checkpoint.pt    to go on from (--resume)                      comparison.png   with --compare
report.json      settings, machine, results                    adapter/         with lora and paca, in PEFT's format
losses.csv       one row per run and step                      model/           with --adapter full
calibration.json, calibration.png    with rates from sensitivities; the former for --rates of another run
"""

import argparse
import csv
import datetime
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .. import samplers
from ..allocation import METHODS
from ..integrations.target_checks import CONTEXT_GRADIENTS
from ..missing_grad import MISSING_GRAD
from ..row_plan import GRANULARITIES
from ..schedules import SCHEDULES
from . import checkpoint, compare, compare_report, hardware, models
from .data import Data, load_data
from .documents import BUILTIN
from .errors import UserError, require_finetune_packages
from .settings import ADAPTERS, CONTEXTS, DTYPES, RATES, Settings, parse_grad_scale, resolve, settings_of
from .training import Run, train

EXAMPLES = """examples:
  dropbp-kernels finetune                                   the built-in model and task, several ways compared
  dropbp-kernels finetune --drop-rate 0.75                  branches dropped in place of tokens without a loss, compared
  dropbp-kernels finetune --data builtin:docs --drop-rate 0.5
  dropbp-kernels finetune --data notes.txt --no-compare     one run of ours
  dropbp-kernels finetune --coreset 0.5 --drop-rate 0       half of each batch, chosen by its gradients
  dropbp-kernels finetune --model owner/llama --data chats.jsonl --seq-len 1024 --batch-size 4
  dropbp-kernels finetune --resume runs/finetune-20250101-120000
"""
INTERRUPTED = 130


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
    add("--allocation", "how rates are made from sensitivities", METHODS)
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
    require_finetune_packages()
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
        folder = _new_folder(given.get("output"))
    return _finetune(settings, folder, resumed)


def _new_folder(name: str | None) -> Path:
    """The output folder: new, or empty; not yet made."""
    if name is None:
        stem = Path("runs", f"finetune-{datetime.datetime.now():%Y%m%d-%H%M%S}")
        tries = (stem.with_name(f"{stem.name}{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 100))))
        folder = next(path for path in tries if not path.exists())
    else:
        folder = Path(name).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output {folder}: expected a new or empty folder; to go on with the run in it, use --resume")
    return folder


def _finetune(settings: Settings, folder: Path, resumed: dict[str, Any] | None) -> int:
    begin = time.perf_counter()
    tokenizer = models.load_tokenizer(settings)
    data = load_data(settings.data, tokenizer, settings.seq_len, settings.seed)
    try:  # after all that can be wrong with the options, before any work
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}") from error
    model = models.load_model(settings, data)
    identity = {"model": models.fingerprint(model), "data": data.fingerprint()}
    if resumed is not None:
        checkpoint.check(resumed, identity)
    if settings.context == "auto":
        settings = compare.decide_context(model, data, settings)
    _print_plan(settings, data, folder)
    runs, first_step = _make_runs(model, data, settings, resumed)

    from tqdm import tqdm

    done = train(
        runs,
        settings,
        first_step,
        save=lambda step: checkpoint.save(folder, asdict(settings), identity, step, runs),
        note=tqdm.write,
    )
    is_finished = done == settings.steps
    if is_finished:  # first of all what was trained
        _save_model(runs[-1], tokenizer, folder)
    results = {run.name: compare_report.result(run, with_memory=is_finished) for run in runs}
    report = {
        "finished": is_finished,
        "steps_done": done,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "git_commit": hardware.git_commit(),
        "versions": hardware.versions(),
        "hardware": hardware.hardware(),
        "settings": asdict(settings),
        "data": data.summary(),
        "results": results,
        "wall_s": time.perf_counter() - begin,
    }
    _write(folder, report, runs)
    if not is_finished:
        print(
            f"interrupted after {done} of {settings.steps} steps; to go on: dropbp-kernels finetune --resume {folder}"
        )
        return INTERRUPTED
    _show(folder, report, runs)
    return 0


def _make_runs(model: Any, data: Data, settings: Settings, resumed: dict[str, Any] | None) -> tuple[list[Run], int]:
    """The runs, at the state of the checkpoint if there is one, and the number of steps they have done."""
    control_batch = None if resumed is None else resumed["runs"].get(compare.SMALLER, {}).get("batch_size")
    runs = compare.make_runs(model, data, settings, control_batch)
    for run in runs:
        if run.name == compare.SMALLER:
            same_time = f"a batch of {run.batch_size} takes as long as ours of {settings.batch_size}"
            print(f"control: without dropping, {same_time}")
        if resumed is not None:
            run.load_state_dict(resumed["runs"][run.name])
    if resumed is None:
        return runs, 0
    print(f"going on after {resumed['step']} of {settings.steps} steps")
    return runs, resumed["step"]


def _show(folder: Path, report: dict[str, Any], runs: Sequence[Run]) -> None:
    settings = runs[-1].settings
    compare_report.print_table(report["results"], settings)
    if settings.compare:
        from .plots import draw_comparison

        draw_comparison(runs, report["results"], settings, folder / "comparison.png")
    (folder / checkpoint.FILENAME).unlink(missing_ok=True)
    files = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(f"written to {folder}: {files} ({report['wall_s']:.0f} s in total)")


def _print_plan(settings: Settings, data: Data, folder: Path) -> None:
    facts = data.summary()
    print(
        f"model {settings.model}, {settings.adapter}, learning rate {settings.learning_rate:g}, {settings.dtype} on "
        f"{settings.device}\ndata {facts['name']}: {facts['train_rows']} rows to train "
        f"({facts['train_tokens']} tokens, {facts['train_tokens_with_loss']} with loss), "
        f"{facts['validation_rows']} to validate\n{settings.steps} steps of {settings.batch_size} rows, "
        f"{compare.in_words(settings)}; output in {folder}"
    )


def _write(folder: Path, report: dict[str, Any], runs: Sequence[Run]) -> None:
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    rows = compare_report.loss_rows(runs)
    with open(folder / "losses.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, compare_report.LOSS_FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    handler = runs[-1].handler
    if handler is not None and handler.calibration is not None:
        handler.calibration.save(folder / "calibration.json")
        handler.calibration.draw(folder / "calibration.png")


def _save_model(run: Run, tokenizer: Any, folder: Path) -> None:
    """What was trained by ours, for from_pretrained of transformers or PEFT."""
    target = folder / ("model" if run.settings.adapter == "full" else "adapter")
    run.model.save_pretrained(target)  # type: ignore[operator]
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(target)
