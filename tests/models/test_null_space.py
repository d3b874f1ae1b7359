import itertools
import math

import pytest
import torch
from support.fakes import normal

from cl_lightning.models import NullSpaceHead, SolutionSet


def all_maps(inputs=12, outputs=2):
    return SolutionSet.all_maps(inputs, outputs)


def learnt(tasks, **options):
    found = all_maps(tasks[0][0].shape[1], tasks[0][1].shape[1])
    for inputs, targets in tasks:
        found = found.restricted(inputs, targets, **options)
    return found


def realisable(sizes=(3, 4, 2)):
    """Tasks that one map fits, in 12 dimensions."""
    weight = normal(12, 2, seed=50)
    return [(x, x @ weight) for x in (normal(n, 12, seed=n) for n in sizes)]


def contradictory():
    """Rows of 4 and of 10 dimensions, of which 2 are common, with targets that no map fits."""
    first = normal(9, 4, seed=1) @ normal(4, 12, seed=2)
    second = normal(20, 10, seed=3) @ normal(10, 12, seed=4)
    return (first, normal(9, 2, seed=5)), (second, normal(20, 2, seed=6))


def test_two_tasks_by_hand():
    # 2 w_1 = 6 leaves w_2 free; then w_1 + w_2 = 4 and w_1 + w_2 = 6, at best 5.
    first = SolutionSet.all_maps(2, 1).restricted(torch.tensor([[2.0, 0.0]]), torch.tensor([[6.0]]))
    assert first.point.flatten().tolist() == pytest.approx([3, 0])
    assert first.projector.flatten().tolist() == pytest.approx([0, 0, 0, 1])
    second = first.restricted(torch.ones(2, 2), torch.tensor([[4.0], [6.0]]))
    assert second.point.flatten().tolist() == pytest.approx([3, 2])
    assert second.dimension == 0


def test_tasks_that_one_map_fits_give_the_joint_minimum_norm_solution_in_any_order():
    tasks = realisable()
    joint = torch.linalg.pinv(torch.cat([x for x, _ in tasks])) @ torch.cat([y for _, y in tasks])
    for order in itertools.permutations(tasks):
        found = learnt(list(order))
        torch.testing.assert_close(found.point, joint, rtol=0, atol=1e-13)
        assert found.dimension == 12 - 9
    for seed in range(3):  # every member fits every task
        member = found.point + found.basis() @ normal(3, 2, seed=seed)
        assert max(float((x @ member - y).abs().max()) for x, y in tasks) < 1e-12


def test_otherwise_the_first_task_keeps_its_minimum_and_the_second_is_optimal_within():
    (x0, y0), (x1, y1) = contradictory()
    alone = learnt([(x0, y0)])
    both = alone.restricted(x1, y1)
    lowest = (x0 @ torch.linalg.lstsq(x0, y0, driver="gelsd").solution - y0).square().sum()
    assert float((x0 @ both.point - y0).square().sum()) == pytest.approx(float(lowest), rel=1e-13)
    free = alone.basis()  # of the null space of x0
    torch.testing.assert_close(x0 @ free, torch.zeros(9, 8).double(), rtol=0, atol=1e-13)
    slope = free.T @ x1.T @ (x1 @ both.point - y1)
    torch.testing.assert_close(slope, torch.zeros(8, 2).double(), rtol=0, atol=1e-11)
    # Equality-constrained least squares, by the system of Karush, Kuhn and Tucker for the rows of x0.
    rows = torch.linalg.svd(x0).Vh[:4]
    system = torch.cat([torch.cat([x1.T @ x1, rows.T], 1), torch.cat([rows, torch.zeros(4, 4).double()], 1)])
    right = torch.cat([x1.T @ y1, rows @ alone.point])
    solved = torch.linalg.lstsq(system, right, driver="gelsd").solution[:12]
    torch.testing.assert_close(both.point, solved, rtol=0, atol=1e-10)
    other = learnt([(x1, y1), (x0, y0)])
    assert not torch.allclose(x0 @ other.point, x0 @ both.point, atol=1e-3)


def test_the_basis_is_orthonormal_and_the_projector_stays_one():
    found = learnt(realisable())
    basis, projector = found.basis(), found.projector
    torch.testing.assert_close(basis.T @ basis, torch.eye(3).double())
    torch.testing.assert_close(basis @ basis.T, projector)
    torch.testing.assert_close(projector @ projector, projector, rtol=0, atol=1e-14)
    assert torch.equal(projector, projector.T)
    for number in range(40):  # one dimension after another, until none is left
        row = normal(1, 12, seed=100 + number)
        found = found.restricted(row, row @ normal(12, 2, seed=50))
    assert found.dimension == 0
    torch.testing.assert_close(found.projector, torch.zeros(12, 12).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.point, normal(12, 2, seed=50), rtol=0, atol=1e-10)


def test_the_recursion_by_samples_gives_the_same():
    tasks = realisable()
    weight, projector = torch.zeros(12, 2).double(), torch.eye(12).double()
    for row, target in ((r, t) for x, y in tasks for r, t in zip(x, y, strict=True)):
        u = projector @ row
        weight += torch.outer(u, target - row @ weight) / (row @ u)
        projector -= torch.outer(u, u) / (row @ u)
    found = learnt(tasks)
    torch.testing.assert_close(found.point, weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.projector, projector, rtol=0, atol=1e-12)


def test_projected_gradient_descent_converges_to_it():
    (x0, y0), (x1, y1) = contradictory()
    alone = learnt([(x0, y0)])
    weight, rate = alone.point.clone(), 1 / torch.linalg.matrix_norm(x1, ord=2) ** 2
    for _ in range(20_000):
        weight -= rate * alone.projector @ x1.T @ (x1 @ weight - y1)
    torch.testing.assert_close(alone.restricted(x1, y1).point, weight, rtol=0, atol=1e-9)


def test_a_task_again_and_a_task_without_rows_change_nothing():
    tasks = [*realisable(), contradictory()[1]]
    found = learnt(tasks)
    for inputs, targets in (tasks[0], (torch.zeros(0, 12), torch.zeros(0, 2)), (torch.zeros(2, 12), torch.ones(2, 2))):
        again = found.restricted(inputs, targets)
        torch.testing.assert_close(again.point, found.point, rtol=0, atol=1e-12)
        torch.testing.assert_close(again.projector, found.projector, rtol=0, atol=1e-12)


def test_the_nearest_member_is_the_projection():
    found, weight = learnt(realisable()), normal(12, 2, seed=77)
    nearest = found.nearest(weight)
    torch.testing.assert_close(found.nearest(nearest), nearest)
    torch.testing.assert_close(found.basis().T @ (weight - nearest), torch.zeros(3, 2).double(), rtol=0, atol=1e-13)
    assert max(float((x @ nearest - y).abs().max()) for x, y in realisable()) < 1e-12


def test_the_tolerance_is_a_share_of_the_largest_singular_value_of_the_task():
    rows, targets = torch.diag(torch.tensor([4.0, 0.1])), torch.ones(2, 1)
    whole, cut = (SolutionSet.all_maps(2, 1).restricted(rows, targets, tolerance=t) for t in (0.02, 0.03))
    assert (whole.dimension, cut.dimension) == (0, 1)  # 0.1 / 4 = 0.025
    assert whole.point.flatten().tolist() == pytest.approx([0.25, 10])
    assert cut.point.flatten().tolist() == pytest.approx([0.25, 0])
    # Nor of what is left: after the first direction, 0.1 is still compared with 4.
    first = SolutionSet.all_maps(2, 1).restricted(rows[:1], targets[:1])
    assert first.restricted(rows, targets, tolerance=0.03).dimension == 1
    with pytest.raises(ValueError, match=r"SolutionSet: tolerance is 1.0; it must be in \[0, 1\)"):
        whole.restricted(rows, targets, tolerance=1.0)


def test_small_singular_values_do_not_leak_into_directions_that_are_taken():
    first = learnt([(normal(5, 12, seed=1), normal(5, 2, seed=2))])
    weak = normal(4, 4, seed=8) @ (torch.logspace(0, -8, 4).double()[:, None] * normal(4, 12, seed=3))
    second = first.restricted(weak, normal(4, 2, seed=4))
    kept = normal(5, 12, seed=1)
    taken = first.projector - second.projector
    assert float((kept @ taken).abs().max()) < 1e-14
    torch.testing.assert_close(taken @ taken, taken, rtol=0, atol=1e-14)
    assert torch.equal(second.restricted(weak, torch.ones(4, 2), tolerance=0.0).projector, second.projector)


def test_the_head_learns_classes_as_they_arrive_and_keeps_its_outputs():
    head, features = NullSpaceHead(20, tolerance=1e-8), normal(15, 20)
    labels = torch.tensor([0, 1, 2] * 3 + [3, 4] * 3)
    head.grow(3)
    head.fit_features(features[:9], labels[:9])
    before = head.linear(features[:9])
    torch.testing.assert_close(before, torch.eye(3).double()[labels[:9]], rtol=0, atol=1e-12)
    assert head.solutions().dimension == 11
    head.grow(2)
    head.fit_features(torch.cat([features[9:], normal(3, 20, seed=9)]), torch.cat([labels[9:], torch.tensor([-1] * 3)]))
    torch.testing.assert_close(head.linear(features), torch.eye(5).double()[labels], rtol=0, atol=1e-12)
    assert head.counts.tolist() == [3] * 5
    assert head.solutions().dimension == 5  # rows without a label have no part in it
    assert head.num_bytes() == 8 * (20 * 20 + 5 * 20 + 5 + 5)
    fresh = NullSpaceHead(20)
    fresh.load_state_dict(head.state_dict())
    assert torch.equal(fresh.linear(features), head.linear(features))
    assert torch.equal(fresh.projector, head.projector)


def test_a_tolerance_out_of_range_is_an_error():
    for wrong in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="NullSpaceHead: tolerance is"):
            NullSpaceHead(3, tolerance=wrong)
