"""L2Init and WassersteinRegularization."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.fakes import normal
from support.runs import assert_resumes, assert_same_run, plain_net, run, sgd
from torch import nn

from cl_lightning.callbacks.l2_init import L2Init
from cl_lightning.callbacks.wasserstein_regularization import WassersteinRegularization
from cl_lightning.strategies.baselines.finetune import Finetune

FINETUNE = partial(Finetune, backbone=plain_net, optimizer=sgd)
BOTH = pytest.mark.parametrize("kind", [L2Init, WassersteinRegularization])


def case(callback):
    """A network whose weights have moved since the callback saw them first."""
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    strategy = SimpleNamespace(network=network)
    callback.on_task_start(None, strategy, None)
    first = {name: value.detach().clone() for name, value in network.named_parameters()}
    with torch.no_grad():
        for seed, value in enumerate(network.parameters()):
            value.add_(normal(*value.shape, seed=seed))
    return strategy, first


def test_l2_init_is_the_sum_of_squares():
    callback = L2Init(weight=0.3)
    strategy, first = case(callback)
    found = callback.losses(strategy, None, None)["l2_init"]
    expected = sum((value - first[name]).square().sum() for name, value in strategy.network.named_parameters())
    torch.testing.assert_close(found, 0.3 * expected)


def test_wasserstein_compares_sorted_weights_of_matrices():
    callback = WassersteinRegularization(weight=0.3)
    strategy, first = case(callback)
    found = callback.losses(strategy, None, None)["wasserstein"]
    expected, bound = 0.0, 0.0
    for name in ("0.weight", "1.weight"):
        weight = strategy.network.get_parameter(name).detach()
        pairs = list(zip(sorted(weight.flatten().tolist()), sorted(first[name].flatten().tolist()), strict=True))
        expected += sum((a - b) ** 2 for a, b in pairs) / len(pairs)
        bound += (weight - first[name]).square().mean()
    torch.testing.assert_close(found.detach(), torch.tensor(0.3 * expected).double())
    assert found < 0.3 * bound
    found.backward()
    weight = strategy.network[0].weight
    ranks = weight.detach().flatten().argsort().argsort()
    gradient = 2 / 12 * (weight.detach().flatten() - first["0.weight"].flatten().sort().values[ranks])
    torch.testing.assert_close(weight.grad.flatten(), 0.3 * gradient)


def test_a_permutation_of_the_first_weights_costs_nothing():
    wasserstein, squares = WassersteinRegularization(), L2Init()
    network = nn.Sequential(nn.Linear(3, 4)).double()
    strategy = SimpleNamespace(network=network)
    for callback in (wasserstein, squares):
        callback.on_task_start(None, strategy, None)
    with torch.no_grad():
        network[0].weight.copy_(network[0].weight.flip(0, 1))
    assert wasserstein.losses(strategy, None, None)["wasserstein"] == 0
    assert squares.losses(strategy, None, None)["l2_init"] > 0


@BOTH
def test_the_first_value_of_new_rows_is_theirs_and_frozen_weights_have_no_term(kind):
    callback, network = kind(weight=1.0), nn.ModuleList([nn.Linear(3, 2)])
    strategy = SimpleNamespace(network=network)
    callback.on_task_start(None, strategy, None)
    with torch.no_grad():
        network[0].weight.add_(1.0)
    network.append(nn.Linear(3, 2))
    callback.on_task_start(None, strategy, None)
    before = float(next(iter(callback.losses(strategy, None, None).values())))
    with torch.no_grad():
        network[1].weight.add_(1.0)
    after = float(next(iter(callback.losses(strategy, None, None).values())))
    assert after == pytest.approx(2 * before)
    network[0].requires_grad_(False)
    assert float(next(iter(callback.losses(strategy, None, None).values()))) == pytest.approx(before)
    network.requires_grad_(False)
    assert callback.losses(strategy, None, None) == {}


@BOTH
def test_without_a_weight_it_is_its_host_and_it_resumes(kind, tmp_path):
    assert_same_run(run(FINETUNE(), kind(weight=0.0)), run(FINETUNE()))
    assert_resumes(lambda: (FINETUNE(), [kind(weight=0.1)]), tmp_path)
    with pytest.raises(ValueError, match="weight"):
        kind(weight=-1.0)


@BOTH
def test_weights_stay_near_their_first_values(kind):
    gaps, large = [], {L2Init: 1.0, WassersteinRegularization: 100.0}[kind]
    for weight in (0.0, large):
        watch = kind(weight=weight or 1.0)
        strategy = run(FINETUNE(), *([watch] if weight else []), max_epochs=3).strategy
        fresh = kind(weight=1.0)
        fresh.first = dict(watch.first) if weight else {}
        if not weight:
            reference = kind(weight=1.0)
            start = FINETUNE()
            torch.manual_seed(0)
            start.build((1, 8, 8))
            reference.on_task_start(None, start, None)
            fresh.first = reference.first
        strategy.network.requires_grad_(True)
        names = {name: value for name, value in fresh.first.items() if name.startswith("backbone")}
        fresh.first = names
        gaps.append(float(next(iter(fresh.losses(strategy, None, None).values()))))
    assert gaps[1] < 0.5 * gaps[0]
