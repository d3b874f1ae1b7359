from pathlib import Path
from typing import Any

import pytest
import torch
from support.fakes import normal
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.memory import Importance, PathIntegral, RiemannianWalk
from cl_lightning.models import MLP, LinearHead, Network


def small_net() -> Network:
    torch.manual_seed(0)
    net = Network(MLP((2, 4, 4), hidden=(6,)), LinearHead(6))
    net.head.grow(4)
    return net.double()


def descend(net: nn.Module, path: PathIntegral, images: Tensor, labels: Tensor, lr: float, steps: int, **options: Any):
    """Gradient descent, noting the path; returns the decrease of the loss."""
    parameters = dict(net.named_parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, **options)
    path.begin(parameters)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(net(images).logits, labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        path.before_step(parameters)
        optimizer.step()
        path.after_step(parameters)
    return losses[0] - F.cross_entropy(net(images).logits, labels).item()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_work_of_all_weights_is_the_decrease_of_the_loss(momentum: float):
    net, path = small_net(), PathIntegral()
    decrease = descend(net, path, normal(20, 2, 4, 4), torch.arange(20) % 4, 1e-3, 200, momentum=momentum)
    work = sum(value.sum() for value in path.work.values()).item()
    assert decrease > 0.01
    assert work == pytest.approx(decrease, rel=0.02)
    assert path.steps.item() == 200


def test_work_leaves_the_penalty_out():
    theta = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    parameters, slope = {"theta": theta}, torch.tensor([0.5, -1.0], dtype=torch.float64)
    importance, path = Importance(), PathIntegral()
    importance.merge({"theta": torch.zeros(2, dtype=torch.float64)}, {"theta": torch.ones(2, dtype=torch.float64)})
    path.begin(parameters)
    (slope @ theta + 3 * importance.penalty(parameters)).backward()
    pull = {name: 3 * value for name, value in importance.gradient(parameters).items()}
    path.before_step(parameters, pull)
    theta.grad.mul_(0.1)  # clipping comes later and must not be seen
    move = torch.tensor([-0.25, 0.125], dtype=torch.float64)
    with torch.no_grad():
        theta += move
    path.after_step(parameters)
    torch.testing.assert_close(path.work["theta"], -slope * move)


def test_a_step_that_loss_scaling_skips_leaves_no_trace():
    theta = nn.Parameter(torch.ones(2))
    path = PathIntegral()
    path.begin({"theta": theta})
    theta.grad = torch.tensor([torch.inf, torch.nan])
    path.before_step({"theta": theta})
    path.after_step({"theta": theta})
    path.after_step({"theta": theta})  # and one that was not announced does nothing
    assert path.work["theta"].tolist() == [0, 0]


def test_importance_of_a_path_is_work_over_the_squared_distance_and_can_be_clamped():
    theta = {"a.b": torch.tensor([1.0, 1.0, 1.0])}
    path = PathIntegral(0.5)
    path.begin(theta)
    end = {"a.b": torch.tensor([2.0, 0.0, 1.0])}
    path.accumulate(
        theta, {"a.b": torch.tensor([-3.0, -3.0, -3.0]), "new": torch.ones(1)}, end | {"new": torch.ones(1)}
    )
    torch.testing.assert_close(path.importance(end)["a.b"], torch.tensor([3 / 1.5, 0, 0]))
    path.clamp = False
    torch.testing.assert_close(path.importance(end)["a.b"], torch.tensor([2.0, -2.0, 0]))
    path.begin(end)
    assert path.work["a.b"].tolist() == [0, 0, 0]


def test_starting_again_forgets_the_names_and_the_work_of_before():
    path, importance = PathIntegral(), Importance()
    path.begin({"a": torch.zeros(2), "b": torch.zeros(1)})
    path.accumulate({"a": torch.zeros(2)}, {"a": torch.ones(2)}, {"a": -torch.ones(2)})
    torch.testing.assert_close(path.importance({"a": torch.ones(2), "b": torch.zeros(1)})["a"], torch.ones(2) / 1.1)
    path.begin({"a": torch.ones(2)})
    assert path.importance({"a": torch.zeros(2)}).keys() == {"a"}
    torch.testing.assert_close(path.work, {"a": torch.zeros(2)})
    importance.merge({"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.ones(2), "b": torch.ones(1)})
    importance.anchor_at({"b": torch.zeros(1)}, 3.0)
    torch.testing.assert_close(importance.anchors, {"b": torch.zeros(1)})
    torch.testing.assert_close(importance.omegas, {"b": torch.tensor(3.0)})


def test_a_path_continues_after_a_restart(tmp_path: Path):
    images, labels = normal(20, 2, 4, 4), torch.arange(20) % 4
    net, path = small_net(), PathIntegral()
    descend(net, path, images, labels, 0.1, 3)
    torch.save(path.state_dict(), tmp_path / "state.pt")
    other = PathIntegral()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    parameters = dict(net.named_parameters())
    assert other.steps.item() == 3
    for ours, expected in zip(other.importance(parameters).values(), path.importance(parameters).values(), strict=True):
        assert torch.equal(ours, expected)


# --- RWalk -----------------------------------------------------------------------------------------------------------


def steps(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Gradient and change of three weights at each step, float64."""
    gradients = [normal(3, seed=seed + k) for k in range(count)]
    return [(g, -0.2 * g + 0.1 * normal(3, seed=seed + 50 + k)) for k, g in enumerate(gradients)]


def walked(walk: RiemannianWalk, theta: Tensor, made: list[tuple[Tensor, Tensor]], name: str = "w") -> Tensor:
    for gradient, move in made:
        after = theta + move
        walk.accumulate({name: theta}, {name: gradient}, {name: after})
        theta = after
    return theta


def plain_walk(
    made: list[tuple[Tensor, Tensor]], fisher: Tensor | None, rate: float, interval: int, eps: float
) -> tuple[Tensor, Tensor]:
    """F and s of the definition, one weight at a time, in Python numbers."""
    scores, fishers = [], []
    for j in range(3):
        old = None if fisher is None else fisher[j].item()
        work = moved = score = 0.0
        for count, (gradient, move) in enumerate(made, start=1):
            square = gradient[j].item() ** 2
            old = square if old is None else rate * square + (1 - rate) * old
            work -= gradient[j].item() * move[j].item()
            moved += move[j].item()
            if count % interval == 0 or count == len(made):
                score += work / (old * moved**2 / 2 + eps)
                work = moved = 0.0
        scores.append(score)
        fishers.append(old)
    return torch.tensor(fishers, dtype=torch.float64), torch.tensor(scores, dtype=torch.float64)


def test_two_tasks_of_a_walk_are_its_definition():
    rate, interval, eps = 0.7, 3, 0.01
    walk = RiemannianWalk(rate=rate, interval=interval, xi=eps)
    theta, fisher, average = normal(3, seed=50), None, None
    for task in range(2):
        made = steps(8, seed=100 * task)
        walk.begin({"w": theta})
        theta = walked(walk, theta, made)
        omega = walk.importance({"w": theta})["w"]
        fisher, score = plain_walk(made, fisher, rate, interval, eps)
        average = score if average is None else (average + score) / 2
        assert (average > 0).any()
        torch.testing.assert_close(omega, fisher / fisher.max() + average.clamp(min=0) / average.max())
        assert omega.min() >= 0
        assert omega.max() <= 2


def test_the_largest_values_are_over_all_weights():
    walk = RiemannianWalk(rate=1.0, interval=1, xi=1.0)
    theta = {"a": torch.zeros(1, dtype=torch.float64), "b.c": torch.zeros(1, dtype=torch.float64)}
    gradients = {"a": torch.full((1,), -2.0).double(), "b.c": torch.full((1,), -4.0).double()}
    after = {"a": torch.ones(1).double(), "b.c": torch.ones(1).double()}
    walk.begin(theta)
    walk.accumulate(theta, gradients, after)
    # F = 4, 16; w = 2, 4; s = 2 / (4 / 2 + 1), 4 / (16 / 2 + 1)
    omega = walk.importance(after)
    assert omega["a"].item() == pytest.approx(4 / 16 + 1)
    assert omega["b.c"].item() == pytest.approx(1 + (4 / 9) / (2 / 3))


def test_on_a_straight_path_the_work_is_the_decrease_of_a_linear_loss():
    walk, slope = RiemannianWalk(interval=100), normal(3, seed=1)
    theta = normal(3, seed=2)
    walk.begin({"w": theta})
    end = walked(walk, theta, [(slope, -0.25 * slope)] * 7)
    torch.testing.assert_close(walk.work["w"].sum(), slope @ theta - slope @ end)


def test_with_rate_1_only_the_last_gradient_counts_and_without_progress_only_the_fisher_information():
    walk, made = RiemannianWalk(rate=1.0, interval=2), steps(5)
    uphill = [(gradient, 0.1 * gradient) for gradient, _ in made]  # each step increases the loss
    walk.begin({"w": torch.zeros(3, dtype=torch.float64)})
    end = walked(walk, torch.zeros(3, dtype=torch.float64), uphill)
    last = made[-1][0].square()
    torch.testing.assert_close(walk.importance({"w": end})["w"], last / last.max())


def test_rows_that_are_new_in_a_task_begin_their_own_walk():
    walk, made = RiemannianWalk(interval=1, xi=1.0), steps(1)
    walk.begin({"w": torch.zeros(3, dtype=torch.float64)})
    walk.importance({"w": walked(walk, torch.zeros(3, dtype=torch.float64), made)})
    both = {"w": torch.zeros(3, dtype=torch.float64), "new": torch.zeros(3, dtype=torch.float64)}
    walk.begin(both)
    end = walked(walk, both["new"], made, "new")
    omega = walk.importance({"w": both["w"], "new": end})
    (gradient, move), score = made[0], 0.0
    score = -gradient * move / (gradient.square() * move.square() / 2 + 1.0)
    top = score.max()  # the score of "w" has halved: it did not move in the second task
    torch.testing.assert_close(omega["new"] - omega["w"], (score.clamp(min=0) - (score / 2).clamp(min=0)) / top)


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_a_walk_continues_after_a_restart_within_an_interval(taken: int, tmp_path: Path):
    made, start = steps(7), normal(3, seed=50)
    whole, cut = (RiemannianWalk(interval=3) for _ in range(2))
    for walk in (whole, cut):
        walk.begin({"w": start})
    end = walked(whole, start, made)
    middle = walked(cut, start, made[:taken])
    torch.save(cut.state_dict(), tmp_path / "state.pt")
    other = RiemannianWalk(interval=3)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(walked(other, middle, made[taken:]), end)
    assert torch.equal(other.importance({"w": end})["w"], whole.importance({"w": end})["w"])


def test_a_step_that_loss_scaling_skips_leaves_no_trace_in_a_walk():
    walk, theta = RiemannianWalk(interval=1), normal(3, seed=50)
    walk.begin({"w": theta})
    end = walked(walk, theta, steps(2))
    before = {name: buffer.clone() for name, buffer in walk.named_buffers()}
    walk.accumulate({"w": end}, {"w": torch.tensor([torch.inf, torch.nan, 1.0], dtype=torch.float64)}, {"w": end})
    after = dict(walk.named_buffers())
    assert all(torch.equal(after[name], value) for name, value in before.items() if name != "steps")


def test_what_belongs_to_one_task_is_dropped_with_it():
    walk, path, theta = RiemannianWalk(), PathIntegral(), {"w": normal(3, seed=50)}
    for part in (walk, path):
        part.begin(theta)
        part.accumulate(theta, {"w": normal(3)}, {"w": theta["w"] + 0.1})
        part.importance({"w": theta["w"] + 0.1})
        part.reset()
    assert [name for name, _ in path.named_buffers()] == ["steps"]
    assert [name for name, _ in walk.named_buffers()] == ["steps", "fisher/w", "average/w"]
    assert walk.num_bytes() == 8 + 2 * 3 * 8
