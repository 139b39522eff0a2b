"""Peak memory of fine-tuning LLaMA-2-7B with PaCA and with LoRA at equal trained parameters, simulated: no GPU.

python -m benchmarks.simulate_adapters       two minutes; appends rows to benchmarks/results/simulated_adapters.csv

All seven linears of a block, bfloat16 base and activations, AdamW with its two moments. LoRA has rank 8 (19.99 million
parameters), PaCA 15 columns (20.40 million): the fewest that are no fewer. Everything a step holds is counted: weights,
optimizer, gradients, activations and logits.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dropbp_kernels.cli.model_config import load_config
from dropbp_kernels.cli.planning import Setting, StepModel

from .rows import RESULTS, Machine, append_rows, machine

MODEL, RANKS = "llama-2-7b", {"lora": 8, "paca": 15}
BATCHES = ((8, 512), (1, 4096))


@dataclass(frozen=True)
class AdapterMemoryRow(Machine):
    """One adapter in one setting. results/README.md says what each column means."""

    kind: str
    model: str
    adapter: str
    rank: int
    num_trained: int
    adapter_dtype: str
    batch_size: int
    seq_len: int
    drop_rate: float
    checkpoint: str
    fused_loss: str
    fused: bool
    peak_bytes: int
    weight_bytes: int
    optimizer_bytes: int
    activation_bytes: int


# (dtype of what is trained, drop rate, checkpoint, fused loss, fused of apply_dropbp)
Way = tuple[str, float, str, str, bool]
WAYS: list[Way] = [
    ("float32", 0.0, "none", "off", False),
    ("float32", 0.0, "none", "off", True),
    ("bfloat16", 0.0, "none", "off", False),
    ("bfloat16", 0.0, "none", "off", True),
    ("bfloat16", 0.0, "none", "chunked", False),
    ("bfloat16", 0.0, "none", "chunked", True),
    ("bfloat16", 0.0, "block", "chunked", False),
    ("bfloat16", 0.875, "none", "chunked", False),
    ("bfloat16", 0.875, "kept", "chunked", False),
    ("bfloat16", 0.875, "sliced", "chunked", False),
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate_adapters", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV file; default: benchmarks/results")
    parser.add_argument("--model", default=MODEL, help=f"as for dropbp-kernels plan; default: {MODEL}")
    options = parser.parse_args()
    where = asdict(machine(torch.device("cpu")))
    for dtype in dict.fromkeys(way[0] for way in WAYS):
        for adapter, rank in RANKS.items():
            model = StepModel(load_config(options.model), adapter, rank, adapter_dtype=getattr(torch, dtype))
            for way in WAYS:
                if way[0] != dtype:
                    continue
                for batch_size, seq_len in BATCHES:
                    columns = simulated(model, adapter, rank, way, batch_size, seq_len)
                    row = AdapterMemoryRow(**where, model=options.model, **columns)
                    append_rows(options.out / "simulated_adapters.csv", [row])
                    print(
                        f"{adapter} {rank:<3} {row.batch_size} x {row.seq_len:<5} {row.adapter_dtype:<9} rate "
                        f"{row.drop_rate:<6g} checkpoint {row.checkpoint:<6} fused loss {row.fused_loss:<8} fused "
                        f"{row.fused!s:<5} peak "
                        f"{row.peak_bytes / 2**30:6.2f} GiB, activations {row.activation_bytes / 2**30:6.2f}",
                        flush=True,
                    )


def simulated(model: StepModel, adapter: str, rank: int, way: Way, batch_size: int, seq_len: int) -> dict[str, object]:
    """The columns of one row, but the machine's and the model's name."""
    dtype, drop_rate, checkpoint, fused_loss, fused = way
    setting = Setting(batch_size, seq_len, drop_rate, checkpoint, fused_loss=fused_loss, fused=fused)
    found = model.predict(setting)
    return {
        "kind": "simulated",
        "adapter": adapter,
        "rank": rank,
        "num_trained": model.num_trained,
        "adapter_dtype": dtype,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "drop_rate": drop_rate,
        "checkpoint": checkpoint,
        "fused_loss": fused_loss,
        "fused": fused,
        "peak_bytes": found.peak_bytes,
        "weight_bytes": found.by_tag["weights"],
        "optimizer_bytes": found.by_tag["optimizer"],
        "activation_bytes": found.by_tag.get("activations", 0),
    }


if __name__ == "__main__":
    main()
