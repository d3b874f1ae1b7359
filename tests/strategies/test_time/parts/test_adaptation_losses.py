import math

import pytest
import torch
from support.adaptation import adapt, scores, watching
from support.fakes import normal
from torch.nn import functional as F

from cl_lightning.strategies.test_time.parts.losses import (
    Entropy,
    GeneralizedCrossEntropy,
    PseudoLabelCrossEntropy,
    SoftLikelihoodRatio,
    generalized_cross_entropy,
    soft_likelihood_ratio,
)
from cl_lightning.strategies.test_time.tent import Tent


def test_the_soft_likelihood_ratio_of_known_predictions():
    sure = torch.tensor([[100.0, 0.0, 0.0]], dtype=torch.float64)
    assert float(soft_likelihood_ratio(sure)) == pytest.approx(-0.99 * math.log(99 + 1e-5), abs=1e-9)
    flat = torch.zeros(1, 5, dtype=torch.float64)
    assert float(soft_likelihood_ratio(flat)) == pytest.approx(math.log(4), abs=1e-4)
    logits = normal(4, 3)
    p = logits.softmax(1)
    expected = -sum(p[:, c] * torch.log(p[:, c] / (p[:, 0] + p[:, 1] + p[:, 2] - p[:, c])) for c in range(3))
    torch.testing.assert_close(soft_likelihood_ratio(logits, ceiling=1.0), expected, rtol=0, atol=1e-4)


def test_the_gradient_of_the_soft_likelihood_ratio_is_large_where_that_of_the_entropy_vanishes():
    logits = torch.tensor([[4.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    (ratio,) = torch.autograd.grad(soft_likelihood_ratio(logits).sum(), logits)
    p = logits.softmax(1)
    (plain,) = torch.autograd.grad(-(p * p.log()).sum(), logits)
    assert float(ratio.norm()) > 3 * float(plain.norm())


def test_the_generalised_cross_entropy_runs_from_cross_entropy_to_absolute_error():
    logits = normal(6, 4).requires_grad_()
    label = logits.argmax(1)
    p = logits.detach().softmax(1)
    torch.testing.assert_close(generalized_cross_entropy(logits, 1.0), 1 - p.amax(1))
    near = generalized_cross_entropy(logits, 1e-5)
    torch.testing.assert_close(near, F.cross_entropy(logits, label, reduction="none"), rtol=0, atol=1e-4)
    (gradient,) = torch.autograd.grad(generalized_cross_entropy(logits, 0.8).sum(), logits)
    torch.testing.assert_close(gradient, p.amax(1, keepdim=True) ** 0.8 * (p - F.one_hot(label, 4)))


def test_each_loss_goes_with_tent_and_is_what_it_minimises():
    still = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.01)}
    logged = {}
    for loss, expected in (
        (Entropy(), lambda z: -(z.softmax(1) * z.log_softmax(1)).sum(1)),
        (SoftLikelihoodRatio(), soft_likelihood_ratio),
        (GeneralizedCrossEntropy(0.5), lambda z: generalized_cross_entropy(z, 0.5)),
        (PseudoLabelCrossEntropy(), lambda z: F.cross_entropy(z, z.argmax(1), reduction="none")),
    ):
        strategy = watching(Tent, loss=loss, **still)
        noted = []

        def noting(batch, output, adapting=strategy.adapt, noted=noted):
            result = adapting(batch, output)
            noted.append((result[0].detach(), result[1]["adaptation"].detach()))
            return result

        strategy.adapt = noting
        adapt(strategy)
        for logits, values in noted:
            torch.testing.assert_close(values, expected(logits))
        logged[type(loss).__name__] = scores(strategy)
    assert not any(
        torch.equal(one, other) for a, one in logged.items() for b, other in logged.items() if a != b
    )  # each trains another network


def test_a_part_is_copied():
    loss = GeneralizedCrossEntropy()
    assert Tent(loss=loss).loss is not loss


@pytest.mark.parametrize("q", [0.0, 1.5])
def test_the_exponent_is_in_its_range(q):
    with pytest.raises(ValueError, match=f"GeneralizedCrossEntropy: q is {q}"):
        GeneralizedCrossEntropy(q)
