"""What `dropbp-kernels plan` says of target plans: the target share of a data set, and tables."""

from collections.abc import Iterator
from typing import Any

from ..target_share import count_targets
from .data import load_data
from .errors import UserError
from .model_config import shipped
from .models import load_tokenizer
from .settings import Settings

COUNTED_BATCH_SIZES = (1, 2, 4, 8, 16)
MAX_COUNTED_ROWS = 1024
GiB = 2**30


def measure_data(name: str, tokenizer: str, seq_len: int, batch_size: int) -> dict[str, Any]:
    """The rows of a data set as `finetune` pads them: length of a batch, and what a target plan runs, by batch size."""
    settings = Settings(model=tokenizer)
    if tokenizer in shipped():
        raise UserError(f"--tokenizer: expected one with --data, since {tokenizer} is a config alone; builtin: bytes")
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


def tables(report: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The title and rows of a table for the data and one for target plans, where they were asked for."""
    if "data" in report:
        rows = [
            {
                "batch": size,
                "length": f"{found['seq_len']:,}",
                "targets": f"{found['targets']:.1%}",
                "rows run": f"{found['forward']:.1%}",
                "with a backward": f"{found['backward']:.1%}",
                "passes": f"{found['passes']:.1f}",
                "step time, LoRA": f"{found['relative_step_time']['lora']:.2f}",
                "full": f"{found['relative_step_time']['full']:.2f}",
            }
            for size, found in report["data"]["by_batch_size"].items()
        ]
        yield f"{report['data']['name']} by batch size; step time by rows alone, of an undropped step's:", rows
    if "target_plans" in report:
        rows = [
            {
                "targets": "no plan" if (share := row["setting"]["target_share"]) is None else f"{share:.1%}",
                "peak, GiB": f"{row['peak_bytes'] / GiB:.2f}",
                "step time": f"{row['relative_step_time']:.2f}",
            }
            for row in report["target_plans"]
        ]
        yield (
            'Target plans (context="inference"), nothing dropped; step time by FLOPs, of the step without a plan:',
            rows,
        )
