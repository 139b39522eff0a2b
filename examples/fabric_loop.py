"""DropBP in a Lightning Fabric loop: mixed precision, gradient accumulation and an exact resume. Seconds on a CPU.

Fabric needs nothing but the handler in its checkpoint. Under its DDP strategy pass find_unused_parameters=True, since
the parameters of a dropped branch get no gradient in that step.

python examples/fabric_loop.py --drop-rate 0.75
"""

import argparse
import tempfile
from pathlib import Path

import torch
from lightning.fabric import Fabric
from transformers import LlamaConfig, LlamaForCausalLM

from dropbp_kernels import apply_dropbp

ACCUMULATE = 2


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--drop-rate", type=float, default=0.75, help="share of branch backwards to drop (default 0.75)"
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default 20)")
    parser.add_argument("--precision", default="bf16-mixed", help="of Fabric (default bf16-mixed)")
    args = parser.parse_args(argv)

    fabric = Fabric(accelerator="auto", devices=1, precision=args.precision)
    fabric.seed_everything(0, verbose=False)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).train()
    handler = apply_dropbp(model, args.drop_rate)  # before Fabric wraps the model
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    tokens = fabric.to_device(torch.arange(64).repeat(4, 1))

    for step in range(args.steps):
        handler.step()  # one plan for all micro-batches of the step
        for micro_batch in range(ACCUMULATE):
            with fabric.no_backward_sync(model, enabled=micro_batch < ACCUMULATE - 1):
                loss = model(input_ids=tokens + micro_batch, labels=tokens + micro_batch).loss
                fabric.backward(loss / ACCUMULATE)
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == args.steps - 1:
            fabric.print(f"step {step:2d}  loss {loss.item():.3f}")

    with tempfile.TemporaryDirectory() as folder:  # a resumed run would draw the plans that come next
        path = Path(folder, "checkpoint.pt")
        fabric.save(path, {"model": model, "optimizer": optimizer, "dropbp": handler.state_dict()})
        handler.load_state_dict(fabric.load(path)["dropbp"])
    fabric.print(handler.report())
    return loss.item()


if __name__ == "__main__":
    main()
