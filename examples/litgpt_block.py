"""DropBP in a GPT of your own, in LitGPT's manner (Block, CausalSelfAttention, MLP, one Config). Runs on a CPU.

What DropBP needs of a model is marked: a gate for each residual branch, and the norm inside the branch. With parallel
residuals (GPT-NeoX, Phi) both branches read the same input and each still has its own gate. The loss comes from the
last hidden state, so that the logits of a large vocabulary are never stored whole.

python examples/litgpt_block.py --drop-rate 0.5 --parallel-residual
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropbp_kernels import DropBP, DropBPHandler
from dropbp_kernels.flops import attention_core_flops, linear_flops
from dropbp_kernels.losses import linear_cross_entropy


@dataclass
class Config:
    block_size: int = 64
    padded_vocab_size: int = 256
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 64
    parallel_residual: bool = False


class CausalSelfAttention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x)))


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.norm_1, self.attn = nn.LayerNorm(config.n_embd), CausalSelfAttention(config)
        self.norm_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)
        head_dim = config.n_embd // config.n_head
        self.gate_attn = DropBP(  # the FLOPs let the handler drop a share of the work, not of the branches
            lambda batch_size, seq_len: (
                linear_flops(self.attn, batch_size * seq_len)
                + attention_core_flops(batch_size, seq_len, config.n_head, head_dim)
            ),
            modules=[self.norm_1, self.attn],
        )
        self.gate_mlp = DropBP(
            lambda batch_size, seq_len: linear_flops(self.mlp, batch_size * seq_len), modules=[self.norm_2, self.mlp]
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel_residual:
            y = self.gate_attn.residual_add(x, lambda _: self.attn(self.norm_1(x)))
            return self.gate_mlp.residual_add(y, lambda _: self.mlp(self.norm_2(x)))
        x = self.gate_attn.residual_add(x, lambda x: self.attn(self.norm_1(x)))  # was: x + self.attn(self.norm_1(x))
        return self.gate_mlp.residual_add(x, lambda x: self.mlp(self.norm_2(x)))  # was: x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """Token ids (batch, seq) in, the loss of predicting the next one out."""

    def __init__(self, config: Config):
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe.weight[: idx.shape[1]]
        for block in self.h:
            x = block(x)
        return linear_cross_entropy(self.ln_f(x), self.lm_head.weight, targets)  # was: cross_entropy(lm_head(...))


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drop-rate", type=float, default=0.5, help="share of branch backwards to drop (default 0.5)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (default 60)")
    parser.add_argument("--parallel-residual", action="store_true", help="attention and MLP read the same input")
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = GPT(Config(parallel_residual=args.parallel_residual)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    handler = DropBPHandler(model, args.drop_rate)
    text = torch.tensor(list(Path(__file__).read_bytes()), device=device)

    for step in range(args.steps):
        starts = torch.randint(len(text) - 65, (8,)).tolist()
        batch = torch.stack([text[start : start + 65] for start in starts])
        handler.step()
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    print(handler.report())
    return loss.item()


if __name__ == "__main__":
    main()
