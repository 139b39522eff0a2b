"""The record of a calibration: saved, drawn, and what it refuses to be read from."""

import json

import pytest

from dropbp_kernels.calibration import Calibration


@pytest.fixture
def calibration():
    return Calibration(
        branches=("0.attention", "0.mlp", "1.attention", "1.mlp"),
        sensitivities=(4.0, 1.0, 0.5, 2.0),
        flops=(1e9, 4e9, 1e9, 4e9),
        definition="norm",
        method="exact",
        drop_rate=0.5,
        min_rate=0.0,
        allocation="published",
        drop_rates=(0.1, 0.7, 0.9, 0.3),
    )


def test_a_file_holds_all_of_it(calibration, tmp_path):
    calibration.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == calibration
    assert json.loads((tmp_path / "calibration.json").read_text())["drop_rates"] == [0.1, 0.7, 0.9, 0.3]


def test_other_files_are_refused(calibration, tmp_path):
    (tmp_path / "other.json").write_text('{"drop_rate": 0.5}')
    with pytest.raises(ValueError, match=r"other\.json: expected a calibration with the keys .*, got drop_rate$"):
        Calibration.load(tmp_path / "other.json")
    content = {**calibration.to_dict(), "drop_rates": [0.5]}
    (tmp_path / "short.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"short\.json: expected branches, .*, drop_rates to be lists of one length"):
        Calibration.load(tmp_path / "short.json")
    (tmp_path / "list.json").write_text("[0.5]")
    with pytest.raises(ValueError, match=r"list\.json: expected a calibration .*, got list$"):
        Calibration.load(tmp_path / "list.json")
    (tmp_path / "text.json").write_text("rates: 0.5")
    with pytest.raises(ValueError, match=r"text\.json: expected a JSON file with a calibration"):
        Calibration.load(tmp_path / "text.json")


def test_picture_has_a_bar_for_each_branch(calibration, tmp_path):
    image_module = pytest.importorskip("matplotlib.image")
    calibration.draw(tmp_path / "calibration.png")
    image = image_module.imread(tmp_path / "calibration.png")[..., :3]
    rates = (image[..., 0] > 0.8) & (image[..., 1] < 0.5) & (image[..., 2] < 0.1)  # the orange bars
    widths = rates.sum(axis=1)
    shown = [width for width, before in zip(widths[1:], widths[:-1], strict=True) if width and not before]
    assert [round(width / max(shown), 1) for width in shown] == [0.1, 0.8, 1.0, 0.3]
