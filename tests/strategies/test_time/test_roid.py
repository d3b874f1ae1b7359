import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.adaptation import adapt, batches, online_errors, scores, source_network, tiny_resnet, watching
from support.fakes import batch_of, normal
from torch import nn
from torch.nn import functional as F

from cl_lightning.losses import entropy
from cl_lightning.models import Output
from cl_lightning.strategies.test_time import roid
from cl_lightning.strategies.test_time.parts.filters import DiversityCertainty
from cl_lightning.strategies.test_time.parts.losses import soft_likelihood_ratio, symmetric_cross_entropy
from cl_lightning.strategies.test_time.parts.outputs import PriorCorrection
from cl_lightning.strategies.test_time.roid import ROID
from cl_lightning.strategies.test_time.source import Source
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "ROID": Subject(small(ROID, backbone=tiny_resnet, temperature=10.0)),
}
WAITS = {"ROID": {"step_moves"}}  # whether a sample is selected

PUBLISHED = {
    "roid": {
        "source": "mariodoebler/test-time-adaptation: cfgs/cifar10_c/roid.yaml",
        "source_momentum": 0.99,
        "temperature": 0.3333333333333333,
        "backbone": "CifarResNet(depth=8, width=8)",
        "optimizer": "Adam(lr=0.001)",
    },
}

sgd = partial(torch.optim.SGD, lr=0.02)


def weights_by_hand(p: torch.Tensor, h: torch.Tensor, mean: torch.Tensor, temperature: float) -> torch.Tensor:
    diverse = 1 - (p @ mean) / (p.norm(dim=1) * mean.norm())
    diverse = (diverse - diverse.min()) / (diverse.max() - diverse.min())
    certain = (-h + h.max()) / (h.max() - h.min())
    return torch.where(diverse < diverse.mean(), 0.0, (diverse * certain / temperature).exp())


def test_weights_are_those_of_diverse_and_sure_samples():
    strategy: Any = SimpleNamespace(num_source=5)
    part, logits = DiversityCertainty(0.5), 2 * normal(9, 5).float()
    part.learn_source(strategy)
    assert part.mean.tolist() == pytest.approx([0.2] * 5)
    batch, mean = batch_of(torch.zeros(9, dtype=torch.int64)), torch.full((5,), 0.2)
    for _ in range(2):
        found = part(strategy, batch, Output(logits, logits))
        torch.testing.assert_close(found, weights_by_hand(logits.softmax(1), entropy(logits), mean, 0.5))
        assert float(found.max()) <= math.exp(2) + 1e-5
        part.learn(Output(logits, logits), found > 0)
        mean = 0.9 * mean + 0.1 * logits.softmax(1).mean(0)  # of all samples
        torch.testing.assert_close(part.mean, mean)
    same = logits[:1].expand(9, 5)
    for equal in (same, same[:1]):
        rows = batch_of(torch.zeros(len(equal), dtype=torch.int64))
        assert (part(strategy, rows, Output(equal, equal)) == 1).all()
    part.reset()
    assert part.mean.tolist() == pytest.approx([0.2] * 5)


def test_the_symmetric_cross_entropy_is_symmetric_and_of_equal_predictions_the_entropy():
    a, b = normal(4, 3), normal(4, 3, seed=1)
    torch.testing.assert_close(symmetric_cross_entropy(a, b), symmetric_cross_entropy(b, a))
    torch.testing.assert_close(symmetric_cross_entropy(a, a), entropy(a))
    expected = (
        F.cross_entropy(a, b.softmax(1), reduction="none") + F.cross_entropy(b, a.softmax(1), reduction="none")
    ) / 2
    torch.testing.assert_close(symmetric_cross_entropy(a, b), expected)


@pytest.mark.parametrize(("rows", "classes"), [(4, 6), (9, 3)])
def test_the_prior_is_smoothed_and_multiplies(rows, classes):
    logits = 3 * normal(rows, classes)
    p = logits.softmax(1)
    mean = p.mean(0)
    smoothing = max(1 / rows, 1 / classes) / float(mean.max())
    prior = (mean + smoothing) / (1 + smoothing * classes)
    assert float(prior.sum()) == pytest.approx(1.0)
    output = Output(logits, logits)
    torch.testing.assert_close(PriorCorrection()(output).exp(), p * prior)
    torch.testing.assert_close(PriorCorrection("logits")(output), logits * prior)
    flat = torch.zeros(rows, classes, dtype=torch.float64)
    assert float(PriorCorrection()(Output(flat, flat)).std()) == pytest.approx(0.0, abs=1e-9)


def test_the_first_steps_are_those_of_a_plain_loop(monkeypatch):
    monkeypatch.setattr(roid, "viewed", lambda strategy, batch, draw, **kind: batch.images.flip(-1))
    strategy = watching(ROID, source_momentum=0.9, optimizer=sgd)
    made = adapt(strategy)
    plain, source, expected = source_network(), source_network("source").state_dict(), []
    norms = {n: p for n, p in plain.named_parameters() if ".bn" in n}
    optimizer, mean = sgd(list(norms.values())), torch.full((10,), 0.1)
    for images, _ in batches(made.datamodule):
        z, view = plain(images).logits, plain(images.flip(-1)).logits
        p = z.detach().softmax(1)
        w = weights_by_hand(p, entropy(z.detach()), mean, 1 / 3)
        mean = 0.9 * mean + 0.1 * p.mean(0)
        share = p.mean(0)
        smoothing = 0.1 / share.max()
        expected.append(p.log() + ((share + smoothing) / (1 + 10 * smoothing)).log())
        optimizer.zero_grad()
        ((w * (soft_likelihood_ratio(z) + symmetric_cross_entropy(view, z))).sum() / len(images)).backward()
        optimizer.step()
        with torch.no_grad():
            for name, value in norms.items():
                value.copy_(0.9 * value + 0.1 * source[name])
    torch.testing.assert_close(scores(strategy), torch.cat(expected), rtol=5e-3, atol=5e-3)


def test_views_have_no_blur_and_no_noise(monkeypatch):
    seen = []
    monkeypatch.setattr(roid, "viewed", lambda strategy, batch, draw, **kind: (seen.append(kind), batch.images)[1])
    adapt(watching(ROID, optimizer=sgd))
    assert seen == [{"sharp": True}] * 8
    seen.clear()
    adapt(watching(ROID, consistency_weight=0.0, optimizer=sgd))
    assert seen == []


def test_with_momentum_0_each_batch_is_predicted_by_the_source():
    made = adapt(watching(ROID, source_momentum=0.0, prior_correction="off", optimizer=sgd)).strategy
    before = source_network("source").state_dict()
    norms = [m for m in made.network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(torch.equal(p, before[n]) for n, p in made.trained_parameters().items())
    assert made.parts.output is None
    assert not norms or made.bytes_kept()["source"] > 0


def test_it_adapts_to_corruptions():
    errors = online_errors((Source, {}), (ROID, {"optimizer": partial(torch.optim.Adam, lr=1e-3)}))
    assert errors[1] < errors[0] - 0.15


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"source_momentum": 1.5}, r"momentum is 1\.5"),
        ({"temperature": 0.0}, r"temperature is 0\.0"),
        ({"consistency_weight": -1.0}, r"consistency_weight is -1\.0"),
        ({"prior_correction": "all"}, "prior_correction is 'all'"),
    ],
)
def test_options_out_of_range_are_errors(given, words):
    with pytest.raises(ValueError, match=words):
        ROID(**given)
