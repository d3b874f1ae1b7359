"""Rows that are trained in a task and consolidated at its end (CWR*)."""

import pytest
import torch
from support.fakes import normal

from cl_lightning.models import ConsolidatedHead, consolidate

F, T = False, True


def filled(*sizes: int, d: int = 3) -> ConsolidatedHead:
    head = ConsolidatedHead(d)
    for size in sizes:
        head.grow(size)
    return head.double()


def train(head: ConsolidatedHead, seed: int) -> torch.Tensor:
    """Set the temporary rows to random numbers, as training does."""
    rows = normal(head.num_columns, head.num_features, seed=seed)
    with torch.no_grad():
        for block, own in zip(head.blocks, rows.split(head.block_sizes()), strict=True):
            block.weight.copy_(own)
    return rows


def test_the_consolidated_rows_worked_out_by_hand():
    old = torch.tensor([[1.0, 2.0], [5.0, 5.0]], dtype=torch.float64)
    new = torch.tensor([[3.0, 1.0], [0.0, 8.0]], dtype=torch.float64)  # the mean of all entries is 3
    found = consolidate(old, new, torch.tensor([36, 0]), torch.tensor([4, 7]))
    # r = sqrt(36 / 4) = 3 and 0: ((3 * 1 + 0) / 4, (3 * 2 - 2) / 4) and (-3, 5)
    expected = torch.tensor([[0.75, 1.0], [-3.0, 5.0]], dtype=torch.float64)
    assert torch.equal(found, expected)


def test_a_new_class_has_rows_of_mean_zero_and_equal_counts_give_the_average():
    old, new, counts = normal(4, 5), normal(4, 5, seed=1), torch.full((4,), 9)
    fresh = consolidate(old, new, torch.zeros(4), counts)
    torch.testing.assert_close(fresh, new - new.mean())
    torch.testing.assert_close(fresh.mean(), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(consolidate(old, new, counts, counts), (old + new - new.mean()) / 2)


def test_rows_of_absent_classes_are_unchanged_and_their_temporary_rows_are_reset():
    head = filled(2, 1)
    head.begin(torch.tensor([T, T, F]))
    first = train(head, 1)
    head.end(torch.tensor([4, 4, 0]))
    torch.testing.assert_close(head.consolidated[:2], first[:2] - first[:2].mean())
    assert torch.equal(head.consolidated[2], torch.zeros(3).double())
    before = head.consolidated.clone()
    head.begin(torch.tensor([F, T, T]))
    assert torch.equal(head.weight(), torch.stack([0 * before[0], before[1], 0 * before[2]]))
    second = train(head, 2)
    head.end(torch.tensor([0, 1, 5]))
    assert torch.equal(head.consolidated[0], before[0])
    mean = second[1:].mean()
    torch.testing.assert_close(head.consolidated[1], (2 * before[1] + second[1] - mean) / 3)  # sqrt(4 / 1) = 2
    torch.testing.assert_close(head.consolidated[2], second[2] - mean)
    assert head.past.tolist() == [4, 5, 5]


def test_a_class_of_the_task_without_samples_is_left_out():
    head = filled(3)
    head.begin(torch.tensor([T, T, T]))
    rows = train(head, 1)
    head.end(torch.tensor([2, 0, 3]))
    kept = rows[[0, 2]]
    torch.testing.assert_close(head.consolidated[[0, 2]], kept - kept.mean())
    assert not head.consolidated[1].any()
    head.begin(torch.tensor([F, T, F]))
    assert not head.weight().any()


def test_training_has_the_temporary_rows_and_predictions_the_consolidated_ones():
    head, features = filled(2, 2), normal(5, 3)
    head.begin(torch.tensor([T, T, F, F]))
    train(head, 1)
    head.end(torch.tensor([4, 4, 0, 0]))
    kept = head.consolidated.clone()
    torch.testing.assert_close(head.classify(features), features @ kept.T)
    head.begin(torch.tensor([F, F, T, T]))
    rows = train(head, 2)
    torch.testing.assert_close(head(features), features @ rows.T)
    shown = torch.cat([kept[:2], rows[2:] - rows[2:].mean()])
    torch.testing.assert_close(head.classify(features), features @ shown.T)
    head.end(torch.tensor([0, 0, 4, 4]))
    torch.testing.assert_close(head.classify(features), features @ shown.T)  # all its classes were new


def test_a_state_restores_shape_and_counts():
    head = filled(2, 1)
    head.begin(torch.tensor([T, F, T]))
    train(head, 1)
    head.end(torch.tensor([3, 0, 2]))
    fresh = ConsolidatedHead(3)
    fresh.load_state_dict(head.state_dict())
    assert fresh.block_sizes() == [2, 1]
    assert fresh.past.tolist() == [3, 0, 2]
    torch.testing.assert_close(fresh.consolidated, head.consolidated.float())


@pytest.mark.parametrize("method", ["forward", "classify"])
def test_without_classes_there_are_no_logits(method):
    assert getattr(ConsolidatedHead(3), method)(torch.zeros(4, 3)).shape == (4, 0)
