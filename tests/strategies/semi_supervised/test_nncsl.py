"""NNCSL, soft nearest neighbours for continual semi-supervised learning."""

import math
from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.fakes import normal
from support.runs import NormNet, run
from support.watching import watching
from torch.nn import functional as F

from cl_lightning.data import RandomCrop
from cl_lightning.strategies.semi_supervised.nncsl import (
    NNCSL,
    negative_entropy_of_mean,
    smoothed,
    soft_cross_entropy,
    soft_neighbours,
    view_targets,
)
from cl_lightning.stream import ClassIncremental, LabelFraction, Subset
from cl_lightning.testing import Subject, TinyDigits, small

HIDDEN = LabelFraction(ClassIncremental(sizes=[4, 3, 3], class_order=[3, 1, 4, 0, 5, 9, 2, 6, 8, 7]), fraction=0.3)
SUBJECTS = {
    "NNCSL": Subject(
        small(NNCSL, hidden=12, width=8, supports_per_class=2, feature_share=0.5),
        data=partial(TinyDigits, scenario=HIDDEN),
        first_task_is_finetuning=False,
        matches_single_process=False,
        reason="unlabelled samples are trained on; batch normalisation of the projection is over a process",
    )
}
SLOW = "a step has four views of its samples and two of the supports, each in the networks of two tasks"
PUBLISHED = {
    "nncsl": {
        "source": "kangzhiq/NNCSL: CIFAR-10 with a memory of 500 samples, as its card gives it",
        "backbone": "ResNet18",
        "memory_size": 500,
        "supports_per_class": 5,
        "optimizer": "SGD(lr=0.4, momentum=0.9, weight_decay=1e-05)",
        "scheduler": "CosineOverPhase(final=0.08, warmup=10)",
        "trainer.max_epochs": 250,
    }
}
DATA = {
    "scenario": LabelFraction(ClassIncremental(tasks=5), fraction=0.05),
    "batch_size": 32,
    "transforms": [RandomCrop(padding=1)],
}
NET, ADAM = partial(NormNet, units=64), partial(torch.optim.Adam, lr=2e-3)


def test_soft_neighbours_are_means_of_labels_by_cosine():
    queries, supports, labels = normal(3, 4), normal(5, 4, seed=1), normal(5, 2, seed=2).softmax(1)
    found = soft_neighbours(queries, supports, labels, 0.3)
    for row, query in zip(found, queries, strict=True):
        weights = [math.exp(float(F.cosine_similarity(query, other, 0)) / 0.3) for other in supports]
        expected = sum(w * label for w, label in zip(weights, labels, strict=True)) / sum(weights)
        torch.testing.assert_close(row, expected)
    torch.testing.assert_close(found.sum(1), torch.ones(3, dtype=torch.float64))
    inside = torch.tensor([True, False, True, True, False])
    some = soft_neighbours(queries, supports, labels, 0.3, inside)
    torch.testing.assert_close(some, soft_neighbours(queries, supports[inside], labels[inside], 0.3))


def test_at_temperature_zero_it_is_the_label_of_the_nearest_sample():
    queries, supports = normal(6, 4), normal(5, 4, seed=1)
    nearest = (F.normalize(queries, dim=1) @ F.normalize(supports, dim=1).T).argmax(1)
    assert soft_neighbours(queries, supports, torch.eye(5), 1e-4).argmax(1).equal(nearest)


def test_labels_are_smoothed_over_the_classes_that_count():
    found = smoothed(torch.tensor([4, 2, 0]), torch.tensor([2, 4]), 0.1)
    torch.testing.assert_close(found, torch.tensor([[0.05, 0.95], [0.95, 0.05], [0.05, 0.05]]))


def test_the_target_of_a_view_is_of_the_other_one_and_of_a_small_view_of_both():
    first = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64, requires_grad=True)
    second = torch.tensor([[0.8, 0.2], [0.6, 0.4]], dtype=torch.float64)
    found = view_targets(first, second, 2, 0.25)

    def power(p):
        return torch.tensor([x**4 for x in p]) / sum(x**4 for x in p)

    one, two = (torch.stack([power(row) for row in p.tolist()]).double() for p in (first, second))
    expected = torch.cat([two, one, (one + two) / 2, (one + two) / 2])
    expected[3] = torch.where(expected[3] < 1e-4, 0.0, expected[3])
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    assert found.shape == (8, 2)
    assert not found.requires_grad
    tiny = view_targets(torch.tensor([[0.95, 0.05]]), torch.tensor([[0.95, 0.05]]), 0, 0.25)
    assert tiny[:, 1].tolist() == [0.0, 0.0]  # 7.7e-6
    assert float(view_targets(torch.tensor([[0.87, 0.13]]), torch.tensor([[0.87, 0.13]]), 0, 0.25)[0, 1]) > 0


def test_the_entropy_of_the_mean_is_largest_for_balanced_classes():
    assert float(negative_entropy_of_mean(torch.eye(4, dtype=torch.float64), 0.25)) == pytest.approx(-math.log(4))
    p = torch.tensor([[0.7, 0.3], [0.4, 0.6]], dtype=torch.float64)
    mean = sum(row.square() / row.square().sum() for row in p) / 2
    assert float(negative_entropy_of_mean(p, 0.5)) == pytest.approx(float((mean * mean.log()).sum()), rel=1e-12)


def test_the_cross_entropy_of_equal_distributions_is_their_entropy_without_gradient():
    logits = normal(4, 3).requires_grad_()
    p = logits.softmax(1)
    loss = soft_cross_entropy(p.detach(), p)
    assert float(loss) == pytest.approx(float(-(p * p.log()).sum() / 4), rel=1e-12)
    loss.backward()
    torch.testing.assert_close(logits.grad, torch.zeros_like(logits), atol=1e-12, rtol=0)


def by_hand(strategy, batch, output, terms):
    """Terms from the output by the equations, with rows that are selected."""
    rows = {name: part for name, (part, _) in batch.parts.items()}
    labels = batch.labels[rows["support 0"]].repeat(2)
    seen, new = strategy.task.num_seen, strategy.task.num_new
    columns = torch.arange(seen)

    def projected(module, features):
        mean, outputs = features, None
        for layer in module:
            if isinstance(layer, torch.nn.BatchNorm1d):
                if module is strategy.projections.now:
                    variance, mean_of = mean.var(0, unbiased=False), mean.mean(0)
                    mean = (mean - mean_of) / (variance + layer.eps).sqrt() * layer.weight + layer.bias
                else:
                    mean = layer(mean)
            else:
                mean = layer(mean)
            outputs = mean
        return outputs

    z = projected(strategy.projections.now, output.features)
    supports = torch.cat([z[rows["support 0"]], z[rows["support 1"]]])

    def neighbours(queries, held, chosen):
        inside = torch.isin(labels, chosen)
        return soft_neighbours(queries, held[inside], smoothed(labels[inside], chosen, strategy.smoothing), 0.1)

    names = ["large 0", "large 1", "small 0", "small 1"]
    p = [neighbours(z[rows[name]], supports, columns[seen - new :]) for name in names]
    targets = view_targets(p[0], p[1], 2, 0.25)
    found = {
        "snn": soft_cross_entropy(targets, torch.cat(p)),
        "entropy": negative_entropy_of_mean(torch.cat(p), 0.25),
        "linear": 0.005 * F.cross_entropy(output.logits[torch.arange(len(z))[rows["support 0"].start :]], labels),
    }
    if strategy.teacher:
        h = strategy.teacher(batch.images).features
        old = projected(strategy.projections.before, h)
        large = torch.cat([torch.arange(len(z))[rows[name]] for name in names[:2]])
        held = torch.cat([old[rows["support 0"]], old[rows["support 1"]]])
        before = neighbours(old[large], held, columns[: seen - new])
        nnd = soft_cross_entropy(before, neighbours(z[large], supports, columns[: seen - new]))
        feat = (strategy.projections.regression(output.features[large]) - h[large]).square().mean()
        found["distill"] = 0.2 * (0.25 * feat + 0.75 * nnd)
    return batch, {name: float(value) for name, value in terms.items()}, {name: float(v) for name, v in found.items()}


@pytest.fixture(scope="module")
def steps():
    few = LabelFraction(Subset(ClassIncremental(sizes=[5, 5]), per_class=24), fraction=0.25)
    options = {"hidden": 20, "width": 10, "supports_per_class": 3, "feature_share": 0.25, "memory_size": 20}
    watched = watching(NNCSL, by_hand, backbone=NET, **options)
    run(watched, data={**DATA, "scenario": few}, max_epochs=1)
    return watched


def test_every_term_is_that_of_the_equations(steps):
    for task, names in ((0, {"snn", "entropy", "linear"}), (1, {"snn", "entropy", "linear", "distill"})):
        _, terms, expected = steps.recorded[task][2]
        assert set(terms) == names
        assert terms == pytest.approx(expected, rel=1e-4)


def test_a_step_has_all_samples_without_labels_and_supports_of_all_classes_in_two_views(steps):
    for batch, _, _ in steps.recorded[1]:
        assert (batch.parts["large 0"][1].labels == -1).all()
        assert batch.parts["support 0"][1].labels.bincount().tolist() == [3] * 10
        for pair in (("large 0", "large 1"), ("support 0", "support 1"), ("small 0", "small 1")):
            first, second = (batch.parts[name][1] for name in pair)
            assert first.indices.equal(second.indices)
            assert not first.images.equal(second.images)
    seen = torch.cat([batch.parts["large 0"][1].indices for batch, _, _ in steps.recorded[1]])
    assert len(seen.unique()) == len(seen) == 120


def test_the_memory_is_balanced_and_the_networks_before_are_copies(steps):
    assert steps.memory.labels.bincount().tolist() == [2] * 10
    for name, value in steps.projections.before.state_dict().items():
        assert value.equal(steps.projections.now.state_dict()[name])
    assert not any(parameter.requires_grad for parameter in steps.projections.before.parameters())


def test_it_is_far_above_finetuning_on_the_labelled_samples():
    found = run(
        NNCSL(backbone=NET, memory_size=100, optimizer=ADAM, hidden=64, width=32, linear_weight=1.0),
        data=DATA,
        max_epochs=2,
    )
    finetune = finetuning({"backbone": NET, "optimizer": ADAM}, data=DATA, max_epochs=20)
    # Measured: .72 and .18.
    assert found.matrix.measures()["average_accuracy"] > finetune.measures()["average_accuracy"] + 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"supports_per_class": 0}, "supports_per_class is 0"),
        ({"memory_size": 0}, "memory_size is 0"),
        ({"hidden": 0}, "hidden is 0"),
        ({"width": 0}, "width is 0"),
        ({"small_views": -1}, "small_views is -1"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"sharpening": 0.0}, "sharpening is 0"),
        ({"smoothing": 1.0}, "smoothing is 1"),
        ({"linear_weight": -1.0}, "linear_weight is -1"),
        ({"distill_weight": -1.0}, "distill_weight is -1"),
        ({"feature_share": 1.5}, "feature_share is 1.5"),
        ({"loss_classes": "task"}, "loss_classes is 'task'"),
        ({"replay_size": 4}, "policy and replay_size"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NNCSL(**options)
