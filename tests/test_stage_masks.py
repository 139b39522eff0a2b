"""Who attends to whom between the stages of a target plan, by hand."""

import torch

from dropbp_kernels.stage_masks import StageMasks
from dropbp_kernels.targets import plan_targets

X = -100


def masks_of(plan):
    """The mask of every stage, as lists of 0 and 1 by sample; None where causal."""
    masks, found = StageMasks(plan.documents), []
    for stage in plan.stages:
        masks.add(stage)
        found.append(None if masks.is_causal else masks.mask()[:, 0].int().tolist())
    return masks, found


def test_padding_is_seen_by_itself_only():
    plan = plan_targets(torch.tensor([[X, X, 3, 4, X], [X, X, X, 4, X]]))
    masks, (context, targets) = masks_of(plan)
    assert context is None  # causal does: no row sees what stands on its right
    first = StageMasks(plan.documents)
    first.add(plan.stages[0])
    assert first.mask()[:, 0].int().tolist() == [
        [[1, 0], [0, 1]],  # row 0 and its padding
        [[1, 0], [1, 1]],  # rows 0 and 1
    ]
    assert targets == [
        [[1, 0, 1, 0], [1, 0, 1, 1]],  # rows 1 and 2 see row 0, not its padding
        [[1, 1, 1, 0], [0, 0, 0, 1]],  # row 2 sees rows 0 to 2
    ]
    assert masks.is_row().int().tolist() == [[1, 0, 1, 1], [1, 1, 1, 0]]
    assert masks_of(plan_targets(torch.tensor([[X, 3, X], [X, X, X]])))[0].mask().int().tolist() == [[[[1]]], [[[1]]]]


def test_the_first_rows_of_one_document_are_causal():
    assert masks_of(plan_targets(torch.tensor([[X, X, 3], [X, X, 4]])))[1] == [None, [[[1, 1]], [[1, 1]]]]


def test_a_window_counts_places_and_not_keys():
    plan = plan_targets(torch.tensor([[X, X, 3, X, X, 4]]), context_keep=1.0, turns="apart")
    masks, _ = masks_of(plan)
    assert [stage.rows.tolist() for stage in plan.stages] == [[[0]], [[0, 1]], [[2, 3]], [[2, 3, 4]]]
    # Of rows that ran twice the first run is not seen any more.
    assert masks.mask()[0, 0].int().tolist() == [
        [0, 1, 1, 0, 0, 1, 0, 0],
        [0, 1, 1, 0, 0, 1, 1, 0],
        [0, 1, 1, 0, 0, 1, 1, 1],
    ]
    assert masks.mask(window=3)[0, 0].int().tolist() == [
        [0, 1, 1, 0, 0, 1, 0, 0],
        [0, 0, 1, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 1, 1],
    ]


def test_documents_of_a_packed_sequence_do_not_see_each_other():
    plan = plan_targets(torch.tensor([[X, X, 3, X, X, 4]]), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    # Keys at places 0 and 3, then 1 and 4.
    assert masks_of(plan)[1] == [[[[1, 0], [0, 1]]], [[[1, 0, 1, 0], [0, 1, 0, 1]]]]


def test_of_a_shared_context_only_what_runs_is_masked():
    tokens = torch.tensor([[1, 2, 5, 6], [1, 2, 7, 8], [1, 9, 9, 9]])
    plan = plan_targets(torch.tensor([[X, X, X, 3], [X, X, X, 4], [X, X, 5, X]]))
    plan = plan.with_shared_context(tokens, torch.arange(4).unsqueeze(0))
    masks = StageMasks(plan.documents)
    masks.add(plan.stages[0])
    by_sample = dict(zip(plan.stages[0].samples.tolist(), masks.mask()[:, 0].int().tolist(), strict=True))
    assert by_sample == {0: [[1, 0], [1, 1]], 2: [[1, 0], [0, 1]]}
    assert masks.is_row().sum() == 3
    masks.add(plan.stages[1])
    assert masks.mask()[:, 0].int().tolist() == [[[1, 1, 1]], [[1, 1, 1]], [[1, 0, 1]]]
