import pytest
import torch

from cl_lightning.memory import SharedBudget


def test_classes_with_a_loss_above_the_median_have_fewer_exemplars_and_the_sum_is_kept():
    budget = SharedBudget([0.5], [0.0, 0.1])
    losses = torch.tensor([0.3, 0.9, 0.1, 0.7])
    assert budget.quotas(losses, 20, 0).tolist() == [20] * 4
    assert budget.quotas(losses, 20, 1).tolist() == [22, 18, 22, 18]
    assert budget.quotas(losses, 20, 9).tolist() == [22, 18, 22, 18]  # the last rate holds
    # The median is among the others: weights 1.5, 0.5, 1.5 of 3 * 7 = 21.
    odd = SharedBudget([0.5], [0.5]).quotas(torch.tensor([0.2, 0.9, 0.3]), 7, 0)
    assert odd.tolist() == [9, 3, 9]


@pytest.mark.parametrize(("rate", "mean"), [(0.0, 7), (0.1, 7), (0.37, 13), (0.9, 1)])
def test_quotas_have_the_same_sum_whatever_the_rate(rate, mean):
    losses = torch.rand(11, generator=torch.Generator().manual_seed(0))
    quotas = SharedBudget([0.5], [rate]).quotas(losses, mean, 0)
    assert int(quotas.sum()) == 11 * mean
    above = losses > losses.median()
    assert quotas[above].max() <= quotas[~above].min()
    assert int(quotas[above].max() - quotas[above].min()) <= 1


def test_without_class_rates_all_classes_have_equally_many():
    assert SharedBudget([0.5]).quotas(torch.tensor([3.0, 1.0, 2.0]), 5, 4).tolist() == [5, 5, 5]


@pytest.mark.parametrize("options", [([],), ([1.0],), ([0.5, -0.1],), ([0.5], [1.0]), ([0.5], [-0.1])])
def test_rates_out_of_range_are_errors(options):
    with pytest.raises(ValueError, match="SharedBudget: "):
        SharedBudget(*options)
