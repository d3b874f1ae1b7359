"""Losses and distillation of targets that are not one class, against plain formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from cl_lightning.losses import at_size, target_distillation, target_loss


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_several_labels_count_where_they_are_known_each_sample_alike():
    outputs = random(2, 3)
    targets = torch.tensor([[1, 0, -1, -1], [-1, -1, 1, 0]], dtype=torch.int8)
    p = outputs.sigmoid()
    first = -(math.log(p[0, 0]) + math.log(1 - p[0, 1])) / 2
    second = -math.log(p[1, 2])
    assert float(target_loss(outputs, targets)) == pytest.approx((first + second) / 2, rel=1e-12)
    unknown = torch.full((2, 4), -1, dtype=torch.int8)
    assert target_loss(outputs, unknown) == 0


def test_a_number_has_the_squared_error():
    outputs, targets = random(4, 1), random(4, seed=1)
    assert torch.allclose(target_loss(outputs, targets), ((outputs[:, 0] - targets) ** 2).mean())


def test_pixels_have_the_cross_entropy_and_those_without_annotation_count_as_zero():
    outputs = random(2, 3, 2, 2)
    masks = torch.tensor([[[0, 2], [1, 255]], [[255, 255], [2, 2]]], dtype=torch.uint8)
    expected = 0.0
    for image in range(2):
        for row in range(2):
            for column in range(2):
                label = int(masks[image, row, column])
                if label != 255:
                    expected -= float(outputs[image, :, row, column].log_softmax(0)[label])
    assert float(target_loss(outputs, masks)) == pytest.approx(expected / 8, rel=1e-12)
    small = random(2, 3, 1, 1)
    assert torch.allclose(target_loss(small, masks), target_loss(small.expand(2, 3, 2, 2), masks))
    assert at_size(outputs, (2, 2)) is outputs


def test_an_empty_batch_has_loss_zero_with_a_graph():
    for outputs, targets in (
        (torch.zeros(0, 2), torch.zeros(0, 3, dtype=torch.int8)),
        (torch.zeros(0, 1), torch.zeros(0)),
        (torch.zeros(0, 2, 4, 4), torch.zeros(0, 4, 4, dtype=torch.uint8)),
    ):
        loss = target_loss(outputs.requires_grad_(), targets)
        loss.backward()
        assert loss == 0


def test_distillation_by_kind():
    student, teacher = random(4, 3), random(4, 3, seed=1)
    labels, numbers = torch.zeros(4, 3, dtype=torch.int8), torch.zeros(4)
    p, q = (student / 2).sigmoid(), (teacher / 2).sigmoid()
    expected = -(q * p.log() + (1 - q) * (1 - p).log()).mean()
    assert torch.allclose(target_distillation(student, teacher, labels, 2.0), expected)
    assert torch.allclose(
        target_distillation(student[:, :1], teacher[:, :1], numbers, 2.0), ((student - teacher)[:, 0] ** 2).mean()
    )
    maps, its = random(2, 3, 2, 2), random(2, 3, 2, 2, seed=3)
    masks = torch.zeros(2, 2, 2, dtype=torch.uint8)
    pixels = F.cross_entropy(
        (maps / 2).movedim(1, -1).reshape(-1, 3), (its / 2).movedim(1, -1).reshape(-1, 3).softmax(1)
    )
    assert torch.allclose(target_distillation(maps, its, masks, 2.0), pixels)


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2), r"expected \(B, 1\)"),
        (torch.zeros(2, 3), torch.zeros(2, 4, 4, dtype=torch.uint8), "ConvPixels and PixelHead"),
        (torch.zeros(2, 5), torch.zeros(2, 4, dtype=torch.int8), "one logit"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(outputs, targets, message):
    with pytest.raises(ValueError, match=message):
        target_loss(outputs, targets)
