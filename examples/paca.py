"""DropBP with a PaCA adapter, which trains a few columns of each weight; --save writes it as LoRA too. On a CPU.

Dropped branches save nothing for the backward, kept ones a few channels. The model is a tiny random Llama, so that
nothing is downloaded; put AutoModelForCausalLM.from_pretrained(...) in its place. Needs the extra: pip install
'dropbp_kernels[finetune]'

python examples/paca.py --drop-rate 0.75
"""

import argparse

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from dropbp_kernels import apply_dropbp
from dropbp_kernels.paca import PacaConfig, convert_to_lora


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--drop-rate", type=float, default=0.75, help="share of branch backwards to drop (default 0.75)"
    )
    parser.add_argument(
        "--columns", type=int, default=16, help="how many input columns of each weight are trained (default 16)"
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default 20)")
    parser.add_argument("--save", help="a folder for the adapter, and one for it as LoRA (default none)")
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
    columns = PacaConfig(r=args.columns, alpha=4 * args.columns, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), columns).train()
    handler = apply_dropbp(model, drop_rate=args.drop_rate)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    tokens = torch.arange(64).repeat(4, 1)

    for step in range(args.steps):
        handler.step()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == args.steps - 1:
            print(f"step {step:2d}  loss {loss.item():.3f}")
    print(f"kept {handler.report()['flops_kept']:.0%} of the branches' backward FLOPs")
    if args.save:
        model.save_pretrained(f"{args.save}/paca")
        convert_to_lora(model, path=f"{args.save}/lora")  # exact, for servers that know LoRA
    return loss.item()


if __name__ == "__main__":
    main()
