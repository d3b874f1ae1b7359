"""Analytic class-incremental learning."""

from functools import partial

import pytest
import torch
from support.pretrained import in_tasks, samples_right
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP, LinearHead, RidgeHead
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.acil import ACIL
from cl_lightning.strategies.pretrained.gacil import GACIL
from cl_lightning.testing import Subject, check_limit, check_strategy, small

SUBJECTS = {
    "ACIL": Subject(
        small(ACIL, ridge=1.0, projection=40),
        first_task_is_finetuning=False,
        reason="the head has a closed form after the first task",
    ),
}

PUBLISHED = {
    "acil_cifar100": {
        "source": "ZHUANGHP/Analytic-continual-learning: the command for CIFAR-100, without TrivialAugment and warm-up",
        "backbone": "ResNet32",
        "ridge": 0.1,
        "projection": 8192,
        "session_epochs": 300,
        "optimizer": "SGD(lr=0.5, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase",
        "data.scenario": "ClassIncremental(class_order=1993, first=50, increment=2)",
        "data.batch_size": 256,
    },
}

hidden = partial(MLP, hidden=(64,))
SMALL = partial(ACIL, backbone=hidden, ridge=1.0, projection=200)


def test_after_the_first_task_it_is_the_regression_on_all_samples_at_once():
    made = in_tasks(SMALL, 2, max_epochs=2)
    strategy, data = made.strategy.eval(), made.datamodule
    batches = list(strategy.passes.batches(indices=torch.arange(len(data.samples(train=True).labels))))
    raw = data.samples(train=True).labels[torch.cat([batch.indices for batch in batches]).numpy()]
    targets = F.one_hot(torch.as_tensor(made.stream.columns_of(raw)), 10).double()
    head = strategy.network.head.final
    with torch.no_grad():
        features = torch.cat([strategy.network.backbone(batch.images) for batch in batches]).double()
    inputs = (features @ head.random.double()).clamp(min=0)
    joint = torch.linalg.solve(inputs.T @ inputs + torch.eye(200).double(), inputs.T @ targets)
    torch.testing.assert_close(head.weight().T, joint, rtol=1e-3, atol=1e-4)


def test_its_parts_are_those_of_the_paper():
    strategy = ACIL(backbone=hidden)
    strategy.build((1, 8, 8))
    head = strategy.network.head
    assert isinstance(head.temporary, LinearHead)
    assert isinstance(head.final, RidgeHead)
    assert (head.final.ridges, head.final.activation, head.final.backend) == ([0.1], "relu", "recursive")
    assert head.final.random.shape == (64, 8192)
    assert 0.124 < float(head.final.random.abs().max()) <= 1 / 8


def test_on_a_frozen_backbone_it_is_gacil():
    options = {"ridge": 1.0, "projection": 40}
    check_limit(small(ACIL, adapt=False, **options), small(GACIL, **options))


def test_it_learns_a_backbone_in_the_first_task_and_does_not_forget():
    made = in_tasks(SMALL, 2, max_epochs=3)
    plain = in_tasks(partial(Finetune, backbone=hidden), 2, max_epochs=3)
    # Measured: .96 against .48.
    assert last_accuracy(made.matrix.R_ci) > last_accuracy(plain.matrix.R_ci) + 0.3
    other = in_tasks(partial(SMALL, backend="accumulate"), 2, max_epochs=3)
    assert abs(samples_right(made.matrix) - samples_right(other.matrix)) <= 1


def test_sums_conform():
    make = small(ACIL, ridge=1.0, projection=40, backend="accumulate")
    check_strategy(make, checks=["trains", "resume", "restores", "bytes"], first_task_is_finetuning=False)


def test_options_out_of_range_are_errors():
    with pytest.raises(ValueError, match="ridge is 0"):
        ACIL(ridge=0.0)
