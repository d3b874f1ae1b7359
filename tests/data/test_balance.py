"""Classes of unequal size: weights by class and task, and the order in which classes are equally frequent."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cl_lightning.data import Plan
from cl_lightning.data.balance import balanced_order, balanced_subset, check_class_weights, class_weight_table, left_out
from cl_lightning.losses import cross_entropy, masked_logits
from cl_lightning.stream import ClassIncremental, DatasetInfo, LabelFraction

NAMES = ("a", "b", "c", "d")
LABELS = np.repeat([0, 1, 2, 3], [2, 6, 3, 9])


def stream(order: object = "natural", fraction: float | None = None):
    info = DatasetInfo(train_labels=LABELS, test_labels=np.arange(4), class_names=NAMES)
    scenario = ClassIncremental(tasks=2, class_order=order)
    return (scenario if fraction is None else LabelFraction(scenario, fraction))(info, seed=0)


def test_balanced_weights_are_inverse_to_the_size_of_the_class_with_mean_one_in_its_task():
    table = class_weight_table("x", "balanced", stream(), LABELS, NAMES)
    torch.testing.assert_close(table, torch.tensor([[8 / 4, 8 / 12, 1, 1], [1, 1, 12 / 6, 12 / 18]]))
    made = stream([3, 0, 2, 1])
    table = class_weight_table("x", "balanced", made, LABELS, NAMES)
    torch.testing.assert_close(table[0, :2], torch.tensor([11 / 18, 11 / 4]))  # columns of 3 and 0
    for task, indices in enumerate(made.train):
        assert table[task][made.columns_of(LABELS[indices])].mean() == pytest.approx(1)


def test_hidden_labels_do_not_count():
    made = stream(fraction=0.5)
    table = class_weight_table("x", "balanced", made, LABELS, NAMES)
    for task, (indices, hidden) in enumerate(zip(made.train, made.unlabelled, strict=True)):
        columns = made.columns_of(LABELS[np.setdiff1d(indices, hidden)])
        counts = np.bincount(columns, minlength=4)
        for column in set(columns.tolist()):
            assert table[task, column] == pytest.approx(len(columns) / (len(set(columns.tolist())) * counts[column]))


def test_weights_that_are_given_belong_to_names():
    made = stream([3, 0, 2, 1])
    by_list = class_weight_table("x", [1.0, 2.0, 3.0, 4.0], made, LABELS, NAMES)
    assert by_list.tolist() == [[4, 1, 3, 2]] * 2  # in the order of columns
    assert class_weight_table("x", {"b": 2.0, "d": 0.0}, made, LABELS, NAMES).tolist() == [[0, 1, 1, 2]] * 2
    with pytest.raises(ValueError, match=r"x: class_weights has 3 numbers; give one per class, 4"):
        class_weight_table("x", [1.0] * 3, made, LABELS, NAMES)
    with pytest.raises(ValueError, match="x: class_weights names 'z', which is no class; classes are a, b, c, d"):
        class_weight_table("x", {"z": 1.0}, made, LABELS, NAMES)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("equal", "class_weights is 'equal'; use 'balanced'"),
        ([1.0, -1.0], "class_weights of 1 is -1.0; give a finite number of at least 0"),
        ({"a": float("inf")}, "class_weights of 'a' is inf"),
        ([0.0, 0.0], "class_weights has no weight above 0"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        check_class_weights("x", weights)


def test_weighted_cross_entropy_is_the_sum_of_weighted_terms_over_the_rows():
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels, of_class = torch.tensor([0, 1, 2, 3, -1, 2]), torch.tensor([0.5, 1, 2, 4], dtype=torch.float64)
    weights = of_class[labels.clamp(min=0)]
    loss = cross_entropy(logits, labels, weights=weights)
    expected = F.cross_entropy(logits, labels, weight=of_class, ignore_index=-1, reduction="sum") / 5
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(cross_entropy(logits, labels, weights=torch.ones(6)), cross_entropy(logits, labels))
    masked, smooth = masked_logits(logits, torch.tensor([True, True, True, True])), 0.3
    whole = cross_entropy(masked, labels, label_smoothing=smooth, weights=weights)
    rows = [
        cross_entropy(masked[i : i + 1], labels[i : i + 1], label_smoothing=smooth) * weights[i]
        for i in range(6)
        if labels[i] >= 0
    ]
    torch.testing.assert_close(whole, sum(rows) / 5)


def test_an_epoch_has_all_classes_and_the_samples_of_a_class_equally_often():
    columns = torch.tensor([0] * 2 + [1] * 7 + [2] * 11 + [-1] * 3)
    order = balanced_order(columns, torch.Generator().manual_seed(1))
    assert len(order) == len(columns)
    times = torch.bincount(order, minlength=len(columns))
    assert sorted(times[columns == c].sum().item() for c in range(3)) == [6, 7, 7]
    for column in range(3):
        assert times[columns == column].max() - times[columns == column].min() <= 1
    assert times[columns == -1].tolist() == [1, 1, 1]
    assert not order.equal(balanced_order(columns, torch.Generator().manual_seed(2)))


def test_classes_of_one_size_are_shuffled_once_each():
    for columns in (torch.arange(12) % 3, torch.full((5,), -1), torch.zeros(0, dtype=torch.int64)):
        order = balanced_order(columns, torch.Generator().manual_seed(0))
        assert sorted(order.tolist()) == list(range(len(columns)))


def test_a_balanced_plan_is_the_same_from_any_step_and_on_any_number_of_processes():
    columns = torch.tensor([0] * 3 + [1] * 20)
    options = {"batch_size": 5, "key": 7, "columns": columns}
    single = list(Plan(torch.arange(23) + 100, columns, **options).epoch(2))
    parts = [list(Plan(torch.arange(23) + 100, columns, rank=rank, world=2, **options).epoch(2)) for rank in range(2)]
    for rows, *shares in zip(single, *parts, strict=True):
        assert torch.cat([share.indices for share in shares]).equal(rows.indices)
        assert (rows.indices < 103).long().equal(1 - rows.tasks)
    late = next(Plan(torch.arange(23) + 100, columns, **options).epoch(2, first=3))
    assert late.indices.equal(single[3].indices)
    everything = torch.cat([rows.tasks for rows in single])
    assert abs(int((everything == 0).sum()) - int((everything == 1).sum())) == 1


def test_a_balanced_subset_has_as_many_samples_of_each_class_as_the_smallest():
    labels = torch.tensor([0] * 5 + [2] * 3 + [-1] * 4 + [3] * 9)
    counts, totals = [], torch.zeros(len(labels))
    for key in range(200):
        mask = balanced_subset(labels, key)
        counts.append(labels[mask].bincount(minlength=4).tolist())
        totals += mask
    assert counts == [[3, 0, 3, 3]] * 200
    assert torch.equal(balanced_subset(labels, 7), balanced_subset(labels, 7))
    assert not totals[8:12].any()
    # each sample of class 3 with probability 1/3: a standard deviation of 6.7 around 66.7
    assert totals[12:].min() > 40
    assert totals[12:].max() < 93
    assert not balanced_subset(torch.tensor([-1, -1]), 0).any()


def test_a_share_of_each_class_is_left_out_at_random():
    labels = torch.tensor([2] * 10 + [0] * 7 + [5] * 3)
    masks = torch.stack([left_out(labels, 0.3, key) for key in range(200)])
    assert all(labels[mask].bincount(minlength=6).tolist() == [2, 0, 3, 0, 0, 0] for mask in masks)
    assert masks[:, :10].sum(0).min() > 30  # 60 each are expected
    assert not left_out(labels, 0.0, 1).any()
    assert int(left_out(torch.zeros(500, dtype=torch.int64), 0.2, 0).sum()) == 100  # no rounding of 0.2 * 500
    assert len(left_out(labels[:0], 0.5, 0)) == 0
