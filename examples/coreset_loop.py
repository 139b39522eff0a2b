"""Coresets in a plain loop: train on the half of each batch whose gradients stand for all of it. Seconds on a CPU.

The data are three sources of unequal size (counting up, counting down, repeating a token), the model a tiny random
Llama, so that nothing is downloaded. All examples of the smallest source are kept. DropBP drops branches of what is
kept.

python examples/coreset_loop.py --keep 0.5 --drop-rate 0.5
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from dropbp_kernels import apply_dropbp
from dropbp_kernels.coreset import CoresetSelector


def batch_of(step: int, size: int = 32, seq_len: int = 24) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch and the source of each of its examples: 0 for most of them, 2 for few."""
    generator = torch.Generator().manual_seed(step)
    sources = (torch.arange(size) >= size // 2).long() + (torch.arange(size) >= size * 9 // 10)
    starts = torch.randint(32, 96, (size, 1), generator=generator)
    ids = starts + torch.arange(seq_len) * torch.tensor([1, -1, 0])[sources][:, None]
    return {"input_ids": ids, "labels": ids}, sources


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.5, help="share of each batch to train on (default 0.5)")
    parser.add_argument("--drop-rate", type=float, default=0.5, help="share of branch backwards to drop (default 0.5)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default 20)")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear")).train()
    handler = apply_dropbp(model, drop_rate=args.drop_rate)
    selector = CoresetSelector(model, keep=args.keep)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)

    for step in range(args.steps):
        batch, sources = batch_of(step)
        selected, _ = selector.select(batch, sources)  # the weights are all 1 here
        subset = {name: value[selected] for name, value in batch.items()}
        handler.step()
        loss = model(**subset).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == args.steps - 1:
            kept = sources[selected].bincount(minlength=3).tolist()
            print(f"step {step:2d}  loss {loss.item():.3f}  kept of each source {kept}")
    print(f"trained on {len(selected)} of {len(sources)} examples of each batch")
    return loss.item()


if __name__ == "__main__":
    main()
