"""Shrink and perturb: its equations at a task and at a step, what stays, and runs with it."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.fakes import normal, task_of
from support.runs import NormNet, assert_resumes, assert_same_run, run, sgd
from torch import nn

from cl_lightning.callbacks.shrink_and_perturb import ShrinkAndPerturb
from cl_lightning.models import LinearHead, Network
from cl_lightning.strategies.baselines.finetune import Finetune

BOTH = pytest.mark.parametrize("when", ["task", "step"])


def strategy_of(width=50, *, frozen=False, seed=0):
    network = Network(nn.Linear(width, width), LinearHead(width), backbone_is_frozen=frozen).double()
    network.head.grow(2)
    network.double()
    return SimpleNamespace(network=network, seed=seed, task=task_of(1), device=torch.device("cpu"))


def start_task(callback, strategy, index=1):
    """What the start of a task does: the parameters before and after by name."""
    before = {name: value.detach().clone() for name, value in strategy.network.named_parameters()}
    if index:
        strategy.network.head.grow(2)
    callback.on_task_start(None, strategy, task_of(index))
    return before, {name: value.detach() for name, value in strategy.network.named_parameters()}


def test_a_task_shrinks_all_weights_apart_from_the_rows_of_its_classes():
    strategy = strategy_of()
    before, after = start_task(ShrinkAndPerturb(shrink=0.25, noise=0.0), strategy)
    for name, value in before.items():
        torch.testing.assert_close(after[name], 0.25 * value)
    fresh = strategy_of().network.head
    torch.manual_seed(3)
    fresh.grow(2)
    new = fresh.blocks[1].weight.detach().clone()
    strategy = SimpleNamespace(network=Network(nn.Identity(), fresh), seed=0)
    ShrinkAndPerturb(shrink=0.25).on_task_start(None, strategy, task_of(1))
    torch.testing.assert_close(fresh.blocks[1].weight.detach(), new, rtol=0, atol=0)


def test_the_noise_of_a_task_has_its_deviation_and_differs_between_tasks_and_seeds():
    found = []
    for index, seed in ((1, 0), (2, 0), (1, 1), (1, 0)):
        before, after = start_task(ShrinkAndPerturb(shrink=1.0, noise=0.3), strategy_of(seed=seed), index)
        found.append(after["backbone.weight"] - before["backbone.weight"])
    assert 0.28 < float(found[0].std()) < 0.32
    assert abs(float(found[0].mean())) < 0.03
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    torch.testing.assert_close(found[0], found[3])


@pytest.mark.parametrize(("index", "frozen"), [(0, False), (1, True)])
def test_the_first_task_and_a_frozen_backbone_stay(index, frozen):
    before, after = start_task(ShrinkAndPerturb(), strategy_of(frozen=frozen), index)
    assert torch.equal(before["backbone.weight"], after["backbone.weight"])
    assert torch.equal(before["head.blocks.0.weight"], after["head.blocks.0.weight"]) == (index == 0)


def step(callback, weights, gradients, rates, *, steps=1):
    optimizer = torch.optim.SGD([{"params": [w], "lr": lr} for w, lr in zip(weights, rates, strict=True)])
    strategy = SimpleNamespace(seed=0, task=task_of(0), device=torch.device("cpu"))
    for number in range(steps):
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        callback.on_before_optimizer_step(SimpleNamespace(global_step=number), strategy, optimizer)
        optimizer.step()


def test_a_step_of_sgd_is_the_equation():
    weights = [normal(4, 3, seed=1), normal(5, seed=2), normal(2, seed=3)]
    before, gradients = [w.clone() for w in weights], [normal(4, 3, seed=4), normal(5, seed=5), None]
    rates = (0.1, 0.3, 0.5)
    step(ShrinkAndPerturb(when="step", decay=0.2, noise=0.0), weights, gradients, rates)
    for place in (0, 1):
        expected = (1 - rates[place] * 0.2) * before[place] - rates[place] * gradients[place]
        torch.testing.assert_close(weights[place], expected)
    assert torch.equal(weights[2], before[2])  # without a gradient


def test_the_noise_of_a_step_is_scaled_by_the_rate_and_is_new_at_each_step():
    moved = []
    for steps in (1, 2):
        weights = [torch.zeros(100, 100, dtype=torch.float64), torch.zeros(100, 100, dtype=torch.float64)]
        callback = ShrinkAndPerturb(when="step", decay=0.0, noise=0.5)
        step(callback, weights, [torch.zeros_like(w) for w in weights], (0.1, 0.4), steps=steps)
        moved.append(weights)
    for weight, rate in zip(moved[0], (0.1, 0.4), strict=True):
        torch.testing.assert_close(float(weight.std()), 0.5 * rate, rtol=0.05, atol=0)
    assert abs(float((moved[0][0] * moved[0][1]).mean())) < 0.05 * 0.5**2 * 0.1 * 0.4 * 10
    torch.testing.assert_close(float(moved[1][1].std()), 0.5 * 0.4 * 2**0.5, rtol=0.05, atol=0)


@pytest.mark.parametrize("options", [{"shrink": 1.0, "noise": 0}, {"when": "step", "decay": 0, "noise": 0}])
def test_without_shrinking_and_noise_it_is_its_host_to_the_bit(options):
    host = partial(Finetune, backbone=NormNet, optimizer=sgd)
    assert_same_run(run(host(), ShrinkAndPerturb(**options), max_epochs=1), run(host(), max_epochs=1))


@BOTH
def test_it_resumes_to_the_bit(when, tmp_path):
    assert_resumes(lambda: (Finetune(backbone=NormNet, optimizer=sgd), [ShrinkAndPerturb(when=when)]), tmp_path)


@pytest.mark.parametrize("options", [{"when": "epoch"}, {"shrink": 1.5}, {"noise": -1}, {"decay": -1}])
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match="ShrinkAndPerturb"):
        ShrinkAndPerturb(**options)
