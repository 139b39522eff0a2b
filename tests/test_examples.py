"""Every example runs and learns something."""

import math
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_own_model_learns(capsys):
    loss = runpy.run_path(str(EXAMPLES / "own_model.py"))["main"](["--drop-rate", "0.5", "--steps", "40"])
    assert loss < 0.8 * math.log(256)
    assert "kept 50% of the branches' backward FLOPs" in capsys.readouterr().out


def test_huggingface_learns(capsys):
    pytest.importorskip("peft")
    loss = runpy.run_path(str(EXAMPLES / "huggingface.py"))["main"]()
    assert loss < math.log(256)
    assert "kept 25% of the branches' backward FLOPs" in capsys.readouterr().out
