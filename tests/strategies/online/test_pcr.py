"""Proxy-based Contrastive Replay."""

import math
from copy import deepcopy
from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.fakes import normal
from support.runs import plain_net, run
from torch import nn
from torch.nn import functional as F

from cl_lightning.batch import Batch
from cl_lightning.data import RandomCrop
from cl_lightning.models import Backbone, CosineHead, LinearHead
from cl_lightning.strategies.online.pcr import PCR, proxy_contrastive
from cl_lightning.stream import ClassIncremental, Online
from cl_lightning.testing import Subject, check_strategy, small

SUBJECTS = {
    "PCR": Subject(
        small(PCR),
        first_task_is_finetuning=False,
        reason="a proxy-based contrastive loss takes the place of cross-entropy",
    ),
}

PUBLISHED = {
    "pcr": {
        "source": "FelixHuiweiLin/PCR: defaults of general_main.py (--num_tasks 10), agents/pcr.py",
        "memory_size": 1000,
        "temperature": 0.09,
        "separate_passes": True,
        "optimizer": "SGD(lr=0.1)",
        "data.scenario": "Online(base=ClassIncremental(tasks=10), batch_size=10)",
        "data.batch_size": 10,
    },
}

FIVE = {"scenario": Online(ClassIncremental(tasks=5), batch_size=10)}


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


SMALL = partial(PCR, backbone=plain_net, optimizer=plain_sgd, memory_size=100)


def cosine_head(num_classes, *, temperature=0.09):
    head = CosineHead(6, scale=1 / temperature)
    head.grow(num_classes)
    return head.double()


def counts_of(labels, num_classes):
    return torch.bincount(labels, minlength=num_classes)


# ---------------------------------------------------------------------- the maths


def test_the_loss_is_the_contrast_of_every_row_with_the_proxies_of_all_rows():
    labels = torch.tensor([0, 3, 3, 1, 0, 0, 4, 1])
    head, features = cosine_head(6), normal(8, 6)
    z, u = F.normalize(features, dim=1), F.normalize(head.weight()[labels], dim=1)  # a proxy for each row
    log_p = (z @ u.T / 0.09).log_softmax(dim=1)
    same = (labels[:, None] == labels).double()
    expected = -((same * log_p).sum(1) / same.sum(1)).mean()
    found = proxy_contrastive(head(features), labels, counts_of(labels, 6))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, list(head.parameters()), retain_graph=True) for loss in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_where_classes_are_equally_many_it_is_the_cross_entropy_among_them_and_a_constant(count):
    present = torch.tensor([1, 2, 5])
    labels, logits = present.repeat(count), normal(3 * count, 7)
    inside = torch.searchsorted(present, labels)
    expected = F.cross_entropy(logits[:, present], inside) + torch.tensor(float(count)).double().log()
    torch.testing.assert_close(proxy_contrastive(logits, labels, counts_of(labels, 7)), expected)


def test_classes_that_are_absent_get_no_gradient_at_all():
    labels = torch.tensor([0, 3, 3, 1])
    head = cosine_head(6)
    features = normal(4, 6).requires_grad_()
    proxy_contrastive(head(features), labels, counts_of(labels, 6)).backward()
    moved = (head.blocks[0].weight.grad != 0).any(1)
    assert moved.tolist() == [True, True, False, True, False, False]
    assert features.grad.isfinite().all()


def test_the_parts_of_two_processes_with_common_counts_have_the_loss_of_one_as_their_mean():
    labels, logits = torch.tensor([0, 2, 2, 1, 1, 1]), normal(6, 4)
    counts = counts_of(labels, 4)
    whole = proxy_contrastive(logits, labels, counts)
    first, second = (proxy_contrastive(logits[part], labels[part], counts) for part in (slice(2), slice(2, 6)))
    torch.testing.assert_close((2 * first + 4 * second) / 6, whole)
    own = proxy_contrastive(logits[:2], labels[:2], counts_of(labels[:2], 4))
    assert not torch.allclose(own, first)


def test_a_single_class_has_no_contrast_but_its_number():
    labels = torch.zeros(5, dtype=torch.int64)
    found = proxy_contrastive(normal(5, 3), labels, counts_of(labels, 3))
    torch.testing.assert_close(found, torch.tensor(5.0).double().log())


def test_it_is_computed_in_single_precision_at_least():
    labels, logits = torch.tensor([0, 1, 1]), normal(3, 2)
    found = proxy_contrastive(logits.bfloat16(), labels, counts_of(labels, 2))
    assert found.dtype == torch.float32
    assert torch.equal(found, proxy_contrastive(logits.bfloat16().float(), labels, counts_of(labels, 2)))


# ---------------------------------------------------------------------- the views


class Notes(PCR):
    """Notes what each step is made of."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.steps = []

    def prepare_batch(self, batch: Batch) -> Batch:
        joint = super().prepare_batch(batch)
        self.steps.append((batch, joint, self._counts.clone()))
        return joint


def test_a_step_has_two_views_of_the_batch_and_of_as_many_samples_of_the_memory():
    made = run(Notes(backbone=plain_net, optimizer=plain_sgd, memory_size=100), data=FIVE)
    steps, normalize = made.strategy.steps, made.datamodule.normalize
    assert [len(joint) for _, joint, _ in steps[:3]] == [20, 40, 40]
    for batch, joint, counts in steps:
        assert torch.equal(counts, counts_of(joint.labels, len(counts)))
        assert (joint.indices >= 0).sum() == 2 * len(batch)
        size = len(batch)
        plain, strong = joint.select(slice(0, size)), joint.select(slice(size, 2 * size))
        assert torch.equal(plain.images, normalize(batch.raw, batch.draw))
        assert torch.equal(plain.labels, strong.labels)
        assert torch.equal(plain.raw, strong.raw)
        assert not torch.equal(plain.images, strong.images)


class Norm(Backbone):
    """One hidden layer with batch normalisation."""

    def __init__(self, image_shape):
        super().__init__(image_shape)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image_shape), 12), nn.BatchNorm1d(12), nn.ReLU())
        self.num_features = 12

    def forward(self, images):
        return self.layers(images)


@pytest.mark.parametrize("separate", [True, False])
def test_batch_and_memory_are_one_pass_or_two_with_statistics_of_their_own(separate):
    apart = []

    class Look(PCR):
        def prepare_batch(self, batch):
            self.size = 2 * len(batch)
            return super().prepare_batch(batch)

        def losses(self, batch, output):
            backbone = deepcopy(self.network.backbone)  # in train mode, where running statistics have no effect
            one = backbone(batch.images)
            parts = batch.images[: self.size], batch.images[self.size :]
            two = torch.cat([backbone(part) for part in parts if len(part)])
            apart.append(float((one - two).abs().max()))
            expected = two if separate else one
            torch.testing.assert_close(output.features, expected)
            torch.testing.assert_close(output.logits, self.network.head(expected))
            return super().losses(batch, output)

    strategy = Look(backbone=Norm, optimizer=plain_sgd, memory_size=100, separate_passes=separate)
    made = run(strategy, data=FIVE, limit_train_batches=4)
    assert apart[0] == 0  # the memory is empty
    assert min(apart[1:]) > 0.01
    steps = int(made.strategy.network.backbone.layers[2].num_batches_tracked)
    assert steps == (2 * len(apart) - 1 if separate else len(apart))


def test_without_transforms_both_views_are_the_images():
    made = run(Notes(backbone=plain_net, optimizer=plain_sgd, memory_size=30, transforms=[], replay_size=4), data=FIVE)
    _, joint, _ = made.strategy.steps[5]
    assert len(joint) == 28
    assert torch.equal(joint.images[:10], joint.images[10:20])
    assert torch.equal(joint.images[20:24], joint.images[24:])


def test_the_memory_holds_raw_images_of_the_stream():
    made = run(SMALL(), data=FIVE)
    memory, source = made.strategy.memory, made.datamodule.samples(train=True)
    assert int(memory.num_seen) == sum(len(part) for part in made.stream.train)
    known = {image.numpy().tobytes() for image in source.images}
    assert all(image.numpy().tobytes() in known for image in memory.images)


# ---------------------------------------------------------------------- runs


def test_new_classes_do_not_move_the_proxies_of_old_ones():
    class Watching(PCR):
        held = None

        def after_step(self, batch):
            super().after_step(batch)
            if self.task.index == 1:
                old = self.network.head.blocks[0].weight.clone()
                assert self.held is None or torch.equal(old, self.held)
                self.held = old

    made = run(Watching(backbone=plain_net, optimizer=plain_sgd, memory_size=0), data=FIVE)
    assert made.strategy.held is not None


def test_it_is_far_above_finetuning_on_a_stream_that_is_seen_once():
    plain = {"backbone": plain_net, "optimizer": plain_sgd}
    pcr = run(PCR(memory_size=200, **plain), data=FIVE).matrix.measures()["average_accuracy"]
    none = finetuning(plain, data=FIVE).measures()["average_accuracy"]
    # Measured: .90 against .18.
    assert pcr > none + 0.35


def test_the_temperature_is_the_scale_of_the_head_unless_one_is_given():
    assert float(PCR(temperature=0.25).build_head(4).scale) == 4.0
    assert isinstance(PCR(head=LinearHead).build_head(4), LinearHead)


def test_variants_conform():
    variant = small(PCR, replay_size=7, head=LinearHead, transforms=[RandomCrop(padding=1)])
    check_strategy(variant, checks=("trains", "resume", "options", "bytes"))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"loss_classes": "current"},
        {"loss_classes": "task"},
        {"replay_size": 0},
        {"memory_size": -1},
    ],
)
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match=r"PCR|Memory"):
        PCR(**options)
