"""Every example runs, learns something and explains itself."""

import math
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# File: arguments, what it needs, the loss of guessing, what it prints.
RUNS = {
    "own_model": (["--drop-rate", "0.5", "--steps", "40"], [], 0.8 * math.log(256), "kept 50% of the branches'"),
    "huggingface": (["--steps", "20"], ["peft"], math.log(256), "kept 25% of the branches' backward FLOPs"),
    "huggingface rows": (["--granularity", "token"], ["peft"], math.log(256), "kept 25%"),
    "huggingface targets": (["--context", "inference", "--drop-rate", "0"], ["peft"], math.log(256), "kept 100%"),
    "paca": (["--steps", "20"], ["peft"], math.log(256), "kept 25% of the branches' backward FLOPs"),
    "hf_trainer": (["--steps", "20", "--measure"], ["peft", "accelerate"], math.log(256), "20 steps, 8 branches"),
    "coreset_loop": (["--steps", "12"], ["peft"], math.log(128), "trained on 16 of 32 examples"),
    "coreset_trainer": (["--steps", "12"], ["peft", "accelerate"], math.log(256), "12 batches of 16, 50% of each"),
    "trl_sft": (["--steps", "12"], ["trl"], 0.95 * math.log(98), "12 steps, 8 branches"),
    "trl_sft branches": (
        ["--steps", "12", "--context", "off", "--drop-rate", "0.75"],
        ["trl"],
        0.95 * math.log(98),
        "kept 25.0%",
    ),
    "trl_dpo": (["--steps", "20"], ["trl"], 0.95 * math.log(2), "20 steps, 8 branches"),
    "trl_grpo": (["--steps", "15"], ["trl"], 0.8, "15 steps, 8 branches"),
    "fabric_loop": (["--steps", "20"], ["lightning"], 0.8 * math.log(256), "backward FLOPs kept 25.0%"),
    "litgpt_block": (["--steps", "30"], [], 0.8 * math.log(256), "backward FLOPs kept 50.0%"),
    "litgpt_block parallel": (["--steps", "30", "--parallel-residual"], [], 0.8 * math.log(256), "30 steps, 8"),
}
# Other packages' own warnings on the way.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]


def main_of(name):
    return runpy.run_path(str(EXAMPLES / f"{name.split()[0]}.py"))["main"]


@pytest.mark.parametrize("name", RUNS)
def test_it_learns(name, capsys):
    arguments, needed, loss_of_guessing, printed = RUNS[name]
    for package in needed:
        pytest.importorskip(package)
    assert main_of(name)(arguments) < loss_of_guessing
    assert printed in capsys.readouterr().out


def test_all_examples_are_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {name.split()[0] for name in RUNS}


@pytest.mark.parametrize("name", [name for name in RUNS if " " not in name])
def test_help(name, capsys):
    for package in RUNS[name][1]:
        pytest.importorskip(package)
    with pytest.raises(SystemExit, match="0"):
        main_of(name)(["--help"])
    out = capsys.readouterr().out
    assert f"python examples/{name}.py" in out
    assert "--drop-rate" in out
    of_options = " ".join(out.partition("options:")[2].split()).split(" --")[1:]
    with_value = [text for text in of_options if text.split()[1].isupper() or text.split()[1].startswith("{")]
    assert [text for text in with_value if "(default " not in text] == []
