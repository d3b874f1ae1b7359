"""Mahalanobis classifier: Gaussian classes with a shared covariance."""

from functools import partial

import pytest
import torch
from support.fakes import normal
from support.pretrained import in_tasks, samples_right

from cl_lightning.measures import last_accuracy
from cl_lightning.memory import PrototypeHead
from cl_lightning.models import MLP
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.pretrained.mahalanobis import Mahalanobis, MahalanobisHead
from cl_lightning.testing import Subject, check_strategy, small

SUBJECTS = {
    "Mahalanobis": Subject(
        small(Mahalanobis, ridge=0.01, adapt=True),
        first_task_is_finetuning=False,
        reason="the head has a closed form after the first task",
    ),
}

PUBLISHED = {
    "mahalanobis": {
        "source": "Lee et al. 2018, sec. 3.3: ResNet-34, first half of the classes; epochs and rates are ours",
        "backbone": "Timm(name=resnet34)",
        "adapt": True,
        "weighting": "class",
        "session_epochs": 200,
        "optimizer": "SGD(lr=0.1, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase",
        "data.scenario": "ClassIncremental(class_order=1993, first=50, increment=10)",
        "data.batch_size": 128,
    },
}

CLASSES, WIDTH = 4, 5
random_features = partial(MLP, hidden=(64,))
SMALL = partial(Mahalanobis, backbone=random_features)


def samples(sizes=(30, 10, 20, 15)):
    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(sizes))
    roots = normal(CLASSES, WIDTH, WIDTH, seed=4)
    return (normal(len(labels), 1, WIDTH) @ roots[labels]).squeeze(1) + 4 * normal(CLASSES, WIDTH, seed=5)[
        labels
    ], labels


def head_of(*parts, **options):
    head = MahalanobisHead(WIDTH, **options)
    head.grow(CLASSES)
    for features, labels in parts:
        head.fit_features(features, labels)
    return head


def by_definition(features, labels, *, weighting, ridge):
    """Means and Sigma, class by class."""
    means = torch.stack([features[labels == c].mean(0) for c in range(CLASSES)])
    within = [features[labels == c].T.cov(correction=0) for c in range(CLASSES)]
    weights = torch.bincount(labels).double() / len(labels) if weighting == "sample" else torch.full((CLASSES,), 0.25)
    sigma = sum(float(weight) * covariance for weight, covariance in zip(weights, within, strict=True))
    return means, sigma + ridge * torch.eye(WIDTH).double()


@pytest.mark.parametrize("weighting", ["sample", "class"])
def test_it_is_the_smallest_distance_under_the_covariance_within_classes(weighting):
    features, labels = samples()
    means, sigma = by_definition(features, labels, weighting=weighting, ridge=0.3)
    points = 4 * normal(50, WIDTH, seed=7)
    gap = points[:, None] - means
    distances = torch.einsum("ncd,de,nce->nc", gap, torch.linalg.inv(sigma), gap)
    own = torch.einsum("nd,de,ne->n", points, torch.linalg.inv(sigma), points)
    early = labels < 2
    for parts in ([(features, labels)], [(features[mask], labels[mask]) for mask in (early, ~early)]):
        head = head_of(*parts, ridge=0.3, weighting=weighting)
        torch.testing.assert_close(head.shared_covariance(), sigma, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(head.distances(points), distances, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(head.classify(points), (own[:, None] - distances) / 2, rtol=1e-9, atol=1e-9)


def test_both_weightings_are_the_same_for_classes_of_equal_size():
    features, labels = samples((12,) * CLASSES)
    first, second = (head_of((features, labels), weighting=weighting) for weighting in ("sample", "class"))
    torch.testing.assert_close(first.shared_covariance(), second.shared_covariance(), rtol=1e-10, atol=1e-10)
    features, labels = samples()
    first, second = (head_of((features, labels), weighting=weighting) for weighting in ("sample", "class"))
    assert not torch.allclose(first.shared_covariance(), second.shared_covariance(), rtol=0.01)


def test_an_invertible_linear_map_changes_no_distance_and_a_large_ridge_is_the_nearest_mean():
    features, labels = samples()
    root = normal(WIDTH, WIDTH, seed=3)
    plain, mapped = head_of((features, labels), ridge=0.0), head_of((features @ root, labels), ridge=0.0)
    points = normal(40, WIDTH, seed=8)
    torch.testing.assert_close(plain.distances(points), mapped.distances(points @ root), rtol=1e-6, atol=1e-6)
    nearest = PrototypeHead(WIDTH, metric="euclidean").double()
    nearest.grow(CLASSES)
    nearest.fit_features(features, labels)
    far = head_of((features, labels), ridge=1e9)
    assert torch.equal(far.classify(points).argmax(1), nearest.classify(points).argmax(1))


def test_classes_without_samples_are_infinitely_far():
    features, labels = samples()
    head = head_of((features[labels < 3], labels[labels < 3]))
    assert torch.isposinf(head.distances(features)[:, 3]).all()
    assert torch.isneginf(head.classify(features)[:, 3]).all()


# ---------------------------------------------------------------------- runs


def test_what_is_right_in_the_end_does_not_depend_on_the_split_into_tasks():
    made = [in_tasks(SMALL, count) for count in (1, 5)]
    assert abs(samples_right(made[0].matrix) - samples_right(made[1].matrix)) <= 1
    plain = in_tasks(partial(Finetune, backbone=random_features), 5)
    assert last_accuracy(made[1].matrix.R_ci) > max(0.88, last_accuracy(plain.matrix.R_ci) + 0.4)


def area(inside, outside):
    """Area under the ROC curve: share of pairs in which the first is larger."""
    return float((inside[:, None] > outside).double().mean())


def test_the_confidence_separates_digits_from_images_of_no_class():
    made = in_tasks(partial(SMALL, ridge=1e-3), 2)
    strategy = made.strategy.eval()
    images = torch.cat([batch.images for batch in strategy.passes.batches()])[:150]  # of the last task
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    strange = images.flatten(1)[:, order].view_as(images)
    inside, outside = (strategy.confidence(part) for part in (images, strange))
    assert area(inside, outside) > 0.9
    head = strategy.network.head
    with torch.no_grad():
        distances = head.distances(strategy.network.backbone(images))
    assert torch.equal(inside, -distances.amin(dim=1))
    assert torch.equal(distances.argmin(dim=1), head.classify(strategy.network.backbone(images)).argmax(dim=1))
    stepped = strategy.confidence(images, magnitude=1e-3)
    assert (stepped > inside).double().mean() > 0.9  # the step increases it
    assert not images.requires_grad


def test_the_step_on_the_image_is_the_sign_of_the_gradient():
    made = in_tasks(partial(SMALL, ridge=1e-3), 1)
    strategy = made.strategy.eval().double()
    images = next(iter(strategy.passes.batches())).images[:3].double()
    found, size = strategy.confidence(images, magnitude=0.01), 1e-6
    slopes = torch.zeros_like(images).flatten(1)
    for pixel in range(64):
        shift = torch.zeros(64, dtype=torch.float64)
        shift[pixel] = size
        ends = [strategy.confidence(images + sign * shift.view(1, 1, 8, 8)) for sign in (1, -1)]
        slopes[:, pixel] = (ends[0] - ends[1]) / (2 * size)
    expected = strategy.confidence(images + 0.01 * slopes.sign().view_as(images))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_frozen_network_with_class_weights_conforms():
    make = small(Mahalanobis, ridge=0.01, weighting="class")
    check_strategy(make, checks=["trains", "resume", "restores", "bytes"], first_task_is_finetuning=False)


def test_options_out_of_range_are_errors():
    with pytest.raises(ValueError, match="MahalanobisHead: ridge is -1"):
        Mahalanobis(ridge=-1.0)
    with pytest.raises(ValueError, match="MahalanobisHead: weighting is 'task'"):
        Mahalanobis(weighting="task")
    with pytest.raises(ValueError, match="Mahalanobis: magnitude is -1"):
        Mahalanobis().confidence(torch.zeros(1, 1, 8, 8), magnitude=-1.0)
