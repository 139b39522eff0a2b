"""DropBP in transformers' Trainer, with LoRA: one callback. Runs in seconds on a CPU.

The model is a tiny random Llama and the task is counting, so that nothing is downloaded; put in your own. What was
dropped is logged with the loss, to wherever --report-to says.

python examples/hf_trainer.py --drop-rate 0.75 --measure
"""

import argparse
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dropbp_kernels import DropBPCallback


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--drop-rate", type=float, default=0.75, help="share of branch backwards to drop (default 0.75)"
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default 20)")
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, ... (default none)")
    parser.add_argument("--measure", action="store_true", help="log times and the peak of memory too")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))
    starts = torch.arange(0, 192, 3)
    data = [{"input_ids": start + torch.arange(48), "labels": start + torch.arange(48)} for start in starts]

    callback = DropBPCallback(drop_rate=args.drop_rate, rates="sensitivity", calibrate_at=0.1, measure=args.measure)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=args.steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=5,
            save_strategy="no",
            report_to=args.report_to,
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(model, settings, train_dataset=data, callbacks=[callback])
        trainer.train()
    print(callback.handler.report())
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]


if __name__ == "__main__":
    main()
