"""Dual-stream analytic learning."""

from functools import partial

import pytest
import torch
from support.fakes import normal
from support.pretrained import in_tasks
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP, RidgeHead
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.acil import ACIL
from cl_lightning.strategies.exemplar_free.dsal import DSAL, DualStreamHead
from cl_lightning.testing import Subject, check_strategy, small

SUBJECTS = {
    "DSAL": Subject(
        small(DSAL, ridge=1.0, compensation_ridge=1.0, projection=40),
        first_task_is_finetuning=False,
        reason="the head has a closed form after the first task",
    ),
}

PUBLISHED = {
    "dsal_cifar100": {
        "source": "ZHUANGHP/Analytic-continual-learning: the command for CIFAR-100, without TrivialAugment and warm-up",
        "backbone": "ResNet32",
        "ridge": 0.1,
        "projection": 8192,
        "compensation_ridge": 0.1,
        "compensation": 0.6,
        "residue_batch": 256,
        "session_epochs": 300,
        "optimizer": "SGD(lr=0.5, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase",
        "data.scenario": "ClassIncremental(class_order=1993, first=50, increment=2)",
        "data.batch_size": 256,
    },
}

CLASSES, WIDTH, UNITS = 6, 5, 30
hidden = partial(MLP, hidden=(64,))


def samples(count=120):
    labels = torch.arange(count) % CLASSES
    return normal(count, WIDTH) + 2 * normal(CLASSES, WIDTH, seed=5)[labels], labels


def head_of(tasks, **options):
    """A head after tasks, each ``(features, labels)``; it grows with the classes."""
    torch.manual_seed(0)
    head = DualStreamHead(WIDTH, **{"ridge": 0.5, "compensation_ridge": 2.0, "projection": UNITS, **options})
    for features, labels in tasks:
        head.grow(max(0, int(labels.max()) + 1 - head.num_columns))
        head.fit_features(features, labels)
    return head


def in_pairs(features, labels):
    return [(features[labels // 2 == pair], labels[labels // 2 == pair]) for pair in range(3)]


def by_definition(tasks, points, projection, *, activation, weight, compensation_ridge=2.0):
    """Both regressions on all samples so far, task by task."""
    projection, eye = projection.double(), torch.eye(UNITS).double()
    rows, residues, seen = [], [], set()
    for features, labels in tasks:
        rows.append((features, F.one_hot(labels, CLASSES).double()))
        phi = (torch.cat([x for x, _ in rows]) @ projection).relu()
        main = torch.linalg.solve(phi.T @ phi + 0.5 * eye, phi.T @ torch.cat([y for _, y in rows]))
        residue = rows[-1][1] - (features @ projection).relu() @ main
        new = set(labels.tolist()) - seen
        residue[:, [column for column in range(CLASSES) if column not in new]] = 0
        residues.append(residue)
        seen |= new
    psi = activation(torch.cat([x for x, _ in rows]) @ projection)
    second = torch.linalg.solve(psi.T @ psi + compensation_ridge * eye, psi.T @ torch.cat(residues))
    u = points @ projection
    return u.relu() @ main + weight * activation(u) @ second


@pytest.mark.parametrize("backend", ["recursive", "accumulate"])
@pytest.mark.parametrize(("name", "activation"), [("tanh", torch.tanh), ("identity", lambda u: u)])
def test_scores_are_those_of_the_definition(backend, name, activation):
    tasks, points = in_pairs(*samples()), normal(40, WIDTH, seed=8)
    head = head_of(tasks, compensation=0.6, compensation_activation=name, backend=backend)
    expected = by_definition(tasks, points, head.main.random, activation=activation, weight=0.6)
    torch.testing.assert_close(head.classify(points), expected, rtol=1e-7, atol=1e-7)


def test_only_classes_that_are_new_in_a_task_are_compensated():
    features, labels = samples()
    first, second, third = in_pairs(features, labels)
    again = (torch.cat([second[0], first[0] + 0.5]), torch.cat([second[1], first[1]]))  # classes 0 and 1 recur
    tasks, points = [first, again, third], normal(40, WIDTH, seed=8)
    head = head_of(tasks, compensation=1.5)
    expected = by_definition(tasks, points, head.main.random, activation=torch.tanh, weight=1.5)
    torch.testing.assert_close(head.classify(points), expected, rtol=1e-7, atol=1e-7)


def test_the_order_of_the_code_takes_residues_batch_by_batch():
    features, labels = samples()
    order = labels.argsort(stable=True)  # a first batch of a task has one of its classes only
    tasks, size = in_pairs(features[order], labels[order]), 15
    head = head_of(tasks, compensation=0.6, residue_batch=size)
    identity = torch.eye(UNITS).double()
    main, second = torch.zeros(UNITS, CLASSES).double(), torch.zeros(UNITS, CLASSES).double()
    grams = [0.5 * identity, 2.0 * identity]
    cross = [torch.zeros(UNITS, CLASSES).double() for _ in range(2)]
    for pair, (features, labels) in enumerate(tasks):
        for x, y in zip(features.split(size), labels.split(size), strict=True):
            u = x @ head.main.random.double()
            wanted = F.one_hot(y, CLASSES).double()
            grams[0] = grams[0] + u.relu().T @ u.relu()
            cross[0] += u.relu().T @ wanted
            main = torch.linalg.solve(grams[0], cross[0])
            residue = wanted - u.relu() @ main
            residue[:, : 2 * pair] = residue[:, 2 * pair + 2 :] = 0
            grams[1] = grams[1] + u.tanh().T @ u.tanh()
            cross[1] += u.tanh().T @ residue
            second = torch.linalg.solve(grams[1], cross[1])
    points = normal(40, WIDTH, seed=8)
    u = points @ head.main.random.double()
    torch.testing.assert_close(head.classify(points), u.relu() @ main + 0.6 * u.tanh() @ second, rtol=1e-7, atol=1e-7)
    assert not torch.allclose(head.classify(points), head_of(tasks, compensation=0.6).classify(points), atol=1e-3)


def test_without_compensation_it_is_acil():
    tasks, points = in_pairs(*samples()), normal(40, WIDTH, seed=8)
    head = head_of(tasks, compensation=0.0)
    plain = RidgeHead(WIDTH, ridge=0.5, projection=UNITS, init="uniform", backend="recursive")
    plain.random = head.main.random.clone()
    for features, labels in tasks:
        plain.grow(2)
        plain.fit_features(features, labels)
    assert torch.equal(head.classify(points), plain.classify(points))
    head.grow(1)  # a class without samples
    assert torch.isneginf(head.classify(points)[:, -1]).all()
    assert head.classify(points)[:, :-1].isfinite().all()


def test_unlabelled_rows_do_not_count_and_a_copy_has_its_own_residues():
    features, labels = samples()
    hidden_labels = torch.cat([labels, torch.full((9,), -1)])
    points = torch.cat([features, 50 * normal(9, WIDTH, seed=6)])
    head, plain = head_of([(points, hidden_labels)]), head_of([(features, labels)])
    torch.testing.assert_close(head.classify(features), plain.classify(features), rtol=1e-8, atol=1e-8)


# ---------------------------------------------------------------------- runs


def test_it_fits_what_a_small_regression_cannot_and_does_not_forget():
    options = {"backbone": hidden, "ridge": 1.0, "projection": 30}
    made = in_tasks(partial(DSAL, compensation=1.0, compensation_ridge=1.0, **options), 2, max_epochs=3)
    host = in_tasks(partial(ACIL, **options), 2, max_epochs=3)
    plain = in_tasks(partial(Finetune, backbone=hidden), 2, max_epochs=3)
    full, main, none = (last_accuracy(one.matrix.R_ci) for one in (made, host, plain))
    # Measured: .92, ACIL .90, fine-tuning .48.
    assert full > main + 0.01
    assert full > none + 0.3


def test_sums_conform():
    make = small(DSAL, ridge=1.0, compensation_ridge=1.0, projection=40, backend="accumulate", adapt=False)
    check_strategy(make, checks=["trains", "resume", "restores", "bytes"], first_task_is_finetuning=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ridge": 0.0}, "ridge is 0"),
        ({"compensation_ridge": 0.0}, "ridge is 0"),
        ({"compensation": -1.0}, "compensation is -1"),
        ({"residue_batch": 0}, "residue_batch is 0"),
        ({"residue_batch": 9, "backend": "accumulate"}, "residue_batch is 9 with backend 'accumulate'; use recursive"),
    ],
)
def test_options_out_of_range_are_errors(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        DSAL(**options)
