"""What a target plan would leave out of some batches, counted by hand."""

import pytest
import torch

from dropbp_kernels.target_share import TargetShare, count_targets
from dropbp_kernels.targets import IGNORED as X

pytestmark = pytest.mark.usefixtures("turns_apart")


def test_rows_by_hand():
    batch = {"labels": torch.tensor([[X, X, X, 7, 8, X], [X, 6, 7, X, X, X]]), "input_ids": torch.zeros(2, 6)}
    share = count_targets([batch])
    # Contexts of 2 and 0 rows are padded to 2, targets are 2 and 2; what follows does not run.
    assert share == TargetShare(1, num_rows=12, num_targets=4, forward_rows=8, backward_rows=4, num_passes=2)
    assert (share.targets, share.forward, share.backward, share.passes) == (4 / 12, 8 / 12, 4 / 12, 2)
    assert share.step_time(1.0) == pytest.approx((8 + 4) / 24)
    assert share.step_time(2.0) == pytest.approx((8 + 2 * 4) / 36)


def test_all_tokens_targets_cost_what_undropped_costs():
    share = count_targets([{"labels": torch.arange(12).reshape(2, 6)}] * 3)
    assert (share.num_batches, share.forward, share.backward, share.passes) == (3, 1.0, 1.0, 1.0)
    assert share.targets == 10 / 12  # the last token of a sample predicts nothing
    assert share.step_time(1.0) == share.step_time(3.0) == 1.0


def test_a_collators_padding_and_packing_are_planned():
    labels = torch.tensor([[X, X, 5, X, X, 6]])
    packed = count_targets([{"labels": labels, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}])
    assert (packed.num_passes, packed.forward_rows, packed.backward_rows) == (2, 4, 2)
    padded = count_targets([{"labels": labels, "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}])
    assert (padded.num_passes, padded.forward_rows, padded.backward_rows) == (3, 4, 2)  # no context is left of 5's row


def test_bad_batches():
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        count_targets([])
    with pytest.raises(ValueError, match="expected labels in each of them, got input_ids"):
        count_targets([{"input_ids": torch.zeros(1, 2)}])
    with pytest.raises(ValueError, match="labels: expected shape"):
        count_targets([{"labels": torch.zeros(3, dtype=torch.int64)}])
