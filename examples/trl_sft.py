"""Supervised fine-tuning with TRL's SFTTrainer, LoRA and a target plan: one callback. Runs in seconds on a CPU.

Only completions carry a loss: with --context inference prompts run like inference, and the loss is the same. With
--drop-rate branches (the attention or the MLP of a block) are dropped, instead or as well. The model is a tiny random
Llama with a tokenizer of characters, so that nothing is downloaded; put in your own.

python examples/trl_sft.py
python examples/trl_sft.py --context off --drop-rate 0.75
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from dropbp_kernels import DropBPCallback


def tokenizer_of_characters() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["<pad>", "</s>", *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="?")


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", choices=("inference", "off"), default="inference", help="(default inference)")
    parser.add_argument("--drop-rate", type=float, default=0.0, help="share of branch backwards to drop (default 0.0)")
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
    data = Dataset.from_list([{"prompt": f"{n} + 1 = ", "completion": f"{n + 1}"} for n in range(96)])

    callback = DropBPCallback(args.drop_rate, context="inference" if args.context == "inference" else None)
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            max_length=32,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = SFTTrainer(
            LlamaForCausalLM(config),
            settings,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, target_modules="all-linear"),
            callbacks=[callback],
        )
        trainer.train()
    print(callback.handler.report())
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]


if __name__ == "__main__":
    main()
