"""Fine-tuning of models that lie on a disk, with their tokenizers."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from finetune_runs import finetune, pairs, place, report, write_checkpoint  # noqa: F401
from peft import AutoPeftModelForCausalLM
from transformers import LlamaConfig, LlamaForCausalLM

from dropbp_kernels.cli import compare

pytestmark = pytest.mark.usefixtures("one_thread", "place")


def test_own_checkpoint_learns_chats(tmp_path, capsys):
    checkpoint_folder = write_checkpoint(tmp_path / "tiny-llama")
    chats = [
        [{"role": "user", "content": f"square {n}"}, {"role": "assistant", "content": f"it is {n * n}"}]
        for n in range(40)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    argv = ["--model", str(checkpoint_folder), "--data", "chats.jsonl", "--learning-rate", "0.01", "--steps", "8"]
    argv = [*argv, "--rates", "depth_linear", "--schedule", "warmup:0.5", "--missing-grad", "zero"]
    assert finetune("out", *argv, "--grad-scale", "unbiased", "--sampler", "cyclic", "--drop-rate", "0.5") == 0
    facts = report(tmp_path / "out")
    assert list(facts["results"]) == [compare.OURS]  # a comparison only when asked for
    ours = facts["results"][compare.OURS]
    assert ours["validation_loss_after"] < ours["validation_loss_before"]
    assert facts["data"]["train_tokens_with_loss"] < 0.8 * facts["data"]["train_tokens"]
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter")
    assert any(parameter.abs().max() > 0 for name, parameter in adapted.named_parameters() if "lora_B" in name)
    assert (tmp_path / "out" / "adapter" / "tokenizer.json").exists()

    capsys.readouterr()
    assert finetune("long", "--model", str(checkpoint_folder), "--seq-len", "128") == 2
    assert "--seq-len: expected at most 64" in capsys.readouterr().err


def test_checkpoint_with_too_few_embeddings_or_of_another_family(tmp_path, capsys):
    checkpoint_folder = write_checkpoint(tmp_path / "tiny-llama")
    config = json.loads((checkpoint_folder / "config.json").read_text())
    LlamaForCausalLM(LlamaConfig(**{**config, "vocab_size": 200})).save_pretrained(checkpoint_folder)
    assert finetune("out", "--model", str(checkpoint_folder)) == 2
    assert "but the model has only 200 embeddings" in capsys.readouterr().err

    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel  # its norms come after the adds

    config = OpenAIGPTConfig(vocab_size=320, n_embd=16, n_layer=1, n_head=2)
    OpenAIGPTLMHeadModel(config).save_pretrained(checkpoint_folder)
    assert finetune("out", "--model", str(checkpoint_folder), "--adapter", "full") == 2
    assert "found no residual branches in transformer.h.0 (Block)" in capsys.readouterr().err


def test_weights_that_cannot_be_read_and_more_columns_than_there_are(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "tiny-llama")
    assert finetune("out", "--model", str(folder), "--adapter", "paca", "--lora-rank", "33") == 2
    assert "--adapter paca on --model" in (line := capsys.readouterr().err)
    assert "r: expected at most the 32 inputs" in line
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert finetune("out", "--model", str(folder)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"dropbp-kernels: error: --model {folder}: ")


def test_checkpoint_without_tokenizer(tmp_path, capsys):
    checkpoint_folder = write_checkpoint(tmp_path / "tiny-llama")
    (checkpoint_folder / "tokenizer.json").unlink()
    (checkpoint_folder / "tokenizer_config.json").unlink()
    assert finetune("out", "--model", str(checkpoint_folder)) == 2
    assert "no tokenizer could be loaded" in capsys.readouterr().err


def test_context_on_a_model_that_cannot_is_refused(tmp_path, capsys):
    checkpoint_folder = write_checkpoint(tmp_path / "tiny-llama")
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=320, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(
        checkpoint_folder
    )
    argv = ["--model", str(checkpoint_folder), *pairs(tmp_path), "--adapter", "full"]
    assert finetune("out", *argv, "--context-gradient", "full") == 2
    assert "--context-gradient full: expected --context inference with it" in capsys.readouterr().err
    assert finetune("out", *argv, "--context", "inference") == 2
    assert "expected a decoder that can run in stages for context, but BloomModel" in capsys.readouterr().err
    assert finetune("out", *argv, "--steps", "1", "--compare") == 0
    assert compare.TARGETS not in report(tmp_path / "out")["results"]
    assert "no target plan is compared: model: expected a decoder" in capsys.readouterr().out
