from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from support.runs import assert_resumes, assert_same_run, plain_net, run, sgd

from cl_lightning.callback import ContinualCallback
from cl_lightning.callbacks.shrink_and_perturb import ShrinkAndPerturb
from cl_lightning.strategies.baselines.finetune import Finetune

FINETUNE = partial(Finetune, backbone=plain_net, optimizer=partial(torch.optim.SGD, lr=0.1))


class Starts(ContinualCallback):
    """Keeps the weights of the backbone at the start of each task; before or after another callback."""

    def __init__(self) -> None:
        self.weights = []

    def on_task_start(self, trainer, strategy, task):
        self.weights.append(torch.cat([p.detach().flatten() for p in strategy.network.backbone.parameters()]))


class Steps(Callback):
    """Keeps the weights of the backbone after each step."""

    def __init__(self) -> None:
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights.append(torch.cat([p.detach().flatten() for p in pl_module.network.backbone.parameters()]))


def test_at_each_task_but_the_first_weights_shrink_and_noise_is_added():
    before, after = Starts(), Starts()
    run(FINETUNE(), before, ShrinkAndPerturb(shrink=0.7, noise=0.05), after, max_epochs=1)
    assert torch.equal(before.weights[0], after.weights[0])
    draws = []
    for old, new in zip(before.weights[1:], after.weights[1:], strict=True):
        xi = (new - 0.7 * old) / 0.05
        assert abs(float(xi.mean())) < 0.05
        assert abs(float(xi.std()) - 1) < 0.05
        draws.append(xi)
    assert abs(float((draws[0] * draws[1]).mean())) < 0.1  # other numbers in each task


def test_after_each_step_the_change_has_the_learning_rate():
    plain, changed = Steps(), Steps()
    run(FINETUNE(), plain, max_epochs=1)
    run(FINETUNE(), ShrinkAndPerturb(shrink=0.5, noise=0.2, every="step"), changed, max_epochs=1)
    xi = (changed.weights[0] - (1 - 0.1 * 0.5) * plain.weights[0]) / (-0.1 * 0.2)
    assert abs(float(xi.mean())) < 0.05
    assert abs(float(xi.std()) - 1) < 0.05


def test_accumulated_gradients_are_one_step():
    shrink = ShrinkAndPerturb(shrink=0.0, noise=0.0, every="step")
    strategy = Finetune(backbone=plain_net, optimizer=partial(torch.optim.SGD, lr=0.5))
    steps = Steps()
    made = run(strategy, shrink, steps, max_epochs=1, accumulate_grad_batches=3)
    lengths = torch.stack([w.norm() for w in steps.weights[:6]])
    assert torch.equal(lengths[0], lengths[1])  # no step yet
    assert lengths[2] < 0.6 * lengths[1]  # one step: theta / 2
    assert made.trainer.global_step < len(steps.weights)


def test_it_is_its_host_where_nothing_changes_and_it_resumes(tmp_path):
    for every in ("task", "step"):
        assert_same_run(run(FINETUNE(), ShrinkAndPerturb(shrink=1.0, noise=0.0, every=every)), run(FINETUNE()))
        make = partial(ShrinkAndPerturb, shrink=0.9, noise=0.01, every=every)
        assert_resumes(lambda make=make: (Finetune(backbone=plain_net, optimizer=sgd), [make()]), tmp_path / every)


def test_options_out_of_range_are_refused():
    for options in ({"shrink": 1.1}, {"noise": -1.0}, {"every": "epoch"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ShrinkAndPerturb(**options)
