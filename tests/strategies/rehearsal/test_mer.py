"""Meta-Experience Replay."""

import copy
from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.runs import plain_net, run, sgd
from torch.nn import functional as F

from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.mer import MER
from cl_lightning.stream import ClassIncremental, Online
from cl_lightning.testing import Subject, small

PUBLISHED = {
    "mer_rotated_mnist": {
        "source": "aimagelab/mammoth: models/config/mer.yaml, rot-mnist with a memory of 200; algorithm 6",
        "memory_size": 200,
        "replay_size": 25,
        "within_rate": 0.01,
        "across_rate": 0.03,
        "per_sample": False,
        "backbone": "MLP(hidden=[100, 100])",
        "optimizer": "SGD(lr=0.1)",
        "data.scenario": "RotatedDomains(tasks=20)",
        "data.batch_size": 1,
        "trainer.max_epochs": 1,
    },
}


def plain_sgd(parameters, lr=0.1):
    return torch.optim.SGD(parameters, lr=lr)


SUBJECTS = {
    "MER": Subject(
        small(MER, optimizer=plain_sgd, replay_size=3, lists=2, per_sample=False),
        first_task_is_finetuning=False,
        reason="a part of the steps on batch and memory takes the place of the step",
    ),
}


class Follows(MER):
    """Takes each step of the stream again by hand, on a copy of the network, and notes the largest difference."""

    def __init__(self, **options):
        super().__init__(backbone=plain_net, optimizer=plain_sgd, memory_size=40, **options)
        self.gaps, self.drawn, self.moved, self.ce = [], [], [], []

    def prepare_batch(self, batch):
        self.before, self.drawn = copy.deepcopy(self.network), []
        return super().prepare_batch(batch)

    def replay(self, batch, *salt):
        replay = super().replay(batch, *salt)
        if salt:
            self.drawn.append(replay)
        return replay

    def after_step(self, batch):
        expected = self.by_hand(batch)
        pairs = zip(self.network.parameters(), expected, strict=True)
        self.gaps.append(max(float((mine - other).abs().max()) for mine, other in pairs))
        pairs = zip(self.network.parameters(), self.before.parameters(), strict=True)
        self.moved.append(max(float((mine - other).abs().max()) for mine, other in pairs))
        super().after_step(batch)

    @torch.enable_grad()
    def by_hand(self, batch):
        network = copy.deepcopy(self.before)
        optimizer = torch.optim.SGD(network.parameters(), lr=self.inner_lr or 0.1)
        outer = [value.detach().clone() for value in network.parameters()]
        for replay in self.drawn:
            inner = [value.detach().clone() for value in network.parameters()]
            images = batch.images if replay is None else torch.cat([replay.images, batch.images])
            labels = batch.labels if replay is None else torch.cat([replay.labels, batch.labels])
            size = 1 if self.per_sample else len(images)
            for rows, classes in zip(images.split(size), labels.split(size), strict=True):
                optimizer.zero_grad()
                F.cross_entropy(network(rows).logits, classes).backward()
                optimizer.step()
            with torch.no_grad():
                for value, first in zip(network.parameters(), inner, strict=True):
                    value.copy_(first + self.within_rate * (value - first))
        pairs = zip(network.parameters(), outer, strict=True)
        return [first + self.across_rate * (value.detach() - first) for value, first in pairs]


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize(
    "options", [{"within_rate": 0.3, "across_rate": 0.7, "lists": 2, "inner_lr": 0.2}, {"lists": 1}]
)
def test_a_run_goes_the_way_of_the_algorithm(per_sample, options):
    strategy = Follows(per_sample=per_sample, replay_size=3, **options)
    data = {"scenario": Online(ClassIncremental(sizes=[4, 3, 3]), batch_size=4), "batch_size": 4}
    run(strategy, max_epochs=1, data=data, limit_train_batches=4)
    assert len(strategy.gaps) == 12
    assert max(strategy.gaps) < 1e-6
    assert min(strategy.moved) > 1e-4
    assert [len(replay) for replay in strategy.drawn] == [3] * strategy.lists


def test_one_list_of_one_sample_without_memory_is_a_small_step_of_sgd():
    # displacement beta gamma lr grad: SGD with the learning rate 0.1 * 0.5 * 0.3
    made = run(
        MER(backbone=plain_net, optimizer=plain_sgd, memory_size=0, within_rate=0.5, across_rate=0.3, per_sample=False),
        max_epochs=1,
    )
    plain = run(Finetune(backbone=plain_net, optimizer=partial(plain_sgd, lr=0.015)), max_epochs=1)
    for mine, other in zip(made.strategy.parameters(), plain.strategy.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"within_rate": 0.0}, {"across_rate": 0.0}])
def test_a_part_of_0_keeps_the_weights(options):
    strategy = Follows(per_sample=False, **options)
    run(strategy, max_epochs=1, limit_train_batches=3)
    assert max(strategy.moved) == 0


def test_it_is_far_above_finetuning_on_a_stream_that_is_seen_once():
    data = {"scenario": Online(ClassIncremental(tasks=5), batch_size=10), "batch_size": 10}
    options = {"data": data, "limit_train_batches": 8}
    mer = MER(
        backbone=plain_net, memory_size=100, replay_size=10, optimizer=plain_sgd, within_rate=0.7, across_rate=0.7
    )
    mer = run(mer, **options).matrix.measures()["average_accuracy"]
    none = finetuning({"backbone": plain_net, "optimizer": plain_sgd}, **options).measures()["average_accuracy"]
    # Measured: .58 against .17.
    assert mer > none + 0.25


def test_an_optimizer_that_moves_the_weights_under_it_is_refused():
    for optimizer in (sgd, torch.optim.Adam):
        with pytest.raises(ValueError, match=r"MER: optimizer is .*; use torch.optim.SGD without momentum"):
            run(MER(backbone=plain_net, optimizer=optimizer))


@pytest.mark.parametrize(
    "options",
    [{"within_rate": 1.1}, {"across_rate": -0.1}, {"lists": 0}, {"inner_lr": 0.0}, {"loss_classes": "current"}],
)
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match="MER"):
        MER(**options)
