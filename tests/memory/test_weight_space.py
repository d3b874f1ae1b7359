import math
from functools import reduce

import pytest
import torch
from support.fakes import normal
from torch import nn

from cl_lightning.memory import (
    Average,
    Breadcrumbs,
    Dare,
    MaxMagnitude,
    Slerp,
    Ties,
    WeightSets,
    fisher_average,
    move_towards,
    network_tensors,
    shifted,
    task_vector,
    write_weights,
)
from cl_lightning.memory.weight_space import (
    average,
    dropped,
    elected_mean,
    max_magnitude,
    slerp,
    trimmed,
    without_ends,
)

RULES = [MaxMagnitude(), Average(), Slerp(), Ties(), Dare(), Breadcrumbs()]


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def drawn(count, names=("a", "b")):
    return [{name: normal(3, 4, seed=10 * i + j) for j, name in enumerate(names)} for i in range(count)]


def assert_same(found, expected, **tolerances):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], **tolerances)


# ---------------------------------------------------------------------- task vectors


def test_a_task_vector_is_the_change_and_is_added_with_its_scale():
    start, after = {"w": tensor(1, 2)}, {"w": tensor(4, 0), "new": tensor(5)}
    vector = task_vector(after, start)
    assert_same(vector, {"w": tensor(3, -2)})
    assert_same(shifted(start, vector, 0.5), {"w": tensor(2.5, 1)})
    assert_same(shifted(start, vector), {"w": tensor(4, 0)})


def test_an_average_over_steps_moves_by_one_minus_the_momentum_in_single_precision():
    slow = [torch.tensor([1.0, 0.0]), torch.tensor([0.0])]
    move_towards(slow, [torch.tensor([0.0, 1.0], dtype=torch.bfloat16), torch.tensor([8.0])], 0.75)
    torch.testing.assert_close(slow[0], torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(slow[1], torch.tensor([2.0]))


# ---------------------------------------------------------------------- rules


def test_an_average_has_equal_shares_or_the_given_ones():
    vectors = [{"w": tensor(1, 2)}, {"w": tensor(4, -2)}, {"w": tensor(1, 3)}]
    assert_same(average(vectors), {"w": tensor(2, 1)})
    assert_same(average(vectors, [0.5, 0.25, 1]), {"w": tensor(2.5, 3.5)})


def test_slerp_turns_by_a_share_of_the_angle_of_the_whole_vectors():
    first, second = {"x": tensor(2), "y": tensor(0)}, {"x": tensor(0), "y": tensor(2)}
    angle = math.pi / 2 / 3
    assert_same(slerp(first, second, 1 / 3), {"x": tensor(2 * math.cos(angle)), "y": tensor(2 * math.sin(angle))})
    for share, end in ((0.0, first), (1.0, second)):
        assert_same(slerp(first, second, share), end, rtol=0, atol=1e-15)


@pytest.mark.parametrize("other", [tensor(3, 0.01), tensor(-5, 0), tensor(0, 0)])
def test_slerp_of_nearly_parallel_vectors_or_of_zero_is_linear(other):
    first = {"w": tensor(1, 0)}
    assert_same(slerp(first, {"w": other}, 0.25), {"w": 0.75 * first["w"] + 0.25 * other})


def test_trimming_keeps_the_largest_magnitudes_over_all_names():
    vector = {"a": tensor(1, -5, 2), "b": tensor(-0.5, 3)}
    assert_same(trimmed(vector, 0.4), {"a": tensor(0, -5, 0), "b": tensor(0, 3)})
    assert_same(trimmed(vector, 0.41), {"a": tensor(0, -5, 2), "b": tensor(0, 3)})
    assert_same(trimmed(vector, 1.0), vector)
    assert_same(trimmed({"a": torch.arange(1.0, 11.0)}, 0.7), {"a": torch.arange(1.0, 11.0) * (torch.arange(10) > 2)})


def test_the_sign_of_the_sum_is_elected_and_entries_of_that_sign_are_averaged():
    vectors = [{"w": tensor(1, 2, 0, 1)}, {"w": tensor(3, -5, 0, -1)}, {"w": tensor(-2, 0, 4, 0)}]
    assert_same(elected_mean(vectors), {"w": tensor(2, -5, 4, 0)})


def test_ties_is_trim_elect_and_merge():
    first, second = {"w": tensor(4, -3, 0.1, 0.2)}, {"w": tensor(-1, -5, 6, 0.3)}
    assert_same(Ties(keep=0.5)([first, second]), {"w": tensor(4, -4, 6, 0)})


def test_what_is_not_dropped_is_divided_by_its_probability():
    vector = {"a": torch.ones(200, 100, dtype=torch.float64), "b": torch.full((20_000,), 3.0)}
    found = dropped(vector, 0.75, 1)
    assert found["a"].unique().tolist() == [0.0, 4.0]
    assert found["b"].unique().tolist() == [0.0, 12.0]
    assert float(found["a"].mean()) == pytest.approx(1.0, abs=0.05)
    again, other = dropped(vector, 0.75, 1), dropped(vector, 0.75, 2)
    assert torch.equal(again["a"], found["a"])
    for one in (other["a"], found["b"].view(200, 100) / 3):  # independent: both are kept with probability 1/16
        assert float(((one > 0) & (found["a"] > 0)).double().mean()) == pytest.approx(1 / 16, abs=0.01)
    assert_same(dropped(vector, 0.0), vector)


def test_dare_drops_of_each_vector_other_entries_and_averages():
    vectors = [{"w": torch.ones(5000)}, {"w": torch.ones(5000)}]
    found = Dare(drop=0.5)(vectors)["w"]
    assert found.unique().tolist() == [0.0, 1.0, 2.0]
    assert float((found == 1).double().mean()) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(found, Dare(drop=0.5)(vectors)["w"])
    assert not torch.equal(found, Dare(drop=0.5, seed=1)(vectors)["w"])
    signs = Dare(drop=0.5, ties=True)([vectors[0], {"w": -3 * torch.ones(5000)}])["w"]
    assert signs.unique().tolist() == [-6.0, 0.0, 2.0]


def test_the_largest_magnitude_is_taken_and_of_equal_ones_the_last():
    vectors = [{"w": tensor(1, -4, 2, 0)}, {"w": tensor(-3, 2, -2, 0)}, {"w": tensor(2, 1, 1, 0)}]
    assert_same(max_magnitude(vectors), {"w": tensor(-3, -4, -2, 0)})


def test_the_largest_magnitude_step_by_step_is_that_of_all_and_bounds_each():
    vectors = drawn(5)
    merged = MaxMagnitude()(vectors)
    assert_same(reduce(lambda kept, new: MaxMagnitude()([kept, new]), vectors), merged, rtol=0, atol=0)
    for vector in vectors:
        assert all((merged[name].abs() >= value.abs()).all() for name, value in vector.items())


def test_both_ends_of_each_tensor_are_removed():
    vector = {"a": tensor(-10, 1, -2, 3, 4, 5, 6, 7, 8, 9), "b": tensor(100, 0.1, 1, 10)}
    found = without_ends(vector, 0.3, 0.2)
    assert_same(found, {"a": tensor(0, 0, 0, 0, 4, 5, 6, 7, 8, 0), "b": tensor(100, 0, 1, 10)})
    assert_same(
        without_ends({"a": torch.arange(1.0, 11.0)}, 0.0, 0.3), {"a": torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 0, 0, 0])}
    )
    assert_same(without_ends({"one": tensor(3)}, 0.6, 0.3), {"one": tensor(3)})
    assert_same(Breadcrumbs(low=0.3, high=0.2)([vector, vector]), {name: 2 * value for name, value in found.items()})


@pytest.mark.parametrize("rule", [MaxMagnitude(), Average(), Slerp(), Ties(keep=1.0)])
def test_merging_a_vector_with_itself_returns_it(rule):
    (vector,) = drawn(1)
    assert_same(rule([vector]), vector)
    assert_same(rule([vector, vector, vector]), vector)


@pytest.mark.parametrize("rule", RULES)
def test_rules_keep_the_dtype_and_do_not_change_their_inputs(rule):
    vectors = [{name: value.bfloat16() for name, value in vector.items()} for vector in drawn(3)]
    before = [{name: value.clone() for name, value in vector.items()} for vector in vectors]
    found = rule(vectors)
    assert all(value.dtype == torch.bfloat16 and value.shape == (3, 4) for value in found.values())
    for vector, copied in zip(vectors, before, strict=True):
        assert_same(vector, copied, rtol=0, atol=0)


def test_slerp_of_several_gives_the_last_one_a_share_of_one_over_its_number():
    vectors = drawn(3)
    expected = slerp(slerp(vectors[0], vectors[1], 1 / 2), vectors[2], 1 / 3)
    assert_same(Slerp()(vectors), expected)


# ---------------------------------------------------------------------- averages of networks


def test_importances_weigh_each_entry():
    weights = [{"w": tensor(0, 0, 8)}, {"w": tensor(4, 4, 4)}]
    importances = [{"w": tensor(1, 0, 2)}, {"w": tensor(3, 5, 1)}]
    shares = [0.25, 0.75]
    expected = [0.75 * 3 * 4 / (0.25 + 2.25), 4, (0.25 * 2 * 8 + 0.75 * 4) / (0.5 + 0.75)]
    assert_same(fisher_average(weights, importances, shares, epsilon=1e-15), {"w": tensor(*expected)})


def test_the_weighted_average_minimises_the_weighted_squared_distances():
    weights, shares = drawn(3), [0.2, 0.5, 0.3]
    importances = [{name: value.square() for name, value in vector.items()} for vector in drawn(3, ("b", "a"))]
    theta = {name: v.requires_grad_() for name, v in fisher_average(weights, importances, shares, epsilon=0.0).items()}
    loss = sum(
        share * (importance[name] * (theta[name] - network[name]).square()).sum()
        for share, importance, network in zip(shares, importances, weights, strict=True)
        for name in theta
    )
    for gradient in torch.autograd.grad(loss, list(theta.values())):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_equal_or_no_importances_give_the_plain_average_and_shares_of_0_and_1_one_network():
    weights, equal = drawn(2), [{"a": tensor(2), "b": tensor(3)}] * 2
    plain = average(weights, [0.6, 0.4])
    for importances in (equal, [{"a": tensor(0), "b": tensor(0)}] * 2):
        assert_same(fisher_average(weights, importances, [0.6, 0.4]), plain)
    unequal = [{name: value.square() for name, value in vector.items()} for vector in drawn(2)]
    for share in (0, 1):
        found = fisher_average(weights, unequal, [1 - share, share])
        assert_same(found, weights[share], rtol=0, atol=0)


def test_weights_of_one_network_alone_are_taken_from_the_last_one_that_has_them():
    weights = [{"w": tensor(0), "gone": tensor(1)}, {"w": tensor(2), "new": tensor(7)}]
    found = fisher_average(weights, [{"w": tensor(1)}, {"w": tensor(1)}], [0.5, 0.5])
    assert_same(found, {"w": tensor(1), "gone": tensor(1), "new": tensor(7)})


# ---------------------------------------------------------------------- weights of a network


def test_tensors_of_a_network_are_read_and_written_without_counters():
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    found = network_tensors(network)
    assert list(found) == ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
    write_weights(network, {"0.bias": torch.ones(3), "1.running_mean": torch.full((3,), 2.0)})
    assert network[0].bias.tolist() == [1, 1, 1]
    assert network[1].running_mean.tolist() == [2, 2, 2]
    with pytest.raises(KeyError, match=r"1\.gone"):
        write_weights(network, {"1.gone": torch.ones(3)})


def test_sets_of_weights_are_kept_replaced_dropped_and_restored():
    kept, weights = WeightSets(), {"a.weight": torch.ones(2), "b": torch.zeros(3)}
    kept.keep("start", weights)
    kept.keep("start_2", {"a.weight": torch.full((4,), 5.0)})
    weights["a.weight"].fill_(9)  # what is kept is a copy
    assert ("start" in kept, "star" in kept, int(kept.sets)) == (True, False, 2)
    assert_same(kept["start"], {"a.weight": torch.ones(2), "b": torch.zeros(3)})
    assert kept.num_bytes() == 4 * (2 + 3 + 4) + 8
    fresh = WeightSets()
    fresh.keep("other", {"c": torch.ones(1)})
    fresh.load_state_dict(kept.state_dict())
    assert ("other" in fresh, int(fresh.sets)) == (False, 2)
    assert_same(fresh["start_2"], {"a.weight": torch.full((4,), 5.0)})
    kept.keep("start", {"b": torch.ones(1)})
    assert_same(kept["start"], {"b": torch.ones(1)})
    assert int(kept.sets) == 2
    kept.drop("start")
    kept.drop("start")
    assert (kept["start"], int(kept.sets)) == ({}, 1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Ties(keep=0.0), "Ties: keep is 0.0"),
        (lambda: Dare(drop=1.0), "Dare: drop is 1.0"),
        (lambda: Breadcrumbs(low=1.0), "Breadcrumbs: low is 1.0"),
        (lambda: Breadcrumbs(low=0.9, high=0.1), r"Breadcrumbs: low \+ high is 1.0"),
        (lambda: average([]), "average: there are no vectors"),
        (
            lambda: max_magnitude([{"a": tensor(1)}, {"b": tensor(1)}]),
            "vector 1 and the first one do not both have 'a'",
        ),
    ],
)
def test_options_out_of_range_and_unequal_names_are_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()
