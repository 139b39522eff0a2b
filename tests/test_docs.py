"""What README and docs tell people to type: Python is run, commands are parsed, links lead somewhere."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from models import tiny_causal_lm, with_lora
from torch.utils.data import DataLoader

from dropbp_kernels import apply_dropbp, cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]


def blocks(language):
    """(page, text) of every code block of the language, in order; "" for those of none."""
    fenced = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(page, text) for page in PAGES for found, text in fenced.findall(page.read_text()) if found == language]


def tokens_and_labels():
    tokens = torch.arange(32).view(4, 8)
    return tokens, torch.where(torch.arange(8) < 5, -100, tokens)


def loop():
    """A model, an optimizer and two batches of prompts and completions."""
    tokens, labels = tokens_and_labels()
    model = tiny_causal_lm()
    batch = {"input_ids": tokens, "labels": labels}
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "batch": batch,
        "loader": [batch, batch],
        "tokens": tokens,
        "labels": labels,
        "mask": torch.ones_like(tokens),
    }


def patched():
    names = loop()
    names["handler"] = apply_dropbp(names["model"], 0.5)
    names["other_handler"] = apply_dropbp(tiny_causal_lm(), 0.75)
    return names


def given_to_step():
    names = loop()
    return {**names, "handler": apply_dropbp(names["model"], 0.0, context="inference")}


def policy_step():
    return {**given_to_step(), "advantages": torch.tensor([0.0, 1.0])}


def with_sources():
    names = loop()
    return {**names, "model": with_lora(names["model"]), "loader": [(names["batch"], ["a", "b", "a", "a"])]}


def trainer():
    pytest.importorskip("accelerate")
    from trainer_runs import arguments, data
    from transformers import Trainer

    names = {"model": tiny_causal_lm(), "args": arguments("out"), "data": data(), "Trainer": Trainer}
    return {**names, "trainer": Trainer(names["model"], names["args"], train_dataset=data())}


def preferences():
    pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import pre_tokenizers
    from trainer_runs import arguments, tokenizer
    from trl import DPOConfig, DPOTrainer

    from dropbp_kernels import DropBPCallback

    rows = [{"prompt": f"w{n} w5", "chosen": "w7", "rejected": "w4"} for n in range(8)]
    settings = arguments("out", DPOConfig, max_steps=1)

    words = tokenizer()
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {
        "model": with_lora(tiny_causal_lm()),
        "settings": settings,
        "pairs": Dataset.from_list(rows),
        "tokenizer": words,
    }
    return {**names, "DPOTrainer": DPOTrainer, "DropBPCallback": DropBPCallback}


def own_block():
    x, linear = torch.ones(1, 2, 4), torch.nn.Linear(4, 4)
    block = torch.nn.Module()
    block.attention, block.norm_1 = linear, torch.nn.LayerNorm(4)
    return {"self": block, "x": x, "model": block}


def own_model():
    from dropbp_kernels import blocks
    from dropbp_kernels.losses import linear_cross_entropy
    from dropbp_kernels.staged_blocks import run_by_targets, target_labels
    from dropbp_kernels.targets import plan_targets

    tokens, labels = tokens_and_labels()
    return {
        "tokens": tokens, "labels": labels, "plan_targets": plan_targets, "run_by_targets": run_by_targets,
        "target_labels": target_labels, "linear_cross_entropy": linear_cross_entropy,
        "embedding": torch.nn.Embedding(32, 16), "blocks": [blocks.LlamaBlock(16, 32, 2)],
        "final_norm": blocks.RMSNorm(16), "rope": blocks.rotary_embedding(8, 8), "head": torch.nn.Linear(16, 32),
    }  # fmt: skip


def data_set():
    tokens, labels = tokens_and_labels()
    rows = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
    return {"dataset": rows, "collator": torch.utils.data.default_collate, "DataLoader": DataLoader}


def launcher(monkeypatch):
    from dropbp_kernels import tuning

    monkeypatch.setattr(tuning, "TABLES", {})
    x = torch.ones(2, 8)
    names = {"LaunchTable": tuning.LaunchTable, "row_table": tuning.row_table, "width": 8, "x": x}
    return {**names, "launch_my_op": lambda x, weight: x}


def adapter():
    pytest.importorskip("peft")
    return {"model": tiny_causal_lm()}


def plan_of_rows():
    return {**loop(), "apply_dropbp": apply_dropbp}


# For every block, in order, what its names stand for.
RUNS = {
    "README.md": (loop, trainer, own_block),
    "architecture.md": (launcher,),
    "coreset.md": (with_sources, trainer),
    "paca.md": (adapter,),
    "plans.md": (patched,),
    "row_plans.md": (plan_of_rows,),
    "target_plans.md": (plan_of_rows, plan_of_rows, given_to_step, preferences, policy_step, own_model, data_set),
}
CASES = [(name, number) for name, setups in RUNS.items() for number in range(len(setups))]


@pytest.mark.parametrize(("name", "number"), CASES, ids=[f"{name}-{number}" for name, number in CASES])
def test_python_runs(name, number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [text for page, text in blocks("python") if page.name == name]
    setup = RUNS[name][number]
    names = setup(monkeypatch) if setup is launcher else setup()
    exec(compile(texts[number], f"{name}, block {number}", "exec"), names)


def test_no_block_is_left_out():
    found = [page.name for page, _ in blocks("python")]
    assert {name: found.count(name) for name in found} == {name: len(setups) for name, setups in RUNS.items()}


def typed():
    """(page, line) of every command of ours, in a block or in backticks."""
    lines = [(page, line) for page, text in blocks("") for line in text.splitlines()]
    for page in PAGES:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        lines += [(page, line) for line in re.findall(r"`([^`]+)`", prose)]
    for page, line in lines:
        words = " ".join(line.split("#")[0].split()).removeprefix(".venv/bin/")
        if words.startswith(("dropbp-kernels ", "make ", "python -m benchmarks")):
            yield page, words


def test_commands_are_known():
    parser = cli.Parser(prog="dropbp-kernels")
    commands = parser.add_subparsers()
    for command in (cli.finetune, cli.info, cli.plan, cli.profile, cli.tune):
        command.add_parser(commands)
    options = {name: command._option_string_actions for name, command in commands.choices.items()}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    num_ours = 0
    for page, line in typed():
        program, what, *rest = shlex.split(line)
        if program == "make":
            assert what in targets, (page.name, line)
        elif program == "python":
            assert (ROOT / (rest[0].replace(".", "/") + ".py")).is_file(), (page.name, line)
        elif "|" not in rest:
            num_ours += 1
            unknown = [word for word in rest if word.startswith("--") and word not in options[what]]
            assert not unknown, (page.name, line)
    assert num_ours > 8


def anchors(page):
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "LOG.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if target.startswith("http"):
                continue
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), (page.name, target)
            if anchor:
                assert anchor in anchors(linked), (page.name, target)


def cells(text, title):
    """The figures of the row of a table that begins with `title`."""
    (row,) = re.findall(rf"^\| {re.escape(title)}[^|]*\|(.*)\|$", text, re.MULTILINE)
    return re.findall(r"\b\d+(?:\.\d+)?\b", re.sub(r"`[^`]*`|\([^)]*\)", "", row))


def test_the_figures_of_the_readme_are_those_of_its_rows():
    text = (ROOT / "README.md").read_text()
    results = json.loads((ROOT / "benchmarks" / "results" / "finetune.json").read_text())["results"]
    whole = results["full backward"]

    def short(name):
        run = results[name]
        ratios = [f"{run[value] / whole[value]:.2f}" for value in ("step_ms", "peak_live_bytes")]
        return [*ratios, f"{run['validation_loss_after']:.3f}"]

    assert cells(text, "nothing") == ["1", "1", short("full backward")[-1]]
    assert cells(text, "tokens without a loss, such") == short("ours")
    assert cells(text, "random residual branches") == short("DropBP")
    assert cells(text, "for comparison: a quarter") == short("smaller batch")
    runs = [results[name] for name in ("full backward", "smaller batch", "published DropBP", "DropBP", "ours")]
    assert cells(text, "batch") == [str(run["batch_size"]) for run in runs]
    times = [f"{run[name]:.0f}" for run in runs for name in ("forward_ms", "backward_ms")]
    assert cells(text, "forward / backward, ms") == times
    assert cells(text, "step, ms") == [f"{run['step_ms']:.0f}" for run in runs]
    for title, name in (("saved for backward, MiB", "saved_bytes"), ("peak live activations, MiB", "peak_live_bytes")):
        assert cells(text, title) == [f"{run[name] / 2**20:.0f}" for run in runs]
    assert cells(text, "backward FLOPs kept") == [f"{100 * run['backward_flops_kept']:.0f}" for run in runs]
    assert cells(text, "validation loss") == [f"{run['validation_loss_after']:.3f}" for run in runs]
