from functools import partial

import pytest
import torch
from support.adaptation import adapt, online_errors, scores, tiny_resnet, watching
from support.fakes import normal

from cl_lightning.losses import entropy
from cl_lightning.strategies.test_time.bn_adapt import BNAdapt
from cl_lightning.strategies.test_time.core import Core
from cl_lightning.strategies.test_time.parts.losses import class_correlation
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "Core": Subject(small(Core, backbone=tiny_resnet)),
}

adam = partial(torch.optim.Adam, lr=1e-3)


def test_the_correlation_lies_between_that_of_one_hot_and_uniform_predictions():
    ones = torch.ones(6, dtype=torch.float64)
    assert float(class_correlation(torch.eye(3, dtype=torch.float64).repeat(2, 1), ones)) == 0.0
    assert float(class_correlation(torch.full((6, 4), 0.25, dtype=torch.float64), ones)) == pytest.approx(3 / 4)
    p, w = normal(6, 4).softmax(1), normal(6, seed=1).exp()
    expected = 0.0
    for i in range(4):
        row = [sum(float(w[n] * p[n, i] * p[n, j]) for n in range(6)) for j in range(4)]
        expected += sum(value for j, value in enumerate(row) if j != i) / sum(row) / 4
    assert float(class_correlation(p, w)) == pytest.approx(expected)
    assert float(class_correlation(p, 7 * w)) == pytest.approx(expected)  # the scale of the weights does not matter


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_weights_sure_samples_and_takes_the_temperature(temperature):
    strategy, noted = watching(Core, temperature=temperature, optimizer=adam), []
    adapting = strategy.adapt
    strategy.adapt = lambda *given: (noted.append(adapting(*given)), noted[-1])[1]
    adapt(strategy)
    for logits, terms in noted:
        w = 1 + (-entropy(logits.detach())).exp()
        torch.testing.assert_close(terms["adaptation"], class_correlation((logits / temperature).softmax(1), w))


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_without_a_learning_rate_it_is_alpha_bn(alpha):
    made = [
        watching(Core, alpha=alpha, optimizer=partial(torch.optim.SGD, lr=0.0)),
        watching(BNAdapt, statistics="mix", alpha=alpha),
    ]
    for strategy in made:
        adapt(strategy)
    torch.testing.assert_close(*(scores(strategy) for strategy in made), rtol=1e-5, atol=1e-5)


def test_it_improves_on_alpha_bn():
    errors = online_errors(
        (BNAdapt, {"statistics": "mix", "alpha": 0.5}),
        (Core, {"optimizer": partial(torch.optim.Adam, lr=0.01)}),
    )
    assert errors[1] < errors[0] - 0.02  # measured: .231 against .279


def test_options_out_of_range_are_errors():
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        Core(temperature=0.0)
