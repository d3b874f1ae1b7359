"""Scores of targets that are not one class, against scikit-learn and loops."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, jaccard_score, r2_score

from cl_lightning.measures.scores import ExplainedVariance, MeanAveragePrecision, MeanIoU

CLASSES = torch.tensor([[True, True, False, False], [False, False, True, True]])
DOMAINS = torch.ones(2, 4, dtype=torch.bool)


def fed(metric, *rows, parts=3):
    for piece in zip(*(part.chunk(parts) for part in rows), strict=True):
        metric.update(*piece)
    return metric.compute()


def test_mean_average_precision_of_the_classes_of_each_task():
    random = np.random.default_rng(0)
    scores, labels = random.normal(size=(50, 4)), random.integers(0, 2, (50, 5))
    tasks = torch.arange(50) % 2
    rows = torch.tensor(scores), torch.tensor(labels, dtype=torch.int8), tasks
    each = [average_precision_score(labels[:, c], scores[:, c]) for c in range(4)]
    found = fed(MeanAveragePrecision(CLASSES), *rows)
    assert found.accuracy.tolist() == pytest.approx([np.mean(each[:2]), np.mean(each[2:])], abs=1e-6)
    assert found.totals.tolist() == [2, 2]
    assert found.task_aware.isnan().all()
    found = fed(MeanAveragePrecision(DOMAINS), *rows)
    own = [average_precision_score(labels[1::2, c], scores[1::2, c]) for c in range(4)]
    assert float(found.accuracy[0]) == pytest.approx(np.mean(each), abs=1e-6)  # it brought the classes
    assert float(found.accuracy[1]) == pytest.approx(np.mean(own), abs=1e-6)
    assert found.average() == pytest.approx((4 * np.mean(each) + 4 * np.mean(own)) / 8, abs=1e-6)


def test_classes_without_positive_samples_and_unknown_labels_are_left_out():
    scores = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.0, 2.0]])
    labels = torch.tensor([[0, 0], [1, 0], [-1, 0]], dtype=torch.int8)
    found = fed(MeanAveragePrecision(torch.tensor([[True, True]])), scores, labels, torch.zeros(3, dtype=torch.int64))
    assert found.accuracy.tolist() == [0.5]
    assert found.totals.tolist() == [1]


def test_intersection_over_union_of_the_classes_of_each_task():
    random = np.random.default_rng(1)
    outputs, masks = torch.tensor(random.normal(size=(12, 4, 3, 3))), torch.tensor(random.integers(0, 4, (12, 3, 3)))
    masks[0, 0] = 255
    tasks = torch.arange(12) % 2
    predicted, valid = outputs.argmax(1), masks != 255
    each = jaccard_score(masks[valid], predicted[valid], average=None)
    found = fed(MeanIoU(CLASSES), outputs, masks.byte(), tasks)
    assert found.accuracy.tolist() == pytest.approx([each[:2].mean(), each[2:].mean()])
    assert found.totals.tolist() == [2, 2]
    found = fed(MeanIoU(DOMAINS), outputs, masks.byte(), tasks)
    rows = valid & (tasks == 1)[:, None, None]
    own = jaccard_score(masks[rows], predicted[rows], average=None)
    assert found.accuracy.tolist() == pytest.approx([each.mean(), own.mean()])


def test_a_class_that_neither_occurs_nor_is_predicted_is_left_out_and_later_classes_too():
    outputs = torch.zeros(1, 4, 2, 2)
    outputs[:, 0] = 1
    masks = torch.tensor([[[0, 1], [0, 9]]], dtype=torch.uint8)  # class 9 has no logit yet
    found = fed(MeanIoU(CLASSES), outputs, masks, torch.zeros(1, dtype=torch.int64), parts=1)
    assert found.accuracy.tolist()[0] == pytest.approx((2 / 3 + 0) / 2)
    assert found.accuracy[1].isnan()
    assert found.totals.tolist() == [2, 0]


def test_explained_variance_of_each_task():
    random = np.random.default_rng(2)
    true, predicted = random.normal(3, 2, 40), random.normal(3, 2, 40)
    tasks = np.arange(40) % 2
    one = torch.ones(3, 1, dtype=torch.bool)
    found = fed(ExplainedVariance(one), *map(torch.tensor, (predicted[:, None], true, tasks)))
    expected = [r2_score(true[tasks == task], predicted[tasks == task]) for task in (0, 1)]
    assert found.accuracy[:2].tolist() == pytest.approx(expected)
    assert found.accuracy[2].isnan()
    assert found.totals.tolist() == [20, 20, 0]
    constant = fed(ExplainedVariance(one[:1]), torch.rand(5, 1), torch.full((5,), 7.0), torch.zeros(5).long(), parts=1)
    assert constant.accuracy.isnan().all()
    assert constant.average() == 0.0
