"""One rank of plain training loops under DDP and FSDP2. test_engines.py starts two: python engine_ranks.py FOLDER."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from models import toy_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dropbp_kernels import DropBPHandler
from dropbp_kernels.missing_grad import register_missing_grad

NUM_STEPS = 5


def batches(rank: int | None) -> list[torch.Tensor]:
    """The inputs of all steps: a rank's half, or (None) the whole."""
    whole = torch.randn(NUM_STEPS, 4, 3, 8, generator=torch.Generator().manual_seed(5))
    return list(whole if rank is None else whole[:, 2 * rank : 2 * rank + 2])


def train(model, handler, inputs: list[torch.Tensor], missing_grad: str = "skip") -> dict[str, torch.Tensor]:
    """AdamW with weight decay on a mean loss; the weights afterwards, whole."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    register_missing_grad(optimizer, missing_grad)
    for x in inputs:
        handler.step()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        name.removeprefix("module."): value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in model.state_dict().items()
    }


def ddp(rank: int, missing_grad: str):
    model = toy_model(4)
    handler = DropBPHandler(model, 0.5)
    return train(DistributedDataParallel(model, find_unused_parameters=True), handler, batches(rank), missing_grad)


def with_paca():
    """A toy model of which r columns of each linear are trained."""
    import peft

    from dropbp_kernels.paca import PacaConfig

    return peft.get_peft_model(toy_model(4), PacaConfig(r=3, target_modules=["up", "down"], seed=0))


def paca(rank: int):
    model = with_paca()
    handler = DropBPHandler(model, 0.5)
    return train(DistributedDataParallel(model, find_unused_parameters=True), handler, batches(rank))


def ddp_static_graph(rank: int):
    """What DDP says when it was promised that the same parameters are used in every step."""
    model = toy_model(4)
    handler = DropBPHandler(model, 0.5)
    try:
        train(DistributedDataParallel(model, static_graph=True), handler, batches(rank))
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fsdp2(rank: int, missing_grad: str):
    model = toy_model(4)
    handler = DropBPHandler(model, 0.5)
    for block in model:
        fully_shard(block)
    fully_shard(model)
    return train(model, handler, batches(rank), missing_grad)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    only = sys.argv[2:]
    results = {}
    for mode in ("skip", "zero"):
        if not only or "ddp" in only:
            results[f"ddp {mode}"] = ddp(rank, mode)
        if not only or "fsdp2" in only:
            results[f"fsdp2 {mode}"] = fsdp2(rank, mode)
    if "paca" in only or not only:
        results["paca"] = paca(rank)
    if "static" in only or not only:
        results["static"] = ddp_static_graph(rank)
    torch.save(results, Path(sys.argv[1], f"rank{rank}.pt"))
    dist.destroy_process_group()
