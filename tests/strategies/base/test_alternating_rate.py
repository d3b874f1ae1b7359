"""A learning rate that alternates between two values, and follows the better one."""

import math

import pytest
import torch
from scipy.stats import ttest_ind
from support.fakes import normal

from cl_lightning.strategies.base import AlternatingRate
from cl_lightning.strategies.base.alternating_rate import larger_mean


@pytest.mark.parametrize("seed", range(4))
def test_the_p_value_is_that_of_scipy(seed):
    first, second = (normal(7, seed=seed) + 0.3).tolist(), (3 * normal(5, seed=seed + 10)).tolist()
    expected = ttest_ind(first, second, equal_var=False, alternative="greater").pvalue
    assert larger_mean(first, second) == pytest.approx(expected, rel=1e-10)


def test_without_variance_the_means_decide():
    assert larger_mean([2, 2], [1, 1]) == 0
    assert larger_mean([1, 1], [2, 2]) == 1
    assert larger_mean([1, 1], [1, 1]) == 0.5


def run_of(low, high, **options):
    """A rate that has seen these decreases in turn, the high rate first."""
    rate = AlternatingRate(**{"periods": 3, **options})
    for of_low, of_high in zip(low, high, strict=True):
        assert rate.is_high
        rate.end_period(of_high)
        assert not rate.is_high
        rate.end_period(of_low)
    return rate


def test_the_better_rate_becomes_the_next_pair():
    better, worse = [1.0, 1.1, 0.9], [0.1, 0.2, 0.0]
    lower = run_of(better, worse, ratio=0.5)
    assert (lower.high, lower.low, lower.factor) == (0.5, 0.25, 0.5)
    assert lower.decreases == {"low": [], "high": []}
    higher = run_of(worse, better, ratio=0.5)
    assert (higher.high, higher.low, higher.factor) == (2.0, 1.0, 2.0)
    equal = run_of(better, better[::-1], ratio=0.5)
    assert (equal.high, equal.low, equal.factor) == (1.0, 0.5, 1.0)
    equal.end_period(7.0)
    assert equal.factor == 0.5
    assert equal.decreases == {"low": better, "high": [1.1, 1.0, 7.0]}  # the latest ones


def test_nothing_changes_before_both_histories_are_full_or_at_an_unknown_decrease():
    rate = run_of([1.0, 1.1], [0.1, 0.2])
    assert (rate.high, rate.low) == (1.0, 0.95)
    rate.end_period(math.nan)
    rate.end_period(0.9)
    assert [len(rate.decreases[name]) for name in ("low", "high")] == [3, 2]
    assert (rate.high, rate.low) == (1.0, 0.95)


def test_the_significance_is_the_bound_of_the_p_value():
    low, high = [1.0, 2.0, 3.0], [0.0, 1.5, 2.0]
    p = larger_mean(low, high)
    assert 0.05 < p < 0.5
    assert run_of(low, high, significance=p - 0.01).high == 1.0
    assert run_of(low, high, significance=p + 0.01).high == 0.95
    assert run_of(high, low, significance=p + 0.01).low == 1.0
    assert run_of(high, low, significance=p - 0.01).low == 0.95


def test_it_scales_the_rates_of_all_groups_and_of_a_resumed_optimizer():
    def optimizer():
        parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        return torch.optim.SGD([{"params": parameters[:1], "lr": 0.4}, {"params": parameters[1:], "lr": 0.1}])

    rate, made = AlternatingRate(ratio=0.5), optimizer()
    rate.begin(made)
    assert [group["lr"] for group in made.param_groups] == [0.4, 0.1]
    rate.end_period(0.3)
    rate.set(made)
    assert [group["lr"] for group in made.param_groups] == [0.2, 0.05]
    other, again = AlternatingRate(ratio=0.5), optimizer()
    other.load_state_dict(rate.state_dict())
    assert (other.factor, other.decreases) == (0.5, rate.decreases)
    other.begin(again)
    assert [group["lr"] for group in again.param_groups] == [0.2, 0.05]
    again.load_state_dict(made.state_dict())
    other.end_period(0.3)
    other.set(again)
    assert [group["lr"] for group in again.param_groups] == [0.4, 0.1]


@pytest.mark.parametrize(
    "options", [{"ratio": 1.0}, {"ratio": 0.0}, {"periods": 1}, {"significance": 0.5}, {"significance": 0.0}]
)
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match=f"AlternatingRate: {next(iter(options))} is"):
        AlternatingRate(**options)
