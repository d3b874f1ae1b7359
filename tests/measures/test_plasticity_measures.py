"""Dormant units, effective rank and norms, on a few numbers."""

import math

import pytest
import torch
from support.fakes import normal

from cl_lightning.measures import dormant_units, effective_rank, joint_norm


def test_a_unit_is_dormant_below_its_share_of_the_mean_activity_of_its_layer():
    activity = torch.tensor([0.0, 0.1, 0.2, 3.7])  # the mean is 1
    assert dormant_units(activity, 0.0).tolist() == [True, False, False, False]
    assert dormant_units(activity, 0.1).tolist() == [True, True, False, False]
    assert dormant_units(activity, 0.2).tolist() == [True, True, True, False]
    assert torch.equal(dormant_units(activity), dormant_units(100 * activity))
    assert dormant_units(torch.zeros(3)).all()


def test_the_effective_rank_is_the_exponential_of_an_entropy():
    assert effective_rank(torch.eye(5)[:, :3]) == pytest.approx(3)
    assert effective_rank(torch.outer(normal(6), normal(4, seed=1))) == pytest.approx(1)
    p = (0.75, 0.25)  # singular values 3 and 1
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(
        math.exp(-sum(q * math.log(q) for q in p))
    )
    assert effective_rank(torch.zeros(4, 2)) == 0
    features = normal(9, 4)
    assert effective_rank(7 * features) == pytest.approx(effective_rank(features))


def test_the_norm_is_of_all_values_together():
    assert joint_norm([torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]) == pytest.approx(5)
    assert joint_norm([]) == 0
