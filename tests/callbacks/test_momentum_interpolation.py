import math
from functools import partial

import pytest
import torch
from support.pretrained import finetuning_in_tasks, samples_right
from support.runs import NormNet, assert_resumes, assert_same, assert_same_run, plain_net, run, sgd

from cl_lightning.callback import ContinualCallback
from cl_lightning.callbacks.ema_ensemble import EMAEnsemble
from cl_lightning.callbacks.momentum_interpolation import MomentumInterpolation
from cl_lightning.models import MLP
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, check_strategy, small


def finetune(**options):
    return Finetune(**{"backbone": NormNet, "optimizer": sgd, **options})


def state(strategy):
    tensors = strategy.network.state_dict()
    return {name: value.detach().clone() for name, value in tensors.items() if value.is_floating_point()}


class Look(ContinualCallback):
    """Keeps the network before each fit, after each optimizer step, and while it is evaluated."""

    def __init__(self):
        self.starts, self.steps, self.tested = [], [], []

    def on_train_start(self, trainer, strategy):
        self.starts.append(state(strategy))
        self.steps.append([])
        self.count = trainer.global_step

    def on_train_batch_end(self, trainer, strategy, outputs, batch, batch_idx):
        if trainer.global_step > self.count:
            self.count = trainer.global_step
            self.steps[-1].append(state(strategy))

    def on_test_epoch_start(self, trainer, strategy):
        self.tested.append(state(strategy))


@pytest.mark.parametrize("interval", [1, 4])
def test_slow_weights_follow_at_every_interval_by_the_steps_of_the_task(interval):
    look = Look()
    run(finetune(), MomentumInterpolation(tasks_covered=2.0, interval=interval), look, accumulate_grad_batches=2)
    slow, number = {}, 0
    for start, steps, tested in zip(look.starts, look.steps, look.tested, strict=True):
        slow |= {name: value.double() for name, value in start.items() if name not in slow}
        tau = 1 - interval / (2.0 * len(steps))
        assert 0 < tau < 1
        for theta in steps:
            number += 1
            if number % interval == 0:
                slow = {name: tau * value + (1 - tau) * theta[name].double() for name, value in slow.items()}
        for name, value in tested.items():
            torch.testing.assert_close(value.double(), slow[name], rtol=1e-5, atol=1e-6)


def test_the_default_keeps_exp_of_minus_1_of_the_weights_before_a_task():
    callback = MomentumInterpolation()
    callback._steps = 5000
    assert callback._momentum(None) ** 5000 == pytest.approx(math.exp(-1), rel=1e-3)
    callback._steps = 1
    assert callback._momentum(None) == 0.0


def test_momentum_0_is_the_trained_network_and_1_the_first_one_at_every_evaluation():
    first, last = Look(), Look()
    plain = run(finetune(), first)
    assert_same_run(run(finetune(), MomentumInterpolation(momentum=0.0)), plain)
    run(finetune(), MomentumInterpolation(momentum=1.0), last)
    for tested in last.tested:
        for name, value in tested.items():
            born = next(start[name] for start in last.starts if name in start)
            assert torch.equal(value, born), name


def test_training_is_the_same_with_and_without_to_the_bit():
    ours, plain = Look(), Look()
    run(finetune(), MomentumInterpolation(), ours)
    run(finetune(), plain)
    for mine, other in zip(ours.steps, plain.steps, strict=True):
        for one, two in zip(mine, other, strict=True):
            assert_same(one, two)


def test_it_is_the_ensemble_without_warm_up():
    ours = run(finetune(), MomentumInterpolation(momentum=0.9))
    assert_same_run(ours, run(finetune(), EMAEnsemble(momentum=0.9, warmup_steps=0)))


def test_a_reset_begins_each_task_with_the_slow_weights():
    look = Look()
    run(finetune(), MomentumInterpolation(momentum=0.9, reset_fast=True), look)
    for tested, start in zip(look.tested, look.starts[1:], strict=False):
        for name, value in tested.items():
            assert torch.equal(start[name], value), name
    assert any(not torch.equal(look.steps[0][-1][name], look.starts[1][name]) for name in look.steps[0][-1])


@pytest.mark.parametrize("reset_fast", [False, True])
def test_it_resumes_to_the_bit_in_the_middle_of_a_task(tmp_path, reset_fast):
    assert_resumes(lambda: (finetune(), [MomentumInterpolation(interval=3, reset_fast=reset_fast)]), tmp_path)


def test_it_passes_the_suite_with_a_memory():
    subject = Subject(
        small(ER, memory_size=20),
        callbacks=lambda: [MomentumInterpolation(reset_fast=True)],
        first_task_is_finetuning=False,
    )
    check_strategy(subject, checks=["trains", "restores", "options", "data"])


def test_it_forgets_less_than_fine_tuning():
    settings = {"data": {"scenario": ClassIncremental(tasks=5)}, "max_epochs": 3}
    wide = partial(MLP, hidden=(64,))
    plain = finetuning_in_tasks({"backbone": wide, "loss_classes": "current"}, 5, max_epochs=3)
    made = run(Finetune(backbone=wide, loss_classes="current"), MomentumInterpolation(), **settings)
    # Measured: 185 and 133 of 360.
    assert samples_right(made.matrix) > samples_right(plain) + 20


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum": 1.5}, r"momentum is 1\.5"),
        ({"tasks_covered": 0.0}, r"tasks_covered is 0\.0"),
        ({"interval": 0}, "interval is 0"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=f"MomentumInterpolation: {words}"):
        MomentumInterpolation(**options)


def test_a_network_that_does_not_move_stays_as_it_is():
    look = Look()
    still = partial(torch.optim.SGD, lr=0.0)
    run(finetune(backbone=plain_net, optimizer=still), MomentumInterpolation(momentum=0.5), look)
    for name, value in look.tested[-1].items():
        born = next(start[name] for start in look.starts if name in start)
        assert torch.equal(value, born), name
