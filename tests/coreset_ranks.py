"""One rank that chooses a coreset with others. test_coreset_trainer.py starts two: python coreset_ranks.py FOLDER."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from models import tiny_causal_lm

from dropbp_kernels.coreset import CoresetSelector

SIZES = {"a": 30, "b": 5, "c": 40}
RUNS = {
    "exact": {},
    "coordinates": {"num_coordinates": 20},
    "spsa": {"features": "spsa", "directions": 3},
    "random": {"method": "random"},
    "stratified": {"method": "stratified", "sources": SIZES},
}


def ranks_batch():
    ids = torch.randint(64, (24, 12), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[::3, 7:] = -100
    ids[12:, 10:], labels[12:, 10:] = 0, -100  # so the second rank's batch may be narrower
    return {"input_ids": ids, "labels": labels}, ["a"] * 10 + ["b"] * 2 + ["a"] * 3 + ["c"] * 9


def selector_of(options):
    return CoresetSelector(tiny_causal_lm(), **{"num_coordinates": None, "weights": "cluster", **options})


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    batch, sources = ranks_batch()
    mine = slice(12 * rank, 12 * rank + 12)
    width = 12 - 2 * rank
    share = {name: value[mine, :width] for name, value in batch.items()}
    results = {}
    for name, options in RUNS.items():
        selector = selector_of(options)
        steps = []
        for _ in range(3):
            twin = selector_of(options)
            twin.load_state_dict(selector.state_dict())
            selected, weights = twin.select(share, sources[mine])
            subset, _ = selector.subset(share, sources[mine])
            steps.append({"selected": selected, "weights": weights, **subset})
        results[name], results[name + " state"] = steps, selector.state_dict()
    random = selector_of({"method": "random", "keep": 0.3})
    others = {"pictures": share["input_ids"][..., None].expand(-1, -1, 3), "scale": torch.tensor(2.0)}
    results["others"], _ = random.subset({**share, **others})
    try:
        random.select({"input_ids": share["input_ids"][rank:]})
    except ValueError as error:
        results["refused"] = str(error)
    torch.save(results, Path(sys.argv[1], f"rank{os.environ['RANK']}.pt"))
    dist.destroy_process_group()
