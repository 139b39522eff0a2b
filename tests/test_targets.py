"""The target plan of a batch: which rows run, in which stages, and that each runs after all that it sees."""

import pytest
import torch
from hypothesis import given, settings
from target_cases import batches

from dropbp_kernels.targets import IGNORED as X
from dropbp_kernels.targets import plan_targets

pytestmark = pytest.mark.usefixtures("turns_apart")


def rows_of(stage):
    return [rows[real].tolist() for rows, real in zip(stage.rows, stage.is_row, strict=True)]


def test_a_prompt_and_its_completion_by_hand():
    plan = plan_targets(torch.tensor([[X, X, X, 7, 8], [X, X, 6, 7, X]]))
    assert [(stage.is_target, rows_of(stage)) for stage in plan.stages] == [
        (False, [[0, 1], [0]]),  # the last prompt token predicts the first target
        (True, [[2, 3], [1, 2]]),
    ]
    assert plan.shift_labels.tolist() == [[X, X, 7, 8, X], [X, 6, 7, X, X]]
    assert (plan.num_context, plan.num_target, plan.num_skipped) == (3, 4, 3)
    assert not plan.is_dense
    assert [stage.is_prefix for stage in plan.stages] == [True, False]
    assert [stage.num_rows for stage in plan.stages] == [tuple(stage.is_row.sum(1).tolist()) for stage in plan.stages]
    left = plan_targets(
        torch.tensor([[X, X, X, 7, 8], [X, X, X, 7, 8]]), torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    )
    assert not left.stages[0].is_prefix
    places = torch.tensor([[0, 1, 0, 1, 2]])
    assert not plan_targets(torch.tensor([[X, 7, X, X, 8]]), position_ids=places).stages[0].is_prefix  # two documents


def test_turns_run_in_their_order():
    plan = plan_targets(torch.tensor([[X, X, 5, 6, X, X, 7, X]]))
    assert [rows_of(stage) for stage in plan.stages] == [[[0]], [[1, 2]], [[3, 4]], [[5]]]
    assert [stage.is_target for stage in plan.stages] == [False, True, False, True]


def test_documents_of_a_packed_sequence_run_side_by_side():
    labels = torch.tensor([[X, X, 5, X, X, 6]])
    plan = plan_targets(labels, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    assert [rows_of(stage) for stage in plan.stages] == [[[0, 3]], [[1, 4]]]
    assert plan.documents.tolist() == [[0, 0, 0, 1, 1, 1]]
    assert len(plan_targets(labels).stages) == 4  # one document: the second context sees the first target


def test_samples_without_a_target_and_padding_do_not_run():
    labels = torch.tensor([[X, X, X, X], [X, X, X, 3]])
    plan = plan_targets(labels, attention_mask=torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]))
    assert [rows_of(stage) for stage in plan.stages] == [[[], [1]], [[], [2]]]
    assert (plan.num_context, plan.num_target, plan.num_skipped) == (1, 1, 5)


def test_loss_on_all_tokens_is_dense():
    assert plan_targets(torch.tensor([[4, 5, 6], [7, 8, 9]])).is_dense
    assert not plan_targets(torch.tensor([[4, 5, 6], [X, X, X]])).is_dense
    assert not plan_targets(torch.tensor([[X, 5, X], [X, X, 9]])).is_dense
    assert not plan_targets(torch.tensor([[4, 5, 6, 7, 8], [8, 9, 3, X, X]])).is_dense  # no context, and rows that skip


def test_gather_takes_the_rows_of_a_stage():
    stage = plan_targets(torch.tensor([[X, X, X, 7, 8], [X, X, 6, 7, X]])).stages[1]
    values = torch.arange(20).reshape(2, 5, 2)
    assert stage.gather(values).tolist() == [[[4, 5], [6, 7]], [[12, 13], [14, 15]]]


def test_kept_context_runs_once_more_with_the_targets_that_follow():
    labels = torch.tensor([[X, X, X, X, 7, X, X, 8]])
    plan = plan_targets(labels, context_keep=0.5, seed=3)
    before, kept = rows_of(plan.stages[1])[0], plan.num_again
    assert [rows_of(stage)[0] for stage in plan.stages[::2]] == [[0, 1, 2], [4, 5]]  # all context runs as before
    assert kept == sum(len(rows_of(stage)[0]) for stage in plan.stages[1::2]) - 2 in (2, 3)
    assert before == [*sorted(before[:-1]), 3]
    assert [stage.of_targets(stage.rows).tolist() for stage in plan.stages[1::2]] == [[[3]], [[6]]]
    assert plan.head_rows[0].tolist() == [[3, 6]]


def test_kept_context_is_a_share_and_a_function_of_seed_and_step():
    labels = torch.full((4, 100), X)
    labels[:, -10:] = 5

    def kept(**options):
        stage = plan_targets(labels, context_keep=0.1, **options).stages[1]
        return [rows[:-10] for rows in rows_of(stage)]

    first = kept(seed=1, step=2)
    assert sum(map(len, first)) in (35, 36)  # of 4 * 89
    assert len(set(map(tuple, first))) == 4
    assert first == kept(seed=1, step=2)
    assert first != kept(seed=1, step=3) != kept(seed=2, step=3)
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    kept(seed=1, step=2)
    assert torch.equal(torch.rand(1), expected)


def test_rows_come_back_at_their_places():
    plan = plan_targets(torch.tensor([[X, X, X, 7, 8], [X, 5, X, 7, X]]))
    assert plan.to_places(torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 4.0]]), 5).tolist() == [
        [0, 0, 1, 2, 0],
        [3, 0, 4, 0, 0],
    ]
    one = plan_targets(torch.tensor([[X, X, X, 7, 8], [X, 5, X, X, X]]))  # a padded row must not touch place 0
    assert one.to_places(torch.tensor([[True, True], [True, True]]), 4).tolist() == [[0, 0, 1, 1], [1, 0, 0, 0]]


@settings(max_examples=300, deadline=None)
@given(batches())
def test_every_row_runs_after_all_that_it_sees(batch):
    labels, mask, position_ids = batch
    plan = plan_targets(labels, mask, position_ids)
    stage_of = torch.full_like(labels, -1)
    for number, stage in enumerate(plan.stages):
        for sample, rows in enumerate(rows_of(stage)):
            assert rows == sorted(rows)
            for row in rows:
                assert stage_of[sample, row] == -1
                stage_of[sample, row] = number
                assert stage.is_target == (plan.shift_labels[sample, row] != X)
    for sample in range(labels.shape[0]):
        for row in range(labels.shape[1]):
            is_real = mask is None or bool(mask[sample, row])
            same = plan.documents[sample] == plan.documents[sample, row]
            has_target = bool(((plan.shift_labels[sample] != X) & same)[row:].any())
            assert (stage_of[sample, row] >= 0) == (is_real and has_target)
            if stage_of[sample, row] >= 0:
                seen = [k for k in range(row + 1) if same[k] and (mask is None or mask[sample, k])]
                assert all(0 <= stage_of[sample, k] <= stage_of[sample, row] for k in seen)
    assert plan.num_target == int((plan.shift_labels != X).sum())


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (torch.zeros(4, dtype=torch.long), {}, r"labels: expected shape \(batch, seq_len\), got \(4,\)"),
        (
            torch.zeros(2, 4, dtype=torch.long),
            {"attention_mask": torch.ones(2, 5)},
            r"attention_mask: expected labels' shape \(2, 4\), got \(2, 5\)",
        ),
        (
            torch.tensor([[1, 2, 3]]),
            {"attention_mask": torch.tensor([[0, 1, 1]])},
            "in sample 0 the padding at place 0 predicts label 2",
        ),
    ],
)
def test_bad_input(labels, options, message):
    with pytest.raises(ValueError, match=message):
        plan_targets(labels, **options)


def test_slices_count_the_rows_that_they_hold():
    plan = plan_targets(torch.tensor([[X, X, X, X, X, 7, 8], [X, X, 7, X, X, X, X]]))
    slices = plan.with_slices(4).stages[:-1]
    assert [stage.num_rows for stage in slices] == [(2, 1), (2, 0)]
    for stage in slices:
        assert stage.num_rows == tuple(stage.is_row.sum(1).tolist())
        assert stage.padded_share == pytest.approx(1 - stage.is_row.float().mean().item())
        assert stage.real_rows().tolist() == stage.is_row.flatten().nonzero().flatten().tolist()


def test_a_share_of_the_context_that_is_not_whole_is_rounded_anew_in_each_step():
    labels = torch.tensor([[X, X, X, X, X, X, 8]])  # five rows of context
    assert {plan_targets(labels, context_keep=0.5, step=step).num_again for step in range(20)} == {2, 3}
