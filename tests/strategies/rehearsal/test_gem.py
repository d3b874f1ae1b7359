"""GEM and A-GEM."""

from functools import partial
from itertools import product

import pytest
import scipy.optimize
import torch
from support.baselines import finetuning
from support.fakes import normal
from support.runs import assert_same_run, plain_net, run, sgd

from cl_lightning.strategies.base import without_conflict
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal import gem
from cl_lightning.strategies.rehearsal.gem import AGEM, GEM, gem_projection, nonnegative_minimum
from cl_lightning.stream import ClassIncremental, RotatedDomains
from cl_lightning.testing import check_strategy, small

WAITS = {"GEM": {"gem_projection", "pick"}, "AGEM": {"pick"}}  # the projection, and the rows of past tasks
SLOW = "two methods, GEM and A-GEM, with a variant of each"

PUBLISHED = {
    "gem": {
        "source": "Lopez-Paz & Ranzato, NeurIPS 2017, CIFAR-100: learning rate 0.1, gamma 0.5",
        "memory_size": 500,
        "memory_strength": 0.5,
        "optimizer": "SGD(lr=0.1)",
    },
}

EXACT = {"memory_strength": 0.0, "ridge": 0.0}


def plain_sgd(parameters, lr=0.05):
    return torch.optim.SGD(parameters, lr=lr)


def programme(size, rank, seed):
    """A positive semi-definite matrix of a rank, and a vector in its span."""
    root = normal(size, rank, seed=seed)
    return root @ root.T, root @ normal(rank, seed=seed + 1)


# ---------------------------------------------------------------------- the quadratic programme


@pytest.mark.parametrize(("size", "rank"), [(1, 1), (2, 2), (5, 5), (5, 2), (20, 20), (20, 6), (60, 80)])
def test_the_minimum_fulfils_the_conditions_of_kuhn_and_tucker(size, rank):
    for seed in range(20):
        matrix, slope = programme(size, rank, 10 * seed)
        u = nonnegative_minimum(matrix, slope)
        rise, tolerance = matrix @ u + slope, 1e-9 * float(slope.abs().max())
        assert (u >= 0).all()
        assert (rise >= -tolerance).all()
        assert (u * rise).abs().max() <= tolerance * max(1.0, float(u.max()))


def test_the_margin_and_the_ridge_of_a_projection_are_those_of_the_authors():
    gradient, past = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([[0.0, 1.0, 0.0]]).double()
    # One past task: v = gamma + max(0, -(g_1 + gamma (1 + eps)) / (1 + eps)), g_1 = -2.
    v = 0.5 + (2 - 0.5 * 1.001) / 1.001
    torch.testing.assert_close(gem_projection(gradient, past), gradient + v * past[0])


def test_the_minimum_is_the_least_over_all_active_sets():
    for seed in range(30):
        matrix, slope = programme(4, 4, 10 * seed)
        least = 0.0
        for free in product([False, True], repeat=4):
            point, chosen = torch.zeros(4, dtype=torch.float64), torch.tensor(free)
            if chosen.any():
                point[chosen] = torch.linalg.solve(matrix[chosen][:, chosen], -slope[chosen])
            if (point >= 0).all():
                least = min(least, float(point @ matrix @ point / 2 + slope @ point))
        u = nonnegative_minimum(matrix, slope)
        assert float(u @ matrix @ u / 2 + slope @ u) == pytest.approx(least, rel=1e-10, abs=1e-12)


def test_where_nothing_falls_the_minimum_is_zero():
    matrix, _ = programme(3, 3, 0)
    assert torch.equal(nonnegative_minimum(matrix, torch.ones(3).double()), torch.zeros(3).double())
    assert nonnegative_minimum(torch.zeros(0, 0).double(), torch.zeros(0).double()).shape == (0,)
    assert torch.equal(nonnegative_minimum(0 * matrix, 0 * matrix[0]), torch.zeros(3).double())


# ---------------------------------------------------------------------- the projections


@pytest.mark.parametrize("tasks", [1, 2, 5, 12])
def test_the_projected_gradient_is_the_nearest_that_raises_no_past_loss(tasks):
    for seed in range(10):
        g, past = normal(30, seed=seed), normal(tasks, 30, seed=100 + seed)
        projected = gem_projection(g, past, **EXACT)
        assert (past @ projected).min() > -1e-9
        v, _ = scipy.optimize.nnls(past.T.numpy(), -g.numpy())  # its residual is the projection on the cone
        torch.testing.assert_close(projected, g + torch.from_numpy(v) @ past, rtol=1e-9, atol=1e-9)


def test_a_gradient_that_raises_no_past_loss_stays_itself():
    past = normal(4, 10)
    g = torch.linalg.pinv(past) @ torch.tensor([0.5, 1.0, 2.0, 1e-3], dtype=torch.float64)
    assert gem_projection(g, past) is g
    nothing = 0 * g
    assert gem_projection(nothing, past) is nothing


@pytest.mark.parametrize("strength", [0.0, 0.5, 2.0])
def test_every_weight_is_at_least_the_memory_strength_and_the_products_are_not_negative(strength):
    for seed in range(10):
        past = normal(5, 30, seed=100 + seed)
        g = normal(30, seed=seed) - past[0]
        assert (past @ g < 0).any()
        projected = gem_projection(g, past, memory_strength=strength, ridge=0.0)
        v = torch.linalg.pinv(past.T) @ (projected - g)
        rise = past @ projected
        assert v.min() > strength - 1e-9
        assert rise.min() > -1e-9
        assert ((v - strength) * rise).abs().max() < 1e-8


def test_the_ridge_gives_way_by_its_share():
    g, past = normal(30), normal(5, 30, seed=1)
    for ridge in (1e-3, 1.0):
        projected = gem_projection(g, past, memory_strength=0.0, ridge=ridge)
        v = torch.linalg.pinv(past.T) @ (projected - g)
        assert (past @ projected + ridge * v).min() > -1e-9
        assert (past @ projected).min() < 0


def test_equal_past_tasks_do_no_harm():
    g, past = normal(30), normal(3, 30, seed=1)
    alike = torch.cat([past, past, 0 * past[:1], 2 * past[:1]])
    found = gem_projection(g, alike, **EXACT)
    torch.testing.assert_close(found, gem_projection(g, past, **EXACT), rtol=1e-8, atol=1e-8)


def test_long_gradients_are_multiplied_in_parts(monkeypatch):
    g, past = normal(30), normal(4, 30, seed=1)
    whole = gem_projection(g, past)
    monkeypatch.setattr(gem, "_COLUMNS", 7)
    torch.testing.assert_close(gem_projection(g, past), whole, rtol=1e-12, atol=1e-12)


def test_the_average_gradient_is_orthogonal_to_the_reference_or_stays_to_the_bit():
    for seed in range(10):
        g, reference = normal(30, seed=seed), normal(30, seed=100 + seed)
        projected = without_conflict(g, reference)
        if g @ reference < 0:
            assert abs(float(projected @ reference)) < 1e-12 * float(g.norm() * reference.norm()) * 10
            torch.testing.assert_close(projected, g - (g @ reference) / (reference @ reference) * reference)
        else:
            assert torch.equal(projected, g)
        assert torch.equal(without_conflict(g, 0 * g), g)


def test_with_one_past_task_and_no_margin_the_two_projections_are_one():
    for seed in range(10):
        g, reference = normal(30, seed=seed), normal(30, seed=100 + seed)
        one = gem_projection(g, reference[None], **EXACT)
        torch.testing.assert_close(one, without_conflict(g, reference), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_left_to_who_looks_for_it(wrong):
    g, past = normal(6), normal(2, 6, seed=1)
    g[0] = wrong
    assert gem_projection(g, past) is g
    assert not without_conflict(g, past[0]).isfinite().all()


# ---------------------------------------------------------------------- limits and trajectories


@pytest.mark.parametrize("method", [GEM, AGEM])
def test_without_memory_it_is_finetuning_to_the_bit(method):
    made = run(method(backbone=plain_net, optimizer=sgd, memory_size=0))
    assert_same_run(made, run(Finetune(backbone=plain_net, optimizer=sgd)))


@pytest.mark.parametrize("method", [GEM, AGEM])
def test_where_nothing_is_violated_it_is_finetuning_to_the_bit(method):
    class Content(method):
        asked = 0

        def reference_gradient(self, replay):
            self.asked += 1
            return 0.0 * super().reference_gradient(replay)

    made = run(Content(backbone=plain_net, optimizer=sgd, memory_size=60))
    assert made.strategy.asked > 10
    assert_same_run(made, run(Finetune(backbone=plain_net, optimizer=sgd)))


@pytest.mark.parametrize(
    "make", [partial(GEM, replay_size=9), partial(GEM, memory_strength=0.0, ridge=0.0), partial(AGEM, replay_size=30)]
)
def test_every_step_goes_along_a_gradient_that_raises_no_past_loss(make):
    base = make.func

    class Notes(base):
        edited, worst, gap = 0, 0.0, 0.0

        def edit_gradients(self, batch):
            self.before = torch.cat([p.grad.flatten() for p in self.parameters()])
            self.past = []
            super().edit_gradients(batch)
            after = torch.cat([p.grad.flatten() for p in self.parameters()])
            for reference in self.past:
                cosine = float(after @ reference / (after.norm() * reference.norm()).clamp(min=1e-12))
                self.worst = min(self.worst, cosine)
            self.edited += int(not torch.equal(self.before, after))
            with torch.no_grad():
                self.expected = torch.cat([p.flatten() for p in self.parameters()]) - 0.05 * after

        def reference_gradient(self, replay):
            before = [p.grad.clone() for p in self.parameters()]
            self.past.append(super().reference_gradient(replay))
            assert all(torch.equal(p.grad, kept) for p, kept in zip(self.parameters(), before, strict=True))
            return self.past[-1]

        def after_step(self, batch):
            moved = torch.cat([p.flatten() for p in self.parameters()])
            self.gap = max(self.gap, float((moved - self.expected).abs().max()))
            super().after_step(batch)

    options = {} if base is AGEM or "ridge" in make.keywords else {"ridge": 0.0}
    made = run(Notes(backbone=plain_net, optimizer=plain_sgd, memory_size=60, **make.keywords, **options))
    assert made.strategy.edited > 10
    assert made.strategy.worst > -1e-4
    assert made.strategy.gap < 1e-6


def test_a_reference_is_the_gradient_of_the_mean_loss_on_the_memory_of_a_task():
    class Compares(GEM):
        compared = 0

        def reference_gradient(self, replay):
            found = super().reference_gradient(replay)
            rows = self.memory.tasks == replay.tasks[0]
            assert len(replay) == int(rows.sum())
            whole = self.data.finish(replay.replace(raw=self.memory.images[rows]))
            kept = [p.grad for p in self.parameters()]
            self.zero_grad()
            torch.nn.functional.cross_entropy(self.network(whole.images).logits, self.memory.labels[rows]).backward()
            expected = torch.cat([p.grad.flatten() for p in self.parameters()])
            for parameter, gradient in zip(self.parameters(), kept, strict=True):
                parameter.grad = gradient
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
            self.compared += 1
            return found

    made = run(Compares(backbone=plain_net, optimizer=plain_sgd, memory_size=60), max_epochs=1)
    steps = [-(-len(part) // 64) for part in made.stream.train]
    assert made.strategy.compared == steps[1] + 2 * steps[2]


def test_with_one_past_task_and_the_whole_memory_the_two_methods_go_the_same_way():
    data = {"scenario": ClassIncremental(sizes=[5, 5])}
    common = {"backbone": plain_net, "optimizer": plain_sgd, "memory_size": 100}
    gem_run = run(GEM(**common, **EXACT), data=data, max_epochs=1)
    agem_run = run(AGEM(**common, replay_size=100), data=data, max_epochs=1)
    plain = run(Finetune(backbone=plain_net, optimizer=plain_sgd), data=data, max_epochs=1)
    weights = [list(made.strategy.parameters()) for made in (gem_run, agem_run, plain)]
    for one, other in zip(*weights[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(weights[0][0], weights[2][0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("make", [GEM, partial(AGEM, replay_size=2000)])
def test_accumulated_batches_are_edited_as_one(make):
    options = {"backbone": plain_net, "optimizer": plain_sgd, "memory_size": 2000}
    whole = run(make(**options), data={"batch_size": 64}, limit_train_batches=6, max_epochs=1)
    parts = run(
        make(**options), data={"batch_size": 32}, limit_train_batches=12, accumulate_grad_batches=2, max_epochs=1
    )
    assert whole.trainer.global_step == parts.trainer.global_step == 18
    for one, other in zip(whole.strategy.parameters(), parts.strategy.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_the_memory_holds_the_latest_samples_of_each_task_in_equal_parts():
    made = run(GEM(backbone=plain_net, optimizer=plain_sgd, memory_size=60), max_epochs=2)
    memory = made.strategy.memory
    assert torch.bincount(memory.tasks).tolist() == [20, 20, 20]
    assert int(memory.num_seen) == sum(len(part) for part in made.stream.train)


# ---------------------------------------------------------------------- runs


def test_gem_forgets_least_and_averaged_gem_less_than_finetuning():
    turned = {"scenario": RotatedDomains(tasks=3), "batch_size": 16}
    options = {"backbone": plain_net, "optimizer": plain_sgd}
    best, averaged = (
        run(method(memory_size=200, **options), max_epochs=1, data=turned).matrix.measures() for method in (GEM, AGEM)
    )
    none = finetuning(options, max_epochs=1, data=turned).measures()
    # Measured: GEM .75, A-GEM .57, fine-tuning .48; a forgetting of .00, .25 and .39.
    assert averaged["average_accuracy"] > none["average_accuracy"] + 0.045
    assert best["average_accuracy"] > averaged["average_accuracy"] + 0.085
    assert best["forgetting"] < averaged["forgetting"] < none["forgetting"]


def test_among_all_classes_averaging_hardly_helps_and_what_helps_gem_is_its_memory_strength():
    five = {"scenario": ClassIncremental(tasks=5), "batch_size": 10}
    options = {"backbone": plain_net, "optimizer": partial(plain_sgd, lr=0.1)}
    strong, weak, averaged = (
        run(strategy, max_epochs=1, data=five).matrix.measures()["average_accuracy"]
        for strategy in (
            GEM(memory_size=200, **options),
            GEM(memory_size=200, memory_strength=0.0, **options),
            AGEM(memory_size=200, **options),
        )
    )
    none = finetuning(options, max_epochs=1, data=five).measures()["average_accuracy"]
    # Measured: fine-tuning .18, A-GEM .18, GEM without memory strength .26, with it .90.
    assert averaged < none + 0.1
    assert weak < none + 0.2
    assert strong > none + 0.35


def test_among_all_classes_averaging_keeps_old_tasks_where_the_task_is_known():
    five = {"scenario": ClassIncremental(tasks=5), "batch_size": 10}
    options = {"backbone": plain_net, "optimizer": partial(plain_sgd, lr=0.3)}
    averaged, none = (
        run(strategy, max_epochs=3, data=five).matrix.R_ti[-1, :-1].mean()
        for strategy in (AGEM(memory_size=200, **options), Finetune(**options))
    )
    # Measured: .87 against .76.
    assert averaged > none + 0.05


@pytest.mark.parametrize(
    "variant",
    [
        small(GEM, memory_strength=0.0, loss_classes="task", replay_size=7, optimizer=plain_sgd),
        small(AGEM, loss_classes="task", replay_size=7, optimizer=plain_sgd),
    ],
)
def test_variants_conform(variant):
    check_strategy(variant, checks=("trains", "resume", "options", "bytes", "limits"))


@pytest.mark.parametrize("method", [GEM, AGEM])
@pytest.mark.parametrize("options", [{"loss_classes": "current"}, {"replay_size": 0}, {"memory_size": -1}])
def test_wrong_options_are_errors(method, options):
    with pytest.raises(ValueError, match=rf"{method.__name__}|Memory"):
        method(**options)


@pytest.mark.parametrize("options", [{"memory_strength": -0.1}, {"ridge": -1e-3}])
def test_wrong_options_of_gem_are_errors(options):
    with pytest.raises(ValueError, match=r"GEM: (memory_strength|ridge) is -.*; it must be at least 0"):
        GEM(**options)
