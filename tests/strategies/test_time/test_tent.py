from functools import partial

import pytest
import torch
from support.adaptation import adapt, scores, source_network, stream, tiny_resnet, watching
from torch import Tensor

from cl_lightning.losses import entropy
from cl_lightning.strategies.test_time.bn_adapt import BNAdapt
from cl_lightning.strategies.test_time.parts.filters import DiversityFilter, EntropyFilter
from cl_lightning.strategies.test_time.parts.losses import SoftLikelihoodRatio
from cl_lightning.strategies.test_time.parts.restoration import (
    EntropyReset,
    PeriodicReset,
    StochasticRestore,
    WeightEnsembling,
)
from cl_lightning.strategies.test_time.source import Source
from cl_lightning.strategies.test_time.tent import Tent
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "Tent": Subject(small(Tent, backbone=tiny_resnet)),
    "Tent with parts": Subject(
        small(
            Tent,
            backbone=tiny_resnet,
            loss=SoftLikelihoodRatio(),
            filters=[EntropyFilter(0.99), DiversityFilter(0.99)],
            restoration=[StochasticRestore(0.1), WeightEnsembling(0.9), PeriodicReset(3), EntropyReset(0.01)],
        )
    ),
}

SLOW = "a second subject runs all parts that plug into a method"
WAITS = {"Tent with parts": {"step_moves", "forward"}}  # is a sample selected? does the entropy collapse?

PUBLISHED = {
    "tent": {
        "source": "DequanWang/tent: cfgs/tent.yaml",
        "backbone": "CifarResNet(depth=8, width=8)",
        "optimizer": "Adam(lr=0.001)",
    },
}


def test_entropy_is_that_of_a_plain_loop_and_its_gradient_the_closed_form():
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = entropy(logits)
    for row, value in zip(logits.softmax(1), values, strict=True):
        assert float(value) == pytest.approx(-sum(float(p) * float(p.log()) for p in row))
    values.sum().backward()
    p = logits.detach().softmax(1)
    torch.testing.assert_close(logits.grad, -p * (p.log() + values.detach()[:, None]))
    assert float(entropy(torch.zeros(1, 8))) == pytest.approx(torch.tensor(8.0).log().item())


def test_without_a_learning_rate_it_is_batch_norm_adaptation_to_the_bit():
    still, plain = watching(Tent, optimizer=partial(torch.optim.SGD, lr=0.0)), watching(BNAdapt)
    adapt(still)
    adapt(plain)
    assert torch.equal(scores(still), scores(plain))


def test_only_scales_and_shifts_of_norms_change():
    made = adapt(watching(Tent, optimizer=partial(torch.optim.Adam, lr=0.01)))
    after, before = made.strategy.network.state_dict(), source_network("source").state_dict()
    moved = {name for name in before if name in after and not torch.equal(before[name], after[name])}
    assert moved
    assert all(".bn" in name and name.endswith(("weight", "bias")) for name in moved)  # no running statistics


def test_entropy_of_a_batch_falls_from_step_to_step():
    strategy = watching(Tent, optimizer=partial(torch.optim.SGD, lr=0.02))
    found: list[Tensor] = []
    data = stream(samples=100, batch_size=100, corruptions=["gaussian_noise"])
    adapt(strategy, data, options={"phase_epochs": {"adapt": 6}})  # the same batch six times; the first one counts
    found = [float(entropy(part).mean()) for part in strategy.noted[1]]
    assert len(found) == 6
    assert found == sorted(found, reverse=True)
    assert strategy.online.counts.tolist()[1][0] == 100


def test_it_adapts_to_corruptions():
    errors = [
        adapt(watching(cls), stream(samples=None, batch_size=71)).matrix.measures()["mean_online_error"]
        for cls in (Source, BNAdapt, Tent)
    ]
    # Measured: errors of .09 and .09 against .42.
    assert errors[1] < errors[0] - 0.15
    assert errors[2] < errors[0] - 0.15
