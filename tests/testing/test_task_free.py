"""The check of methods that state ``task_free``."""

from functools import partial

import pytest
import torch
from support.runs import plain_net

from cl_lightning.memory import ClassBalanced
from cl_lightning.strategies.online.mir import MIR
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.strategy import Traits
from cl_lightning.testing import Subject, TinyDigits, check_strategy, small
from cl_lightning.testing.task_free import drifting

STATED = Traits(family="rehearsal", keeps_exemplars=True, task_free=True)


class Weighs(ER):
    """Weighs the samples by their task."""

    traits = STATED

    def losses(self, batch, output):
        terms = super().losses(batch, output)
        return {name: term * (1 + batch.tasks.float().mean()) for name, term in terms.items()}


class KeepsByTask(ER):
    """A memory with equal numbers of samples of each task."""

    def __init__(self, **kwargs):
        super().__init__(policy=ClassBalanced(by="task"), **kwargs)
        self.traits = STATED


class Aligns(ER):
    """Changes the head when a task ends."""

    traits = STATED

    def end_task(self, task):
        super().end_task(task)
        self.network.head.blocks[0].weight.data.mul_(2.0)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Weighs, "the state after training with other task ids"),
        (KeepsByTask, "the state after training with other task ids"),
        (Aligns, "predictions before and after the end of the task"),
    ],
)
def test_methods_that_look_at_tasks_fail(cls, message):
    with pytest.raises(AssertionError, match=f"task_free: {message}"):
        check_strategy(Subject(small(cls), first_task_is_finetuning=False), checks=["task_free"])


def test_a_method_that_does_not_passes():
    check_strategy(Subject(small(ER), first_task_is_finetuning=False), checks=["task_free"])


@pytest.mark.parametrize(
    "make",
    [
        partial(ER, policy=ClassBalanced(by="task")),
        partial(ER, loss_classes="task"),
        partial(ER, replay_by="loader"),
        partial(MIR, candidates_of="earlier"),
    ],
)
def test_options_that_need_task_ids_are_stated(make):
    assert type(make()).traits.task_free
    assert not make(backbone=plain_net).traits.task_free


def test_the_classes_of_the_stream_drift():
    stream = drifting(TinyDigits)
    stream.make_stream(0)
    stream.begin(stream.stream.tasks[0])
    stream.begin_phase(0, None, 0)
    labels = torch.cat([batch.labels for batch in stream.train_dataloader()])
    firsts = [labels.tolist().index(label) for label in labels.unique().tolist()]
    assert len(firsts) == 10
    assert (labels[1:] != labels[:-1]).sum() == 9  # one class after another
