import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.fakes import batch_of, normal, task_of
from support.runs import plain_net, run
from torch.nn import functional as F

from cl_lightning.losses import pod_spatial
from cl_lightning.models import CifarResNet, CosineHead, Output, ResNet
from cl_lightning.strategies.base import BALANCED
from cl_lightning.strategies.rehearsal.podnet import PODNet, nca_loss, released_nca_loss
from cl_lightning.strategy import Phase, PhaseOptions
from cl_lightning.stream import RotatedDomains
from cl_lightning.testing import Subject, small

TINY = partial(ResNet, blocks=(1, 1), width=2, shortcut="pad", last_relu=False)
SHORT = PhaseOptions(epochs=1)
SMALL = partial(small, PODNet, backbone=TINY, balanced_options=SHORT)

SUBJECTS = {
    "PODNet": Subject(
        SMALL(proxies=2),
        first_task_is_finetuning=False,
        matches_single_process=False,
        reason="the loss compares cosines, and each process has batch statistics of its own",
    ),
}
SLOW = "a residual network, whose maps are compared"

PUBLISHED = {
    "podnet_cifar100": {
        "source": "arthurdouillard/incremental_learning.pytorch: options/podnet/podnet_cnn_cifar100.yaml, "
        "inclearn/models/podnet.py (clamp), README (20 exemplars of each class)",
        "memory_size": 2000,
        "exemplars_per_class": 20,
        "spatial_weight": 3.0,
        "flat_weight": 1.0,
        "margin": 0.6,
        "proxies": 10,
        "classifier": "head",
        "backbone": "ResNet32(last_relu=False)",
        "optimizer": "SGD(lr=0.1, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase()",
        "balanced_options": {"epochs": 20, "optimizer": "SGD(lr=0.05, momentum=0.9, weight_decay=0.0005)"},
        "data.scenario": "ClassIncremental(class_order=1993, first=50, increment=10)",
        "data.batch_size": 128,
        "data.transforms": ["RandomCrop(padding=4)", "RandomHorizontalFlip()", "ColorJitter(brightness=0.247)"],
        "trainer.max_epochs": 160,
        "trainer.gradient_clip_val": 5.0,
        "trainer.gradient_clip_algorithm": "value",
    },
}


def built(**options):
    """PODNet in a task of 2 classes after 3, and its teacher, a copy."""
    strategy = PODNet(backbone=TINY, **options)
    strategy.build((1, 8, 8))
    head = strategy.network.head
    head.grow(3)
    strategy.network.eval()
    strategy.teacher.learn_from(strategy.network)
    head.grow(2)
    strategy.task = replace(task_of(1), num_new=2, num_seen=5)
    strategy.phase = Phase()
    return strategy.double()


def test_nca_is_the_log_of_the_other_classes_against_the_own_one_with_a_margin():
    s, eta, delta = torch.tensor([[0.9, 0.2, -0.1], [0.3, 0.4, 0.1]], dtype=torch.float64), 2.0, 0.6
    found = nca_loss(eta * s, torch.tensor([0, 1]), eta * delta)
    first = -2 * (0.9 - 0.6) + math.log(math.exp(0.4) + math.exp(-0.2))
    second = -2 * (0.4 - 0.6) + math.log(math.exp(0.6) + math.exp(0.2))
    assert float(found) == pytest.approx((first + second) / 2, abs=1e-12)


def test_nca_is_0_above_the_margin_and_with_a_single_class():
    logits = torch.tensor([[9.0, 1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    loss = nca_loss(logits, torch.tensor([0]), 0.5)
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient.any()
    assert nca_loss(normal(4, 1), torch.zeros(4, dtype=torch.int64), 0.5).item() == 0


def test_the_gradient_of_nca_is_its_closed_form():
    logits, labels = normal(5, 4, requires_grad=True), torch.tensor([0, 1, 2, 3, 0])
    nca_loss(logits, labels, 30.0).backward()  # no row is above the margin
    own = F.one_hot(labels, 4).double()
    others = logits.detach().exp() * (1 - own)
    torch.testing.assert_close(logits.grad, (others / others.sum(1, keepdim=True) - own) / 5)


def test_the_released_form_has_a_one_in_the_sum_after_the_maximum_is_subtracted():
    logits, labels = torch.tensor([[0.5, 2.0, -1.0], [3.0, 1.0, 0.0]]).double(), torch.tensor([0, 0])
    first = 1.5 + math.log(1 + 1 + math.exp(-3))  # the maximum, 2, is of another class
    second = 0.0 + math.log(1 + math.exp(-2) + math.exp(-3))
    assert released_nca_loss(logits, labels).item() == pytest.approx((first + second) / 2, abs=1e-12)
    torch.testing.assert_close(released_nca_loss(logits + 7, labels), released_nca_loss(logits, labels))
    assert abs(released_nca_loss(logits, labels).item() - nca_loss(logits, labels, 0.0).item()) > 0.1


def test_terms_match_their_formulas():
    strategy = built(spatial_weight=3.0, flat_weight=0.5, proxies=2, margin=0.4)
    with torch.no_grad():
        strategy.network.head.scale.fill_(2.0)
        before = strategy.teacher.network.backbone
        for parameter in before.parameters():
            parameter.add_(0.1 * normal(*parameter.shape))
    images, labels = normal(6, 1, 8, 8), torch.tensor([0, 2, 4, 3, 1, 3])
    output = strategy.network(images)
    found = strategy.losses(batch_of(labels, images=images), output)
    assert found.keys() == {"nca", "spatial", "flat"}
    old: list = []
    features = before(images, old)
    r = math.sqrt(5 / 2)  # all classes, the new ones included, over the new ones
    torch.testing.assert_close(found["nca"], nca_loss(output.logits, labels, 2.0 * 0.4))
    torch.testing.assert_close(found["spatial"], 3 * r * pod_spatial(output.maps, old))
    cosines = F.cosine_similarity(output.features, features, dim=1)
    torch.testing.assert_close(found["flat"], 0.5 * r * (1 - cosines).mean())
    assert len(output.maps) == 2
    strategy.released = True
    again = strategy.losses(batch_of(labels, images=images), output)
    torch.testing.assert_close(again["nca"], released_nca_loss(output.logits, labels))


def test_the_scale_is_trained_by_the_margin_too():
    strategy = built()
    scores = Output(normal(4, 4), normal(4, 5), ())
    labels = torch.tensor([0, 1, 2, 3])
    strategy.phase = Phase(BALANCED)
    found = strategy.losses(batch_of(labels), scores)
    assert found.keys() == {"nca"}
    (slope,) = torch.autograd.grad(found["nca"], strategy.network.head.scale)
    others = scores.logits.masked_fill(F.one_hot(labels, 5).bool(), -torch.inf).logsumexp(1)
    rows = (others - scores.logits[torch.arange(4), labels] + 0.6) > 0
    torch.testing.assert_close(slope, torch.tensor(0.6 * int(rows.sum()) / 4).double())


def test_the_head_has_ten_proxies_and_a_learnt_scale_of_1_and_the_second_phase_a_rate_of_its_own():
    strategy = built()
    head = strategy.network.head
    assert isinstance(head, CosineHead)
    assert head.weight().shape == (5, 10, 4)
    assert float(head.scale) == 1
    assert head.scale.requires_grad
    optimizer = strategy.balanced_options.optimizer(head.parameters())
    assert optimizer.defaults["lr"] == 0.05
    assert strategy.balanced_options.epochs == 20
    assert [phase.name for phase in strategy.phases(task_of(1))] == ["train", BALANCED]
    assert [phase.name for phase in PODNet(balanced_options=PhaseOptions(epochs=0)).phases(task_of(1))] == ["train"]


def test_a_backbone_without_maps_and_a_stream_of_domains_are_refused():
    with pytest.raises(ValueError, match="PODNet: backbone is MLP, which has no maps"):
        PODNet(backbone=plain_net).build((1, 8, 8))
    with pytest.raises(ValueError, match="PODNet"):
        run(PODNet(backbone=TINY), data={"scenario": RotatedDomains(tasks=3)}, max_epochs=1)


def test_it_is_far_above_finetuning():
    net = partial(CifarResNet, depth=8, width=8, last_relu=False)
    two = {"max_epochs": 2}
    plain = finetuning({"backbone": net}, **two).measures()["average_accuracy"]
    ours = run(PODNet(backbone=net, memory_size=100, balanced_options=SHORT), **two)
    # Measured: .66 against .26.
    assert ours.matrix.measures()["average_accuracy"] > plain + 0.2


@pytest.mark.parametrize(
    "options",
    [
        {"loss_classes": "current"},
        {"spatial_weight": -1.0},
        {"flat_weight": -1.0},
        {"margin": -0.1},
        {"proxies": 0},
        {"classifier": "svm"},
        {"memory_size": -1},
    ],
)
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match=r"PODNet|Memory"):
        PODNet(**options)
