from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.adaptation import adapt, scores, stream, tiny_resnet, watching
from support.fakes import normal
from torch import nn

from cl_lightning.strategies.test_time.cmf import CMF
from cl_lightning.strategies.test_time.parts.restoration import MomentumFilter
from cl_lightning.strategies.test_time.roid import ROID
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "CMF": Subject(small(CMF, backbone=tiny_resnet, noise=0.9, temperature=10.0)),
}
WAITS = {"CMF": {"step_moves"}}  # whether a sample is selected

PUBLISHED = {
    "cmf": {
        "source": "mariodoebler/test-time-adaptation: methods/cmf.py and cfgs/cifar10_c/cmf.yaml",
        "decay": 0.99,
        "filter_momentum": 0.99,
        "noise": 0.005,
        "temperature": 0.3333333333333333,
        "backbone": "CifarResNet(depth=8, width=8)",
        "optimizer": "Adam(lr=0.001)",
    },
}

sgd = partial(torch.optim.SGD, lr=0.02)


def method(numbers: int) -> Any:
    theta = nn.Parameter(normal(numbers))
    start = {"theta": theta.detach().clone()}
    return SimpleNamespace(trained_parameters=lambda: {"theta": theta}, start=SimpleNamespace(tensors=start))


@pytest.mark.parametrize("ensemble", ["updated", "predicted"])
@pytest.mark.parametrize(("noise", "numbers"), [(0.5, 7680), (0.9, 30000), (1e-9, 100)])
def test_the_filter_follows_its_equations(ensemble, noise, numbers):
    rule, made = MomentumFilter(0.9, 0.8, noise, ensemble=ensemble), method(numbers)
    rule.learn_source(made)
    theta, source = made.trained_parameters()["theta"], made.start.tensors["theta"]
    q = noise * numbers / 38_400
    h, v = source.clone(), 0.0
    for step in range(4):
        with torch.no_grad():
            theta += normal(numbers, seed=step + 1)
        seen = theta.detach().clone()
        rule(made, None)
        h, v = 0.9 * h + 0.1 * source, 0.81 * v + q
        b = (1 - q) / (v + 1 - q)
        if step == 0:
            assert b == pytest.approx(1 - q)
        b = 1.0 if b >= 0.9999 else max(b, 0.89)
        v, predicted = b * v, h
        h = b * h + (1 - b) * seen
        expected = 0.8 * seen + 0.2 * (h if ensemble == "updated" else predicted)
        torch.testing.assert_close(theta.detach(), expected, rtol=1e-6, atol=1e-6)
        assert float(rule.variance) == pytest.approx(v)
    rule.reset()
    with torch.no_grad():
        theta.copy_(source)
    rule(made, None)
    torch.testing.assert_close(theta.detach(), source)  # the state begins at the source again
    assert float(rule.variance) == pytest.approx(q * (1.0 if 1 - q >= 0.9999 else max(1 - q, 0.89)))


@pytest.mark.parametrize(("numbers", "gain"), [(38_400, 0.93999), (53_120, 0.92830)])
def test_the_gain_settles_at_its_known_value(numbers, gain):
    rule, made = MomentumFilter(), method(numbers)
    rule.learn_source(made)
    for _ in range(2000):
        before = float(rule.variance)
        rule(made, None)
    q = 0.005 * numbers / 38_400
    assert float(rule.variance) / (0.99**2 * before + q) == pytest.approx(gain, abs=2e-5)


def test_without_noise_it_is_roid():
    made = [
        watching(CMF, noise=0.0, filter_momentum=0.9, optimizer=sgd),
        watching(ROID, source_momentum=0.9, optimizer=sgd),
    ]
    for strategy in made:
        adapt(strategy)
    torch.testing.assert_close(*(scores(strategy) for strategy in made), rtol=1e-4, atol=1e-4)


def test_a_domain_after_a_reset_is_as_if_it_were_the_first():
    both, alone = (watching(CMF, noise=0.9, consistency_weight=0.0, reset="domain", optimizer=sgd) for _ in range(2))
    adapt(both)
    adapt(alone, stream(corruptions=["contrast"]))
    assert torch.equal(torch.cat(both.noted[2]), torch.cat(alone.noted[1]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"decay": 1.5}, r"decay is 1\.5"),
        ({"filter_momentum": -0.1}, r"momentum is -0\.1"),
        ({"noise": 1.0}, r"noise is 1\.0"),
        ({"ensemble": "both"}, "ensemble is 'both'"),
    ],
)
def test_options_out_of_range_are_errors(given, words):
    with pytest.raises(ValueError, match=words):
        CMF(**given)
