import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from support.fakes import normal
from torch.nn import functional as F

from cl_lightning.models import (
    MaxMarginHead,
    forgetting,
    least_change,
    margins,
    recurring,
    shortfall,
    weakly_regularised,
)


def binary(weight):
    """The classifier of y = 1 against y = -1."""
    return weight[..., 1, :] - weight[..., 0, :]


def pair(weight):
    """Two rows whose difference is a binary classifier; projections of the rows are those of the difference."""
    return torch.stack([-weight / 2, weight / 2])


def tasks(count=3, rows=12, dim=5, gap=0.4):
    """Separable tasks: rows of at least this margin to a common plane."""
    plane = normal(dim, seed=90)
    found = []
    for seed in range(count):
        x = normal(4 * rows, dim, seed=seed)
        x = x[(x @ plane).abs() > gap * plane.norm()][:rows]
        found.append((x, (x @ plane > 0).long()))
    return found


def solved(start, inputs, labels):
    """The projection by sequential quadratic programming of scipy."""
    classes, dim = start.shape
    signs = []
    for x, y in zip(inputs.numpy(), labels.tolist(), strict=True):
        for c in set(range(classes)) - {y}:
            row = np.zeros((classes, dim))
            row[y], row[c] = x, -x
            signs.append(row.ravel())
    normals, first = np.array(signs), start.numpy().ravel()
    constraint = {"type": "ineq", "fun": lambda v: normals @ v - 1, "jac": lambda v: normals}
    made = minimize(
        lambda v: ((v - first) ** 2).sum() / 2,
        first,
        jac=lambda v: v - first,
        constraints=[constraint],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return torch.from_numpy(made.x).view(classes, dim)


def test_margins_by_hand():
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    found = margins(weight, torch.tensor([[1.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 2]))
    assert found.tolist() == [[0, -1, -5], [4, 6, 0]]  # scores are 1, 2, 6 and 2, 0, 6
    missing = shortfall(weight, torch.tensor([[1.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 2]))
    assert missing.tolist() == [[0, 2, 6], [-3, -5, 0]]
    assert forgetting(weight, torch.tensor([[1.0, 1.0]]), torch.tensor([0])) == 36
    assert forgetting(weight, torch.tensor([[2.0, 0.0]]), torch.tensor([2])) == 0


@pytest.mark.parametrize("label", [0, 1])
def test_one_row_is_the_passive_aggressive_step(label):
    w, x, y = normal(4), 3 * normal(4, seed=1), 2 * label - 1
    found = binary(least_change(pair(w), x[None], torch.tensor([label])))
    step = max(0.0, 1 - y * float(w @ x)) / float(x @ x)
    torch.testing.assert_close(found, w + step * y * x, rtol=0, atol=1e-13)


def test_several_classes_and_rows_are_the_solution_of_a_general_solver():
    for seed in range(6):
        inputs, labels = normal(9, 6, seed=seed), torch.tensor([0, 1, 2, 1, 0, 2, 2, 1, 0])
        start = 2 * normal(3, 6, seed=seed + 40)
        found = least_change(start, inputs, labels)
        assert float(shortfall(found, inputs, labels).max()) < 1e-10
        torch.testing.assert_close(found, solved(start, inputs, labels), rtol=0, atol=1e-6)


def test_the_conditions_of_karush_kuhn_and_tucker_hold():
    start, (inputs, labels) = pair(normal(5, seed=7)), tasks(rows=40)[0]
    found = binary(least_change(start, inputs, labels))
    signed = inputs * (2 * labels - 1)[:, None]
    tight = (signed @ found - 1).abs() < 1e-9
    assert 1 <= int(tight.sum()) <= 5
    share = torch.linalg.lstsq(signed[tight].T, found - binary(start)).solution
    torch.testing.assert_close(signed[tight].T @ share, found - binary(start))
    assert bool((share > 0).all())


def test_a_weight_with_all_margins_and_rows_that_repeat_change_nothing():
    inputs, labels = tasks()[0]
    found = least_change(torch.zeros(2, 5), inputs, labels)
    assert torch.equal(least_change(found * 1.5, inputs, labels), found * 1.5)
    twice = least_change(torch.zeros(2, 5), inputs.repeat(3, 1), labels.repeat(3))
    torch.testing.assert_close(twice, found, rtol=0, atol=1e-12)
    assert torch.equal(least_change(found, inputs[:0], labels[:0]), found)


def test_a_row_on_the_same_ray_with_a_shorter_length_decides():
    inputs = torch.tensor([[2.0, 0.0], [0.5, 0.0], [1.0, 0.0]])
    found = binary(least_change(torch.zeros(2, 2), inputs, torch.ones(3, dtype=torch.int64)))
    assert found.tolist() == pytest.approx([2, 0])  # 0.5 w = 1; the others depend on it linearly


def test_a_task_that_no_plane_separates_is_refused():
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    with pytest.raises(ValueError, match="3 samples of 2 classes are not separable"):
        least_change(torch.zeros(2, 2), inputs, torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="not separable"):  # equal rows of two classes
        least_change(torch.zeros(2, 2), inputs[:1].repeat(2, 1), torch.tensor([0, 1]))


def test_the_distance_to_every_common_classifier_falls():
    streams = tasks()
    weights, _ = recurring(streams, 300)
    joint = torch.cat([x for x, _ in streams]), torch.cat([y for _, y in streams])
    limits = [least_change(pair(normal(5, seed=seed)), *joint) for seed in range(4)]
    limits.append(least_change(torch.zeros(2, 5), *joint))
    moves = (weights[1:] - weights[:-1]).square().sum((1, 2))
    for limit in limits:
        far = (weights - limit).square().sum((1, 2))
        assert bool((far[1:] <= far[:-1] - moves + 1e-12).all())
        assert bool((far <= limit.square().sum() + 1e-12).all())
        assert float(moves.sum()) <= float(limit.square().sum()) + 1e-12
    assert max(forgetting(weights[-1], *task) for task in streams) < 1e-8
    largest = limits[-1] / limits[-1].norm()  # of the maximum margin on all data, which need not be reached
    assert float((weights[-1] / weights[-1].norm() * largest).sum()) <= 1 + 1e-12


def test_forgetting_is_bounded_by_the_distance_to_the_set_of_the_task():
    inputs, labels = tasks()[0]
    radius = inputs.norm(dim=1).max()
    for seed in range(30):
        weight = pair(3 * normal(5, seed=seed))
        distance = (weight - least_change(weight, inputs, labels)).norm()
        assert forgetting(weight, inputs, labels) <= float(2 * (radius * distance) ** 2) + 1e-12


def test_orders_of_recurring_tasks():
    streams = tasks()
    cyclic, learnt = recurring(streams, 7)
    assert learnt == [0, 1, 2, 0, 1, 2, 0]
    assert float(cyclic[0].abs().max()) == 0
    torch.testing.assert_close(cyclic[1], least_change(torch.zeros(2, 5), *streams[0]))
    torch.testing.assert_close(cyclic[2], least_change(cyclic[1], *streams[1]))
    _, drawn = recurring(streams, 30, order="random", seed=3)
    assert drawn == recurring(streams, 30, order="random", seed=3)[1]
    assert set(drawn) == {0, 1, 2}
    assert drawn != recurring(streams, 30, order="random", seed=4)[1]
    greedy, chosen = recurring(streams, 6, order="greedy")
    for step, task in enumerate(chosen):
        lost = [forgetting(greedy[step], *each) for each in streams]
        assert lost[task] == max(lost)
    swapped, _ = recurring([streams[1], streams[0]], 2)
    assert not torch.allclose(swapped[2], cyclic[2], atol=1e-3)
    weak, _ = recurring(streams, 1, regularisation=0.5)
    torch.testing.assert_close(weak[1], weakly_regularised(torch.zeros(2, 5), *streams[0], regularisation=0.5))


@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_the_weakly_regularised_classifier_is_a_minimum(size):
    start, inputs, labels = normal(3, 6, seed=1), normal(20, 6, seed=2), torch.arange(20) % 3
    found = weakly_regularised(start, inputs, labels, regularisation=size).requires_grad_()
    loss = F.cross_entropy(inputs @ found.T, labels, reduction="sum") + size / 2 * (found - start).square().sum()
    (slope,) = torch.autograd.grad(loss, found)
    assert float(slope.norm()) < 1e-6


def test_one_row_at_a_large_weight_has_the_first_step_of_gradient_descent():
    start, x = normal(2, 3), normal(1, 3, seed=1)
    found = weakly_regularised(start, x, torch.tensor([1]), regularisation=1e8)
    share = (x @ start.T).softmax(1)[0, 0]
    expected = torch.stack([-share * x[0], share * x[0]]) / 1e8
    torch.testing.assert_close(found - start, expected, rtol=1e-5, atol=0)


def test_its_direction_converges_to_the_projections_and_its_norm_grows_with_the_logarithm():
    streams = tasks(count=2)
    limit, _ = recurring(streams, 2)
    cosines, norms = [], []
    for size in (1e-2, 1e-6, 1e-8):
        found, _ = recurring(streams, 2, regularisation=size)
        cosines.append(float(torch.cosine_similarity(binary(found[-1]), binary(limit[-1]), dim=0)))
        norms.append(float(found[-1].norm() / limit[-1].norm()))
    assert cosines == sorted(cosines)
    assert cosines[0] > 0.95
    assert cosines[2] > 0.999
    assert 0.9 < (norms[2] - norms[1]) / math.log(100) < 1  # W ~ ln(1 / lambda) times the projection


def test_the_head_projects_all_rows_or_those_of_the_task():
    features, labels = normal(12, 8), torch.tensor([0, 1] * 3 + [3, 2] * 3)
    heads = {}
    for against in ("seen", "task"):
        heads[against] = head = MaxMarginHead(8, against=against)
        head.grow(2)
        head.fit_features(features[:6], labels[:6])
        first = least_change(torch.zeros(2, 8), features[:6], labels[:6])
        torch.testing.assert_close(head.weight(), first)
        head.grow(2)
        head.fit_features(torch.cat([features[6:], normal(1, 8)]), torch.cat([labels[6:], torch.tensor([-1])]))
    wide = torch.cat([first, torch.zeros(2, 8)])
    torch.testing.assert_close(heads["seen"].weight(), least_change(wide, features[6:], labels[6:]))
    alone = least_change(torch.zeros(2, 8), features[6:], labels[6:] - 2)
    torch.testing.assert_close(heads["task"].weight(), torch.cat([first, alone]))
    assert heads["task"].counts.tolist() == [3] * 4
    weak = MaxMarginHead(8, regularisation=0.3)
    weak.grow(2)
    weak.fit_features(features[:6], labels[:6])
    expected = weakly_regularised(torch.zeros(2, 8), features[:6], labels[:6], regularisation=0.3)
    torch.testing.assert_close(weak.weight(), expected)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MaxMarginHead(3, regularisation=-1.0), "MaxMarginHead: regularisation is -1.0"),
        (lambda: MaxMarginHead(3, against="all"), "MaxMarginHead: against is 'all'; use 'seen' or 'task'"),
        (lambda: recurring(tasks(), 0), "recurring: steps is 0"),
        (lambda: recurring(tasks(), 1, order="best"), "recurring: order is 'best'"),
        (lambda: least_change(torch.zeros(2, 5), *tasks()[0], tolerance=0.0), "least_change: tolerance is 0.0"),
        (lambda: weakly_regularised(torch.zeros(2, 5), *tasks()[0], regularisation=0.0), "regularisation is 0.0"),
    ],
)
def test_options_out_of_range_are_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()
