from functools import partial

import pytest
import torch
from support.adaptation import adapt, batches, scores, source_network, tiny_resnet, watching
from support.fakes import batch_of, normal
from torch import nn

from cl_lightning.losses import entropy
from cl_lightning.strategies.test_time.parts.losses import marginal_entropy
from cl_lightning.strategies.test_time.tent import Tent
from cl_lightning.strategies.test_time.wisdom_of_crowds import WisdomOfCrowds
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "WisdomOfCrowds": Subject(small(WisdomOfCrowds, backbone=tiny_resnet, diversity_weight=0.5)),
}
WAITS = {"WisdomOfCrowds": {"step_moves"}}  # whether a sample is selected

sgd = partial(torch.optim.SGD, lr=0.5)


def test_the_marginal_entropy_has_the_value_and_the_gradient_of_the_mean_prediction():
    logits = normal(6, 4).requires_grad_()
    found = marginal_entropy(logits, batch_of(torch.zeros(6, dtype=torch.int64)))
    mean = logits.softmax(1).mean(0)
    expected = -(mean * mean.log()).sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (found, expected)))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_it_is_a_plain_loop_over_the_samples_whose_confidence_has_not_fallen(alpha):
    strategy = watching(WisdomOfCrowds, diversity_weight=alpha, optimizer=sgd)
    made = adapt(strategy)
    plain, source = source_network(), source_network()
    optimizer = sgd([p for m in plain.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()])
    expected, counts = [], []
    for images, _ in batches(made.datamodule):
        logits = plain(images).logits
        with torch.no_grad():
            p, first = logits.softmax(1), source(images).logits.softmax(1)
        label = first.argmax(1)
        rows = p[range(len(p)), label] >= first[range(len(p)), label] - 1e-6
        expected.append(logits.detach())
        counts.append((int(rows.sum()), len(rows)))
        mean = logits.softmax(1).mean(0)
        optimizer.zero_grad()
        (entropy(logits)[rows].mean() + alpha * (mean * mean.log()).sum()).backward()
        optimizer.step()
    assert counts[0][0] == counts[0][1]  # in the first step both networks agree
    assert counts[-1][0] < counts[-1][1]
    found = scores(strategy)
    torch.testing.assert_close(found[:120], torch.cat(expected)[:120], rtol=1e-3, atol=1e-3)
    assert float((found - torch.cat(expected)).abs().mean()) < 0.05  # a row on the edge may be chosen by rounding


def test_without_a_learning_rate_all_samples_are_selected():
    strategy = watching(WisdomOfCrowds, optimizer=partial(torch.optim.SGD, lr=0.0))
    chosen = []
    weights = strategy.parts.weights
    strategy.parts.weights = lambda *given: (chosen.append(weights(*given)), chosen[-1])[1]
    adapt(strategy)
    assert all(bool((values == 1).all()) for values in chosen)
    assert len(chosen) == 8


def test_the_first_step_is_that_of_tent():
    made = [watching(cls, optimizer=sgd) for cls in (WisdomOfCrowds, Tent)]
    for strategy in made:
        adapt(strategy)
    torch.testing.assert_close(*(strategy.noted[1][1] for strategy in made), rtol=1e-4, atol=1e-4)
    assert not torch.equal(*(strategy.noted[2][-1] for strategy in made))


def test_options_out_of_range_are_errors():
    with pytest.raises(ValueError, match=r"WisdomOfCrowds: .*diversity_weight is -1\.0"):
        WisdomOfCrowds(diversity_weight=-1.0)
