"""The report of a handler, as people read it; the numbers in it are tested in test_handler.py."""

import io
import json

import pytest
from models import toy_model

from dropbp_kernels import DropBPHandler


@pytest.fixture
def handler():
    """Four branches, of which the first was never dropped and the last always."""
    handler = DropBPHandler(toy_model(), 0.5, strict=False)
    handler.set_drop_rates([0.0, 0.5, 0.5, 0.99])
    for _ in range(8):
        handler.step()
    return handler


def test_text_is_a_table_with_a_line_per_branch(handler):
    report = handler.report()
    summary, empty, header, *lines = str(report).splitlines()
    assert summary.startswith("8 steps, 4 branches, drop rate 0.5 (realised 0.")
    assert empty == ""
    assert header.split() == ["branch", "kept", "dropped", "drop", "rate", "realised", "GFLOPs"]
    assert [line.split()[0] for line in lines] == list(handler.gates)
    assert lines[0].split()[1:5] == ["8", "0", "0.000", "0.000"]
    for line, branch in zip(lines, report["branches"], strict=True):
        assert line.split()[1:3] == [str(branch["num_kept"]), str(branch["num_dropped"])]
    assert len({len(line) for line in (header, *lines)}) == 1  # columns are aligned


def test_report_is_still_a_dict_for_json(handler):
    report = handler.report()
    assert json.loads(json.dumps(report)) == report


def test_before_the_first_step():
    text = str(DropBPHandler(toy_model(), 0.25).report())
    assert text.startswith("no step yet, 4 branches, drop rate 0.25")
    assert text.splitlines()[3].split()[4] == "-"


def test_rich_shows_the_same_cells(handler):
    rich_console = pytest.importorskip("rich.console")
    console = rich_console.Console(width=120, record=True, file=io.StringIO())
    console.print(handler.report())
    text = console.export_text()
    assert text.splitlines()[0].startswith("8 steps, 4 branches")
    for name in handler.gates:
        assert f"│ {name} " in text


def test_picture_shows_every_branch(handler, tmp_path):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    handler.report().draw(tmp_path / "report.png")
    image = matplotlib_image.imread(tmp_path / "report.png")[..., :3]
    assert image.shape[1] == 1200
    is_bar = (image[..., 0] > 0.8) & (image[..., 2] < 0.4)
    # Bars by row of pixels: the first branch has none, the last the longest.
    assert is_bar.sum() > 1000
    assert is_bar.sum(axis=1).max() > 0.5 * image.shape[1]
