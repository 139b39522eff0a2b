"""The simulated memory of PaCA against LoRA, on a small model; the rows of LLaMA-2-7B lie in benchmarks/results."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch

from benchmarks.rows import RESULTS, read_rows
from benchmarks.simulate_adapters import BATCHES, RANKS, WAYS, simulated
from dropbp_kernels.cli.model_config import load_config
from dropbp_kernels.cli.planning import StepModel

WAY = ("float32", 0.0, "none", "off", False)


def test_small_model_keeps_less_with_paca_than_with_lora():
    models = {
        name: StepModel(load_config("builtin"), name, rank, adapter_dtype=torch.float32)
        for name, rank in {"lora": 8, "paca": 16}.items()
    }
    lora, paca = (simulated(model, name, 0, WAY, 4, 256) for name, model in models.items())
    assert paca["num_trained"] > 0.9 * lora["num_trained"]
    assert paca["activation_bytes"] < 0.8 * lora["activation_bytes"]
    assert paca["peak_bytes"] < lora["peak_bytes"]


def test_committed_rows_are_those_of_the_table_and_say_what_the_page_says():
    rows = {
        (
            r["adapter"],
            r["adapter_dtype"],
            float(r["drop_rate"]),
            r["checkpoint"],
            r["fused_loss"],
            r["fused"] == "True",
            int(r["seq_len"]),
        ): r
        for r in read_rows(RESULTS / "simulated_adapters.csv")
    }
    assert set(rows) == {(adapter, *way, seq_len) for adapter in RANKS for way in WAYS for _, seq_len in BATCHES}
    trained = {row["adapter"]: int(row["num_trained"]) for row in rows.values()}
    assert trained["lora"] <= trained["paca"] <= 1.03 * trained["lora"]
    less = {}
    for way in WAYS:
        for _, seq_len in BATCHES:
            lora, paca = (int(rows[(adapter, *way, seq_len)]["peak_bytes"]) for adapter in RANKS)
            less[way] = 1 - paca / lora
    assert less["float32", 0.0, "none", "off", False] >= 0.35  # the goal was 0.25
    # LoRA fused keeps no float32 copies, and no product of an MLP.
    assert 0.06 <= less["float32", 0.0, "none", "off", True] < 0.08
    assert 0.13 <= less["bfloat16", 0.0, "none", "off", False] < 0.16  # short of the published 0.16
    assert 0.06 <= less["bfloat16", 0.0, "none", "chunked", True] < 0.08
    assert min(less.values()) > -0.001  # where branches are dropped and sliced no adapter is left to save
