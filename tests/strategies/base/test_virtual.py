import copy
from types import SimpleNamespace

import pytest
import torch
from support.fakes import batch_of, normal
from support.runs import NormNet
from torch import nn
from torch.nn import functional as F

from cl_lightning.models import LinearHead, Network
from cl_lightning.strategies.base import (
    mean_gradient,
    output_at,
    relative_step,
    step_on,
    trained_weights,
    virtual_step,
)


@pytest.fixture
def network():
    head = LinearHead(16)
    head.grow(3)
    made = Network(NormNet((1, 4, 4)), head).double()
    made.backbone.layers[4].p = 0.0
    return made


IMAGES = normal(6, 1, 4, 4, seed=1)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def weights_of(network):
    return {name: value.detach().clone() for name, value in network.named_parameters()}


def shifted(network, change):
    """A copy of a network with changed weights."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        for name, value in other.named_parameters():
            value += change[name]
    return other


@pytest.mark.parametrize("mode", [True, False])
def test_the_output_is_that_of_a_network_with_these_weights_and_nothing_of_the_network_changes(network, mode):
    network.train(mode)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    change = {name: normal(*value.shape, seed=i) for i, (name, value) in enumerate(network.named_parameters())}
    expected = shifted(network, change)(IMAGES)
    output = output_at(network, {name: value + change[name] for name, value in network.named_parameters()}, IMAGES)
    torch.testing.assert_close(output, expected)
    after = network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert network.training is mode


def test_some_weights_may_be_given_and_a_compiled_backbone_runs_as_it_is_written(network):
    network.eval()
    network.backbone._compiled_call_impl = lambda *_: pytest.fail("the compiled backbone has weights of its own")
    calls = network.backbone._compiled_call_impl
    bias = torch.tensor([1.0, -2.0, 0.5]).double()
    output = output_at(network, {"head.blocks.0.bias": bias}, IMAGES)
    torch.testing.assert_close(output.logits, output.features @ network.head.blocks[0].weight.T + bias)
    assert network.backbone._compiled_call_impl is calls


def test_a_virtual_step_is_a_step_of_plain_sgd(network):
    weights = trained_weights(network)
    gradient = mean_gradient(F.cross_entropy(output_at(network, weights, IMAGES).logits, LABELS), weights)
    assert all(value.grad is None for value in network.parameters())
    other = copy.deepcopy(network)
    F.cross_entropy(other(IMAGES).logits, LABELS).backward()
    torch.optim.SGD(other.parameters(), lr=0.3).step()
    torch.testing.assert_close(virtual_step(weights, gradient, 0.3), dict(other.named_parameters()))


def test_a_loss_after_a_virtual_step_gives_the_parameters_its_gradient_there(network):
    weights = trained_weights(network)
    gradient = {name: normal(*value.shape, seed=i) for i, (name, value) in enumerate(weights.items())}
    F.cross_entropy(output_at(network, virtual_step(weights, gradient, 0.1), IMAGES).logits, LABELS).backward()
    other = shifted(network, {name: -0.1 * value for name, value in gradient.items()})
    other.zero_grad()
    F.cross_entropy(other(IMAGES).logits, LABELS).backward()
    for mine, expected in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad)


def test_frozen_weights_are_left_out_and_weights_without_an_influence_have_the_gradient_0(network):
    network.backbone.requires_grad_(False)
    weights = trained_weights(network)
    assert list(weights) == ["head.blocks.0.weight", "head.blocks.0.bias"]
    with torch.no_grad():
        with torch.enable_grad():
            loss = 3 * weights["head.blocks.0.bias"].sum()
        gradient = mean_gradient(loss, weights, 0.5)
    assert gradient["head.blocks.0.bias"].tolist() == [1.5] * 3
    assert not gradient["head.blocks.0.weight"].any()
    assert not any(value.any() for value in mean_gradient(None, weights).values())


def test_a_relative_step_has_the_share_of_the_norm_of_each_tensor():
    weights = {"a": torch.tensor([3.0, 4.0]).double(), "b": normal(2, 2), "c": normal(3)}
    direction = {"a": torch.tensor([0.0, -2.0]).double(), "b": normal(2, 2, seed=1), "c": torch.zeros(3).double()}
    step = relative_step(weights, direction, 0.1)
    torch.testing.assert_close(step["a"], torch.tensor([0.0, -0.5]).double())
    assert float(step["b"].norm() / weights["b"].norm()) == pytest.approx(0.1)
    assert float(F.cosine_similarity(step["b"].flatten(), direction["b"].flatten(), dim=0)) == pytest.approx(1.0)
    assert not step["c"].any()
    torch.testing.assert_close(relative_step(weights, direction, -0.1)["a"], -step["a"])


def test_half_precision_that_needs_a_loss_scale_is_not_used():
    network = Network(nn.Flatten(), LinearHead(16))
    network.head.grow(2)
    images = torch.rand(4, 1, 4, 4)
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        with torch.autocast("cpu", dtype=dtype):
            assert output_at(network, trained_weights(network), images).logits.dtype == expected


def test_a_virtual_step_on_a_batch_is_a_step_of_gradient_descent(network):
    group = {"lr": 0.3}
    strategy = SimpleNamespace(
        network=network,
        classification_loss=lambda output, batch: F.cross_entropy(output.logits, batch.labels),
        trainer=SimpleNamespace(optimizers=[SimpleNamespace(param_groups=[group])]),
    )
    before = weights_of(network)
    for lr in (None, 0.7):
        other = copy.deepcopy(network)
        optimizer = torch.optim.SGD(other.parameters(), lr=lr or 0.3)
        F.cross_entropy(other(IMAGES).logits, LABELS).backward()
        optimizer.step()
        found = step_on(strategy, batch_of(LABELS, images=IMAGES), lr)
        for name, value in other.named_parameters():
            torch.testing.assert_close(found[name], value)
    assert all(torch.equal(value, before[name]) for name, value in network.named_parameters())
    assert all(value.grad is None for value in network.parameters())
