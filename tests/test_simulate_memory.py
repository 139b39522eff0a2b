"""The simulated table of memory per token, on a small model; its rows of LLaMA-2-7B lie in benchmarks/results."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.rows import RESULTS, read_rows
from benchmarks.simulate_memory import TARGET_WAYS, WAYS, simulated, simulated_targets


def test_small_model_orders_as_it_should():
    undropped, ours, kept = (
        simulated("builtin", *way)["kib_per_token"]
        for way in (
            ("undropped", 0.0, "none", "off", False, "float32"),
            ("ours", 0.75, "none", "off", False, "float32"),
            ("ours", 0.75, "kept", "chunked", False, "float32"),
        )
    )
    assert 0 < kept < ours < 0.5 * undropped


def test_committed_rows_are_those_of_the_table_and_meet_the_targets():
    rows = {
        (
            r["method"],
            float(r["drop_rate"]),
            r["checkpoint"],
            r["fused_loss"],
            r["use_cache"] == "True",
            r["adapter_dtype"],
        ): r
        for r in read_rows(RESULTS / "simulated_memory.csv")
    }
    assert set(rows) == set(WAYS)
    assert {row["kind"] for row in rows.values()} == {"simulated"}
    kib = {way: float(row["kib_per_token"]) for way, row in rows.items()}
    assert kib["ours", 0.875, "none", "off", False, "float32"] <= 1700
    assert kib["ours", 0.875, "kept", "chunked", False, "bfloat16"] <= 250
    assert kib["ours", 0.875, "sliced", "chunked", False, "float32"] <= 250
    assert kib["ours", 0.875, "sliced", "chunked", False, "bfloat16"] <= 190
    # With PEFT's float32 adapters too, where fused LoRA layers keep no float32 copies.
    assert kib["ours fused", 0.875, "kept", "chunked", False, "float32"] <= 250
    assert kib["ours fused", 0.875, "sliced", "chunked", False, "float32"] <= 190
    undropped, fused = (kib[name, 0.0, "none", "off", False, "float32"] for name in ("undropped", "undropped fused"))
    assert fused < 0.55 * undropped
    assert kib["undropped", 0.0, "none", "off", False, "float32"] == pytest.approx(8660, rel=0.05)
    assert kib["detach", 0.875, "none", "off", True, "float32"] == pytest.approx(2907, rel=0.1)


def test_a_target_plan_of_the_small_model_needs_less():
    row = simulated_targets("builtin", 512, 32, "none", "off")
    assert row["times_less"] == row["peak_bytes_undropped"] / row["peak_bytes"] > 4


def test_committed_rows_of_target_plans_meet_the_target():
    rows = {(r["checkpoint"], r["fused_loss"]): r for r in read_rows(RESULTS / "simulated_targets.csv")}
    assert set(rows) == set(TARGET_WAYS)
    assert {(row["kind"], row["seq_len"], row["num_targets"]) for row in rows.values()} == {
        ("simulated", "8192", "512")
    }
    assert float(rows["none", "off"]["times_less"]) >= 8
