"""The distances of all pairs of examples, and the choice among them that the host makes.

eager     torch.cdist with p=1
compile   torch.compile of eager
cpp       for facility_location: the lazy greedy in C++, with the conversion of similarities to integers
reference for facility_location: its twin in PyTorch
naive     the greedy in C++ that computes every gain in every turn
"""

from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch import Tensor

from dropbp_kernels import _backend
from dropbp_kernels.coreset import facility_location

from .baselines import backends, check_results, compiled, raw_op, right_ones
from .rows import Row, machine, op_rows
from .settings import Settings
from .timing import Case, Variant, measure

OP = "l1_distances"
NUM_FEATURES = 2560  # CoLM's
# Examples: small batches, and as many candidates as are supported. The naive greedy is left out of the largest.
NUM_EXAMPLES = {"full": (32, 128, 512), "quick": (32, 128, 512), "tiny": (8,)}
NUM_CANDIDATES = {"full": (32, 128, 512, 4096), "quick": (32, 128, 512), "tiny": (8,)}
LARGEST_NAIVE = 512


def eager(features: Tensor) -> Tensor:
    return torch.cdist(features, features, p=1.0)


def distances_case(num_examples: int, device: torch.device) -> Case:
    """The distances in all variants that can run on `device`, each checked against float64."""
    functions = {"eager": eager, "compile": compiled(eager)}
    functions |= {backend: raw_op(backend, OP, OP, device) for backend in backends(OP, device)}

    def make_inputs() -> Tensor:
        return torch.randn(num_examples, NUM_FEATURES, device=device)

    features = make_inputs()
    plain, exact = eager(features), eager(features.double())
    what = f"{OP}, {num_examples} examples"
    functions = right_ones(what, functions, lambda function: [function(features)], [plain], [exact])
    variants = {name: Variant(function) for name, function in functions.items()}
    return Case(OP, "all pairs", "fwd", torch.float32, num_examples, NUM_FEATURES, 0, make_inputs, variants)


def selection_case(num_candidates: int) -> Case:
    """Half of the candidates picked, in all variants; they must agree. The host chooses, wherever features were."""

    def make_inputs() -> Tensor:
        distances = eager(torch.randn(num_candidates, 64))
        return distances.max() - distances

    def pick(similarity: Tensor, *, lazy: bool = True) -> Tensor:
        return facility_location(similarity, num_candidates // 2, lazy=lazy)[0]

    def pick_in_pytorch(similarity: Tensor) -> Tensor:
        with patch.object(_backend, "host", lambda: None):
            return pick(similarity)

    functions = {"reference": pick_in_pytorch}
    if _backend.host() is not None:
        functions["cpp"] = pick
        if num_candidates <= LARGEST_NAIVE:
            functions["naive"] = lambda similarity: pick(similarity, lazy=False)
    similarity = make_inputs()
    expected = functions["reference"](similarity).double()
    for name, function in functions.items():
        check_results(f"facility_location, {name}", [function(similarity).double()], [expected], [expected])
    variants = {name: Variant(function) for name, function in functions.items()}
    return Case(
        "facility_location",
        "half of the candidates",
        "fwd",
        torch.float32,
        num_candidates,
        num_candidates,
        0,
        make_inputs,
        variants,
    )


def run(settings: Settings) -> Iterator[list[Row]]:
    """Rows of every case, one list a case. Raises WrongResult before a wrong variant is timed."""
    where = machine(settings.device, settings.commit)
    host = torch.device("cpu")
    for num_examples in NUM_EXAMPLES[settings.scale]:
        if settings.has_time():
            case = distances_case(num_examples, settings.device)
            timings = measure(case, settings.device, seconds=settings.seconds, min_rounds=settings.min_rounds)
            yield op_rows(case, timings, where, None)
    for num_candidates in NUM_CANDIDATES[settings.scale]:
        if settings.has_time():
            case = selection_case(num_candidates)
            timings = measure(case, host, seconds=settings.seconds, min_rounds=settings.min_rounds)
            yield op_rows(case, timings, machine(host, settings.commit), None)
