"""benchmarks.convergence: runs are trained once and recorded whole, controls follow from timings, tables add up."""

import dataclasses
import re
import statistics
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks are not part of an installed package", allow_module_level=True)
pytest.importorskip("peft")
sys.path.append(str(ROOT))

from benchmarks import (  # noqa: E402
    convergence,
    convergence_data,
    convergence_gradients,
    convergence_lines,
    convergence_methods,
    convergence_report,
    convergence_runs,
    convergence_simulated,
    convergence_timing,
    coreset_data,
)
from benchmarks.convergence_methods import GROUPS, TINY, Group, Point  # noqa: E402
from benchmarks.rows import RESULTS, read_rows  # noqa: E402
from dropbp_kernels import apply_dropbp  # noqa: E402
from dropbp_kernels.cli import builtin, corpus  # noqa: E402
from dropbp_kernels.cli.data import IGNORED, Data, Row  # noqa: E402


def tiny_data(name, seq_len, seed):
    """Rows of random bytes, of unequal lengths, the last half of each with a loss."""
    if name == "mixture":
        return convergence_data.MixtureData(seq_len, seed)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (seq_len, seq_len - 8) * 10:
        ids = torch.randint(256, (length,), generator=generator, dtype=torch.int32)
        labels = ids.clone()
        labels[: length // 2] = IGNORED
        rows.append(Row(ids, labels))
    return Data(rows, 258, seed, name)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The tiny model lies in tmp_path, untrained; data are a few rows of noise."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(builtin.config(TINY)).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(builtin, "ensure_pretrained", lambda recipe, device: tmp_path / "model")
    monkeypatch.setattr(convergence_data, "load", tiny_data)
    monkeypatch.setattr(coreset_data, "_text", lambda source: bytes(range(256)) * 300)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.parametrize("group", ["targets", "variations", "chosen", "plans", "paca", "coreset"])
def test_a_group_is_timed_and_trained_and_a_second_call_has_nothing_to_do(group, tiny, capsys, monkeypatch):
    call = ["--group", group, "--scale", "tiny", "--out", str(tiny)]
    assert convergence.main([*call, "--time", "--rounds", "1"]) == 0
    assert convergence.main([*call, "--seeds", "3"]) == 0
    rows = read_rows(tiny / convergence.FILE)
    assert {(row["method"], float(row["drop_rate"])) for row in rows} == {
        (point.method, point.drop_rate) for point in convergence_methods.group_of(group, "tiny").points
    }
    for row in rows:
        curve = [float(entry.partition(":")[2]) for entry in row["validation_curve"].split(";")]
        ends = float(row["validation_before"]), float(row["validation_loss"])
        assert (curve[0], curve[-1]) == pytest.approx(ends, rel=1e-4)
        assert curve[0] == pytest.approx(5.55, abs=0.1)  # an untrained model on 259 tokens
        assert len(row["train_curve"].split(";")) == int(row["steps"]) == 2
    undropped = next(row for row in rows if row["method"] == "undropped")
    assert float(undropped["validation_loss"]) != pytest.approx(curve[0], abs=1e-4)
    steps = read_rows(tiny / convergence_timing.FILE)
    assert not any(convergence_methods.is_simulated(row["method"], float(row["drop_rate"])) for row in steps)
    assert {row["adapter"] for row in rows} == {row["adapter"] for row in steps}
    assert {row["group"] for row in rows} == {row["group"] for row in steps} == {GROUPS[group].rows_of or group}
    assert all(float(row["backward_gflop"]) >= 0 for row in steps)

    monkeypatch.setattr(convergence, "train", lambda *args: pytest.fail("trained again"))
    capsys.readouterr()
    assert convergence.main([*call, "--seeds", "3"]) == 0
    assert f"0 of {len(rows)} runs to do" in capsys.readouterr().out


def test_no_method_is_left_out():
    """The groups that are not run above hold no method that those do not."""
    names = ("targets", "variations", "chosen", "plans", "paca", "coreset")
    points = [point for name in names for point in GROUPS[name].points]
    assert {point.method for group in GROUPS.values() for point in group.points} == {point.method for point in points}
    assert convergence_methods.METHODS.keys() == {point.method for point in points}


def test_an_interrupted_call_goes_on_where_it_was(tiny):
    only = ["--group", "targets", "--scale", "tiny", "--out", str(tiny), "--seeds", "0", "1", "--only", "undropped"]
    convergence.main(only)
    path = tiny / convergence.FILE
    whole = read_rows(path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    convergence.main(only)
    again = read_rows(path)
    assert [row["seed"] for row in again] == ["0", "1"]
    assert [row["validation_loss"] for row in again] == [row["validation_loss"] for row in whole]
    assert again[0]["validation_loss"] != again[1]["validation_loss"]


def test_a_step_is_as_fast_as_an_undropped_one_of_some_batch():
    undropped = {4: 10.0, 8: 14.0, 16: 30.0}
    batch = convergence_timing.batch_as_fast_as
    assert [batch(ms, undropped) for ms in (14.0, 22.0, 12.0, 40.0)] == [8, 12, 6, 16]
    assert batch(8.0, undropped) == 2.0  # on the line through the two smallest
    assert batch(1.0, undropped) == 1.0


def test_tables_of_one_task_share_their_runs():
    for name, group in GROUPS.items():
        assert group.rows_of is None or group.task == GROUPS[group.rows_of].task, name
        assert len({str(point) for point in group.points}) == len(group.points), name
    group = Group(GROUPS["plans"].task, (Point("undropped"), Point("published", 0.75, learning_rate=4e-3)))
    runs = list(convergence.wanted_runs(group, "lora", [0, 1], [], "plans"))
    assert [(run.seed, run.group, run.learning_rate) for run in runs] == [
        (seed, "plans", rate) for seed in (0, 1) for rate in (8e-3, 4e-3)
    ]
    swept = list(convergence.wanted_runs(group, "lora", [100], [1e-3, 2e-3], "plans"))
    assert [run.learning_rate for run in swept] == [1e-3, 1e-3, 2e-3, 2e-3]


def test_methods_drop_the_same_share_of_the_work(tiny):
    """Rates by kind, by schedule and by sensitivity alike: their mean over the run, by FLOPs, is the drop rate."""
    task = dataclasses.replace(convergence_methods.group_of("plans", "tiny").task, steps=50)
    for method in convergence_methods.METHODS:
        if method.startswith(("undropped", "target plan", "coreset", "query rows")):
            continue
        run = convergence_runs.make_run(task, "lora", Point(method, 0.75), 2, 8e-3, 0)
        if run.settings.rates == "sensitivity":
            run._calibrate(run.data.batch(0, 2))
        flops = run.handler.flops()
        steps = [zip(run.handler.rates_at(step), flops, strict=True) for step in range(task.steps)]
        dropped = statistics.mean(sum(rate * cost for rate, cost in step) / sum(flops) for step in steps)
        is_on_a_grid = method == "published, by sensitivity"  # of tenths
        assert dropped == pytest.approx(0.75, abs=0.1 if is_on_a_grid else 1e-6), method
        if "attention" in method:
            assert len(set(run.handler.drop_rates)) == 2


def test_gradients_of_plans_are_compared_with_those_of_the_whole_batch(tiny):
    call = ["--scale", "tiny", "--batches", "1", "--plans", "3", "--steps", "2", "--rates", "0.5", "--out", str(tiny)]
    assert convergence_gradients.main(call) == 0
    rows = {row["method"]: row for row in read_rows(tiny / convergence_gradients.FILE)}
    assert list(rows) == [*convergence_gradients.PLANS, convergence_gradients.FEWER]
    assert all(-1.0 <= float(row["cosine"]) <= 1.0 for row in rows.values())
    # Halves of one batch: their mean points better than each of them.
    fewer = rows[convergence_gradients.FEWER]
    assert 0.2 < float(fewer["cosine"]) < float(fewer["cosine_of_mean"]) < 1.0
    fewer.update(cosine="0.5", cosine_of_mean="0.25", norm_over_undropped="2")  # (1 + (4 - 1) / 3)^-1/2
    line = convergence_gradients.table(list(rows.values()), "plans").splitlines()[-1]
    assert line == f"| {convergence_gradients.FEWER} 0.5 | 0.50 | 0.25 (3) | 0.71 | 2.00 |"


def test_aligned_samples_are_a_smaller_batch_to_an_adapter(tiny):
    """Nothing but branches is trained, so a sample that all of them drop leaves nothing to the gradient."""
    task = convergence_methods.group_of("plans", "tiny").task
    run = convergence_runs.make_run(task, "lora", Point("sample, aligned", 0.75), 8, 8e-3, 0)
    run.step(0)
    ids, labels = run.data.batch(1, 8)
    kept = torch.tensor([True, False, False, True, False, False, False, False])
    run.handler.set_plan([kept] * len(run.handler.gates))
    ours = convergence_gradients.gradient(run, ids, labels)
    run.handler.set_plan([True] * len(run.handler.gates))
    theirs = convergence_gradients.gradient(run, ids[kept], labels[kept])
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0).item() == pytest.approx(1.0, abs=1e-5)


def test_frozen_branches_are_the_same_in_every_step():
    """The last ones, or those of the lowest rates; the one on the edge is kept as often as the rates pay for."""
    flops = [1.0, 3.0] * 4
    for step in range(5):
        kept = convergence_methods.last_branches([0.75] * 8, flops, 0, step)
        assert kept == (False,) * 6 + (True, True)
        rates = [0.0, 0.9, 0.9, 0.0, 0.9, 0.9, 1.0, 1.0]  # 1 + 3 and, of the last that is left, 0.1 * (1 + 3 + 1 + 3)
        edge = (step + 1) * 8 // 30 > step * 8 // 30
        assert convergence_methods.lowest_rates(rates, flops, 0, step) == (
            *(True, False, False, True, False),
            edge,
            False,
            False,
        )
    shares = [convergence_methods.last_branches([0.7] * 8, flops, 0, step) for step in range(15)]
    assert statistics.mean(sum(c for c, is_kept in zip(flops, kept, strict=True) if is_kept) for kept in shares) == 4.8


@pytest.fixture
def started(tiny):
    """A run after its first step, and the next batch."""
    task = convergence_methods.group_of("plans", "tiny").task
    run = convergence_runs.make_run(task, "lora", Point("undropped"), 4, 8e-3, 0)
    run.step(0)
    return run, *run.data.batch(1, 4)


def cosine(one, other):
    return torch.nn.functional.cosine_similarity(one, other, dim=0).item()


@pytest.mark.parametrize("context", ["none", "one_hop"])
def test_aligned_query_rows_have_the_gradient_of_a_target_plan(context, started):
    """A simulated plan that keeps the same tokens everywhere is a target plan of these tokens, which saves the work."""
    run, ids, labels = started
    labels = ids.long()
    is_target = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    is_target[:, -1] = False
    whole = convergence_gradients.gradient(run, ids, labels)
    plan = convergence_simulated.QueryRows(run.model, 0.75, context=context, aligned=True)
    plan.kept = is_target.expand(4, -1, -1)
    ours = convergence_gradients.gradient(run, ids, labels)
    plan.clear()
    assert torch.equal(convergence_gradients.gradient(run, ids, labels), whole)
    plan.remove()
    shifted = torch.full_like(labels, IGNORED)
    shifted[:, 1:] = torch.where(is_target[:, :-1], labels[:, 1:], IGNORED)
    apply_dropbp(run.model, 0.0, context="inference", context_gradient=context)
    theirs = convergence_gradients.gradient(run, ids, shifted)
    assert cosine(ours, theirs) == pytest.approx(1.0, abs=1e-5)
    assert cosine(ours, whole) < 0.99


def test_query_rows_of_mlps_are_those_of_a_token_plan(started):
    run, ids, labels = started
    plan = convergence_simulated.QueryRows(run.model, 0.75)
    plan.draw(tuple(ids.shape), seed=0, step=0)
    assert plan.kept.sum(dim=(1, 2)).tolist() == [ids.numel() // 4] * 4
    assert not torch.equal(plan.kept[1], plan.kept[3])
    half = convergence_simulated.QueryRows(run.model, 0.75, last=0.5)
    half.remove()
    assert half.drop_rates == [1.0, 1.0, 0.5, 0.5]
    plan.kept[0::2] = True
    kept = plan.kept[1::2].flatten(1)
    ours = convergence_gradients.gradient(run, ids, labels)
    plan.clear()
    apply_dropbp(run.model, 0.0).set_plan([True, kept[0], True, kept[1]])
    torch.testing.assert_close(ours, convergence_gradients.gradient(run, ids, labels), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("context", ["none", "one_hop"])
def test_attention_sends_no_gradient_to_the_input_of_a_dropped_query(context, started):
    run, ids, labels = started
    block = [module for module in run.model.modules() if type(module).__name__ == "LlamaDecoderLayer"][1]
    inputs = []

    def keep(module, args, output):
        output.retain_grad()
        inputs.append(output)

    block.input_layernorm.register_forward_hook(keep)
    plan = convergence_simulated.QueryRows(run.model, 0.75, context=context)
    plan.draw(tuple(ids.shape), seed=0, step=0)
    run.loss(ids, labels).backward()
    reached = inputs[0].grad.abs().sum(dim=-1) > 0
    assert torch.equal(reached, reached & plan.kept[2])
    assert reached.sum() > ids.numel() // 8  # not those of the last columns, which have no loss


def test_query_rows_are_chosen_by_output_or_by_loss(started):
    run, ids, labels = started
    scores = []
    for block in [m for m in run.model.modules() if type(m).__name__ == "LlamaDecoderLayer"]:
        block.post_attention_layernorm.register_forward_pre_hook(
            lambda module, args: scores.append(args[0].norm(dim=-1))
        )
        block.mlp.register_forward_hook(lambda module, args, output: scores.append(output.norm(dim=-1) / scores.pop()))
    plan = convergence_simulated.QueryRows(run.model, 0.75, chosen="output")
    plan.draw(tuple(ids.shape), seed=0, step=0)
    run.loss(ids, labels)
    for kept, score in zip(plan.kept[1::2], scores, strict=True):
        assert kept.sum() == kept.numel() // 4
        assert score[kept].min() >= score[~kept].max()
    plan.clear()

    logits = run.model(input_ids=ids).logits.detach().requires_grad_()
    targets = labels[:, 1:].flatten().long()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
    (expected,) = torch.autograd.grad(loss, logits)
    norms = convergence_simulated.loss_gradient_norms(logits.detach(), labels)
    torch.testing.assert_close(norms, expected.norm(dim=-1))
    plan.draw(tuple(ids.shape), seed=0, step=0, scores=norms)
    assert norms[plan.kept[0]].min() >= norms[~plan.kept[0]].max()
    with pytest.raises(ValueError, match="chosen: expected one of random, loss, output, got 'luck'"):
        convergence_simulated.QueryRows(run.model, 0.75, chosen="luck")


def test_windows_share_the_labels_among_them():
    labels = torch.tensor([[IGNORED, 1, 2, 3, 4, 5], [IGNORED, 1, IGNORED, 3, 4, 5]])
    windows = [convergence_runs.in_window(labels, 2, number) for number in range(2)]
    assert windows[0].tolist() == [[IGNORED, 1, 2, 3, IGNORED, IGNORED], [IGNORED, 1, IGNORED, 3, IGNORED, IGNORED]]
    assert windows[1].tolist() == [[IGNORED] * 4 + [4, 5]] * 2


def test_windows_cover_all_values_once():
    assert convergence.window_means([1.0, 2.0, 3.0, 4.0, 5.0], 2) == [1.5, 4.0]
    assert convergence.window_means([1.0, 2.0], 20) == [1.0, 2.0]


def test_a_difference_is_paired_by_seed_and_real_only_beyond_its_noise():
    losses = {0: 2.0, 1: 3.0, 2: 4.0, 7: 9.0}
    close = convergence_lines.difference(losses, {0: 1.9, 1: 2.9, 2: 3.9, 8: 0.0})
    assert (close.mean, close.num) == (pytest.approx(0.1), 3)
    assert close.is_real
    assert str(close) == "**+0.100**"
    # mean 0.1, deviation 0.05: t = 0.1 / (0.05 / sqrt(3)) = 3.46, below 4.303
    noisy = convergence_lines.difference(losses, {0: 1.95, 1: 2.9, 2: 3.85})
    assert str(noisy) == "+0.100"
    assert not convergence_lines.difference({0: 2.0}, {0: 1.0}).is_real
    assert convergence_lines.difference({0: 2.0}, {1: 1.0}) is None


def run_row(method, drop_rate, batch_size, seed, loss, **different):
    task = GROUPS["plans"].task
    values = {
        "group": "plans",
        "adapter": "lora",
        "method": method,
        "drop_rate": str(drop_rate),
        "batch_size": str(batch_size),
        "steps": str(task.steps),
        "learning_rate": str(task.learning_rates["lora"]),
        "seed": str(seed),
        "validation_before": "3",
        "validation_loss": str(loss),
        "train_curve": "3;2.5",
    }
    return {**values, **different}


def step_row(method, drop_rate, batch_size, step, backward):
    values = {"date_utc": "2026", "group": "plans", "adapter": "lora", "method": method, "drop_rate": str(drop_rate)}
    costs = {"step_over_undropped": str(step), "backward_gflop": str(backward)}
    return {**values, **costs, "batch_size": str(batch_size)}


def test_a_table_by_hand(tmp_path):
    rows = []
    for seed, noise in enumerate((0.0, 0.1, 0.05)):
        rows += [
            run_row("undropped", 0, 12, seed, 2.0 + noise),
            run_row("published", 0.75, 12, seed, 2.5 + noise),
            run_row("branch", 0.75, 12, seed, 2.3 + noise + 0.01 * seed),
            run_row("undropped", 0, 5, seed, 2.2 + noise),
        ]
    rows.append(run_row("branch", 0.75, 12, convergence_lines.FIRST_SWEEP_SEED, 1.0))
    rows.append(run_row("branch", 0.75, 12, 0, 1.0, learning_rate="1e-5"))
    steps = [
        step_row("undropped", 0, 12, 1.0, 8.0),
        step_row("undropped", 0, 3, 0.4, 2.0),
        step_row("published", 0.75, 12, 0.6, 1.5),
        step_row("branch", 0.75, 12, 0.61, 3.35),
    ]
    assert convergence_report.table("plans", "lora", rows, steps).splitlines()[-4:] == [
        "| undropped | 12 | 1.00 | 1.00 | 2.050 ± 0.050 |  |  |  |  | 3 |",
        "| published 0.75 | 12 | 0.60 | 0.19 | 2.550 ± 0.050 | **+0.500** | **+0.300** (5) |  |  | 3 |",
        "| branch 0.75 | 12 | 0.61 | 0.42 | 2.360 ± 0.056 | **+0.310** | **+0.110** (5) | **+0.110** (5) "
        "| **-0.190** (38%) | 3 |",
        "| undropped | 5 | 0.53 | 0.42 | 2.250 ± 0.050 | **+0.200** |  |  |  | 3 |",
    ]
    page = "a\n<!-- convergence: plans, lora -->\nold\n<!-- end -->\nb"
    filled = convergence_report.with_tables(page, rows, steps, [])
    assert convergence_report.with_tables(filled, rows, steps, []) == filled
    assert filled.startswith("a\n<!-- convergence: plans, lora -->\nbyte Llama, 8 blocks")
    assert filled.endswith("| 3 |\n<!-- end -->\nb")
    with pytest.raises(ValueError, match="expected <!-- end --> after <!-- convergence: plans, lora -->"):
        convergence_report.with_tables(page[:-14], rows, steps, [])
    convergence_report.draw("plans", "lora", rows, steps, tmp_path / "plans.png")
    assert (tmp_path / "plans.png").stat().st_size > 10_000


def test_the_page_says_what_the_committed_rows_say():
    text = convergence_report.PAGE.read_text()
    filled = convergence_report.with_tables(text, *convergence_report.read_all(RESULTS))
    assert filled == text, "run: python -m benchmarks.convergence --report"
    pictures = set(re.findall(r"\]\((convergence-.*?\.png)\)", text))
    assert pictures == {path.name for path in convergence_report.DOCS.glob("convergence-*.png")}


def test_summaries_are_long_and_end_where_the_docstring_does(monkeypatch):
    source, text = "x = 1\n" * 20, "What it does.\n\nMore of it."
    pairs = ((source, text + '"""'), (source, 'Short."""'), ("x = 1", 'Too short a pair."""'))
    monkeypatch.setattr(corpus, "docstring_pairs", lambda max_bytes: pairs)
    convergence_data._summaries.cache_clear()
    rows = convergence_data._summaries(160)
    convergence_data._summaries.cache_clear()
    decode = builtin.ByteTokenizer().decode
    targets = [decode([int(label) for label in row.labels if label != IGNORED]) for row in rows]
    assert targets == ['What it does."""', 'Short."""']
    with pytest.raises(ValueError, match="expected a built-in name, mixture or summaries, got 'poems'"):
        convergence_data.load("poems", 32, 0)


def test_committed_rows_have_the_columns_of_today():
    for file, row_type in (
        (convergence.FILE, convergence.ConvergenceRow),
        (convergence_timing.FILE, convergence_timing.ConvergenceStepRow),
        (convergence_gradients.FILE, convergence_gradients.GradientRow),
    ):
        rows = read_rows(RESULTS / file)
        assert rows, file
        assert list(rows[0]) == [column.name for column in fields(row_type)]
        assert all(None not in row and None not in row.values() for row in rows)  # too long or too short a line


def test_points_are_named_on_the_command_line(capsys):
    with pytest.raises(SystemExit):
        convergence.main(["--group", "plans", "--only", "poems 0.5"])
    assert "published 0.75" in capsys.readouterr().err
    assert str(Point("published", 0.75)) == convergence_methods.label("published", 0.75)
