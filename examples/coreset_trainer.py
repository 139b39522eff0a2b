"""Coresets in transformers' Trainer: one more line, and half of each batch is trained on. Runs in seconds on a CPU.

A column of the data names the source of each example. DropBP's callback drops branches of what is kept.

python examples/coreset_trainer.py --keep 0.5 --drop-rate 0.5
"""

import argparse
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dropbp_kernels import DropBPCallback
from dropbp_kernels.coreset import apply_coreset


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.5, help="share of each batch to train on (default 0.5)")
    parser.add_argument("--drop-rate", type=float, default=0.5, help="share of branch backwards to drop (default 0.5)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default 20)")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))
    up = [{"input_ids": start + torch.arange(32), "source": "up"} for start in torch.arange(0, 192, 2)]
    down = [{"input_ids": start - torch.arange(32), "source": "down"} for start in torch.arange(64, 256, 12)]
    data = [{**example, "labels": example["input_ids"]} for example in up + down]

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=16,  # candidates
            learning_rate=1e-2,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(model, settings, train_dataset=data, callbacks=[DropBPCallback(args.drop_rate)])
        selector = apply_coreset(trainer, keep=args.keep)
        trainer.train()
    print(f"{selector.step} batches of 16, {args.keep:.0%} of each trained on")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]


if __name__ == "__main__":
    main()
