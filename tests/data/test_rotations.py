import pytest
import torch

from cl_lightning.batch import Batch, Draw
from cl_lightning.data import rotate_batch, rotated, rotation_labels


def test_images_are_rotated_by_quarters_one_rotation_after_another():
    images = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4)
    turned = rotated(images).view(4, 2, 3, 4, 4)
    assert torch.equal(turned[0], images)
    assert torch.equal(turned[1, 0, 0, 0], images[0, 0, :, -1])  # counter-clockwise: the last column is on top
    for turn in range(4):
        assert torch.equal(turned[(turn + 1) % 4], torch.rot90(turned[turn], 1, (-2, -1)))


def test_each_class_and_turn_has_a_column_of_its_own():
    labels = rotation_labels(torch.arange(5), 5)
    assert sorted(labels.tolist()) == list(range(20))
    assert labels[:5].tolist() == [0, 1, 2, 3, 4]
    assert labels.view(4, 5)[1:, 2].tolist() == [5 + 6, 5 + 7, 5 + 8]


def test_rotated_rows_of_a_batch_have_no_class():
    images, labels = torch.rand(3, 1, 2, 2), torch.tensor([4, 0, 2])
    batch = Batch(images, labels, labels, labels, images, Draw.of(3, 1), extra={"weight": torch.rand(3)})
    turned = rotate_batch(batch)
    assert turned.labels.tolist() == [4, 0, 2, *[-1] * 9]
    assert turned.tasks.tolist() == [4, 0, 2] * 4
    assert {len(value) for value in (turned.images, turned.raw, turned.indices, turned.extra["weight"])} == {12}


def test_images_that_are_not_square_are_an_error():
    with pytest.raises(ValueError, match=r"images of \(2, 3\) pixels"):
        rotated(torch.zeros(1, 1, 2, 3))
