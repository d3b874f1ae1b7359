from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.fakes import normal
from support.runs import NormNet, assert_resumes, assert_same_run, plain_net, run, sgd
from torch import nn

from cl_lightning.callbacks.spectral_regularization import SpectralRegularization, singular_vectors, spectral_penalty
from cl_lightning.strategies.baselines.finetune import Finetune

FINETUNE = partial(Finetune, backbone=plain_net, optimizer=sgd)


def test_power_iteration_finds_the_largest_singular_value():
    weight = normal(6, 9)
    left, right = singular_vectors(weight, normal(6, seed=1), 200)
    found = left @ weight @ right
    torch.testing.assert_close(found, torch.linalg.matrix_norm(weight, 2))
    torch.testing.assert_close(left.norm(), torch.ones(()).double())
    once = singular_vectors(weight, normal(6, seed=1))
    v = weight.T @ normal(6, seed=1)
    torch.testing.assert_close(once[1], v / v.norm())
    torch.testing.assert_close(once[0], weight @ v / (weight @ v).norm())


@pytest.mark.parametrize("exponent", [1, 2, 3])
def test_the_gradient_of_the_penalty_is_its_closed_form(exponent):
    weight = normal(4, 5).requires_grad_()
    left, right = singular_vectors(weight.detach(), normal(4, seed=1), 500)
    penalty = spectral_penalty(weight, left, right, exponent)
    sigma = torch.linalg.matrix_norm(weight.detach(), 2)
    torch.testing.assert_close(penalty.detach(), (sigma**exponent - 1) ** 2)
    (gradient,) = torch.autograd.grad(penalty, weight)
    factor = 2 * exponent * (sigma**exponent - 1) * sigma ** (exponent - 1)
    torch.testing.assert_close(gradient, factor * torch.outer(left, right))


def test_an_orthogonal_matrix_has_the_penalty_of_its_scale_and_1_is_a_minimum():
    q = torch.linalg.qr(normal(5, 5)).Q
    for scale in (0.5, 1.0, 2.0):
        weight = (scale * q).requires_grad_()
        penalty = spectral_penalty(weight, *singular_vectors(weight.detach(), normal(5, seed=1), 9), 2)
        torch.testing.assert_close(penalty.detach(), torch.tensor((scale**2 - 1) ** 2).double())
    weight = q.clone().requires_grad_()
    penalty = spectral_penalty(weight, *singular_vectors(q, normal(5, seed=1)), 2)
    assert torch.autograd.grad(penalty, weight)[0].abs().max() < 1e-12


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map, self.norm, self.words = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Embedding(7, 3)
        self.conv, self.fixed = nn.Conv2d(2, 3, 2, bias=False), nn.Linear(3, 3).requires_grad_(False)


def test_the_term_has_each_trained_layer_once():
    torch.manual_seed(0)
    network = Parts().double()
    with torch.no_grad():
        network.norm.weight.copy_(normal(4))
        network.norm.bias.copy_(normal(4, seed=1))
    strategy = SimpleNamespace(network=network, device=torch.device("cpu"))
    callback = SpectralRegularization(weight=0.3, exponent=2)
    for _ in range(300):
        callback.on_train_batch_start(None, strategy, None, 0)
    found = callback.losses(strategy, None, None)["spectral"]
    matrices = [network.map.weight, network.conv.weight.flatten(1)]
    expected = sum((torch.linalg.matrix_norm(w, 2) ** 2 - 1) ** 2 for w in matrices)
    expected += (network.norm.weight.abs() ** 2 - 1).square().sum()
    expected += sum(bias.norm() ** 4 for bias in (network.map.bias, network.norm.bias))
    torch.testing.assert_close(found, 0.3 * expected)


def test_without_a_weight_it_is_its_host_and_it_resumes(tmp_path):
    assert_same_run(run(FINETUNE(), SpectralRegularization(weight=0.0)), run(FINETUNE()))
    assert_resumes(lambda: (Finetune(backbone=NormNet, optimizer=sgd), [SpectralRegularization(weight=0.01)]), tmp_path)


def test_singular_values_stay_near_1():
    norms = []
    for weight in (0.0, 0.1):
        network = run(FINETUNE(), SpectralRegularization(weight=weight), max_epochs=4).strategy.network
        layers = [x.weight for x in network.modules() if isinstance(x, nn.Linear)]
        norms.append(max(float((torch.linalg.matrix_norm(w.detach(), 2) - 1).abs()) for w in layers))
    assert norms[1] < 0.5 * norms[0]


def test_options_out_of_range_are_refused():
    for options in ({"weight": -1.0}, {"exponent": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            SpectralRegularization(**options)
