"""A small language model from fused DropBP blocks, trained on this file's own bytes. Runs in seconds on a CPU.

python examples/own_model.py --drop-rate 0.75
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropbp_kernels import DropBPHandler, blocks


class ByteModel(nn.Module):
    """Bytes in, logits of the next byte out: (batch, seq) -> (batch, seq, 256)."""

    def __init__(self, width: int = 64, num_blocks: int = 4, num_heads: int = 4):
        super().__init__()
        self.head_dim = width // num_heads
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(blocks.LlamaBlock(width, 3 * width, num_heads) for _ in range(num_blocks))
        self.norm = blocks.RMSNorm(width)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        rope = blocks.rotary_embedding(tokens.shape[1], self.head_dim, device=tokens.device)
        stream = blocks.Stream(self.embedding(tokens))
        for block in self.blocks:
            stream = block(stream, rope)
        return self.head(blocks.finish(stream, self.norm))


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drop-rate", type=float, default=0.5, help="share of branch backwards to drop (default 0.5)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (default 60)")
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = torch.tensor(list(Path(__file__).read_bytes()), device=device)
    torch.manual_seed(0)
    model = ByteModel().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    handler = DropBPHandler(model, args.drop_rate)

    for step in range(args.steps):
        starts = torch.randint(len(text) - 65, (8,)).tolist()
        batch = torch.stack([text[start : start + 65] for start in starts])
        handler.step()  # draws the plan of this step
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == args.steps - 1:
            print(
                f"step {step:3d}  loss {loss.item():.3f}  kept {sum(handler.plan.kept)} of {len(handler.plan)} branches"
            )

    report = handler.report()
    print(f"kept {report['flops_kept']:.0%} of the branches' backward FLOPs")
    return loss.item()


if __name__ == "__main__":
    main()
