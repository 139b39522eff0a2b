"""Which samples and which tokens are kept: random orders of them, and what of an order falls into a stage.

Pure functions of (seed, step) and the sizes. An order stands for any share: its first rows are kept.
"""

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from .permutation import draw_permutation


def draw_samples(most_kept: dict[int, int], samples: Sequence[int], *, seed: int, step: int) -> dict[int, list[int]]:
    """A random order of `samples` for each run of branches; every one is kept by some run, as far as these reach.

    most_kept: for each run, the most samples that one of its branches keeps, where these help to reach every one; or 0.
    Cost:   on the host, that of `draw_permutation` and `cover`.
    """
    runs = list(most_kept)
    drawn = draw_permutation(len(samples), seed=seed, step=step, branch=torch.tensor(runs)).tolist()
    orders = dict(zip(runs, drawn, strict=True))
    cover(orders, most_kept, random.Random(f"cover:{seed}:{step}"))
    return {run: [samples[place] for place in order] for run, order in orders.items()}


def cover(orders: dict[int, list[int]], num_kept: dict[int, int], generator: random.Random) -> None:
    """Let samples change places so that every one is among the first num_kept of some order, as far as these reach.

    orders: permutations of the same samples, by run; changed in place. Who changes with whom is drawn without regard to
    which sample is which, so every sample is as likely as before to be at any place.

    Cost: on the host, the length of all kept places, and again for each sample that was in none.
    """
    num_samples = len(next(iter(orders.values())))
    times = [0] * num_samples
    for run, order in orders.items():
        for sample in order[: num_kept[run]]:
            times[sample] += 1
    missing = [sample for sample in range(num_samples) if times[sample] == 0]
    # Not by shuffle, whose stream Python may change.
    for sample in sorted(missing, key=lambda _: generator.random()):
        places = [
            (run, place)
            for run, order in orders.items()
            for place, other in enumerate(order[: num_kept[run]])
            if times[other] > 1
        ]
        if not places:
            return
        run, place = places[math.floor(generator.random() * len(places))]
        order = orders[run]
        times[order[place]] -= 1
        times[sample] += 1
        order[order.index(sample)], order[place] = order[place], sample


def draw_tokens(
    runs: Sequence[int], num_rows: int, device: torch.device, is_real: Tensor | None, *, seed: int, step: int
) -> Tensor:
    """A random order of range(num_rows) for each run of branches, int64 (len(runs), num_rows), on the device.

    is_real: bool, num_rows elements; those that are False stand last.
    """
    branch = torch.tensor(runs, device=device)
    drawn = draw_permutation(num_rows, seed=seed, step=step, branch=branch, device=device)
    if is_real is None:
        return drawn
    is_padding = ~is_real.to(device).flatten()[drawn]
    return drawn.gather(1, is_padding.to(torch.int8).argsort(dim=1, stable=True))


def tokens_by_stage(
    drawn: Tensor, num_kept: Sequence[tuple[int, int]], widths: Sequence[int]
) -> tuple[list[Tensor], list[list[int]]]:
    """What falls into each stage of orders of all stages' tokens, which stand side by side in each sample.

    num_kept: for each branch, which order of drawn is its own and how many of the first tokens of that it keeps.
    Shapes: drawn (orders, B * sum(widths)); a stage's orders (orders, B * width), as drawn; how many of its tokens each
            branch keeps in each stage.
    Cost:   two sorts on the device, which is waited for once; nothing where there is one stage.
    """
    if len(widths) == 1:
        return [drawn], [[count] for _, count in num_kept]
    width, sizes = sum(widths), torch.tensor(widths, device=drawn.device)
    column = drawn % width
    stage = torch.arange(len(widths), device=drawn.device).repeat_interleave(sizes)[column]
    in_stage = drawn // width * sizes[stage] + column - (sizes.cumsum(0) - sizes)[stage]
    num_samples = drawn.shape[1] // width
    orders = in_stage.gather(1, stage.argsort(dim=1, stable=True)).split([num_samples * size for size in widths], dim=1)
    counts = [torch.bincount(stage[place, :count], minlength=len(widths)) for place, count in num_kept]
    return list(orders), torch.stack(counts).tolist()
