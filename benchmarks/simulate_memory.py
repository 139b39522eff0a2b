"""Peak activation memory per token of LLaMA-2-7B fine-tuned with LoRA, simulated: no GPU, no weights, nothing timed.

python -m benchmarks.simulate_memory             a minute; appends rows to benchmarks/results/simulated_memory.csv
python -m benchmarks.simulate_memory --targets   LLaMA-3-8B by target plan; to benchmarks/results/simulated_targets.csv

Rank 8 on all seven linears, bfloat16, batch 1. The slope is what one more token costs: the peak of live bytes at 8,192
tokens less that at 4,096 (without weights and optimizer state; gradients cost nothing per token), over 4,096.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dropbp_kernels.cli.model_config import load_config
from dropbp_kernels.cli.planning import Prediction, Setting, StepModel

from .rows import RESULTS, Machine, append_rows, machine

MODEL, DROP_RATE, SHORT, LONG = "llama-2-7b", 0.875, 4096, 8192


@dataclass(frozen=True)
class MemoryRow(Machine):
    """One way to run a step. results/README.md says what each column means."""

    kind: str
    model: str
    method: str
    drop_rate: float
    checkpoint: str
    fused_loss: str
    use_cache: bool
    adapter_dtype: str
    peak_bytes_4096: int
    peak_bytes_8192: int
    kib_per_token: float
    at_the_peak: str


# (method, drop rate, checkpoint, fused loss, key/value cache left on, dtype of the adapters)
WAYS = [
    ("undropped", 0.0, "none", "off", False, "float32"),
    ("detach", DROP_RATE, "none", "off", True, "float32"),
    ("detach", DROP_RATE, "none", "off", False, "float32"),
    ("ours", DROP_RATE, "none", "off", True, "float32"),
    ("ours", DROP_RATE, "none", "off", False, "float32"),
    ("ours", DROP_RATE, "none", "chunked", False, "float32"),
    ("undropped", 0.0, "block", "chunked", False, "float32"),
    ("ours", DROP_RATE, "block", "chunked", False, "float32"),
    ("ours", DROP_RATE, "kept", "chunked", False, "float32"),
    ("ours", DROP_RATE, "kept", "chunked", False, "bfloat16"),
    ("ours", DROP_RATE, "sliced", "chunked", False, "float32"),
    ("ours", DROP_RATE, "sliced", "chunked", False, "bfloat16"),
    ("undropped fused", 0.0, "none", "off", False, "float32"),
    ("ours fused", DROP_RATE, "none", "chunked", False, "float32"),
    ("ours fused", DROP_RATE, "kept", "chunked", False, "float32"),
    ("ours fused", DROP_RATE, "sliced", "chunked", False, "float32"),
]


TARGET_MODEL, TARGET_SEQ_LEN, NUM_TARGETS = "llama-3-8b", 8192, 512


@dataclass(frozen=True)
class TargetMemoryRow(Machine):
    """A step without and with a target plan. results/README.md says what each column means."""

    kind: str
    model: str
    checkpoint: str
    fused_loss: str
    adapter_dtype: str
    seq_len: int
    num_targets: int
    peak_bytes_undropped: int
    peak_bytes: int
    times_less: float
    at_the_peak: str


TARGET_WAYS = [("none", "off"), ("none", "chunked"), ("kept", "chunked")]  # checkpoint, fused loss


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file; default: benchmarks/results")
    parser.add_argument("--model", default=MODEL, help=f"as for dropbp-kernels plan; default: {MODEL}")
    parser.add_argument("--targets", action="store_true", help=f"target plans of {TARGET_MODEL}")
    options = parser.parse_args()
    where = asdict(machine(torch.device("cpu")))
    if options.targets:
        for way in TARGET_WAYS:
            by_targets = TargetMemoryRow(**where, **simulated_targets(TARGET_MODEL, TARGET_SEQ_LEN, NUM_TARGETS, *way))
            append_rows(options.out / "simulated_targets.csv", [by_targets])
            print(
                f"checkpoint {by_targets.checkpoint:<6} fused loss {by_targets.fused_loss:<8} "
                f"{by_targets.peak_bytes_undropped / 2**30:.2f} GiB undropped, {by_targets.peak_bytes / 2**30:.2f} GiB "
                f"by target plan: {by_targets.times_less:.1f}x less ({by_targets.at_the_peak})",
                flush=True,
            )
        return
    for way in WAYS:
        row = MemoryRow(**where, **simulated(options.model, *way))
        append_rows(options.out / "simulated_memory.csv", [row])
        print(
            f"{row.method:<15} {row.drop_rate:<6g} checkpoint {row.checkpoint:<6} fused loss {row.fused_loss:<8} "
            f"cache {row.use_cache!s:<6} adapters {row.adapter_dtype:<9} {row.kib_per_token:8.0f} KiB/token "
            f"({row.at_the_peak})",
            flush=True,
        )


def simulated(
    name: str, method: str, drop_rate: float, checkpoint: str, fused_loss: str, use_cache: bool, adapter_dtype: str
) -> dict[str, object]:
    """The columns of one row."""
    model = StepModel(load_config(name), adapter_dtype=getattr(torch, adapter_dtype), use_cache=use_cache)
    runs, fused = "detach" if method == "detach" else "inference", method.endswith("fused")
    settings = [Setting(1, tokens, drop_rate, checkpoint, runs, fused_loss, fused) for tokens in (SHORT, LONG)]
    short, long = map(model.predict, settings)
    return {
        "kind": "simulated",
        "model": name,
        "method": method,
        "drop_rate": drop_rate,
        "checkpoint": checkpoint,
        "fused_loss": fused_loss,
        "use_cache": use_cache,
        "adapter_dtype": adapter_dtype,
        "peak_bytes_4096": _peak(short),
        "peak_bytes_8192": _peak(long),
        "kib_per_token": (_peak(long) - _peak(short)) / (LONG - SHORT) / 1024,
        "at_the_peak": _at_the_peak(long),
    }


def simulated_targets(name: str, seq_len: int, num_targets: int, checkpoint: str, fused_loss: str) -> dict[str, object]:
    """The columns of one row of simulated_targets.csv."""
    model = StepModel(load_config(name))
    settings = [
        Setting(1, seq_len, 0.0, checkpoint, fused_loss=fused_loss, target_share=share)
        for share in (None, num_targets / seq_len)
    ]
    undropped, by_targets = map(model.predict, settings)
    return {
        "kind": "simulated",
        "model": name,
        "checkpoint": checkpoint,
        "fused_loss": fused_loss,
        "adapter_dtype": "float32",
        "seq_len": seq_len,
        "num_targets": num_targets,
        "peak_bytes_undropped": _peak(undropped),
        "peak_bytes": _peak(by_targets),
        "times_less": _peak(undropped) / _peak(by_targets),
        "at_the_peak": _at_the_peak(by_targets),
    }


def _peak(found: Prediction) -> int:
    """Without weights and optimizer state."""
    return found.peak_bytes - found.by_tag["weights"] - found.by_tag["optimizer"]


def _at_the_peak(found: Prediction) -> str:
    return " ".join(f"{tag} {n >> 20} MiB" for tag, n in found.by_tag.items() if tag in ("activations", "logits"))


if __name__ == "__main__":
    main()
