"""Membership inference and the divergence of outputs, on a few numbers and against plain loops."""

import math

import pytest
import torch
from support.fakes import normal

from cl_lightning.measures import jensen_shannon, membership, membership_threshold


def test_the_threshold_separates_members_from_others_best_and_is_the_smallest_of_equal_ones():
    members, others = torch.tensor([0.1, 0.2, 0.5, 0.9]), torch.tensor([0.3, 0.6, 0.7, 1.0])
    # shares of members minus shares of others: .1 1/4, .2 2/4, .3 1/4, .5 2/4, .6 1/4, .7 0, .9 1/4, 1 0
    assert membership_threshold(members, others) == pytest.approx(0.2)
    samples = torch.tensor([0.2, 0.21, 0.0, 5.0])
    assert membership(samples.float(), members, others) == 0.5
    assert membership(torch.tensor([math.inf]), members, others) == 0.0
    assert membership_threshold(torch.tensor([0.3, 0.3]), torch.tensor([0.3, 0.4])) == pytest.approx(0.3)
    assert membership_threshold(torch.tensor([0.3, 0.5]), torch.tensor([0.3, 0.3, 0.3])) == 0.5  # equal losses together


@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_is_the_best_of_a_plain_search(seed):
    members, others = normal(13, seed=seed).abs(), normal(7, seed=seed + 9).abs() + 0.3

    def advantage(t):
        return float((members <= t).double().mean() - (others <= t).double().mean())

    found = membership_threshold(members, others)
    assert advantage(found) == pytest.approx(max(advantage(t) for t in torch.cat([members, others]).tolist()))


def test_the_divergence_is_0_for_equal_outputs_symmetric_and_at_most_ln_2():
    p, q = normal(6, 4).softmax(1), normal(6, 4, seed=1).softmax(1)
    torch.testing.assert_close(jensen_shannon(p, p), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(jensen_shannon(p, q), jensen_shannon(q, p))
    apart = jensen_shannon(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert float(apart) == pytest.approx(math.log(2))
    middle = (p + q) / 2
    expected = [
        sum(0.5 * float(a[c]) * math.log(float(a[c] / m[c])) for a in pair for c in range(4))
        for pair, m in zip(zip(p, q, strict=True), middle, strict=True)
    ]
    torch.testing.assert_close(jensen_shannon(p, q), torch.tensor(expected, dtype=torch.float64))
