"""Targets that are not one class: what a strategy sees of them."""

import numpy as np
import pytest
import torch

from cl_lightning.batch import Draw
from cl_lightning.data import RandomCrop, RandomHorizontalFlip, Targets, TensorSource
from cl_lightning.data.targets import TargetTable, with_masks
from cl_lightning.data.transforms import Compose, Context

MASKS = np.array([[[0, 1], [2, 255]], [[3, 3], [0, 2]], [[255, 0], [0, 0]]])


def test_labels_become_columns_and_those_of_other_tasks_are_not_known():
    sets = np.array([[1, 0, 1], [0, 1, 0]])
    targets = Targets("labels", sets, 3)
    assert targets.labels().tolist() == [0, 1]
    columns = torch.tensor([[True, True, False], [False, False, True]])
    table = TargetTable(targets, [2, 0, 1], columns)
    rows = torch.tensor([0, 1, 0])
    assert table(rows, torch.tensor([0, 0, 1])).tolist() == [[1, 1, -1], [0, 0, -1], [-1, -1, 0]]
    assert TargetTable(targets, [2, 0, 1], None)(rows, rows).tolist() == [[1, 1, 0], [0, 0, 1], [1, 1, 0]]
    assert table(rows, rows.clamp(max=1)).dtype == torch.int8


def test_pixels_of_other_tasks_are_background_and_those_without_annotation_stay():
    targets = Targets("pixels", MASKS, 4)
    assert targets.labels().tolist() == [1, 2, 0]
    assert targets.sets.tolist() == [[True, True, True, False], [True, False, True, True], [True, False, False, False]]
    columns = torch.tensor([[True, True, False, False], [True, False, True, True]])
    table = TargetTable(targets, [0, 2, 1, 3], columns)
    rows = torch.tensor([0, 1, 0])
    found = table(rows, torch.tensor([0, 1, 1]))
    assert found.dtype == torch.uint8
    assert found.tolist() == [[[0, 0], [1, 255]], [[3, 3], [0, 0]], [[0, 2], [0, 255]]]
    assert TargetTable(targets, [0, 2, 1, 3], None)(rows[:1], rows[:1]).tolist() == [[[0, 2], [1, 255]]]


def test_numbers_are_standardised():
    targets = Targets("number", np.array([[1.0], [4.0]]), 1)
    assert TargetTable(targets, [0], None, (2.0, 4.0))(torch.tensor([1, 0]), torch.zeros(2)).tolist() == [0.5, -0.25]
    assert targets.labels().tolist() == [0, 0]
    assert targets.sets is None
    assert targets.select(np.array([1])).values.tolist() == [4.0]


def test_masks_follow_their_images_and_the_outside_is_not_annotated():
    masks = torch.arange(16, dtype=torch.uint8).view(1, 4, 4).repeat(64, 1, 1)
    images = (masks[:, None] + 1).repeat(1, 3, 1, 1)
    draw = Draw.of(64, 5)
    context = Context(torch.arange(64), 0)
    moved, followed = with_masks(Compose([RandomHorizontalFlip(), RandomCrop(padding=2)]), images, masks, draw, context)
    outside = moved[:, 0] == 0
    assert outside.any()
    assert torch.equal(followed[~outside], moved[:, 0][~outside] - 1)
    assert (followed[outside] == 255).all()
    assert not torch.equal(moved, images)


def test_digests_depend_on_the_targets():
    targets = Targets("pixels", MASKS, 4)
    assert targets.digest(np.array([0])) != targets.digest(np.array([1]))
    assert targets.digest(np.array([0])) == Targets("pixels", MASKS[:1], 4).digest(np.array([0]))


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("labels", np.array([[1, 2]]), "not 0 and 1 alone"),
        ("labels", np.array([[1, 0], [0, 0]]), "sample 1 has no label"),
        ("labels", np.array([1, 0]), r"give 0 and 1 of shape \(N, 2\)"),
        ("number", np.array([1.0, np.nan]), "target of sample 1 is nan"),
        ("number", np.zeros((2, 2)), "give a number each|one number per sample"),
        ("pixels", np.array([[[0, 2]]]), "mask of sample 0 has the class 2; allowed are 0 .. 1"),
        ("pixels", np.array([[[0, -1]]]), "has the class -1"),
        ("pixels", np.array([[[255, 255]]]), "no annotated pixel"),
        ("pixels", np.zeros((1, 2, 2)), "give integers"),
        ("class", np.zeros(1), "kind"),
    ],
)
def test_wrong_targets_are_refused(kind, values, message):
    with pytest.raises(ValueError, match=message):
        Targets(kind, values, 2)


def test_a_source_refuses_targets_that_do_not_fit():
    images = np.zeros((3, 2, 2), np.uint8)
    targets = Targets("pixels", MASKS, 4)
    TensorSource(images, targets.labels(), class_names=list("abcd"), targets=targets)
    with pytest.raises(ValueError, match="3 targets for 2 samples"):
        TensorSource(images[:2], targets.labels()[:2], class_names=list("abcd"), targets=targets)
    with pytest.raises(ValueError, match=r"masks have the size \(2, 2\), images \(2, 3\)"):
        TensorSource(np.zeros((3, 2, 3), np.uint8), targets.labels(), class_names=list("abcd"), targets=targets)
