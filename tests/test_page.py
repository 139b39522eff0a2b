"""docs/kernels.md: it is what the committed rows say, and what it says of made-up rows is right."""

import csv
from dataclasses import fields

import pytest

from benchmarks import page
from benchmarks.rows import RESULTS, Row

DEFAULTS = {
    "date_utc": "2026-01-01T00:00:00Z",
    "commit": "abc",
    "host": "Linux, 2 CPUs, AMD",
    "device": "AMD",
    "threads": "2",
    "torch": "2.13",
    "op": "an_op",
    "case": "plain",
    "direction": "fwd",
    "dtype": "bfloat16",
    "rows": "8",
    "width": "16",
    "copy_fraction": "0.5",
}


def write(path, *rows):
    """A CSV file of op rows: (backend, median_ms) and what differs from DEFAULTS."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for backend, median_ms, different in rows:
            writer.writerow({**DEFAULTS, "backend": backend, "median_ms": str(median_ms), **different})


def test_the_committed_page_is_what_the_rows_say(capsys):
    assert page.main(["--check"]) == 0, f"run: python -m benchmarks.page\n{capsys.readouterr().out}"
    points = page.read_points(RESULTS)
    for point, rows in points.items():
        if page.has_bandwidth(rows):
            assert page.picture_of([point]).exists(), "run: python -m benchmarks.page"


def test_without_gpu_rows_the_page_says_so(tmp_path):
    write(tmp_path / "an_op.csv", ("eager", 2.0, {}), ("cpp", 1.0, {}))
    text = page.make_page(page.read_points(tmp_path))
    assert "## GPU\n\n**There is no row of a GPU yet**: nothing on this page was measured on one.\n" in text
    assert "| fwd, plain | bfloat16 | 8 x 16 | cpp | 1 ms | 50% | 2.00 | abc |" in text


def test_gpu_and_cpu_are_kept_apart(tmp_path):
    gpu = {"device": "NVIDIA H200", "dtype": "float32"}
    write(tmp_path / "an_op.csv", ("cpp", 1.0, {}), ("eager", 2.0, {}), ("triton", 0.1, gpu), ("liger", 0.05, gpu))
    text = page.make_page(page.read_points(tmp_path))
    gpu_part, cpu_part = text.split("## CPU")
    assert "no row" not in text
    assert "### NVIDIA H200" in gpu_part
    assert "| `an_op` | triton | liger | 1 | 0 | 0 | 1 | **0.50** |" in gpu_part
    assert "triton |" not in cpu_part
    assert "| `an_op` | cpp | eager | 1 | 1 | 0 | 0 | 2.00 |" in cpu_part
    assert "kernels-an_op-gpu-nvidia-h200.png" in gpu_part


def test_wins_and_losses_by_hand(tmp_path):
    assert [page.verdict(ratio) for ratio in (0.969, 0.97, 1.0, 1.03, 1.04)] == ["loss", "even", "even", "even", "win"]
    rows = []
    for width, eager in ((16, 0.9), (32, 1.0), (64, 3.0)):
        rows += [("eager", eager, {"width": str(width)}), ("cpp", 1.0, {"width": str(width)})]
    write(tmp_path / "an_op.csv", *rows)
    assert "| `an_op` | cpp | eager | 3 | 1 | 1 | 1 | **0.90** |" in page.make_page(page.read_points(tmp_path))


def test_the_newest_run_counts_and_ratios_stay_inside_it(tmp_path):
    later = {"date_utc": "2026-01-02T00:00:00Z", "commit": "def"}
    write(tmp_path / "an_op.csv", ("eager", 8.0, {}), ("aten", 1.0, {}), ("cpp", 1.0, {}))
    write(tmp_path / "more.csv", ("eager", 3.0, later), ("cpp", 2.0, later))
    text = page.make_page(page.read_points(tmp_path))
    assert "| 2 ms | 50% | 1.50 | def |" in text
    assert "abc" not in text
    assert "vs aten" not in text  # that was another run


def test_host_overhead_is_judged_against_the_raw_op(tmp_path):
    def rows(case, ours):
        return [(name, ms, {"case": case}) for name, ms in (("eager", 0.02), ("raw", 0.004), ("ours", ours))]

    write(tmp_path / "host.csv", *rows("no gradient", 0.0065), *rows("recorded", 0.0145))
    text = page.make_page(page.read_points(tmp_path))
    assert "| `an_op` | fwd, no gradient | 20.0 us |  | 4.0 us | 6.5 us | 3.08 | 2.5 us | 3 us | met |" in text
    assert "| 14.5 us | 1.38 | 10.5 us | 10 us | **missed** |" in text


def test_other_files_are_no_rows_of_ops(tmp_path):
    (tmp_path / "step.csv").write_text("date_utc,method\n1,ours\n")
    (tmp_path / "empty.csv").write_text("")
    assert page.read_points(tmp_path) == {}


def test_pictures_are_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(page, "PAGE", tmp_path / "kernels.md")
    write(
        tmp_path / "an_op.csv",
        *(("eager", 2.0, {"width": w}) for w in ("16", "32")),
        ("cpp", 1.0, {"width": "32"}),
        *((name, 1.0, {"op": "other"}) for name in ("eager", "triton", "cuda", "reference", "cpp")),
        *((name, 1.0, {"host": "Linux, Intel(R) Xeon(R)", "device": "Intel(R) Xeon(R)"}) for name in ("eager", "cpp")),
    )
    assert page.main(["--rows", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "kernels-an_op-cpu-amd.png", "kernels-other-cpu-amd.png", "kernels-an_op-cpu-intel-r-xeon-r.png"
    }  # fmt: skip
    assert page.main(["--rows", str(tmp_path), "--check"]) == 0
    (tmp_path / "kernels.md").write_text("edited by hand")
    assert page.main(["--rows", str(tmp_path), "--check"]) == 1
