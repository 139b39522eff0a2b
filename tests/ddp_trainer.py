"""One rank of Trainer runs under DDP. test_trainer.py starts two: python ddp_trainer.py FOLDER, with RANK and so on."""

import os
import sys
import tempfile
from pathlib import Path

import torch
from models import tiny_causal_lm, with_lora
from trainer_runs import arguments, data
from transformers import Trainer

from dropbp_kernels import DropBPCallback

# What is run: the callback's options by name.
RUNS = {
    "uniform": {"rates": "uniform"},
    "sensitivity": {"rates": "sensitivity", "calibrate_at": 0.3, "plan": "micro_batch"},
}


def run(name: str, batch_size: int) -> dict:
    """Train a tiny model; its weights, and where the handler stands."""
    callback = DropBPCallback(0.5, **RUNS[name])
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, per_device_train_batch_size=batch_size, gradient_accumulation_steps=2)
        model = with_lora(tiny_causal_lm())
        Trainer(model, args, train_dataset=data(), callbacks=[callback]).train()
    return {"weights": model.state_dict(), "handler": callback.handler.state_dict()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save({name: run(name, 2) for name in RUNS}, Path(sys.argv[1], f"rank{os.environ['RANK']}.pt"))
    torch.distributed.destroy_process_group()
