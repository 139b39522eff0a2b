"""The benchmarks of ops: what is measured and written is what they say."""

import csv
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks import (
    baselines,
    bench_checkpointed_step,
    bench_coreset_step,
    bench_gated_residual_add,
    bench_gated_residual_layer_norm,
    bench_gated_residual_rms_norm,
    bench_glu,
    bench_group_step,
    bench_host_overhead,
    bench_l1_distances,
    bench_loss_step,
    bench_paca_step,
    bench_partial_gather,
    bench_patched_step,
    bench_permuted_norm,
    bench_row_step,
    bench_sensitivity,
    bench_step,
    bench_target_step,
    bench_turn_step,
    boundary,
    boundary_norms,
    run,
)
from benchmarks.baselines import WrongResult, check_results
from benchmarks.rows import append_rows, machine, op_rows, read_rows
from benchmarks.settings import Settings
from benchmarks.steps import size_of
from benchmarks.timing import Case, Timing

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture
def uncompiled(monkeypatch):
    """torch.compile's place is taken by the function itself: compiling is not what these tests are about."""
    benches = bench_gated_residual_add, boundary_norms, bench_permuted_norm, bench_partial_gather, bench_l1_distances
    for bench in benches:
        monkeypatch.setattr(bench, "compiled", lambda function: function)


# ---- rows


def test_rows_compare_with_eager_and_compile(tmp_path):
    timings = {"eager": Timing([4.0]), "compile": Timing([1.0]), "cpp": Timing([2.0, 2.0])}
    case = Case("op", "case", "fwd", torch.float32, 2, 3, 4_000_000, lambda: (), dict.fromkeys(timings))
    rows = op_rows(case, timings, machine(CPU), copy_gb_s=8.0)
    cpp = rows[2]
    assert (cpp.backend, cpp.gb_s, cpp.copy_fraction) == ("cpp", 2.0, 0.25)
    assert (cpp.speedup_vs_eager, cpp.speedup_vs_compile, cpp.num_samples) == (2.0, 0.5, 2)
    assert str(cpp).split()[-4:] == ["2.0", "25%", "2.00", "0.50"]


@dataclass(frozen=True)
class Pair:
    name: str
    value: float | None


def test_rows_are_appended_under_one_header(tmp_path):
    path = tmp_path / "new" / "pairs.csv"
    append_rows(path, [Pair("a, b", 1.5)])
    append_rows(path, [Pair("c", None)])
    append_rows(path, [])
    assert path.read_text() == 'name,value\n"a, b",1.5\nc,\n'
    assert read_rows(path)[0] == {"name": "a, b", "value": "1.5"}


def test_a_file_with_other_columns_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("name,other\na,1\n")
    with pytest.raises(ValueError, match=r"pairs\.csv: expected the columns .*value.*, found .*other"):
        append_rows(path, [Pair("b", 2.0)])
    assert path.read_text() == "name,other\na,1\n"


def test_committed_rows_have_the_columns_of_today():
    from dataclasses import fields

    from benchmarks.rows import RESULTS, Row

    for path in filter(Path.exists, (RESULTS / f"{suite}.csv" for suite in run.SUITES)):
        own = {
            "step": bench_step.StepRow,
            "checkpointed_step": bench_checkpointed_step.CheckpointedStepRow,
            "loss_step": bench_loss_step.LossStepRow,
            "patched_step": bench_patched_step.PatchedStepRow,
            "row_step": bench_row_step.RowStepRow,
            "target_step": bench_target_step.TargetStepRow,
            "turn_step": bench_turn_step.TurnStepRow,
            "group_step": bench_group_step.GroupStepRow,
            "coreset_step": bench_coreset_step.CoresetStepRow,
            "paca_step": bench_paca_step.PacaStepRow,
            "sensitivity": bench_sensitivity.SensitivityRow,
        }
        row_type = own.get(path.stem, Row)
        with path.open(newline="") as file:
            lines = list(csv.reader(file))
        assert lines[0] == [column.name for column in fields(row_type)], path.name
        assert {len(line) for line in lines} == {len(lines[0])}, path.name


# ---- ops


def test_a_wrong_result_is_refused():
    exact = torch.linspace(0, 1, 100, dtype=torch.float64)
    eager = exact.float()
    check_results("right", [eager], [eager], [exact])
    with pytest.raises(WrongResult, match=r"wrong: result 0 is off by 0\.001, allowed"):
        check_results("wrong", [eager + 1e-3], [eager], [exact])
    with pytest.raises(WrongResult, match="off by inf"):
        check_results("unwritten", [eager * float("nan")], [eager], [exact])
    with pytest.raises(WrongResult, match=r"float64 \(100,\), eager's torch.float32"):
        check_results("dtype", [exact], [eager], [exact])


def test_a_peer_that_cannot_run_is_left_out_with_a_reason(monkeypatch, capsys):
    def reason(*arguments, device="cuda"):
        with pytest.raises(baselines.PeerMissing) as missing:
            baselines.peer(*arguments, torch.device(device))
        return str(missing.value)

    assert reason("numpy", "numpy", "array", device="cpu") == "runs on a CUDA GPU only"
    assert reason("no-such", "no_such_package.ops", "f") == "no_such_package is not installed (pip install no-such)"
    assert reason("numpy", "numpy.no_such", "f") == "numpy is installed, but has no numpy.no_such"
    assert reason("numpy", "numpy", "no_such") == "numpy is installed, but numpy has no no_such"
    assert baselines.peer("numpy", "math", "sqrt", torch.device("cuda"))(4) == 2

    baselines.say_once.cache_clear()
    peers = {"ours": lambda device: len, "liger": baselines.liger_add_rms_norm, "quack": baselines.quack_add_rms_norm}
    for _ in range(2):
        assert baselines.available(peers, CPU) == {"ours": len}
    out = capsys.readouterr().out
    assert out == "liger is left out: runs on a CUDA GPU only\nquack is left out: runs on a CUDA GPU only\n"


@pytest.mark.parametrize("name", ["compile", "liger", "swapped"])
def test_a_wrong_peer_is_not_measured_and_a_line_says_so(name, capsys):
    exact = [torch.linspace(0, 1, 100, dtype=torch.float64)]
    right, wrong = lambda: [exact[0].float()], lambda: [exact[0].float() + 1e-3]
    functions = {"eager": right, name: wrong, "cpp": right}
    for _ in range(2):
        found = baselines.right_ones(f"op of {name}", functions, lambda function: function(), right(), exact)
        assert found == {"eager": right, "cpp": right}
    line = f"{name} is not measured: op of {name}, {name}: result 0 is off by 0.001, allowed 1.06e-06\n"
    assert capsys.readouterr().out == line


@pytest.mark.parametrize("name", ["reference", "cpp", "triton", "cuda"])
def test_a_wrong_backend_of_ours_is_an_error(name):
    exact = [torch.linspace(0, 1, 100, dtype=torch.float64)]
    functions = {"compile": exact[0].float, name: (exact[0] + 1e-3).float}
    with pytest.raises(WrongResult, match=f"op, {name}: result 0 is off by"):
        baselines.right_ones("op", functions, lambda function: [function()], [exact[0].float()], exact)


def test_rows_are_taken_where_the_compiled_result_is_wrong(monkeypatch, one_thread):
    def wrong(function):
        return lambda *arguments, **options: tuple(2 * result for result in function(*arguments, **options))

    monkeypatch.setattr(boundary_norms, "compiled", wrong)
    rows = next(iter(bench_gated_residual_rms_norm.run(Settings(CPU, "tiny"))))
    assert "compile" not in {row.backend for row in rows}
    ours = next(row for row in rows if row.backend in baselines._backend.BACKENDS)
    assert ours.speedup_vs_compile is None
    assert ours.speedup_vs_eager > 0


def test_the_compiled_baseline_is_compiled_and_checked(one_thread, monkeypatch):
    assert baselines.compiler == "inductor"
    monkeypatch.setattr(baselines, "compiler", "aot_eager")  # all but C++ compilers, which take ten seconds
    norm = bench_gated_residual_rms_norm.NORM
    torch._dynamo.utils.counters.clear()
    cases = boundary_norms.make_cases(norm, 8, 16, torch.float32, CPU, trains_weight=True)
    assert torch._dynamo.utils.counters["aot_autograd"]["ok"] == 1
    assert "compile" in cases["fwd+bwd"].variants


def test_moved_bytes_by_hand(uncompiled):
    moved = {
        problem.case: bench_gated_residual_add.make_case(problem, 8, 16, torch.float32, CPU).moved_bytes
        for problem in bench_gated_residual_add.PROBLEMS
    }
    whole, half = 8 * 16 * 4, 4 * 16 * 4
    assert moved == {
        "sum": 3 * whole,
        "sum in place": 3 * whole,
        "half the rows": 2 * whole + half,
        "half the rows in place": 3 * half,
        "scaled": 2 * whole,
        "half the rows, each scaled": 2 * half,
    }
    for bench in (bench_gated_residual_rms_norm, bench_gated_residual_layer_norm):
        cases = boundary_norms.make_cases(bench.NORM, 8, 16, torch.bfloat16, CPU, trains_weight=True)
        assert {name: case.moved_bytes for name, case in cases.items()} == {
            "fwd": 2 * whole,
            "bwd": 2 * whole,
            "fwd+bwd": 4 * whole,
        }


def test_permuted_benchmark_runs_checked_variants_beside_the_unpermuted(uncompiled, one_thread):
    cases = list(bench_permuted_norm.run(Settings(CPU, "tiny")))
    assert [(rows[0].op, rows[0].direction) for rows in cases] == [
        ("permuted_norm", "fwd"),
        ("permuted_norm", "bwd"),
        ("permuted_residual_add", "fwd"),
    ]
    whole = 16 * 64 * 2
    assert [rows[0].moved_bytes for rows in cases] == [2.25 * whole, whole, 3 * whole]
    assert all(rows[-1].backend == "unpermuted" for rows in cases)


def test_benchmarks_of_channels_and_pairs_run_checked_variants(uncompiled, one_thread):
    cases = list(bench_partial_gather.run(Settings(CPU, "tiny")))
    columns = 16 * bench_partial_gather.NUM_CHANNELS * 2
    assert {rows[0].case.rpartition(",")[0]: rows[0].moved_bytes for rows in cases} == {
        "gather": 2 * columns,
        "update": 4 * columns,
        "restore": 2 * columns,
        "norm, then gather": 4 * 16 * 64 * 2 + columns,
        "gradient of columns": 16 * 64 * 2 + columns + 4 * columns,
    }
    cases = list(bench_l1_distances.run(Settings(CPU, "tiny")))
    assert [(rows[0].op, rows[0].rows) for rows in cases] == [("l1_distances", 8), ("facility_location", 8)]


def test_rows_of_the_choice_name_the_host_that_made_it(monkeypatch):
    bench = bench_l1_distances
    monkeypatch.setattr(bench, "distances_case", lambda *args: None)
    monkeypatch.setattr(bench, "measure", lambda *args, **options: {})
    monkeypatch.setattr(bench, "machine", lambda device, commit: device.type)
    monkeypatch.setattr(bench, "op_rows", lambda case, timings, where, copy: [where])
    assert list(bench.run(Settings(torch.device("cuda"), "tiny"))) == [["cuda"], ["cpu"]]


def test_a_backward_that_writes_into_its_inputs_gets_its_own(monkeypatch):
    class Writing(torch.autograd.Function):
        """As liger-kernel's, which is not measured on a CPU."""

        @staticmethod
        def forward(ctx, gate, up):
            ctx.save_for_backward(gate, up)
            return torch.nn.functional.silu(gate) * up

        @staticmethod
        def backward(ctx, grad):
            gate, up = (tensor.detach() for tensor in ctx.saved_tensors)
            grads = bench_glu.reference.glu_backward_reference(grad, gate, up, "silu")
            gate.data.zero_(), up.data.zero_()
            return grads

    eager = bench_glu.KINDS["swiglu"][1]
    monkeypatch.setattr(bench_glu, "functions", lambda *args: {"eager": eager, "liger": Writing.apply})
    for case in bench_glu.make_cases("swiglu", 4, 8, torch.float32, CPU).values():
        inputs = case.make_inputs()
        liger, gate = case.variants["liger"], inputs[0][0]
        before = gate.clone()
        liger.run(liger.prepare(inputs))
        assert torch.equal(gate, before), case.direction


@pytest.mark.parametrize("name", ["gated_residual_add", "gated_residual_layer_norm", "gated_residual_rms_norm"])
def test_benchmarks_of_a_wrong_op_are_refused(name, tmp_path, monkeypatch, capsys, uncompiled, one_thread):
    if name == "gated_residual_add":
        monkeypatch.setattr(bench_gated_residual_add, "raw_op", lambda *args: lambda a, *rest: a + 1)
    else:
        bench = {bench.OP: bench for bench in (bench_gated_residual_layer_norm, bench_gated_residual_rms_norm)}[name]
        op = getattr(bench, name)
        wrong = lambda residual, branch, *parameters: op(residual, 2 * branch, *parameters)  # noqa: E731
        monkeypatch.setattr(bench, name, wrong)
    monkeypatch.setattr(baselines, "compiler", baselines.compiler)  # put back: run sets the tiny scale's
    code = run.main(["--scale", "tiny", "--device", "cpu", "--only", name, "--out", str(tmp_path)])
    assert code == 1
    assert "REFUSED" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_case_starts_after_the_deadline(uncompiled):
    settings = Settings(CPU, "tiny", deadline=time.monotonic() - 1)
    assert list(bench_gated_residual_rms_norm.run(settings)) == []
    assert settings.num_left_out > 0


def test_a_suite_that_does_not_fit_costs_no_other(monkeypatch, capsys):
    def too_large(settings):
        raise torch.OutOfMemoryError("tried to allocate 200 GiB")
        yield

    seen = []
    monkeypatch.setitem(run.SUITES, "target_step", too_large)
    monkeypatch.setitem(run.SUITES, "glu", lambda settings: iter(seen.append("glu") or ()))
    assert run.main(["--device", "cpu", "--only", "target_step", "glu"]) == 1
    assert seen == ["glu"]
    assert "OUT OF MEMORY: target_step: tried to allocate 200 GiB" in capsys.readouterr().err


def test_a_suite_that_hangs_ends_the_process_and_says_where(tmp_path):
    code = "import time\nfrom benchmarks import run\nrun.SUITES['glu'] = lambda settings: time.sleep(60)\n"
    options = ["--device", "cpu", "--only", "glu", "--budget-s", "0.5", "--hang-s", "0.5"]
    command = [sys.executable, "-c", f"{code}run.main({options})"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert "<lambda>" in done.stderr


def test_wide_changes_whole_steps_on_a_cpu_alone(monkeypatch):
    assert [size_of(Settings(CPU, is_wide=is_wide)).hidden_size for is_wide in (False, True)] == [192, 576]
    assert size_of(Settings(CPU, "tiny", is_wide=True)) == size_of(Settings(CPU, "tiny"))
    cuda = torch.device("cuda")
    assert size_of(Settings(cuda, is_wide=True)) == size_of(Settings(cuda))
    seen = []
    monkeypatch.setitem(run.SUITES, "row_step", lambda settings: iter(seen.append(size_of(settings)) or ()))
    assert run.main(["--device", "cpu", "--only", "row_step", "--wide"]) == 0
    assert seen[0].hidden_size == 576


# ---- the boundary


def test_the_boundary_is_free_where_the_next_branch_is_dropped():
    counts = {(entry["op"], entry["state"]): entry for entry in boundary.boundary_counts(CPU, 4, 8)}
    assert boundary.is_free(counts["gated_residual_add", "dropped"])
    for norm in ("gated_residual_rms_norm", "gated_residual_layer_norm"):
        assert boundary.is_free(counts[norm, "kept, then dropped"])
        assert boundary.is_free(counts[norm, "dropped, then dropped"])
        kept = counts[norm, "kept, then kept"]
        assert (kept["forward_kernels"], kept["backward_kernels"]) == (1, 1)
        assert kept["backward_allocated_bytes"] == 4 * 8 * 2  # one gradient, in bfloat16
        assert not boundary.is_free(kept)


def test_host_overhead_puts_the_raw_op_beside_what_calls_it():
    cases = list(bench_host_overhead.make_cases(CPU, num_calls=1))
    assert len(cases) == bench_host_overhead.NUM_CASES
    forwards = [case for case in cases if case.direction == "fwd"]
    assert len(forwards) == 5
    assert all({"eager", "raw", "ours"} <= case.variants.keys() for case in forwards)
    for case in forwards:
        ours, raw = (case.variants[name].run(None) for name in ("ours", "raw"))
        first = [result[0] if isinstance(result, tuple) else result for result in (ours, raw)]
        torch.testing.assert_close(first[0].detach(), first[1])


# ---- commands


def test_pytest_finds_and_runs_the_benchmarks():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", "--benchmark-enable"]
    quick = ["--benchmark-min-rounds=1", "--benchmark-max-time=0.001", "-k", "host_overhead and eager"]
    # pytest-benchmark takes no times in a worker of xdist, and believes these variables that it is one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run([*command, *quick], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{bench_host_overhead.NUM_CASES} passed" in result.stdout
    assert "test_bench_host_overhead" in result.stdout
