"""Clustering accuracy after each task."""

from functools import partial

import torch
from support.runs import assert_resumes, assert_same_run, plain_net, run, sgd

from cl_lightning.callbacks.discovery_accuracy import DiscoveryAccuracy
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.er import ER

SMALL = partial(ER, backbone=plain_net, optimizer=sgd, memory_size=100)


class Permuted(ER):
    """Its predictions have the columns in another order."""

    def predict(self, images: torch.Tensor, tasks: torch.Tensor | None = None) -> torch.Tensor:
        return super().predict(images).roll(1, dims=1)


def test_it_is_the_accuracy_of_columns_in_any_order_and_observes_alone():
    accuracy, permuted = DiscoveryAccuracy(), DiscoveryAccuracy()
    made = run(SMALL(), accuracy)
    other = run(Permuted(backbone=plain_net, optimizer=sgd, memory_size=100), permuted)
    assert accuracy.tasks[1:] == permuted.tasks[1:]
    plain = made.matrix.measures()["average_accuracy"]
    assert abs(accuracy.tasks[-1].all - plain) < 0.02  # the best order is that of the columns
    assert other.matrix.measures()["average_accuracy"] < 0.2
    assert_same_run(made, run(SMALL()))


def test_old_classes_are_those_of_earlier_tasks():
    accuracy = DiscoveryAccuracy()
    run(Finetune(backbone=plain_net, optimizer=sgd), accuracy)
    assert accuracy.tasks[0].old != accuracy.tasks[0].old  # nan: there are none
    assert all(each.new > each.old + 0.3 for each in accuracy.tasks[1:])  # fine-tuning forgets
    assert set(accuracy.results()) == {"all", "old", "new"}


def test_it_is_resumed(tmp_path):
    assert_resumes(lambda: (SMALL(), [DiscoveryAccuracy()]), tmp_path)
