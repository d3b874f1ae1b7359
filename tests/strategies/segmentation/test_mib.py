"""MiB: merged probabilities of the background, against sums over softmaxes; rows that begin as the background."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cl_lightning.batch import Batch, Draw
from cl_lightning.models import ConvPixels, LinearHead, Network, Output, PixelHead
from cl_lightning.strategies.segmentation.mib import (
    MiB,
    background_cross_entropy,
    background_distillation,
    share_background,
)
from cl_lightning.testing import Subject, TinyMasks, run, small

PUBLISHED: dict = {}


def logits(classes, seed=0):
    return torch.randn(3, classes, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def masks(allowed, seed=1):
    places = torch.randint(len(allowed), (3, 4, 5), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(allowed, dtype=torch.uint8)[places]


def test_background_is_the_sum_over_old_classes_pixel_by_pixel():
    o, m = logits(6), masks([0, 4, 5, 255])
    expected = 0.0
    for image in range(3):
        for row in range(4):
            for column in range(5):
                p = o[image, :, row, column].softmax(0)
                label = int(m[image, row, column])
                if label == 0:
                    expected -= math.log(p[0] + p[1] + p[2] + p[3])
                elif label != 255:
                    expected -= math.log(p[label])
    assert float(background_cross_entropy(o, m, old=4)) == pytest.approx(expected / 60, rel=1e-12)


def test_without_old_classes_it_is_the_cross_entropy():
    o, m = logits(4), masks([0, 1, 3])
    for old in (0, 1):
        assert torch.allclose(background_cross_entropy(o, m, old), F.cross_entropy(o, m.long()), rtol=1e-12)


def test_distillation_merges_new_classes_into_the_background_pixel_by_pixel():
    o, teacher = logits(6), logits(4, seed=2)
    expected = 0.0
    for image in range(3):
        for row in range(4):
            for column in range(5):
                p, q = o[image, :, row, column].softmax(0), teacher[image, :, row, column].softmax(0)
                merged = [p[0] + p[4] + p[5], p[1], p[2], p[3]]
                assert sum(merged) == pytest.approx(1)
                expected -= sum(float(q[c]) * math.log(merged[c]) for c in range(4)) / 4
    assert float(background_distillation(o, teacher)) == pytest.approx(expected / 60, rel=1e-12)
    plain = -(teacher.softmax(1) * o[:, :4].log_softmax(1)).mean()
    assert torch.allclose(background_distillation(o, teacher, unbiased=False), plain, rtol=1e-12)


def grown():
    head = PixelHead(5)
    head.grow(4)
    head.double()
    before = [part.detach().clone() for part in (head.blocks[0].weight, head.blocks[0].bias)]
    head.blocks.append(head.new_block(2).double())
    share_background(head)
    return head, before


def test_right_after_the_initialisation_the_distillation_has_its_minimum():
    head, (weight, bias) = grown()
    features = logits(5)
    old = F.conv2d(features, weight[:, :, None, None], bias)
    o = head(features)
    o.retain_grad()
    q = old.softmax(1)
    merged = torch.cat([o[:, :1].exp() + o[:, 4:].exp().sum(1, keepdim=True), o[:, 1:4].exp()], 1)
    merged = merged / merged.sum(1, keepdim=True)
    assert torch.allclose(merged, q, atol=1e-12)
    assert torch.allclose(o[:, 0], o[:, 4])
    assert torch.allclose(o[:, 0], old[:, 0] - math.log(3))
    background_distillation(o, old).backward()
    assert o.grad.abs().max() < 1e-15
    assert torch.equal(head.blocks[0].weight, weight)
    assert torch.equal(head.blocks[0].bias[1:], bias[1:])


def test_losses_follow_the_options():
    strategy = small(MiB, distill_weight=3.0)()
    backbone = ConvPixels((1, 8, 8), channels=(4,))
    strategy.network = Network(backbone, PixelHead(4))
    strategy.network.head.grow(3)
    images, m = torch.randn(2, 1, 8, 8), masks([0, 3, 4])[:2, :4, :4]

    nothing = torch.zeros(2, dtype=torch.int64)
    batch = Batch(images, nothing, nothing, nothing, images, Draw.of(2, 0), extra={"targets": m})
    strategy.network.eval()
    strategy.teacher.learn_from(strategy.network)
    strategy.network.head.grow(2)
    output = strategy.network(images)
    terms = strategy.losses(batch, output)
    target = strategy.teacher(images).logits
    assert terms["ce"] == background_cross_entropy(output.logits, m, 3)
    assert terms["distill"] == 3 * background_distillation(output.logits, target)
    strategy.unbiased = False
    terms = strategy.losses(batch, output)
    assert terms["ce"] == background_cross_entropy(output.logits, m, 0)
    assert terms["distill"] == 3 * background_distillation(output.logits, target, unbiased=False)
    strategy.distill_weight = 0.0
    assert set(strategy.losses(batch, output)) == {"ce"}
    assert isinstance(output, Output)


def test_it_keeps_old_classes_better_than_plain_losses():
    """Sum of mIoU of the first and the second task at the end of the third: .71 against .31."""

    def old(**options):
        backbone = partial(ConvPixels, channels=(16, 16), norm="group")
        data = partial(TinyMasks, val_fraction=0.0, transforms=[])
        outcome = run(Subject(small(MiB, backbone=backbone, **options), data=data, epochs=40))
        return float(outcome.matrix["R_ci"][2, :2].sum())

    with_background, plain = old(), old(unbiased=False, init_from_background=False, distill_weight=0.0)
    assert with_background > plain + 0.2


@pytest.mark.parametrize(
    ("options", "message"), [({"distill_weight": -1}, "distill_weight"), ({"head": LinearHead}, "PixelHead")]
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(Subject(small(MiB, **options), data=TinyMasks))
