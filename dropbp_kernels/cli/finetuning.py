"""A fine-tuning from its settings to its output folder: the order of events, and what is left behind.

checkpoint.pt    to go on from (--resume)                      comparison.png   with --compare
report.json      settings, machine, results                    adapter/         with lora and paca, in PEFT's format
losses.csv       one row per run and step                      model/           with --adapter full
calibration.json, calibration.png    with rates from sensitivities; the former for --rates of another run
"""

import csv
import datetime
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import checkpoint, compare, compare_report, hardware, models
from .data import Data, load_data
from .output import make_folder
from .settings import Settings
from .training import Run, train

INTERRUPTED = 130  # exit code


def finetune(settings: Settings, folder: Path, resumed: dict[str, Any] | None) -> int:
    """Run it; return the exit code. resumed: the state of a checkpoint to go on from."""
    begin = time.perf_counter()
    tokenizer = models.load_tokenizer(settings)
    data = load_data(settings.data, tokenizer, settings.seq_len, settings.seed)
    make_folder(folder)  # after all that can be wrong with the options, before any work
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
    results = {run.name: compare_report.result(run) for run in runs}
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
    _write(folder, report, runs)  # before bytes are counted, which takes a while and may be interrupted
    if not is_finished:
        print(
            f"interrupted after {done} of {settings.steps} steps; to go on: dropbp-kernels finetune --resume {folder}"
        )
        return INTERRUPTED
    for run in runs:
        results[run.name].update(compare_report.measure_memory(run))
    report["wall_s"] = time.perf_counter() - begin
    _write_report(folder, report)
    _show(folder, report, runs)
    return 0


def _make_runs(model: Any, data: Data, settings: Settings, resumed: dict[str, Any] | None) -> tuple[list[Run], int]:
    """The runs, at the state of the checkpoint if there is one, and the number of steps they have done."""
    control_batch = None if resumed is None else resumed["runs"].get(compare.SMALLER, {}).get("batch_size")
    runs = compare.make_runs(model, data, settings, control_batch)
    for run in runs:
        if run.name == compare.SMALLER:
            why = f"it takes as long as ours of {settings.batch_size}"
            if run.batch_size == settings.batch_size:
                why = "ours is no faster, or smaller batches are not either"
            print(f"control: without dropping, a batch of {run.batch_size}: {why}")
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


def _write_report(folder: Path, report: dict[str, Any]) -> None:
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")


def _write(folder: Path, report: dict[str, Any], runs: Sequence[Run]) -> None:
    _write_report(folder, report)
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
