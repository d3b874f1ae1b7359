"""Analytic exemplar-free online learning with pseudo-features."""

from functools import partial

import pytest
import torch
from support.fakes import normal
from support.pretrained import in_tasks
from support.runs import run
from torch.nn import functional as F

from cl_lightning.callbacks.continual_evaluation import ContinualEvaluation
from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP, RidgeHead
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.online.aef_ocl import AEFOCL, BalancedRidgeHead
from cl_lightning.strategies.pretrained.gacil import GACIL
from cl_lightning.stream import ClassIncremental, LongTailed, Online
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "AEFOCL": Subject(
        small(AEFOCL, ridge=1.0, projection=40),
        first_task_is_finetuning=False,
        reason="the head has a closed form, nothing is trained",
    ),
}

PUBLISHED = {
    "aef_ocl_long_tailed": {
        "source": "the released code's defaults: ridge, size of the projection, noise; the rest is ours",
        "ridge": 0.1,
        "projection": 8192,
        "noise": 1.0,
        "backbone": "Timm(name=deit_small_patch16_224.fb_in1k, pretrained=True)",
        "data.scenario": "LongTailed(arrangement=shuffled, base=ClassIncremental(tasks=10), imbalance=100)",
        "data.batch_size": 128,
        "data.resize": 224,
        "data.mean": [0.485, 0.456, 0.406],
        "data.std": [0.229, 0.224, 0.225],
    },
}

CLASSES, WIDTH, UNITS = 4, 5, 30
random_features = partial(MLP, hidden=(64,))


def samples(sizes=(40, 25, 10, 1)):
    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(2))]
    return normal(len(labels), WIDTH) + 2 * normal(CLASSES, WIDTH, seed=5)[labels] + 3, labels


def head_of(features, labels, size=1000, **options):
    torch.manual_seed(0)
    head = BalancedRidgeHead(WIDTH, **{"ridge": 0.5, "projection": UNITS, **options})
    head.grow(CLASSES)
    for x, y in zip(features.split(size), labels.split(size), strict=True):
        head.observe(x, y)
    return head


def ridge(features, labels, projection, points):
    """Scores of a ridge regression on all samples at once."""
    phi, u = ((part @ projection.double()).relu() for part in (features, points))
    gram = phi.T @ phi + 0.5 * torch.eye(UNITS).double()
    return u @ torch.linalg.solve(gram, phi.T @ F.one_hot(labels, CLASSES).double())


def test_statistics_are_those_of_the_samples_whatever_the_batches():
    features, labels = samples()
    for size in (1000, 7, 1):
        head = head_of(features, labels, size)
        for column in range(CLASSES):
            own = features[labels == column]
            torch.testing.assert_close(head.means[column], own.mean(0))
            torch.testing.assert_close(head.squares[column], (own - own.mean(0)).square().sum(0))
        phi = (features @ head.random.double()).relu()
        torch.testing.assert_close(head.gram, phi.T @ phi)
        torch.testing.assert_close(head.cross, phi.T @ F.one_hot(labels, CLASSES).double())


def test_without_noise_each_mean_is_repeated_up_to_the_largest_class():
    features, labels = samples()
    head, points = head_of(features, labels, 7, noise=0.0), normal(30, WIDTH, seed=8)
    means = torch.stack([features[labels == c].mean(0) for c in range(CLASSES)])
    fill = torch.arange(CLASSES).repeat_interleave(torch.tensor([0, 15, 30, 39]))
    expected = ridge(torch.cat([features, means[fill]]), torch.cat([labels, fill]), head.random, points)
    torch.testing.assert_close(head.classify(points), expected, rtol=1e-8, atol=1e-8)


def test_with_noise_pseudo_features_are_regressed_like_samples():
    features, labels = samples()
    head, points = head_of(features, labels, noise=0.7), normal(30, WIDTH, seed=8)
    fill = torch.arange(CLASSES).repeat_interleave(torch.tensor([0, 15, 30, 39]))
    drawn = head.pseudo_features(fill, 0)
    expected = ridge(torch.cat([features, drawn]), torch.cat([labels, fill]), head.random, points)
    torch.testing.assert_close(head.classify(points), expected, rtol=1e-8, atol=1e-8)


def test_pseudo_features_have_the_mean_and_the_variance_of_their_class():
    features, labels = samples()
    head = head_of(features, labels, noise=0.5)
    for column in range(CLASSES):
        drawn = head.pseudo_features(torch.full((40000,), column), 0)
        own = features[labels == column]
        torch.testing.assert_close(drawn.mean(0), own.mean(0), rtol=0, atol=0.02)
        spread = 0.5 * own.std(0) if column < 3 else torch.zeros(WIDTH).double()  # the last class has one sample
        torch.testing.assert_close(drawn.std(0), spread, rtol=0.02, atol=1e-12)
    again, other = head.pseudo_features(torch.arange(4), 0), head.pseudo_features(torch.arange(4), 1)
    assert torch.equal(again, head.pseudo_features(torch.arange(4), 0))
    assert not torch.equal(again[:3], other[:3])


def test_where_classes_are_equally_many_it_is_the_ridge_regression():
    features, labels = samples((15,) * CLASSES)
    head, points = head_of(features, labels, 7), normal(30, WIDTH, seed=8)
    plain = RidgeHead(WIDTH, ridge=0.5, projection=UNITS, init="uniform", backend="recursive")
    plain.random = head.random.clone()
    plain.grow(CLASSES)
    plain.fit_features(features, labels)
    torch.testing.assert_close(head.classify(points), plain.classify(points), rtol=1e-8, atol=1e-8)


def test_a_prediction_leaves_no_trace_and_unlabelled_rows_do_not_count():
    features, labels = samples()
    head = head_of(features[:50], labels[:50])
    head.classify(features)
    hidden = torch.cat([labels[50:], torch.full((6,), -1)])
    head.observe(torch.cat([features[50:], 50 + normal(6, WIDTH, seed=1)]), hidden)
    plain = head_of(features, labels, 50)
    for name in ("gram", "cross", "means", "squares", "counts"):
        torch.testing.assert_close(getattr(head, name), getattr(plain, name), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(head.classify(features), plain.classify(features), rtol=1e-8, atol=1e-8)
    few = head_of(features[labels < 2], labels[labels < 2])
    assert torch.isneginf(few.classify(features)[:, 2:]).all()


# ---------------------------------------------------------------------- runs

TAIL = {"scenario": Online(LongTailed(ClassIncremental(tasks=5), imbalance=50, arrangement="shuffled"), batch_size=10)}


def test_pseudo_features_help_on_a_long_tailed_stream():
    options = {"backbone": random_features, "ridge": 1.0, "projection": 200}
    made, host = (run(strategy, data=TAIL).matrix.R_ci for strategy in (AEFOCL(**options), GACIL(**options)))
    # Measured: .81 against .64.
    assert last_accuracy(made) > last_accuracy(host) + 0.1


def test_it_predicts_at_any_time_and_does_not_forget():
    curve = ContinualEvaluation(every_n_steps=5, samples=50)
    make = partial(AEFOCL, backbone=random_features, ridge=1.0, projection=100)
    made = run(make(), curve, data={"scenario": ClassIncremental(tasks=5)})
    plain = in_tasks(make, 5)
    assert torch.equal(made.strategy.network.head.gram, plain.strategy.network.head.gram)
    none = in_tasks(partial(Finetune, backbone=random_features), 5)
    # Measured: .92 against .13.
    assert last_accuracy(made.matrix.R_ci) > max(0.86, last_accuracy(none.matrix.R_ci) + 0.4)


def test_options_out_of_range_are_errors():
    with pytest.raises(ValueError, match="BalancedRidgeHead: noise is -1"):
        AEFOCL(noise=-1.0)
    with pytest.raises(ValueError, match="ridge is 0"):
        AEFOCL(ridge=0.0)
