"""One rank of plain training loops in several engines. test_engines.py starts two: python engine_ranks.py FOLDER."""

import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from models import tiny_causal_lm, toy_model
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from dropbp_kernels import DropBPHandler, apply_dropbp, remove_dropbp
from dropbp_kernels.missing_grad import register_missing_grad

NUM_STEPS = 5
# Ways to run a Llama of transformers that must not mind how its weights or its batch are cut.
LLAMA_OPTIONS = {
    "branch": {"drop_rate": 0.5},
    "fused": {"drop_rate": 0.5, "fused": True},
    "kept": {"drop_rate": 0.5, "checkpoint": "kept"},
    "sliced": {"drop_rate": 0.5, "checkpoint": "sliced"},
    "context": {"drop_rate": 0.5, "context": "inference"},
}
# These keep other rows where the batch is cut, or are refused there: for tensor parallel runs alone.
WHOLE_BATCH_OPTIONS = {
    "token": {"drop_rate": 0.5, "granularity": "token"},
    "fused token": {"drop_rate": 0.5, "granularity": "token", "fused": True},
    "one_hop": {"drop_rate": 0.5, "context": "inference", "context_gradient": "one_hop"},
    "full": {"drop_rate": 0.5, "context": "inference", "context_gradient": "full"},
}


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


def pipeline(rank: int):
    """Half of the blocks as a stage with a handler of its own; two micro-batches a step, of the whole batch."""
    stage = toy_model(4)[2 * rank : 2 * rank + 2]
    handler = DropBPHandler(stage, 0.5, seed=rank)
    schedule = ScheduleGPipe(
        PipelineStage(stage, rank, dist.get_world_size(), torch.device("cpu")),
        n_microbatches=2,
        loss_fn=lambda output, target: output.square().mean(),
    )
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    for x in batches(None):
        handler.step()
        schedule.step(*([x] if rank == 0 else []), target=None if rank == 0 else x)
        optimizer.step()
        optimizer.zero_grad()
    return stage.state_dict(), [branch["num_kept"] for branch in handler.report()["branches"]]


def chats(rank: int | None) -> list[list[dict[str, torch.Tensor]]]:
    """For each step the batches of a rank, or (None) of both; the ranks differ in turns, and one has no target once."""
    steps = []
    for step in range(3):
        tokens = torch.randint(64, (2, 2, 12), generator=torch.Generator().manual_seed(step))
        labels = tokens.masked_fill(torch.arange(12) < 7, -100)
        labels[1, :, 2:4] = tokens[1, :, 2:4]
        if step == 1:
            labels[1] = -100
        halves = [{"input_ids": tokens[half], "labels": labels[half]} for half in (0, 1)]
        steps.append(halves if rank is None else [halves[rank]])
    return steps


def train_targets(model, handler, steps: list[list[dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """SGD on the mean of the batches' losses, where one without a target counts as 0; the weights afterwards.

    Not Adam, which hides a gradient's scale and turns the rounding of one near zero into a step.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for batches in steps:
        handler.step()
        for batch in batches:
            loss = model(**batch).loss
            if loss.requires_grad:
                (loss / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name.removeprefix("module."): value for name, value in model.state_dict().items()}


def targets(rank: int, granularity: str):
    """Without find_unused_parameters where no branch is dropped."""
    model = tiny_causal_lm(num_hidden_layers=2)
    rate = 0.0 if granularity == "branch" else 0.5
    handler = apply_dropbp(model, rate, granularity=granularity, context="inference")
    return train_targets(DistributedDataParallel(model), handler, chats(rank))


# Of the samples of each rank, step by step.
ADVANTAGES = torch.tensor([[[0.0, 2.0], [1.0, 0.0]], [[-1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])


def train_policy(model, handler, ranks: list[int]) -> dict[str, torch.Tensor]:
    """SGD on log-probabilities times advantages; samples whose advantage is zero have no gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, advantages in enumerate(ADVANTAGES):
        tokens = torch.randint(64, (2, 2, 12), generator=torch.Generator().manual_seed(step))
        for rank in ranks:
            labels = tokens[rank].masked_fill(torch.arange(12) < 7, -100)
            handler.step(labels=labels, without_gradient=advantages[rank] == 0.0)
            logps = model(input_ids=tokens[rank]).logits.log_softmax(-1)[:, 6:-1].gather(2, tokens[rank][:, 7:, None])
            (-(logps[..., 0].sum(1) * advantages[rank]).sum() / len(ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return _whole(model.module if isinstance(model, DistributedDataParallel) else model)


def policies(rank: int) -> dict[str, dict[str, torch.Tensor]]:
    """DDP and FSDP2, under which no sample runs apart."""
    weights = {}
    for name, engine in (("ddp", DistributedDataParallel), ("fsdp2", _fsdp2)):
        model = tiny_causal_lm(num_hidden_layers=2)
        handler = apply_dropbp(model, 0.0, context="inference")
        weights[name] = train_policy(engine(model), handler, [rank])
    return weights


def sharded_targets(rank: int) -> tuple[dict[str, torch.Tensor], str]:
    """FSDP2 where ranks have other numbers of turns, and what is said where one of them has no target."""
    model = tiny_causal_lm(num_hidden_layers=2)
    handler = apply_dropbp(model, 0.0, context="inference")
    _fsdp2(model)
    first, second, _ = chats(rank)
    with mock.patch("dropbp_kernels.targets.PASS_ROWS", 1):  # where each for itself would not run its turns together
        train_targets(model, handler, [first])
    weights = _whole(model)
    try:
        model(**second[0])
    except ValueError as error:
        return weights, str(error)
    return weights, "no error"


def _tensor_parallel(model):
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    rows = ("self_attn.o_proj", "mlp.down_proj")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        parallelize_module(block, mesh, dict.fromkeys(columns, ColwiseParallel()))
        parallelize_module(block, mesh, dict.fromkeys(rows, RowwiseParallel()))
    return model


def _fsdp2(model):
    for block in model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def _fsdp1(model):
    policy = ModuleWrapPolicy({type(block) for block in model.model.layers})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"))


def _whole(net) -> dict[str, torch.Tensor]:
    """The weights of a net that an engine may have cut."""
    if isinstance(net, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(net):
            weights = {name: value.detach().clone() for name, value in net.named_parameters()}
        return {name.replace("_fsdp_wrapped_module.", ""): value for name, value in weights.items()}
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in net.state_dict().items()
    }


def llama(options, engine=None, rank: int | None = None, patch_first: bool = True) -> dict[str, torch.Tensor]:
    """Two steps of a tiny Llama; its weights afterwards, whole. rank: of a batch that is cut; None: all of it."""
    model = tiny_causal_lm()
    handler = apply_dropbp(model, **options) if patch_first else None
    net = model if engine is None else engine(model)
    handler = handler or apply_dropbp(model, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    batches = torch.randint(64, (2, 4, 10), generator=torch.Generator().manual_seed(3))
    for tokens in batches if rank is None else batches[:, 2 * rank : 2 * rank + 2]:
        labels = tokens.clone()
        labels[:, :3] = labels[:, 5:8] = -100  # two turns
        handler.step()
        net(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    remove_dropbp(model)
    net(input_ids=tokens, labels=tokens).loss.backward()  # as it was: every weight is used
    assert all(parameter.grad is not None for parameter in net.parameters())
    return _whole(net)


def refusal(options) -> str:
    """What a Llama under FSDP2 says to options that it cannot run."""
    try:
        llama(options, _fsdp2, dist.get_rank())
    except ValueError as error:
        return str(error)
    return "no error"


def llamas(rank: int) -> dict[str, object]:
    """A tiny Llama in every engine and every way."""
    results: dict[str, object] = {}
    for name, options in (LLAMA_OPTIONS | WHOLE_BATCH_OPTIONS).items():
        results[f"tensor parallel {name}"] = llama(options, _tensor_parallel)
    for name, options in LLAMA_OPTIONS.items():
        results[f"fsdp1 {name}"] = llama(options, _fsdp1, rank)
        results[f"fsdp2 {name}"] = llama(options, _fsdp2, rank)
        results[f"fsdp2 first {name}"] = llama(options, _fsdp2, rank, patch_first=False)
    for name in ("one_hop", "full"):
        results[f"refused {name}"] = refusal(WHOLE_BATCH_OPTIONS[name])
    return results


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
    if "pipeline" in only or not only:
        results["pipeline"] = pipeline(rank)
    if "static" in only or not only:
        results["static"] = ddp_static_graph(rank)
    if "llama" in only or not only:
        results |= llamas(rank)
    if "targets" in only or not only:
        results |= {f"targets {granularity}": targets(rank, granularity) for granularity in ("branch", "sample")}
        results["sharded targets"] = sharded_targets(rank)
        results["policies"] = policies(rank)
    torch.save(results, Path(sys.argv[1], f"rank{rank}.pt"))
    dist.destroy_process_group()
