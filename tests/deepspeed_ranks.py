"""One rank of plain training loops in DeepSpeed. test_deepspeed.py starts two: python deepspeed_ranks.py FOLDER."""

import os
import sys
from pathlib import Path

import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")  # read when it is imported

import torch.distributed as dist
from models import tiny_causal_lm, with_lora

from dropbp_kernels import apply_dropbp

NUM_STEPS = 3
# Ways to patch a Llama: whether it has adapters, the options, and the stages of ZeRO.
OPTIONS = {
    "branch": (False, {}, (0, 1, 2)),
    "fused": (False, {"fused": True}, (1, 2)),
    "kept": (False, {"checkpoint": "kept"}, (2,)),
    "lora": (True, {"fused": True}, (1, 2)),
    "undropped": (False, {"drop_rate": 0.0, "fused": True}, (3,)),
    "undropped kept": (True, {"drop_rate": 0.0, "fused": True, "checkpoint": "kept"}, (3,)),
}


def batches(rank: int | None) -> torch.Tensor:
    """Tokens of all steps: a rank's half, or (None) the whole."""
    whole = torch.randint(64, (NUM_STEPS, 4, 10), generator=torch.Generator().manual_seed(3))
    return whole if rank is None else whole[:, 2 * rank : 2 * rank + 2]


def patched(name: str):
    """A tiny Llama and its handler."""
    has_adapters, options, _ = OPTIONS[name]
    model = with_lora(tiny_causal_lm()) if has_adapters else tiny_causal_lm()
    return model, apply_dropbp(model, **{"drop_rate": 0.5, **options})


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


def train(name: str, stage: int, rank: int) -> dict[str, torch.Tensor]:
    """The weights after some steps in DeepSpeed, whole."""
    import deepspeed

    model, handler = patched(name)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,  # its default is a norm of 1
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=config)
    for tokens in batches(rank):
        handler.step()
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    weights = {}
    for key, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            weights[key] = parameter.detach().clone()
    return weights


def refusal(rank: int) -> str:
    """What is said of branches that are dropped under ZeRO-3."""
    try:
        train("branch", 3, rank)
    except RuntimeError as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__.clear()  # or it compiles a collective of its own, which takes a minute
    deepspeed.init_distributed(dist_backend="gloo")
    rank = dist.get_rank()
    results: dict[object, object] = {
        (name, stage): train(name, stage, rank) for name, (*_, stages) in OPTIONS.items() for stage in stages
    }
    results["refused"] = refusal(rank)
    torch.save(results, Path(sys.argv[1], f"rank{rank}.pt"))
    dist.destroy_process_group()
