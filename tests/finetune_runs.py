"""Runs of `dropbp-kernels finetune` on models and steps so few that a test takes seconds."""

import csv
import dataclasses
import json

import pytest
import tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dropbp_kernels.cli import compare, main
from dropbp_kernels.cli.settings import Settings

TINY = ["--seq-len", "32", "--batch-size", "4", "--steps", "6", "--pretrain-steps", "1", "--device", "cpu"]
TINY_RECIPE = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
TEXT = "".join(f"The square of {n} is {n * n}. " for n in range(200))


@pytest.fixture
def place(tmp_path, tmp_path_factory, monkeypatch):
    """A folder of its own with text to train on, and a built-in model that is pretrained in no time, once for all."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DROPBP_KERNELS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    recipe = Settings.recipe
    monkeypatch.setattr(Settings, "recipe", lambda self: dataclasses.replace(recipe(self), **TINY_RECIPE))
    monkeypatch.setattr(compare, "TIMED_ROUNDS", 1)
    (tmp_path / "text.txt").write_text(TEXT)


def finetune(output, *argv):
    return main(["finetune", "--output", str(output), "--data", "text.txt", *TINY, *argv])


def losses(folder):
    """Everything in losses.csv but the times, which differ."""
    with open(folder / "losses.csv", newline="") as file:
        return [(r["run"], r["step"], r["train_loss"], r["validation_loss"]) for r in csv.DictReader(file)]


def report(folder):
    return json.loads((folder / "report.json").read_text())


def pairs(tmp_path):
    """Prompts without a loss of three times the length of their completions."""
    lines = [json.dumps({"prompt": f"The square of {n:02}: ", "completion": f"{n * n:05}"}) for n in range(100)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return ["--data", "pairs.jsonl"]


def write_checkpoint(folder):
    """Write a tiny Llama and a tokenizer with a chat template into `folder`; return it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    tokenizer.train_from_iterator(
        [TEXT],
        tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
