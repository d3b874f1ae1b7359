"""Spectral regularisation: sigma, its gradient, the fixed point, and what a run with it does."""

from functools import partial

import pytest
import torch
from support.fakes import normal
from support.runs import NormNet, assert_resumes, assert_same, assert_same_run, plain_net, run, sgd
from torch import nn

from cl_lightning.callbacks.spectral_regularization import SpectralRegularization, spectral_norm
from cl_lightning.models import LinearHead, Network
from cl_lightning.strategies.baselines.finetune import Finetune


def made(*layers, **options):
    """A network of these layers without classes, in float64, after 200 power iterations."""
    network = Network(nn.Sequential(*layers), LinearHead(1)).double()
    callback = SpectralRegularization(**options)
    for _ in range(200):
        callback.iterate(network, 0)
    return network, callback


def layer(weight, bias=None):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).double()
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear


def test_a_few_iterations_find_the_largest_singular_value_of_matrices_and_of_convolutions():
    network, callback = made(nn.Linear(6, 4, bias=False), nn.Conv2d(3, 5, 2, bias=False))
    for place, shape in ((0, (4, 6)), (1, (5, 12))):
        weight = network.backbone[place].weight
        found = spectral_norm(weight.flatten(1), callback.vectors[f"backbone.{place}.weight"])
        torch.testing.assert_close(found, torch.linalg.matrix_norm(weight.reshape(shape), 2), rtol=1e-6, atol=0)


def test_the_vector_is_warm_one_iteration_a_step_is_enough_while_weights_drift():
    network, callback = made(nn.Linear(6, 4, bias=False))
    weight = network.backbone[0].weight
    for _ in range(30):
        with torch.no_grad():
            weight += 1e-3 * normal(4, 6, seed=3)
        callback.iterate(network, 0)
    found = spectral_norm(weight, callback.vectors["backbone.0.weight"])
    torch.testing.assert_close(found, torch.linalg.matrix_norm(weight, 2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_value_and_gradient_have_their_closed_form(k):
    weight, bias = normal(4, 6, seed=1), normal(4, seed=2)
    network, callback = made(layer(weight, bias), nn.LayerNorm(3).double(), exponent=k, weight=0.5)
    norm = network.backbone[1]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, -1.0, 0.5]))
        norm.bias.copy_(torch.tensor([0.5, 0.0, -1.0]))
    u, s, v = torch.linalg.svd(weight)
    by_hand = (s[0] ** k - 1) ** 2 + (bias @ bias) ** k + (2.0**k - 1) ** 2 + (0.5**k - 1) ** 2 + 1.25**k
    term = callback.losses(type("Strategy", (), {"network": network}), None, None)["spectral"]
    torch.testing.assert_close(term.detach(), 0.5 * by_hand)
    (2 * term).backward()
    gradient = 2 * k * (s[0] ** k - 1) * s[0] ** (k - 1) * u[:, :1] @ v[:1]
    torch.testing.assert_close(network.backbone[0].weight.grad, gradient, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(network.backbone[0].bias.grad, 2 * k * (bias @ bias) ** (k - 1) * bias)


def test_a_multiple_of_an_orthogonal_matrix_has_a_known_penalty_and_singular_value_1_no_gradient():
    q = torch.linalg.qr(normal(5, 5))[0]
    network, callback = made(layer(1.5 * q))
    torch.testing.assert_close(callback.penalty(network).detach(), torch.tensor((1.5**2 - 1) ** 2).double())
    network, callback = made(layer(q))
    gradient = torch.autograd.grad(callback.penalty(network), network.backbone[0].weight)[0]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def test_frozen_weights_and_embeddings_have_no_penalty():
    network, callback = made(nn.Linear(3, 3), nn.Embedding(4, 3), nn.Linear(3, 2).requires_grad_(False))
    assert list(callback.vectors) == ["backbone.0.weight"]
    whole = made(nn.Sequential(network.backbone[0]))
    torch.testing.assert_close(callback.penalty(network), whole[1].penalty(whole[0]))


def test_start_vectors_differ_between_matrices_and_are_a_function_of_the_seed():
    network = Network(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), LinearHead(6))
    network.backbone[1].load_state_dict(network.backbone[0].state_dict())
    vectors = []
    for seed in (0, 0, 1):
        callback = SpectralRegularization()
        callback.iterate(network, seed)
        vectors.append(callback.vectors)
    assert_same(vectors[0], vectors[1])
    assert not torch.allclose(vectors[0]["backbone.0.weight"], vectors[2]["backbone.0.weight"])
    assert not torch.allclose(vectors[0]["backbone.0.weight"], vectors[0]["backbone.1.weight"])


def test_weight_0_is_its_host_to_the_bit():
    host = partial(Finetune, backbone=NormNet, optimizer=sgd)
    assert_same_run(run(host(), SpectralRegularization(weight=0.0)), run(host()))


def test_it_resumes_to_the_bit(tmp_path):
    assert_resumes(lambda: (Finetune(backbone=NormNet, optimizer=sgd), [SpectralRegularization(weight=0.01)]), tmp_path)


def test_a_run_with_it_ends_with_singular_values_near_1():
    def distance(*callbacks):
        plain = partial(torch.optim.SGD, lr=0.2)
        strategy = run(Finetune(backbone=plain_net, optimizer=plain), *callbacks, max_epochs=4).strategy
        matrices = [p for p in strategy.network.parameters() if p.dim() > 1]
        return sum(abs(float(torch.linalg.matrix_norm(p.detach(), 2)) - 1) for p in matrices) / len(matrices)

    # Measured: 0.11 against 0.45.
    assert distance(SpectralRegularization(weight=0.3)) < 0.4 * distance()


@pytest.mark.parametrize("options", [{"weight": -1}, {"exponent": 0}])
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match="SpectralRegularization"):
        SpectralRegularization(**options)
