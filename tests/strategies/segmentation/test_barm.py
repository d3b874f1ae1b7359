"""BARM: each term against loops over pixels, and what has a gradient."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cl_lightning.batch import Batch, Draw
from cl_lightning.models import BackgroundHead, ConvPixels, Network, PixelHead
from cl_lightning.strategies.segmentation.barm import BARM, at_places, pseudo_labels
from cl_lightning.testing import Subject, TinyMasks, run, small

tiny = partial(small, BARM, head=partial(BackgroundHead, width=6, norm="group"))
SUBJECTS = {
    "BARM": Subject(
        tiny(),
        data=TinyMasks,
        first_task_is_finetuning=False,
        reason="its first task has a branch with a convolution, and sigmoids",
    )
}


def head_with(blocks, width=4, d=5):
    torch.manual_seed(0)
    head = BackgroundHead(d, width=width)
    for number in blocks:
        head.grow(number)
    return head.double().eval()


def features(seed=0):
    return torch.randn(2, 5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_residuals_lower_the_background_and_never_raise_it():
    head = head_with([3, 2, 2])
    logits = head(features())
    first, second, third = head.outputs
    assert logits.shape == (2, 7, 3, 3)
    assert torch.equal(logits[:, 0], first.background + second.background.clamp(max=0) + third.background.clamp(max=0))
    assert (logits[:, 0] <= first.background).all()
    assert torch.equal(logits[:, 1:], torch.cat([first.classes, second.classes, third.classes], 1))
    assert head.block_sizes() == [3, 2, 2]
    assert torch.equal(head.blocks[1].ear[0].weight, head.blocks[0].ear[0].weight)


def test_in_training_the_last_branch_alone_has_a_gradient_and_its_residual_is_not_clamped():
    head = head_with([3, 2, 2])
    head(features())
    logits = head.training_logits()
    first, second, third = head.outputs
    assert torch.equal(logits[:, 0], first.background + third.background + second.background.clamp(max=0))
    logits.sum().backward()
    assert all(p.grad is None for block in head.blocks[:2] for p in block.parameters())
    assert all(p.grad is not None for p in head.blocks[2].parameters())
    with torch.no_grad():
        for block in head.blocks[1:]:
            block.rows.weight[0] = 0
            block.rows.bias[0] = 0
    zero = head(features())
    alone = head_with([3])(features())
    assert torch.allclose(zero[:, :3], alone)


def test_a_head_is_loaded_from_its_state():
    head = head_with([3, 2])
    other = BackgroundHead(5, width=4)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.double().eval()(features()), head(features()))


def test_certain_classes_of_the_teacher_become_labels_of_the_background_alone():
    teacher = torch.tensor([2.0, 1.0, -1.0]).view(1, 3, 1, 1).repeat(1, 1, 1, 4)
    teacher[0, :, 0, 1] = torch.tensor([0.0, 3.0, 1.0])
    teacher[0, :, 0, 2] = torch.tensor([-3.0, -2.0, 0.5])  # sigmoid .62
    teacher[0, :, 0, 3] = torch.tensor([0.0, 3.0, 1.0])
    masks = torch.tensor([[[0, 0, 0, 4]]], dtype=torch.uint8)
    assert pseudo_labels(masks, teacher, 0.7).tolist() == [[[0, 1, 0, 4]]]
    assert pseudo_labels(masks, teacher, 0.6).tolist() == [[[0, 1, 2, 4]]]


def second_task():
    """Strategy in its second task, its batch, its output, and the parts of both heads."""
    torch.manual_seed(1)
    strategy = tiny(new_weight=2.0, background_weight=3.0, feature_weight=5.0, distill_weight=7.0)()
    head = BackgroundHead(4, width=3)
    strategy.network = Network(ConvPixels((1, 8, 8), channels=(4,)), head)
    head.grow(3)
    strategy.network.double().eval()
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    strategy.teacher.learn_from(strategy.network)
    head.grow(2)
    strategy.network.double().eval()
    with torch.no_grad():
        for parameter in strategy.network.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    masks = torch.tensor([0, 3, 4, 255], dtype=torch.uint8)[torch.randint(4, (2, 8, 8))]
    nothing = torch.zeros(2, dtype=torch.int64)
    batch = Batch(images, nothing, nothing, nothing, images, Draw.of(2, 0), extra={"targets": masks})
    return strategy, batch, strategy.network(images)


def test_all_terms_equal_loops_over_places():
    strategy, batch, output = second_task()
    terms = strategy.losses(batch, output)
    masks, head = batch.extra["targets"], strategy.network.head
    teacher = strategy.teacher(batch.images)
    old = strategy.teacher.network.head.outputs
    logits = F.interpolate(head.training_logits(), size=(8, 8), mode="bilinear")
    labels = pseudo_labels(masks, F.interpolate(teacher.logits, size=(8, 8), mode="bilinear"), 0.7)
    total, count = 0.0, 0
    for image in range(2):
        for row in range(8):
            for column in range(8):
                if (label := int(labels[image, row, column])) == 255:
                    continue
                p = logits[image, :, row, column].sigmoid()
                total -= sum(float((p[c] if c == label else 1 - p[c]).log()) for c in range(5))
                count += 1
    assert float(terms["bce"]) == pytest.approx(total / count, rel=1e-6)
    places = at_places(masks, torch.Size([4, 4]))
    assert torch.equal(places, masks[:, ::2, ::2])
    positive, behind = ((places > 0) & (places != 255)), places == 0
    s = head.outputs[-1].background.sigmoid()
    assert float(terms["new"]) == pytest.approx(2 * float(-(1 - s)[positive].log().mean()), rel=1e-6)
    high = ((s - 1) ** 2 - s**2).clamp(min=0)[behind]
    assert float(terms["background"]) == pytest.approx(3 * float(high.mean()), rel=1e-6)
    moved = ((head.outputs[0].ear - old[0].ear) * behind[:, None]) ** 2
    assert float(terms["features"]) == pytest.approx(5 * float(moved.mean()), rel=1e-6)
    distilled = 0.0
    for mine, its in ((head.outputs[0].background, old[0].background), (head.outputs[0].classes, old[0].classes)):
        p, q = mine.sigmoid(), its.sigmoid()
        distilled += float(-(q * p.log() + (1 - q) * (1 - p).log()).sum()) / (2 * 4 * 4)
    assert float(terms["distill"]) == pytest.approx(7 * distilled, rel=1e-6)


def test_it_keeps_more_of_old_classes_than_without_its_terms():
    """Sum of mIoU of the first and the second task at the end of the third: .65 against .37."""

    def old(**options):
        backbone = partial(ConvPixels, channels=(16, 16), norm="group")
        data = partial(TinyMasks, val_fraction=0.0, transforms=[])
        factory = tiny(backbone=backbone, head=partial(BackgroundHead, width=16, norm="group"), **options)
        return float(run(Subject(factory, data=data, epochs=60)).matrix["R_ci"][2, :2].sum())

    without = {"feature_weight": 0.0, "distill_weight": 0.0, "pseudo_threshold": 1.0, "old_rate": 1.0}
    assert old() > old(**without) + 0.14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pseudo_threshold": 1.5}, "pseudo_threshold"),
        ({"feature_weight": -1.0}, "feature_weight"),
        ({"old_rate": 0.0}, "old_rate"),
        ({"head": PixelHead}, "BackgroundHead"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(Subject(small(BARM, **options), data=TinyMasks))
