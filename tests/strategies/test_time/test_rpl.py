from functools import partial

import pytest
import torch
from support.adaptation import adapt, batches, scores, source_network, tiny_resnet, watching
from torch import nn

from cl_lightning.strategies.test_time.bn_adapt import BNAdapt
from cl_lightning.strategies.test_time.rpl import RPL
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "RPL": Subject(small(RPL, backbone=tiny_resnet)),
}

PUBLISHED = {
    "rpl": {
        "source": "test-time-adaptation benchmarks: cfgs/cifar10_c/rpl.yaml",
        "q": 0.8,
        "backbone": "CifarResNet(depth=8, width=8)",
        "optimizer": "Adam(lr=0.001)",
    },
}

sgd = partial(torch.optim.SGD, lr=0.05)


@pytest.mark.parametrize("q", [0.8, 0.3])
def test_it_is_a_plain_loop_of_generalised_cross_entropy(q):
    strategy = watching(RPL, q=q, optimizer=sgd)
    made = adapt(strategy)
    plain = source_network()
    optimizer = sgd([p for m in plain.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()])
    expected = []
    for images, _ in batches(made.datamodule):
        logits = plain(images).logits
        expected.append(logits.detach())
        optimizer.zero_grad()
        ((1 - logits.softmax(1).amax(1) ** q) / q).mean().backward()
        optimizer.step()
    torch.testing.assert_close(scores(strategy), torch.cat(expected), rtol=1e-3, atol=1e-3)


def test_without_a_learning_rate_it_is_batch_norm_adaptation():
    still, plain = watching(RPL, optimizer=partial(torch.optim.SGD, lr=0.0)), watching(BNAdapt)
    adapt(still)
    adapt(plain)
    assert torch.equal(scores(still), scores(plain))


def test_the_exponent_is_in_its_range():
    with pytest.raises(ValueError, match=r"q is 0\.0"):
        RPL(q=0.0)
