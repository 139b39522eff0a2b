"""How many examples of each source a batch keeps: small sources whole, the others in proportion to their number.

A random half of a batch would hold half of the little that a small source has in it. So examples of sources below the
mean size are kept, all of them, and the large sources share what is left of the budget.
"""

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

# Small sources are kept whole, the smallest first, only while the others keep at least this share of what `keep` alone
# would leave them. Where sources are of nearly equal size, the mean makes some of them "small" by chance, and these
# would else take the whole budget.
LEAST_SHARE = 0.5


def num_kept(num_examples: int, keep: float) -> int:
    """The size of the subset: keep * num_examples, rounded half up, at least one."""
    return max(1, int(keep * num_examples + 0.5))


def source_id(source: Hashable) -> int:
    """An int64 that stands for a source on every rank and in every process: integers for themselves."""
    if isinstance(source, int):
        return source
    return int.from_bytes(hashlib.blake2b(repr(source).encode(), digest_size=8).digest(), "big", signed=True)


def plan_budgets(
    sources: Sequence[Hashable], budget: int, sizes: Mapping[Hashable, int] | None = None
) -> dict[Hashable, int]:
    """How many examples each source keeps; the sum is the budget. A source that keeps all it has needs no selection.

    sources: that of each example of the batch. budget: how many are kept, 1 to all of them. sizes: how many examples
    each source has in the data set, which decides what is small (below the mean size); None: the counts in this batch.

    Errors: ValueError when sizes lacks a source of the batch, names more sources than the batch has examples, or calls
            all of the batch small; when the subset would have fewer examples than there are sources.
    Source: CoLM (arXiv 2407.19580), section 4.1.
    """
    counts = Counter(sources)
    names = sorted(counts, key=source_id)  # the order in which ties are broken must not depend on that of the batch
    if sizes is not None:
        _check_sizes(sizes, counts)
    keep = budget / len(sources)
    if budget < len(names):
        raise ValueError(
            f"sources: expected at most {budget}, as many as examples are kept of {len(sources)}, got {len(names)}; "
            "enlarge the batch or keep"
        )
    size_of: Mapping[Hashable, int] = counts if sizes is None else sizes
    mean = sum(size_of.values()) / len(size_of)
    small = sorted((name for name in names if size_of[name] < mean), key=lambda name: counts[name])
    if len(small) == len(names) and budget < len(sources):
        raise ValueError(
            f"sources: expected an example of a source that is not small (of at least the mean size {mean:g}), but all "
            f"{len(sources)} examples are from small ones: {', '.join(map(str, names))}"
        )
    budgets: dict[Hashable, int] = {}
    left, num_others = budget, len(sources)
    for name in small:
        count = counts[name]
        num_sources_after = len(names) - len(budgets) - 1
        if left - count < max(num_sources_after, LEAST_SHARE * keep * (num_others - count)):
            break
        budgets[name] = count
        left, num_others = left - count, num_others - count
    large = [name for name in names if name not in budgets]
    return {**budgets, **_in_proportion({name: counts[name] for name in large}, left)}


def _in_proportion(counts: Mapping[Hashable, int], budget: int) -> dict[Hashable, int]:
    """budget shared out by counts: each part at least one and, where no exact share is below that, at most 1 off it.

    Largest remainders get what rounding down leaves; of equal ones, the first.
    """
    total = sum(counts.values())
    parts = {name: max(1, budget * count // total) for name, count in counts.items()}
    by_remainder = sorted(counts, key=lambda name: -(budget * counts[name] % total))
    for name in by_remainder[: max(0, budget - sum(parts.values()))]:
        parts[name] += 1
    for _ in range(sum(parts.values()) - budget):  # what sources below one example got too much
        richest = max(parts, key=lambda name: parts[name] - budget * counts[name] / total if parts[name] > 1 else -1.0)
        parts[richest] -= 1
    return parts


def _check_sizes(sizes: Mapping[Hashable, int], counts: Mapping[Hashable, int]) -> None:
    num_examples = sum(counts.values())
    if unknown := sorted(map(str, set(counts) - set(sizes))):
        known = ", ".join(map(str, sizes))
        raise ValueError(f"sources: expected those that the selector was told of ({known}), got {', '.join(unknown)}")
    if num_examples < len(sizes):
        raise ValueError(
            f"batch: expected at least as many examples as there are sources, {len(sizes)}, got {num_examples}"
        )
