from functools import partial

import pytest
import torch
from support.adaptation import (
    adapt,
    batches,
    online_errors,
    scores,
    source_network,
    stream,
    tiny_resnet,
    watching,
)
from support.fakes import normal
from torch import nn
from torch.nn import functional as F

from cl_lightning.strategies.test_time import mean_teacher
from cl_lightning.strategies.test_time.cotta import CoTTA
from cl_lightning.strategies.test_time.mean_teacher import move_teacher
from cl_lightning.strategies.test_time.petal import PETAL, POSTERIOR, add_value
from cl_lightning.strategies.test_time.source import Source
from cl_lightning.strategy import PhaseOptions
from cl_lightning.testing import Subject, small

FEW = PhaseOptions(epochs=2)
NONE = PhaseOptions(epochs=0)
PRIOR = {"prior_weight": 1e-3, "damping": 1e-3}
SLOW = "two phases on the source, and a teacher that runs the network on two views"
SUBJECTS = {
    "PETAL": Subject(
        small(PETAL, backbone=tiny_resnet, views=2, teacher_momentum=0.9, posterior_options=FEW, **PRIOR),
        first_task_is_finetuning=False,
        reason="the source network is the mean of the weights over further epochs",
    ),
}
WAITS = {"PETAL": {"_target"}}  # whether further views are needed

PUBLISHED = {
    "petal": {
        "source": "dhanajitb/petal: cifar/cfgs/cifar10/petalfim.yaml and train-swag-diagonal-cifar10.py",
        "teacher_momentum": 0.999,
        "prior_weight": 1e-9,
        "restore": 0.03,
        "threshold": 0.92,
        "views": 32,
        "posterior_options": {"epochs": 5},
        "backbone": "CifarResNet(depth=8, width=8)",
        "optimizer": "Adam(lr=0.001)",
    },
}

sgd = partial(torch.optim.SGD, lr=0.02)
adam = partial(torch.optim.Adam, lr=1e-3)


def test_mean_and_variance_are_moments_of_the_values():
    values = 3 + 0.1 * normal(5, 2, 3)
    mean, variance = torch.full((2, 3), 7.0).double(), torch.zeros(2, 3).double()
    for count, value in enumerate(values, 1):
        add_value(mean, variance, value, count)
    torch.testing.assert_close(mean, values.mean(0))
    torch.testing.assert_close(variance, values.square().mean(0) - values.mean(0).square())


class Noting(PETAL):
    """Notes the weights at the ends of the further epochs, and the terms of each step."""

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if self.phase.name == POSTERIOR:
            weights = {name: value.detach().clone() for name, value in self.network.named_parameters()}
            self.__dict__.setdefault("ends", []).append(weights)

    def adapt(self, batch, output):
        found = super().adapt(batch, output)
        self.__dict__.setdefault("terms_of", []).append(found[1])
        return found


def test_the_stream_follows_the_equations(monkeypatch):
    monkeypatch.setattr(mean_teacher, "viewed", lambda strategy, batch, draw: batch.images.flip(-1))
    options = {"prior_weight": 0.03, "damping": 1e-3, "restore": 0.1, "teacher_momentum": 0.9, "params": "norm"}
    further = PhaseOptions(epochs=3)
    strategy = watching(Noting, views=1, threshold=2.0, posterior_options=further, optimizer=sgd, **options)
    made = adapt(strategy)
    ends = {name: torch.stack([end[name] for end in strategy.ends]).double() for name in strategy.ends[0]}
    mean, square = ({n: v.pow(k).mean(0) for n, v in ends.items()} for k in (1, 2))
    start = {name.replace("head.blocks.0", "head"): value.float() for name, value in mean.items()}
    networks = student, teacher = source_network(), source_network()
    for network in networks:
        missing = network.load_state_dict(start, strict=False).missing_keys
        assert all("num_batches" in name for name in missing)
    norms = {n: p for n, p in student.named_parameters() if ".bn" in n}
    mu = {n: p.detach().clone() for n, p in norms.items()}
    optimizer, expected, priors = sgd(list(norms.values())), [], []
    for images, _ in batches(made.datamodule):
        with torch.no_grad():
            target = teacher(images.flip(-1)).logits
        expected.append(target)
        gaps = ((p - mu[n]).square() / (square[n] - mean[n].square() + 1e-3) for n, p in norms.items())
        priors.append(0.03 / 2 * sum(gap.sum() for gap in gaps))
        optimizer.zero_grad()
        (F.cross_entropy(student(images).logits, target.softmax(1)) + priors[-1]).backward()
        optimizer.step()
        move_teacher(teacher, student, 0.9)
        gradients = torch.cat([p.grad.square() for p in norms.values()])
        with torch.no_grad():
            for name, p in norms.items():
                low = p.grad.square() < gradients.quantile(0.1)
                p[low] = mu[name][low]
    torch.testing.assert_close(scores(strategy), torch.cat(expected), rtol=1e-3, atol=1e-3)
    found = torch.stack([terms["prior"] for terms in strategy.terms_of]).double()
    assert float(found[0]) == 0.0  # at theta = mu
    torch.testing.assert_close(found, torch.stack(priors).double(), rtol=1e-3, atol=1e-6)
    assert float(found[-1]) > 0.01


def test_without_a_prior_and_with_random_restoration_it_is_cotta():
    options = {"views": 2, "threshold": 0.9, "restore": 0.2, "optimizer": adam}
    mine = watching(PETAL, prior_weight=0.0, select="random", posterior_options=NONE, **options)
    plain = watching(CoTTA, **options)
    adapt(mine)
    adapt(plain)
    assert torch.equal(scores(mine), scores(plain))


def test_statistics_of_normalisation_belong_to_the_mean_of_the_weights():
    strategy = watching(PETAL, statistics="source", views=0, posterior_options=FEW, optimizer=sgd, params="norm")
    made = adapt(strategy, stream(corruptions=["contrast"]))
    network, layer = strategy.source.network, strategy.source.network.backbone.bn1
    data = made.datamodule
    data.begin(data.stream.tasks[0])
    data.begin_phase(0, None, 0)
    images = torch.cat([(batch.raw.float() / 255 - 0.305) / 0.376 for batch in data.train_dataloader()])
    with torch.no_grad():
        maps = network.backbone.conv1(images)
    torch.testing.assert_close(layer.running_mean, maps.mean((0, 2, 3)), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(layer.running_var, maps.var((0, 2, 3)), rtol=3e-2, atol=1e-3)


def test_without_further_epochs_the_prior_is_around_the_source_weights():
    strategy = watching(PETAL, views=0, posterior_options=NONE, damping=0.5, params="norm", optimizer=sgd)
    adapt(strategy, stream(corruptions=["contrast"]))
    source = source_network("source").state_dict()
    anchors, omegas = strategy.prior.anchors, strategy.prior.omegas
    assert anchors
    assert all(torch.equal(value, source[name]) for name, value in anchors.items())
    assert all(bool((value == 2.0).all()) for value in omegas.values())


def test_further_epochs_have_their_own_optimizer():
    [group] = PETAL().posterior_options.optimizer([nn.Parameter(torch.zeros(1))]).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.01, 0.9, 5e-4)


def test_labels_of_test_images_are_not_trained_on():
    with pytest.raises(ValueError, match=r"epochs is 2, but the source images .* give --model\.posterior_options\.ep"):
        adapt(watching(PETAL, posterior_options=FEW), stream(source_part="test"))


def test_it_adapts_to_corruptions():
    errors = online_errors((Source, {}), (PETAL, {"views": 4, "threshold": 0.7, "optimizer": adam}))
    assert errors[1] < errors[0] - 0.15


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prior_weight": -1.0}, r"prior_weight is -1\.0"),
        ({"damping": 0.0}, r"damping is 0\.0"),
        ({"restore": 1.1}, r"restore is 1\.1"),
        ({"select": "none"}, "select is 'none'"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=f"PETAL: .*{words}"):
        PETAL(**options)
