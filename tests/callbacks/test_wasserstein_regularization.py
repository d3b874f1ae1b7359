"""Regularisation towards the initial weights: closed forms, the order of the two distances, and runs."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.fakes import normal
from support.runs import NormNet, assert_resumes, assert_same_run, plain_net, run, sgd
from torch import nn

from cl_lightning.callbacks.wasserstein_regularization import L2Init, WassersteinRegularization, wasserstein_to
from cl_lightning.models import LinearHead, Network
from cl_lightning.strategies.baselines.finetune import Finetune

BOTH = pytest.mark.parametrize(("kind", "term"), [(WassersteinRegularization, "wasserstein"), (L2Init, "l2_init")])


def test_the_distance_is_0_for_a_permutation_and_has_its_gradient_elsewhere():
    initial, weight = normal(3, 4, seed=1), normal(3, 4, seed=2, requires_grad=True)
    shuffled = initial.flatten()[torch.randperm(12, generator=torch.Generator().manual_seed(0))].view(3, 4)
    target = initial.flatten().sort().values
    assert float(wasserstein_to(shuffled, target)) == 0
    wasserstein_to(weight, target).backward()
    flat = weight.detach().flatten()
    rank = torch.tensor([int((flat < value).sum()) for value in flat])
    torch.testing.assert_close(weight.grad.flatten(), 2 / 12 * (flat - target[rank]))


def test_numbers_by_hand():
    # Sorted (1, 2, 5) against (0, 3, 4): (1 + 1 + 1) / 3.
    assert float(wasserstein_to(torch.tensor([5.0, 1.0, 2.0]), torch.tensor([0.0, 3.0, 4.0]))) == 1.0


def test_it_is_never_larger_than_the_mean_of_the_squared_changes():
    for seed in range(20):
        initial, weight = normal(5, 4, seed=seed), normal(5, 4, seed=seed + 100)
        distance = wasserstein_to(weight, initial.flatten().sort().values)
        assert 0 < float(distance) <= float((weight - initial).square().mean())


@BOTH
def test_the_term_is_the_sum_over_the_trained_tensors(kind, term):
    network = Network(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), LinearHead(2)).double()
    callback = kind(weight=0.3)
    callback.remember(network)
    first = {name: value.detach().clone() for name, value in network.named_parameters()}
    network.backbone[1].requires_grad_(False)
    with torch.no_grad():
        for place, value in enumerate(network.parameters()):
            value.add_(normal(*value.shape, seed=place))
    callback.remember(network)  # what is known stays
    expected = torch.zeros((), dtype=torch.float64)
    for name in ("backbone.0.weight", "backbone.0.bias"):
        now, then = dict(network.named_parameters())[name].detach().flatten(), first[name].flatten()
        if kind is L2Init:
            expected += ((now - then) ** 2).sum()
        else:
            expected += sum((a - b) ** 2 for a, b in zip(sorted(now), sorted(then), strict=True)) / len(now)
    strategy = SimpleNamespace(network=network)
    torch.testing.assert_close(callback.losses(strategy, None, None)[term].detach(), 0.3 * expected)
    assert callback.bytes_kept()["initial weights"] == 8 * (12 + 3 + 6 + 2)


@BOTH
def test_a_head_that_grows_begins_with_its_first_weights(kind, term):
    network = Network(nn.Flatten(), LinearHead(4))
    callback = kind()
    for new in (2, 3):
        network.head.grow(new)
        callback.remember(network)
        assert float(callback.losses(SimpleNamespace(network=network), None, None)[term]) == 0
    assert set(callback.initial) == {name for name, _ in network.named_parameters()}


@BOTH
def test_weight_0_is_its_host_to_the_bit_and_it_resumes(kind, term, tmp_path):
    host = partial(Finetune, backbone=NormNet, optimizer=sgd)
    assert_same_run(run(host(), kind(weight=0.0), max_epochs=1), run(host(), max_epochs=1))
    assert_resumes(lambda: (host(), [kind(weight=0.1)]), tmp_path)


@pytest.mark.parametrize(("kind", "weight"), [(WassersteinRegularization, 10.0), (L2Init, 0.1)])
def test_weights_stay_nearer_to_the_initial_ones(kind, weight):
    def distance(weight):
        callback = kind(weight=weight)
        plain = partial(torch.optim.SGD, lr=0.1)
        network = run(Finetune(backbone=plain_net, optimizer=plain), callback, max_epochs=3).strategy.network
        return sum(
            float(callback.distance(value, callback.initial[name])) for name, value in network.named_parameters()
        )

    assert distance(weight) < 0.5 * distance(0.0)


@BOTH
def test_wrong_options_are_errors(kind, term):
    with pytest.raises(ValueError, match=kind.__name__):
        kind(weight=-1)
