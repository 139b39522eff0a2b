"""l1_distances: sums of absolute differences of all pairs of rows."""

import pytest
import torch
from inputs import LAYOUTS, make
from tolerances import assert_as_exact

from dropbp_kernels import reference
from dropbp_kernels.measure import PeakLiveBytes
from dropbp_kernels.ops import l1_distances

# NumPy, in Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

raw = torch.ops.dropbp_kernels


def check(features):
    exact = (features.double()[:, None] - features.double()[None, :]).abs().sum(-1)
    wide = features if features.dtype == torch.float64 else features.float()
    distances = raw.l1_distances(features)
    magnitude = exact.max().item() if exact.numel() else 0.0
    assert_as_exact(distances, torch.cdist(wide, wide, p=1.0), exact, "distances", magnitude)
    assert torch.equal(distances, distances.t())
    assert not distances.diagonal().any()


@pytest.mark.parametrize("op", [reference.l1_distances_reference, raw.l1_distances])
def test_by_hand(op):
    features = torch.tensor([[1.0, 2.0], [4.0, -2.0], [1.5, 2.0]])
    assert op(features).tolist() == [[0.0, 7.0, 0.5], [7.0, 0.0, 6.5], [0.5, 6.5, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(33, 63), (8, 64), (7, 1023), (1, 5), (4, 1), (3, 0), (0, 5)])
def test_matches_float64(backend, device, poisoned, shape, dtype):
    check(make(shape, dtype, device=device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(backend, device, layout):
    check(make((9, 20), torch.float32, layout, device))


def test_several_tiles(backend, device, in_chunks):
    check(make((21, 37), torch.float32, device=device))


def test_infinite_and_missing_numbers_stay_in_their_rows(backend, device):
    features = torch.zeros(6, 20, device=device)
    features[1, 3], features[4, 19] = float("inf"), float("nan")
    distances = raw.l1_distances(features)
    assert distances[1, [0, 2, 3, 5]].isinf().all()
    assert distances[4].isnan().all()
    assert not distances[[0, 2, 3, 5]][:, [0, 2, 3, 5]].any()


def test_threads_and_runs_change_no_bit(backend, device):
    features = make((21, 70), torch.float32, device=device)
    expected, num_threads = raw.l1_distances(features), torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(raw.l1_distances(features), expected)
        finally:
            torch.set_num_threads(num_threads)
    assert torch.equal(raw.l1_distances(features[:9]), expected[:9, :9])  # nor does who else is there


def test_allocates_the_result_alone(backend, device):
    features = make((40, 70), torch.float32, device=device)
    with PeakLiveBytes() as live:
        distances = l1_distances(features)
    assert live.peak_bytes == distances.nbytes


def test_has_no_gradient(backend, device):
    assert not l1_distances(torch.randn(3, 4, device=device, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"features: expected shape \(B, h\), got \(3,\)"),
        (torch.zeros(2, 3, 4), ValueError, r"features: expected shape \(B, h\), got \(2, 3, 4\)"),
        (torch.zeros(3, 4).int(), TypeError, r"features: expected dtype float32, .* got torch\.int32"),
    ],
)
def test_bad_input(features, error, message):
    with pytest.raises(error, match=message):
        l1_distances(features)
