"""FeCAM: Mahalanobis distances with a normalised covariance per class."""

from functools import partial

import pytest
import torch
from support.fakes import normal
from support.pretrained import TinyViT, in_tasks, samples_right
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.memory import shrink
from cl_lightning.models import MLP
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.fecam import FeCAM, FeCAMHead, correlation
from cl_lightning.strategies.pretrained.simplecil import SimpleCIL
from cl_lightning.testing import Subject, check_strategy, small

SUBJECTS = {
    "FeCAM": Subject(
        small(FeCAM),
        first_task_is_finetuning=False,
        reason="the head has a closed form after the first task",
    ),
}

PUBLISHED = {
    "fecam_cifar100": {
        "source": "dipamgoswami/FeCAM: the configuration for CIFAR-100 from scratch",
        "backbone": "ResNet18",
        "power": 0.5,
        "shrinkage": [1.0, 1.0],
        "shrinks": 2,
        "covariance": "class",
        "session_epochs": 200,
        "optimizer": "SGD(lr=0.1, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase",
        "data.scenario": "ClassIncremental(class_order=1993, first=50, increment=10)",
        "data.batch_size": 128,
        "data.transforms": [
            "RandomCrop(padding=4)",
            "RandomHorizontalFlip()",
            "ColorJitter(brightness=0.247)",
            "AutoAugment()",
        ],
    },
}

CLASSES, WIDTH = 4, 6
random_features = partial(MLP, hidden=(64,))
FROZEN = partial(FeCAM, backbone=random_features, adapt=False)


def samples(count=80):
    """Features that are not negative, spread differently in each class."""
    labels = torch.arange(count) % CLASSES
    roots = normal(CLASSES, WIDTH, WIDTH, seed=4)
    return (normal(count, 1, WIDTH) @ roots[labels]).squeeze(1).abs() + normal(CLASSES, WIDTH, seed=5).abs()[
        labels
    ], labels


def head_of(*parts, **options):
    """A head in float64 after tasks, each ``(features, labels)``."""
    head = FeCAMHead(WIDTH, **options).double()
    head.grow(CLASSES)
    for features, labels in parts:
        head.fit_features(features, labels)
    return head


def test_the_normalised_covariance_is_the_correlation_and_has_no_unit():
    features = normal(30, WIDTH)
    expected = features.T.corrcoef()
    torch.testing.assert_close(correlation(features.T.cov()), expected)
    torch.testing.assert_close(correlation(7 * features.T.cov()), expected)
    features[:, 2] = 5.0  # without variance
    found = correlation(features.T.cov())
    assert found[2].tolist() == found[:, 2].tolist() == [0, 0, 1, 0, 0, 0]
    torch.testing.assert_close(found.diagonal(), torch.ones(WIDTH).double())


def by_definition(features, labels, points, *, power, shrinks, weights, unit_norm):
    """Distances of the docstring, by plain formulas."""
    if unit_norm:
        features, points = F.normalize(features, dim=1), F.normalize(points, dim=1)
    columns, eye = [], torch.eye(WIDTH).double()
    for c in range(CLASSES):
        own = features[labels == c]
        g = own**power
        sigma = (g - g.mean(0)).T @ (g - g.mean(0)) / (len(g) - 1)
        for _ in range(shrinks):
            v1 = sigma.trace() / WIDTH
            v2 = (sigma.sum() - sigma.trace()) / (WIDTH * (WIDTH - 1))
            sigma = sigma + weights[0] * v1 * eye + weights[1] * v2 * (1 - eye)
        s = sigma.diagonal().sqrt()
        inverse = torch.linalg.inv(sigma / torch.outer(s, s))
        u_c = own.mean(0) ** power
        u = points**power / (points**power).norm(dim=1, keepdim=True)
        gap = u - (u_c if unit_norm else u_c / u_c.norm())
        columns.append(-torch.einsum("nd,de,ne->n", gap, inverse, gap))
    return torch.stack(columns, 1)


@pytest.mark.parametrize(
    ("power", "shrinks", "weights", "unit_norm"),
    [
        (0.5, 2, (1.0, 1.0), False),
        (0.3, 1, (0.5, 0.25), False),
        (1.0, 1, (1.0, 0.0), True),
        (1.0, 0, (1.0, 1.0), False),
    ],
)
def test_scores_are_those_of_the_definition(power, shrinks, weights, unit_norm):
    features, labels = samples()
    points = normal(40, WIDTH, seed=8).abs()
    head = head_of(
        (features, labels), power=power, shrinks=shrinks, shrinkage=weights, unit_norm=unit_norm, covariance="class"
    )
    expected = by_definition(
        features, labels, points, power=power, shrinks=shrinks, weights=weights, unit_norm=unit_norm
    )
    torch.testing.assert_close(head.classify(points), expected, rtol=1e-9, atol=1e-9)
    # In tasks of two classes, and in two parts that share all classes.
    early, half = labels < 2, torch.arange(80) < 30
    for mask in (early, half):
        parts = [(features[mask], labels[mask]), (features[~mask], labels[~mask])]
        again = head_of(*parts, power=power, shrinks=shrinks, shrinkage=weights, unit_norm=unit_norm)
        torch.testing.assert_close(again.classify(points), expected, rtol=1e-9, atol=1e-9)


def test_the_common_covariance_is_the_mean_over_the_classes():
    features, labels = samples()
    early = labels < 1
    head = head_of((features[early], labels[early]), (features[~early], labels[~early]), covariance="common")
    covariances = torch.stack([(features[labels == c] ** 0.5).T.cov() for c in range(CLASSES)])
    torch.testing.assert_close(head.common.mean, covariances.mean(0))
    inverse = torch.linalg.inv(correlation(shrink(covariances.mean(0), 3.0, 3.0)))
    points = normal(40, WIDTH, seed=8).abs()
    means = torch.stack([features[labels == c].mean(0) for c in range(CLASSES)])
    gap = F.normalize(points.sqrt(), dim=1)[:, None] - F.normalize(means.sqrt(), dim=1)
    expected = -torch.einsum("ncd,de,nce->nc", gap, inverse, gap)
    torch.testing.assert_close(head.classify(points), expected, rtol=1e-9, atol=1e-9)


def test_equal_uncorrelated_variances_give_the_nearest_mean_of_the_transformed_features():
    _, labels = samples()
    signs = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)]).double()  # covariance a multiple of I
    means = normal(CLASSES, WIDTH, seed=2).abs() + 2
    features, labels = (means[:, None] + signs).flatten(0, 1), torch.arange(CLASSES).repeat_interleave(2 * WIDTH)
    head = head_of((features, labels), power=1.0, shrinkage=(1.0, 0.0))
    points = normal(60, WIDTH, seed=3).abs()
    nearest = torch.cdist(F.normalize(points, dim=1), F.normalize(means, dim=1)).square()
    torch.testing.assert_close(head.classify(points), -nearest, rtol=1e-8, atol=1e-8)


def test_the_inverse_of_a_class_follows_its_covariance():
    features, labels = samples()
    for covariance in ("class", "common"):
        head = head_of((features[:40], labels[:40]), covariance=covariance)
        head.classify(features)  # computes the inverses
        head.fit_features(features[40:60], labels[40:60])
        fresh = head_of((features[:40], labels[:40]), (features[40:60], labels[40:60]), covariance=covariance)
        assert torch.equal(head.classify(features), fresh.classify(features))
        other = head_of((features[40:], labels[40:]), covariance=covariance)
        other.classify(features)
        other.load_state_dict(head.state_dict())
        assert torch.equal(head.classify(features), other.classify(features))


def test_a_single_sample_has_no_covariance_and_a_class_without_samples_is_not_predicted():
    features, labels = samples()
    few = torch.tensor([0, 1, 4, 5, 8, 9, 2])  # three samples of classes 0 and 1, one of class 2
    for covariance in ("class", "common"):
        scores = head_of((features[few], labels[few]), covariance=covariance).classify(features)
        assert scores[:, :3].isfinite().all()
        assert torch.isneginf(scores[:, 3]).all()
    head = head_of((features[few], labels[few]))
    gap = F.normalize(features.sqrt(), dim=1) - F.normalize(features[2].sqrt(), dim=0)
    torch.testing.assert_close(head.classify(features)[:, 2], -gap.square().sum(1))


# ---------------------------------------------------------------------- runs


def test_what_is_right_in_the_end_does_not_depend_on_the_split_into_tasks():
    made = [in_tasks(FROZEN, count) for count in (1, 5)]
    assert abs(samples_right(made[0].matrix) - samples_right(made[1].matrix)) <= 1
    means = in_tasks(partial(SimpleCIL, backbone=random_features), 5)
    common = in_tasks(partial(FROZEN, covariance="common"), 5)
    # Measured: .94, with a common covariance .90, class means .87.
    full, shared, nearest = (last_accuracy(one.matrix.R_ci) for one in (made[1], common, means))
    assert full > nearest + 0.02
    assert shared > nearest + 0.01


def test_it_learns_its_backbone_in_the_first_task():
    plain = in_tasks(partial(Finetune, backbone=random_features), 2, max_epochs=3)
    made = in_tasks(partial(FeCAM, backbone=random_features), 2, max_epochs=3)
    # Measured: .92 against .48.
    assert last_accuracy(made.matrix.R_ci) > last_accuracy(plain.matrix.R_ci) + 0.3


def test_what_is_kept_is_the_statistics_and_not_the_inverses():
    made = in_tasks(partial(FROZEN, backbone=partial(MLP, hidden=(16,))), 2)
    kept = made.strategy.bytes_kept()["prototypes"]
    # In float32: two means of 16 features and a covariance of each of 10 classes, and two counts in int64.
    assert kept == 10 * (4 * (2 * 16 + 16 * 16) + 2 * 8)


def test_a_common_covariance_conforms():
    make = small(FeCAM, covariance="common", adapt=False)
    check_strategy(make, checks=["trains", "resume", "restores", "bytes"], first_task_is_finetuning=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"power": 0.0}, "power is 0"),
        ({"shrinkage": (1.0, -1.0)}, r"shrinkage\[1\] is -1"),
        ({"shrinks": -1}, "shrinks"),
    ],
)
def test_options_out_of_range_are_errors(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        FeCAM(**options)


def test_negative_features_are_refused_before_training():
    with pytest.raises(ValueError, match="features of the backbone are negative; use power 1"):
        FeCAM(backbone=TinyViT).build((1, 8, 8))
    FeCAM(backbone=TinyViT, power=1.0).build((1, 8, 8))
