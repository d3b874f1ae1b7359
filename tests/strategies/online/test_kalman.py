"""Kalman filter for online classification."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from support.baselines import finetuning
from support.fakes import batch_of, normal
from support.runs import plain_net, run
from torch.nn import functional as F

from cl_lightning.models import MLP, Output
from cl_lightning.strategies.online.kalman import KalmanClassifier, KalmanHead, log_predictive
from cl_lightning.stream import ClassIncremental, Online, Subset
from cl_lightning.testing import Subject, check_strategy, small

SUBJECTS = {
    "KalmanClassifier": Subject(
        small(KalmanClassifier, gamma=0.9, samples=5),
        first_task_is_finetuning=False,
        reason="the head has a closed form",
    ),
}

WIDTH, CLASSES, PRIOR, NOISE = 3, 4, 0.7, 0.3
random_features = partial(MLP, hidden=(64,))


def head_of(parts=(), *, gamma=0.8, classes=CLASSES, learn_gamma=False, **options):
    """A head after batches of a stream, each ``(features, labels)``."""
    head = KalmanHead(
        WIDTH, gamma=gamma, learn_gamma=learn_gamma, **{"prior_variance": PRIOR, "noise_variance": NOISE, **options}
    )
    head.grow(classes)
    for features, labels in parts:
        head.observe(features, labels)
    return head


def samples(count=30, seed=0):
    labels = torch.randint(CLASSES, (count,), generator=torch.Generator().manual_seed(seed))
    return normal(count, WIDTH, seed=seed) + 2 * normal(CLASSES, WIDTH, seed=9)[labels], labels


def inputs_of(features):
    """phi, by hand."""
    rows = [[math.sqrt(WIDTH) * x / math.sqrt(sum(y * y for y in row)) for x in row] for row in features.tolist()]
    return np.array([[*row, 1.0] for row in rows])


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


def test_it_is_the_recursion_of_the_textbook_in_joseph_form():
    features, labels = samples()
    sizes, gamma = (1, 4, 2, 13, 10), 0.8
    head = head_of(zip(features.split(sizes), labels.split(sizes), strict=True), gamma=gamma)
    mean, covariance = np.zeros((WIDTH + 1, CLASSES)), PRIOR * np.eye(WIDTH + 1)
    start = 0
    for size in sizes:
        phi, targets = inputs_of(features)[start : start + size], np.eye(CLASSES)[labels[start : start + size]]
        start += size
        mean, covariance = gamma * mean, gamma**2 * covariance + (1 - gamma**2) * PRIOR * np.eye(WIDTH + 1)
        gain = covariance @ phi.T @ np.linalg.inv(phi @ covariance @ phi.T + NOISE * np.eye(size))
        mean = mean + gain @ (targets - phi @ mean)
        rest = np.eye(WIDTH + 1) - gain @ phi
        covariance = rest @ covariance @ rest.T + NOISE * gain @ gain.T
    close(head.weight().T, mean)
    close(head.covariance, covariance)
    assert torch.equal(head.counts, labels.bincount(minlength=CLASSES))


@pytest.mark.parametrize("sizes", [(30,), (1,) * 30, (7, 1, 22)])
def test_without_drift_it_is_bayesian_regression_in_any_batches(sizes):
    features, labels = samples()
    head = head_of(zip(features.split(sizes), labels.split(sizes), strict=True), gamma=1.0)
    phi = inputs_of(features)
    inverse = np.linalg.inv(phi.T @ phi + NOISE / PRIOR * np.eye(WIDTH + 1))
    close(head.weight().T, inverse @ phi.T @ np.eye(CLASSES)[labels])
    close(head.covariance, NOISE * inverse)


def test_with_drift_it_is_regression_on_a_gaussian_process():
    """Weights of steps i and j have the covariance prior * gamma^|i - j|: the last ones, given all targets at once."""
    features, labels = samples(12)
    gamma, phi, targets = 0.6, inputs_of(features), np.eye(CLASSES)[labels]
    head = head_of(zip(features.split(1), labels.split(1), strict=True), gamma=gamma)
    step = np.arange(12)
    kernel = PRIOR * gamma ** np.abs(step[:, None] - step) * (phi @ phi.T) + NOISE * np.eye(12)
    cross = PRIOR * (gamma ** (11 - step))[:, None] * phi  # of targets and the last weights, (12, m)
    close(head.weight().T, cross.T @ np.linalg.solve(kernel, targets))
    close(head.covariance, PRIOR * np.eye(WIDTH + 1) - cross.T @ np.linalg.solve(kernel, cross))


def test_with_gamma_0_only_the_last_batch_counts():
    (features, labels), last = samples(), samples(5, seed=3)
    found, alone = head_of([(features, labels), last], gamma=0.0), head_of([last], gamma=0.3)
    close(found.weight(), alone.weight())
    close(found.covariance, alone.covariance)
    mean, covariance = found.predicted()
    close(mean, np.zeros((WIDTH + 1, CLASSES)))
    close(covariance, PRIOR * np.eye(WIDTH + 1))


def test_the_covariance_stays_between_0_and_the_prior():
    for gamma in (1.0, 0.99, 0.3):
        head = head_of([samples(10, seed=seed) for seed in range(60)], gamma=gamma)
        values = torch.linalg.eigvalsh(head.covariance)
        assert values.min() > 0
        assert values.max() <= PRIOR
        assert torch.equal(head.covariance, head.covariance.T)


def test_a_class_that_appears_late_is_learnt_as_if_it_had_been_there():
    (features, labels), later = samples(), samples(20, seed=4)
    early = labels.clamp(max=1)
    whole = head_of([(features, early), later])
    grown = head_of([(features, early)], classes=2)
    grown.grow(CLASSES - 2)
    grown.observe(*later)
    close(grown.weight(), whole.weight())
    close(grown.covariance, whole.covariance)


def test_rows_without_a_label_change_nothing_but_time_passes():
    features, labels = samples(6)
    hidden = torch.cat([labels, torch.tensor([-1, -1])])
    extended = torch.cat([features, 50 * normal(2, WIDTH, seed=5)])
    order = torch.tensor([7, 0, 1, 2, 6, 3, 4, 5])
    found, plain = head_of([(extended[order], hidden[order])]), head_of([(features, labels)])
    close(found.weight(), plain.weight())
    close(found.covariance, plain.covariance)
    assert torch.equal(found.counts, plain.counts)
    before = plain.covariance.clone(), plain.weight()
    plain.observe(features[:2], torch.tensor([-1, -1]))
    close(plain.weight(), 0.8 * before[1])
    close(plain.covariance, 0.64 * before[0] + 0.36 * PRIOR * torch.eye(WIDTH + 1).double())


def test_logits_are_gaussian_with_the_moments_of_the_next_batch():
    head, points = head_of([samples()], gamma=0.8, scale=3.0), normal(7, WIDTH, seed=6)
    phi = torch.as_tensor(inputs_of(points))
    moved = 0.64 * head.covariance + 0.36 * PRIOR * torch.eye(WIDTH + 1).double()
    mean, variance = head.logits_of(points)
    close(mean, 0.8 * phi @ head.weight().T)
    close(variance, torch.einsum("nd,de,ne->n", phi, moved, phi))
    expected = 3.0 * mean / (1 + math.pi / 8 * 9.0 * variance[:, None]).sqrt()
    close(head.classify(points), expected, 1e-6)  # the scale is kept in float32
    assert torch.equal(head.eval()(points), head.classify(points))
    assert torch.equal(head.classify(points).argmax(1), mean.argmax(1))
    early = head_of([(points, torch.zeros(7, dtype=torch.int64))])
    assert torch.isneginf(early.classify(points)[:, 1:]).all()  # classes without samples
    blank = early.expand(torch.zeros(2, WIDTH))
    close(blank, torch.tensor([[0.0, 0, 0, 1], [0, 0, 0, 1]]).double())


def test_the_predictive_is_the_mean_of_softmaxes_over_the_draws():
    mean, variance, noise = normal(3, 4), normal(3, seed=1).square() + 0.1, normal(3, 5, 4, seed=2)
    scale = torch.tensor(2.5).double()
    found = log_predictive(mean, variance, scale, noise)
    for i in range(3):
        total = np.zeros(4)
        for s in range(5):
            weights = np.exp(2.5 * (mean[i].numpy() + math.sqrt(float(variance[i])) * noise[i, s].numpy()))
            total += weights / weights.sum()
        close(found[i].exp(), total / 5)
    two = normal(1, 2)
    many = log_predictive(two, variance[:1], scale, normal(1, 200_000, 2, seed=3)).exp()
    points, weights = np.polynomial.hermite_e.hermegauss(60)  # of two classes: a logit difference of variance 2 v
    gap = 2.5 * (float(two[0, 0] - two[0, 1]) + math.sqrt(2 * float(variance[0])) * points)
    exact = (weights / (1 + np.exp(-gap))).sum() / math.sqrt(2 * math.pi)
    assert float(many[0, 0]) == pytest.approx(exact, abs=2e-3)
    none = log_predictive(mean, torch.full((3,), 1e-300).double(), scale, noise)
    close(none, F.log_softmax(2.5 * mean, dim=1))


@pytest.mark.parametrize("gamma", [0.001, 0.5, 0.9, 0.9999])
def test_gamma_starts_where_the_option_says_and_its_gradient_is_right(gamma):
    head = head_of([samples()], gamma=gamma, learn_gamma=True)
    assert float(head.gamma()) == pytest.approx(gamma, rel=1e-5)
    close(head.gamma(), torch.exp(-torch.log1p(torch.exp(head.u.double())) / 2))
    head.u.data = head.u.data.double()
    head.log_scale.data = head.log_scale.data.double()
    points, noise = normal(7, WIDTH, seed=6, requires_grad=True), normal(7, 5, CLASSES, seed=7)

    def loss(u, log_scale, features):
        head.u.data, head.log_scale.data = u.detach(), log_scale.detach()
        mean, variance = head.logits_of(features)
        return log_predictive(mean, variance, log_scale.exp(), noise)[:, 1].mean()

    u, log_scale = head.u.detach().clone(), head.log_scale.detach().clone().requires_grad_()
    value = loss(u, log_scale, points)
    found = torch.autograd.grad(value, [head.u, log_scale, points])
    step = 1e-5
    assert float(found[0]) == pytest.approx(
        float(loss(u + step, log_scale, points) - loss(u - step, log_scale, points)) / (2 * step), rel=1e-4, abs=1e-9
    )
    assert float(found[1]) == pytest.approx(
        float(loss(u, log_scale + step, points) - loss(u, log_scale - step, points)) / (2 * step), rel=1e-4
    )
    moved = torch.zeros_like(points)
    moved[2, 1] = step
    assert float(found[2][2, 1]) == pytest.approx(
        float(loss(u, log_scale, points + moved) - loss(u, log_scale, points - moved)) / (2 * step), rel=1e-4
    )


def stepped(strategy, features, labels, **fields):
    """The loss of a step on features."""
    batch = batch_of(labels).replace(**fields)
    return batch, strategy.losses(batch, Output(features, features.new_zeros(len(features), 0)))["predictive"]


def strategy_with(head, **options):
    strategy = KalmanClassifier(backbone=plain_net, **options)
    strategy.build((1, 1, WIDTH))
    strategy.network.head = head
    return strategy


def test_the_loss_of_a_step_is_of_the_prediction_before_the_update():
    head = head_of([samples()], learn_gamma=True, scale=4.0)
    features, labels = samples(6, seed=8)
    labels[4] = -1
    mean, variance = (part.detach() for part in head.logits_of(features))
    state = head.weight(), head.covariance.clone()
    strategy = strategy_with(head, samples=9)
    batch, loss = stepped(strategy, features, labels)
    noise = batch.draw.fork(0xCA1).randn(9, CLASSES).double()
    log_p = log_predictive(mean, variance, head.log_scale.detach().double().exp(), noise)
    kept = labels >= 0
    close(loss.detach(), -log_p[kept, labels[kept]].mean())
    once = head_of([samples()], learn_gamma=True)
    once.observe(features, labels)
    close(head.weight(), once.weight())
    close(head.covariance, once.covariance)
    assert not torch.allclose(head.weight(), state[0])
    state = head.weight(), head.covariance.clone()
    _, again = stepped(strategy, features, labels, first_pass=False)
    assert float(again) == 0
    assert torch.equal(head.weight(), state[0])
    assert torch.equal(head.covariance, state[1])
    _, nothing = stepped(strategy, features[:0], labels[:0])
    assert float(nothing) == 0
    assert nothing.requires_grad


def test_the_dynamics_have_their_own_learning_rate_and_no_decay():
    strategy = strategy_with(head_of(learn_gamma=True), dynamics_lr=0.02)
    rest, own = strategy.parameter_groups(list(strategy.parameters()))
    assert own == {"params": list(strategy.network.head.parameters()), "lr": 0.02, "weight_decay": 0.0}
    assert {id(parameter) for parameter in rest["params"]} == {
        id(parameter) for parameter in strategy.network.backbone.parameters()
    }
    assert len(own["params"]) == 2
    frozen = strategy_with(head_of(), dynamics_lr=0.02)
    [only] = frozen.parameter_groups(list(frozen.network.head.parameters()))
    assert len(only["params"]) == 1


# ---------------------------------------------------------------------- behaviour

FIVE = {"scenario": Online(Subset(ClassIncremental(tasks=5), per_class=50), batch_size=10)}


def prequential(gamma, swap=40):
    """Share of right predictions before each update, in a stream of two classes that swap their labels at times."""
    head, right = head_of(gamma=gamma, classes=2), 0.0
    centres = torch.tensor([[3.0, 0, 0], [0, 3.0, 0]]).double()
    for step in range(200):
        labels = torch.randint(2, (5,), generator=torch.Generator().manual_seed(step))
        features = normal(5, WIDTH, seed=step) + centres[(labels + step // swap) % 2]
        right += float((head.logits_of(features)[0].argmax(1) == labels).double().mean())
        head.observe(features, labels)
    return right / 200


def test_forgetting_helps_where_labels_change_and_remembering_where_they_do_not():
    # Measured: .59 with gamma 1, .94 with 0.9; without the swaps .975 with 1, .926 with 0.1.
    assert prequential(0.9) > prequential(1.0) + 0.3
    assert prequential(1.0, swap=1000) > prequential(0.1, swap=1000) + 0.02


def test_gamma_is_learnt_from_the_stream():
    options = {"backbone": plain_net, "freeze_backbone": True, "gamma": 0.9, "dynamics_lr": 0.5}
    data = {"scenario": Online(Subset(ClassIncremental(tasks=1), per_class=50), batch_size=10)}
    made = run(KalmanClassifier(**options), data=data)
    assert float(made.strategy.filter.gamma()) > 0.95  # the same classes for the whole stream
    fixed = run(KalmanClassifier(**{**options, "dynamics_lr": 0.0}), data=data, limit_train_batches=5)
    assert float(fixed.strategy.filter.gamma()) == pytest.approx(0.9, rel=1e-5)
    assert float(fixed.strategy.filter.log_scale.exp()) == pytest.approx(10.0, rel=1e-5)


def test_without_drift_no_class_is_forgotten_and_with_drift_old_classes_are():
    # Measured: .92 without drift, .45 with gamma .995, of fine-tuning .14.
    options = {"backbone": random_features, "freeze_backbone": True, "learn_gamma": False}
    accuracies = [
        run(KalmanClassifier(**options, gamma=gamma), data=FIVE).matrix.measures()["average_accuracy"]
        for gamma in (1.0, 0.995)
    ]
    plain = finetuning({"backbone": random_features}, data=FIVE, max_epochs=1).measures()["average_accuracy"]
    assert accuracies[0] > plain + 0.5
    assert accuracies[0] > accuracies[1] + 0.2 > plain + 0.2  # old classes are improbable in the next batch


def test_several_passes_learn_each_sample_once():
    options = {"backbone": plain_net, "freeze_backbone": True, "gamma": 0.99, "learn_gamma": False}
    first, three = (
        run(
            KalmanClassifier(**options),
            data={"scenario": Online(Subset(ClassIncremental(tasks=2), per_class=20), batch_size=50, passes=passes)},
        ).strategy.filter
        for passes in (1, 3)
    )
    close(three.weight(), first.weight())
    close(three.covariance, first.covariance)
    assert torch.equal(three.counts, first.counts)


def test_fixed_features_conform():
    make = small(KalmanClassifier, gamma=1.0, learn_gamma=False, samples=5, freeze_backbone=True)
    check_strategy(make, checks=["trains", "resume"], first_task_is_finetuning=False)


def test_options_out_of_range_are_errors():
    for options, message in (
        ({"gamma": 1.0}, r"KalmanHead: gamma is 1.0; it must be in \(0, 1\)"),
        ({"gamma": 1.1, "learn_gamma": False}, r"KalmanHead: gamma is 1.1; it must be in \[0, 1\]"),
        ({"noise_variance": 0.0}, "KalmanHead: noise_variance is 0"),
        ({"prior_variance": -1.0}, "KalmanHead: prior_variance is -1"),
        ({"scale": 0.0}, "KalmanHead: scale is 0"),
        ({"samples": 0}, "KalmanClassifier: samples is 0"),
        ({"dynamics_lr": -1.0}, "KalmanClassifier: dynamics_lr is -1"),
        ({"loss_classes": "current"}, "KalmanClassifier: loss_classes is 'current'"),
    ):
        with pytest.raises(ValueError, match=message):
            KalmanClassifier(**options)
