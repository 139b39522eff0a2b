"""Launch parameters: which line of a table serves, what is kept on disk, and the search, with a made-up clock."""

import importlib
import json
from dataclasses import asdict, replace

import forks
import pytest
import torch

from dropbp_kernels import _backend, tuning
from dropbp_kernels.cli import errors, launch_search, main
from dropbp_kernels.ops.schema import SCHEMAS
from dropbp_kernels.tuning import WIDEST, Config, Inputs, LaunchTable, Row, row_table

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SMALL, LARGE, HOPPER, FOUND = Config(64, 1), Config(128, 2), Config(256, 4), Config(512, 8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, a GPU that is not there, and no table left behind."""
    monkeypatch.setenv("DROPBP_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_gpu", lambda device: tuning.Gpu("NVIDIA H200", "sm_90"))
    monkeypatch.setattr(tuning, "TABLES", dict(tuning.TABLES))
    return tmp_path


@pytest.fixture
def table():
    rows = [Row(1024, SMALL), Row(WIDEST, LARGE), Row(2048, HOPPER, "sm_90", "measured")]
    return LaunchTable("a", rows, lambda inputs: None)


def fields_of(config, **more):
    return {**asdict(config), **more}


# ---- the table


@pytest.mark.parametrize(("width", "expected"), [(1, SMALL), (1024, SMALL), (1025, LARGE), (WIDEST * 4, LARGE)])
def test_the_first_line_wide_enough_serves(table, width, expected):
    assert table.at(width, CPU) == table.at(width, CPU) == expected
    assert table.row(width, CPU).origin == tuning.UNMEASURED


def test_a_line_of_the_architecture_goes_first(table, monkeypatch):
    assert table.at(512, GPU) == table.at(2000, GPU) == HOPPER
    assert table.at(2049, GPU) == LARGE
    table.forget()
    monkeypatch.setattr(tuning, "_gpu", lambda device: tuning.Gpu("NVIDIA A100", "sm_80"))
    assert table.at(512, GPU) == SMALL


def test_lookup_is_made_once_a_width_and_device(table, monkeypatch):
    table.at(1000, GPU)
    monkeypatch.setattr(table, "row", lambda *arguments: pytest.fail("looked up again"))
    assert table.at(1024, GPU) == HOPPER
    with table.override(FOUND):
        assert table.at(77, CPU) == FOUND
    assert table.at(1000, GPU) == HOPPER


def test_a_table_serves_every_width_and_architecture():
    with pytest.raises(ValueError, match="rows of b: expected one for any architecture and width 65536"):
        LaunchTable("b", [Row(1024, SMALL), Row(WIDEST, LARGE, "sm_90")], lambda inputs: None)


def test_row_table_holds_whole_rows_then_chunks():
    rows = row_table(256, 128)
    assert [(row.max_width, row.config.block) for row in rows] == [(64, 64), (128, 128), (256, 256), (WIDEST, 128)]
    assert {row.config.programs_per_multiprocessor for row in rows} == {0}
    assert [tuning.warps_for(block) for block in (64, 512, 1024, 65536)] == [1, 1, 2, 32]
    assert row_table(WIDEST, 64)[-1].config.block == WIDEST


def test_row_table_fills_a_multiprocessor_at_every_width():
    configs = {row.max_width: row.config for row in row_table(16384, 4096, 16)}
    programs = {width: config.programs_per_multiprocessor for width, config in configs.items()}
    assert programs == {
        **{64: 16, 128: 16, 256: 16, 512: 16, 1024: 8, 2048: 4, 4096: 2, 8192: 1},
        **{16384: 1, WIDEST: 2},  # one program has twice the warps; rows of 65536 go in chunks of 4096
    }


@pytest.mark.parametrize(
    "values", [{"block": 100}, {"block": 0}, {"num_warps": 3}, {"num_warps": 64}, {"block": "64"}, {"num_warps": None}]
)
def test_what_no_kernel_can_be_launched_with_is_refused(values):
    name = next(iter(values))
    with pytest.raises(ValueError, match=f"{name}: expected"):
        Config(**{"block": 64, "num_warps": 1} | values)
    with pytest.raises(ValueError, match="programs_per_multiprocessor: expected 0 to 64, got -1"):
        Config(64, 1, -1)


# ---- the file


def test_what_was_measured_serves_and_stays(table, cache):
    path = tuning.cache_path("NVIDIA H200")
    assert path.parent == cache / "tuning"
    assert path.name.startswith("nvidia-h200-triton-")
    assert table.at(1024, GPU) == HOPPER
    tuning.write_cache(path, "NVIDIA H200", {"a": {1024: fields_of(FOUND, median_ms=0.5)}})
    assert table.at(1024, GPU) == table.at(600, GPU) == FOUND  # of the same power of two
    assert table.at(2048, GPU) == HOPPER
    assert table.at(1024, CPU) == SMALL
    assert table.row(1024, GPU).origin == "measured by dropbp-kernels tune on NVIDIA H200"

    tuning.write_cache(path, "NVIDIA H200", {"a": {2048: fields_of(LARGE)}, "b": {64: fields_of(SMALL)}})
    assert tuning.read_cache(path) == {"a": {1024: FOUND, 2048: LARGE}, "b": {64: SMALL}}
    content = json.loads(path.read_text())
    assert content["tables"]["a"]["1024"]["median_ms"] == 0.5
    assert content["gpu"] == "NVIDIA H200"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{not json",
        "[]",
        '{"format": 0, "tables": {}}',
        '{"format": 1}',
        '{"format": 1, "tables": {"a": {"1024": {"block": 100, "num_warps": 1, "programs_per_multiprocessor": 0}}}}',
        '{"format": 1, "tables": {"a": {"1024": {"block": 64}}}}',
        '{"format": 1, "tables": {"a": {"wide": {}}}}',
        '{"format": 1, "tables": {"a": 3}}',
        "\x80",
    ],
)
def test_a_file_that_cannot_be_read_is_one_warning(table, text):
    path = tuning.cache_path("NVIDIA H200")
    path.parent.mkdir()
    path.write_bytes(text.encode("latin-1"))
    with pytest.warns(RuntimeWarning, match=r"h200.* is no result of dropbp-kernels tune \(.*remove the file"):
        assert table.at(1024, GPU) == HOPPER
    assert table.at(2048, GPU) == HOPPER  # and says it once
    tuning.write_cache(path, "NVIDIA H200", {"a": {1024: fields_of(FOUND)}})  # replaces it
    assert table.at(1024, GPU) == FOUND


def test_the_file_is_that_of_the_triton_which_runs(monkeypatch):
    """Whatever its distribution is called: containers have had pytorch-triton."""
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", "3.6.0+git1")
    assert tuning.cache_path("NVIDIA H200").name == "nvidia-h200-triton-3.6.0+git1.json"


def test_import_reads_and_asks_nothing(cache):
    """Importing the kernels opens no file of the cache and asks no driver."""
    code = """
import sys, torch
torch.cuda.is_available = torch.cuda.get_device_properties = lambda *a: sys.exit("queried CUDA at import")
from dropbp_kernels import tuning
tuning.read_cache = tuning.cache_path = lambda *a: sys.exit("read the cache at import")
import dropbp_kernels._triton.gated_residual_add, dropbp_kernels._triton.gated_residual_rms_norm
assert len(tuning.TABLES) == 4
"""
    pytest.importorskip("triton")
    done = forks.run(code)
    assert done.returncode == 0, done.stderr


# ---- the search


def inputs(rows=4, width=64):
    return launch_search.inputs_of(rows, width, CPU, torch.float32)


def test_search_takes_the_fastest_block_then_the_fastest_grid(monkeypatch):
    """A made-up clock: 3 ms, less by 1 with block 1024, 8 warps, 4 programs each."""
    tried = []

    def run(to):
        tried.append(table.at(to.x.shape[1], CPU))
        return to.x + 1

    def timer(call):
        call()
        config = tried[-1]
        return 3.0 - (config.block == 1024) - (config.num_warps == 8) - (config.programs_per_multiprocessor == 4)

    table = LaunchTable("a", row_table(WIDEST, 64, 16), run)
    steps = []
    entry = launch_search.search(table, inputs(2, 4096), timer, steps.append)
    assert {name: entry[name] for name in asdict(SMALL)} == asdict(Config(1024, 8, 4))
    assert (entry["median_ms"], entry["rows"], entry["replaced_ms"]) == (0.0, 2, 2.0)
    assert entry["replaced"] == asdict(Config(4096, 8, 2))
    assert len(steps) == launch_search.num_candidates(Config(4096, 8, 2), 4096)
    assert {c.programs_per_multiprocessor for c in tried if c.block == 4096} == {2}


def test_candidates_by_hand():
    found = list(launch_search.blocks_and_warps(Config(128, 2), 100))
    assert found == [Config(128, 2), Config(128, 1)]  # one row of a thread's 4 elements, at most
    assert list(launch_search.programs(SMALL)) == []
    assert [
        c.programs_per_multiprocessor for c in launch_search.programs(replace(SMALL, programs_per_multiprocessor=2))
    ] == [
        1,
        4,
        8,
        16,
    ]


def test_a_candidate_that_does_not_fit_is_left_out_and_a_wrong_one_is_an_error():
    errors_of_triton = pytest.importorskip("triton.runtime.errors")

    def too_large(to):
        if table.at(128, CPU).num_warps == 1:
            raise errors_of_triton.OutOfResources(1, 0, "registers")
        return to.x

    table = LaunchTable("a", [Row(WIDEST, Config(128, 2))], too_large)
    entry = launch_search.search(table, inputs(width=128), lambda call: 1.0, lambda n: None)
    assert (entry["num_warps"], entry["median_ms"]) == (2, 1.0)

    wrong = LaunchTable("a", [Row(WIDEST, Config(128, 2))], lambda to: to.x * wrong.at(128, CPU).num_warps)
    with pytest.raises(errors.UserError, match="a, width 128: another result with block 128, 1 warps"):
        launch_search.search(wrong, inputs(width=128), lambda call: 1.0, lambda n: None)


def all_tables():
    if _backend.why_not("triton", "gated_residual_add") is not None:
        return []
    for stem in SCHEMAS:
        importlib.import_module(f"dropbp_kernels._triton.{stem}")
    return list(tuning.TABLES)


@pytest.mark.parametrize("name", all_tables())
def test_every_launcher_computes_the_same_with_every_candidate(name):
    """Under the interpreter, or on a GPU; a row of several chunks too."""
    device = CPU if _backend.is_interpreting() else GPU
    table = tuning.TABLES[name]
    for width in (256, 300):
        to = launch_search.inputs_of(5, width, device, torch.float32)
        with table.override(Config(32, 1, 1)):
            in_chunks = launch_search._tensors(table.run(to))
        timed = []
        launch_search.search(table, to, lambda call, timed=timed: timed.append(call) or 1.0, lambda n: None)
        assert len(timed) >= 2  # each was compared with the present parameters' result before
        for ours, theirs in zip(launch_search._tensors(table.run(to)), in_chunks, strict=True):
            torch.testing.assert_close(ours, theirs)


# ---- the command


def test_dry_run_shows_every_launcher_and_writes_nothing(capsys, cache):
    pytest.importorskip("triton")
    assert main(["tune", "--dry-run", "--width", "4096", "100"]) == 0
    text = capsys.readouterr().out
    assert "gated_residual_rms_norm_backward     4096  block 4096, 8 warps, 2 programs" in text
    assert f"[{tuning.UNMEASURED}]" in text
    assert str(cache / "tuning") in text
    assert list(cache.iterdir()) == []
    assert main(["tune", "--dry-run", "--op", "gated_residual_add"]) == 0
    assert "rms_norm" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--op", "convolution"], "--op: expected one of gated_residual_"),
        (["--width", "0"], "--width: expected 1 to 65536, got 0"),
        (["--rows", "0"], "--rows: expected at least 1, got 0"),
        ([], "tune measures on a CUDA GPU, and torch sees none here; --dry-run shows"),
    ],
)
def test_errors_are_one_line(capsys, monkeypatch, argv, message):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"dropbp-kernels: error: {message}")
    assert captured.err.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_tune_on_a_gpu(capsys, monkeypatch, cache):
    monkeypatch.undo()
    monkeypatch.setenv("DROPBP_KERNELS_CACHE", str(cache))
    assert main(["tune", "--op", "gated_residual_rms_norm", "--width", "1024", "--rows", "4096"]) == 0
    assert "written: " in capsys.readouterr().out
    table = tuning.TABLES["gated_residual_rms_norm"]
    assert table.row(1024, GPU).origin.startswith("measured by dropbp-kernels tune on ")


def test_inputs_are_those_documented():
    made = inputs(3, 5)
    assert isinstance(made, Inputs)
    assert (made.x.shape, made.weight.shape, made.per_row.shape) == ((3, 5), (5,), (3,))
    assert sorted(made.permutation.tolist()) == [0, 1, 2]
