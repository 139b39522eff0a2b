"""Rewards with TRL's GRPOTrainer and a target plan: one callback.

Each prompt runs once, without autograd, and its keys and values serve its whole group of completions:
`context="inference", shared_context=True`. Completions whose advantage is zero run without autograd too. With
`--context-gradient full` the gradient is exact. Runs in seconds on a CPU. The model is a tiny random Llama with a
tokenizer of characters, so that nothing is downloaded; put in your own.

python examples/trl_grpo.py --context-gradient none
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from dropbp_kernels import DropBPCallback


def tokenizer_of_characters() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="?")


def share_of_digits(completions: list[str], **kwargs: object) -> list[float]:
    return [sum(character.isdigit() for character in text) / max(1, len(text)) for text in completions]


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drop-rate", type=float, default=0.0, help="share of branch backwards to drop (default 0.0)")
    parser.add_argument(
        "--context-gradient",
        choices=("none", "one_hop", "full"),
        default="none",
        help="what the keys and values of prompts contribute to the gradient (default none)",
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default 20)")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    tokenizer = tokenizer_of_characters()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    data = Dataset.from_list([{"prompt": f"{n} + 1 = "} for n in range(96)])

    callback = DropBPCallback(
        drop_rate=args.drop_rate,
        context="inference",
        context_gradient=args.context_gradient,
        shared_context=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            num_generations=4,
            max_completion_length=8,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = GRPOTrainer(
            LlamaForCausalLM(config),
            reward_funcs=share_of_digits,
            args=settings,
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[callback],
        )
        trainer.train()
    print(callback.handler.report())
    return 1.0 - [entry["reward"] for entry in trainer.state.log_history if "reward" in entry][-1]


if __name__ == "__main__":
    main()
