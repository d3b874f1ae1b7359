"""Transformed copies as virtual classes."""

import pytest
import torch
from support.fakes import batch_of, normal
from torch.nn import functional as F

from cl_lightning.strategies.few_shot.transformed import (
    NUMBER,
    JointCosineHead,
    JointMeansHead,
    over_copies,
    transformed,
    transformed_batch,
    virtual_labels,
)


def test_copies_are_rotations_and_permuted_channels():
    images = normal(2, 3, 4, 4)
    assert torch.equal(transformed(images, "none"), images)
    two = transformed(images, "rotation2")
    assert torch.equal(two[:2], images)
    assert torch.equal(two[2:], images.flip(2, 3))
    four, twelve = transformed(images, "rotation4"), transformed(images, "rotation_color12")
    assert (len(four), len(twelve)) == (8, 24)
    assert torch.equal(four[4:6], two[2:])
    assert torch.equal(four[2:4], images.transpose(2, 3).flip(2))  # counter-clockwise
    assert torch.equal(twelve[:8], four)
    assert torch.equal(twelve[8:16], four[:, [1, 2, 0]])
    assert torch.equal(twelve[16:], four[:, [2, 0, 1]])
    assert len({copy.numpy().tobytes() for copy in twelve}) == 24


def test_virtual_labels_are_in_the_order_of_the_copies():
    labels = torch.tensor([2, 0, -1])
    assert virtual_labels(labels, 2).tolist() == [4, 0, -1, 5, 1, -1]
    assert virtual_labels(labels, 1).tolist() == labels.tolist()


def test_a_batch_of_copies_hides_their_labels():
    batch = transformed_batch(batch_of(torch.tensor([3, 1]), images=normal(2, 1, 4, 4)), "rotation4")
    assert batch.labels.tolist() == [3, 1] + [-1] * 6
    assert batch.indices.tolist() == [0, 1] * 4
    assert torch.equal(batch.images[6:], batch.images[:2].rot90(3, (2, 3)))


@pytest.mark.parametrize("copies", ["none", "rotation4"])
def test_each_copy_is_scored_by_the_rows_of_its_transform(copies):
    count = NUMBER[copies]
    scores = normal(count * 3, 5 * count)
    expected = torch.zeros(3, 5).double()
    for i in range(3):
        for c in range(5):
            expected[i, c] = sum(scores[m * 3 + i, c * count + m] for m in range(count)) / count
    torch.testing.assert_close(over_copies(scores, count), expected)
    assert over_copies(scores[:0], count).shape == (0, 5)


@pytest.mark.parametrize("copies", [1, 3])
def test_a_cosine_head_has_a_row_for_each_virtual_class(copies):
    head = JointCosineHead(4, scale=5.0, copies=copies)
    head.grow(2)
    head.grow(1)
    head.double()
    assert head.num_columns == 3
    features, rows = normal(6, 4), torch.cat([block.weight.reshape(-1, 4) for block in head.blocks])
    expected = 5 * F.cosine_similarity(features[:, None], rows[None], dim=2)
    torch.testing.assert_close(head.joint_scores(features), expected)
    torch.testing.assert_close(head(features), expected[:, ::copies])
    torch.testing.assert_close(head.classify(features), expected[:, ::copies])
    other = JointCosineHead(4, copies=copies)
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other.joint_scores(features.float()).double(), expected, rtol=1e-4, atol=1e-5)


def test_means_are_of_each_class_and_transform():
    head = JointMeansHead(4, copies=2).double()
    head.grow(3)
    features, labels = normal(2, 5, 4), torch.tensor([0, 2, 0, 2, 2])
    head.fit_copies(features, labels)
    queries = normal(3, 4, seed=1)
    found = head.joint_scores(queries)
    for c in (0, 2):
        for m in (0, 1):
            mean = features[m][labels == c].mean(0)
            torch.testing.assert_close(found[:, 2 * c + m], F.cosine_similarity(queries, mean, dim=1))
    assert found[:, 2:4].isneginf().all()
    assert torch.equal(head.classify(queries), found[:, ::2])
