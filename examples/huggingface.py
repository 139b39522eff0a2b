"""DropBP on a Hugging Face model with LoRA, in a plain loop: three more lines. Runs in seconds on a CPU.

The model is a tiny random Llama, so that nothing is downloaded; put AutoModelForCausalLM.from_pretrained(...) in its
place. Needs the extra: pip install 'dropbp_kernels[finetune]'

By default whole branches (the attention or the MLP of a block) are dropped. With --granularity token every branch drops
a share of the samples or tokens in every step (docs/row_plans.md). With --context inference tokens without a loss, here
the first half of each sample, run like inference (docs/target_plans.md).

python examples/huggingface.py --drop-rate 0.75
python examples/huggingface.py --drop-rate 0.75 --granularity token
python examples/huggingface.py --drop-rate 0 --context inference
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from dropbp_kernels import apply_dropbp


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--drop-rate", type=float, default=0.75, help="share of branch backwards to drop (default 0.75)"
    )
    parser.add_argument(
        "--granularity",
        choices=("branch", "sample", "token"),
        default="branch",
        help="what is dropped: whole branches, or a share of samples or tokens in every branch (default branch)",
    )
    parser.add_argument(
        "--context", choices=("inference",), help="run tokens without a loss like inference (default no)"
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default 20)")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        use_cache=False,
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear")).train()
    handler = apply_dropbp(  # 1: gates on every branch
        model, drop_rate=args.drop_rate, granularity=args.granularity, context=args.context
    )
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    tokens = torch.arange(64).repeat(4, 1)
    labels = tokens.clone()
    if args.context:
        labels[:, :32] = -100  # no loss

    for step in range(args.steps):
        handler.step()  # 2: the plan of this step
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == args.steps - 1:
            print(f"step {step:2d}  loss {loss.item():.3f}")
    print(f"kept {handler.report()['flops_kept']:.0%} of the branches' backward FLOPs")  # 3: what was saved
    return loss.item()


if __name__ == "__main__":
    main()
