from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from support.baselines import finetuning
from support.fakes import normal
from support.runs import plain_net, run, sgd
from support.teaching import losses
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.callback import ContinualCallback
from cl_lightning.callbacks.continual_evaluation import ContinualEvaluation
from cl_lightning.memory import Prototypes, herding_indices
from cl_lightning.models import MLP
from cl_lightning.strategies.rehearsal.icarl import ICaRL
from cl_lightning.stream import Blurry, RotatedDomains
from cl_lightning.testing import Subject, check_strategy, small

SLOW = "the means of the exemplars are measured after each task, and herded anew"
SUBJECTS = {
    "ICaRL": Subject(
        small(ICaRL), first_task_is_finetuning=False, reason="binary cross-entropy takes the place of cross-entropy"
    ),
}

PUBLISHED = {
    "icarl_cifar100": {
        "source": "LAMDA-CL/PyCIL: models/icarl.py, utils/data.py (jitter 63/255)",
        "memory_size": 2000,
        "form": "softmax",
        "backbone": "ResNet32",
        "first_optimizer": "SGD(lr=0.1, momentum=0.9, weight_decay=0.0005)",
        "first_scheduler": "MultiStepLR(gamma=0.1, milestones=[60, 120, 170])",
        "optimizer": "SGD(lr=0.1, momentum=0.9, weight_decay=0.0002)",
        "scheduler": "MultiStepLR(gamma=0.1, milestones=[80, 120])",
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 128,
        "data.transforms": ["RandomCrop(padding=4)", "RandomHorizontalFlip()", "ColorJitter(brightness=0.247)"],
        "loop.first_task_epochs": 200,
        "trainer.max_epochs": 170,
    },
    "icarl_cifar100_paper": {
        "source": "srebuffi/iCaRL: main_cifar_100_theano.py; lr_old / 100, 2 * wght_decay * 100",
        "memory_size": 2000,
        "form": "sigmoid",
        "backbone": "ResNet32",
        "optimizer": "SGD(lr=0.02, momentum=0.9, weight_decay=0.002)",
        "scheduler": "MultiStepLR(gamma=0.2, milestones=[49, 63])",
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 128,
        "trainer.max_epochs": 70,
    },
}

SMALL = partial(ICaRL, backbone=plain_net, optimizer=sgd)


class Lists(ContinualCallback):
    """Notes the exemplars of each class, in order, as each task ends, and the classes' means."""

    def __init__(self):
        self.lists, self.tasks = [], []

    def on_task_end(self, trainer, strategy, task):
        memory = strategy.memory
        rows = {label: memory.rows_of(label) for label in range(task.num_seen)}
        self.lists.append({label: memory.images[of].clone() for label, of in rows.items()})


# ---------------------------------------------------------------------- the maths


def test_with_one_exemplar_per_class_the_nearest_mean_is_the_nearest_exemplar():
    exemplars, features = normal(7, 5), normal(40, 5, seed=1)
    means = Prototypes(5).double()
    means.update(F.normalize(exemplars), torch.arange(7), num_classes=7)
    scores = means.scores(features, 7, "cosine")
    expected = torch.cdist(F.normalize(features), F.normalize(exemplars)).argmin(1)
    assert torch.equal(scores.argmax(1), expected)


def test_the_nearest_mean_is_that_of_unit_vectors_and_does_not_ask_for_the_length_of_features():
    labels = torch.arange(30) % 3
    phi, features = F.normalize(normal(30, 4)), normal(20, 4, seed=1)
    means = Prototypes(4).double()
    means.update(phi, labels, num_classes=3)
    mu = F.normalize(torch.stack([phi[labels == c].mean(0) for c in range(3)]))
    expected = torch.cdist(F.normalize(features), mu).argmin(1)
    assert torch.equal(means.scores(features, 3, "cosine").argmax(1), expected)
    assert torch.equal(means.scores(7 * features, 3, "cosine").argmax(1), expected)


def test_the_mean_of_herded_rows_comes_nearer_to_the_mean_of_all_as_there_are_more():
    errors = torch.zeros(40, dtype=torch.float64)
    for seed in range(20):
        phi = F.normalize(normal(40, 6, seed=seed))
        chosen = phi[herding_indices(phi, 40)]
        running = chosen.cumsum(0) / torch.arange(1, 41)[:, None]
        errors += (running - phi.mean(0)).norm(dim=1) / 20
    assert (errors[[0, 1, 2, 4, 9, 19, 39]].diff() < 0).all()
    assert errors[-1] < 1e-12


def test_the_sigmoid_form_asks_old_outputs_of_the_teacher_and_new_ones_of_the_label():
    logits, taught, labels = normal(4, 5), normal(4, 3, seed=1), torch.tensor([0, 3, 4, 2])
    targets = torch.cat([taught.sigmoid(), F.one_hot(labels, 5)[:, 3:].double()], 1)
    p = logits.sigmoid()
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(1).mean()
    found = losses(ICaRL(), logits, labels, taught)
    assert found.keys() == {"bce"}
    torch.testing.assert_close(found["bce"], expected)


def test_the_softmax_form_is_cross_entropy_and_softened_distillation():
    logits, taught, labels = normal(4, 5), normal(4, 3, seed=1), torch.tensor([0, 3, 4, 2])
    found = losses(ICaRL(form="softmax", distill_weight=0.5, temperature=2.0), logits, labels, taught)
    torch.testing.assert_close(found["ce"], F.cross_entropy(logits, labels))
    distill = -((taught / 2).softmax(1) * (logits[:, :3] / 2).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(found["distill"], 0.5 * distill)
    assert losses(ICaRL(form="softmax"), logits, labels).keys() == {"ce"}


# ---------------------------------------------------------------------- exemplar sets


def test_every_class_has_its_quota_and_old_lists_lose_only_their_ends():
    noted = Lists()
    made = run(SMALL(memory_size=50), noted, max_epochs=1)
    for task, lists in zip(made.stream.tasks, noted.lists, strict=True):
        assert [len(images) for images in lists.values()] == [50 // task.num_seen] * task.num_seen
    for earlier, later in zip(noted.lists, noted.lists[1:], strict=False):
        for label, images in earlier.items():
            assert torch.equal(later[label], images[: len(later[label])])


def test_the_lists_of_a_task_match_herding_by_the_plain_loop():
    made = run(SMALL(memory_size=30), max_epochs=1)
    strategy, data = made.strategy, made.datamodule
    task, source = made.stream.tasks[-1], data.samples(train=True)
    strategy.eval()
    for column in task.columns:
        places = torch.as_tensor(made.stream.train[task.index].copy())
        places = places[torch.as_tensor(source.labels)[places] == made.stream.order[column]]
        with torch.no_grad():
            images = data.normalize(source.images[places], Draw.of(len(places), 0))
            phi = F.normalize(strategy.network.backbone(images).double())
        chosen: list[int] = []
        for k in range(1, 4):
            total = phi[chosen].sum(0)
            gaps = [
                float("inf") if i in chosen else float((phi.mean(0) - (total + phi[i]) / k).norm())
                for i in range(len(phi))
            ]
            chosen.append(gaps.index(min(gaps)))
        rows = strategy.memory.rows_of(column)
        assert torch.equal(strategy.memory.images[rows], source.images[places[chosen]])


@pytest.mark.parametrize(
    "scenario", [RotatedDomains(tasks=3), Blurry(tasks=3, disjoint=40, blurry=20)], ids=["domains", "blurry"]
)
def test_a_class_that_comes_in_several_tasks_has_a_list_for_each(scenario):
    made = run(SMALL(memory_size=60), data={"scenario": scenario}, max_epochs=1)
    memory = made.strategy.memory
    pairs, counts = torch.stack([memory.tasks, memory.labels]).unique(dim=1, return_counts=True)
    columns = made.stream.columns_of(made.datamodule.samples(train=True).labels)
    had = {(t, int(c)) for t, part in enumerate(made.stream.train) for c in set(columns[part].tolist())}
    assert {(int(t), int(c)) for t, c in pairs.T} == had
    assert int(counts.max()) == 60 // len(had)
    assert len(made.strategy.means) == made.strategy.network.head.num_columns


@pytest.mark.filterwarnings("ignore:give --model.memory_size")
def test_a_memory_too_small_for_all_classes_keeps_one_of_the_earliest():
    made = run(SMALL(memory_size=6), max_epochs=1)
    assert made.strategy.memory.counts(10).tolist() == [1] * 6 + [0] * 4
    assert made.strategy.means.known.tolist() == [True] * 6 + [False] * 4


# ---------------------------------------------------------------------- runs


def test_the_means_match_the_exemplars_under_the_network_as_it_is():
    made = run(SMALL(memory_size=40), max_epochs=1)
    strategy = made.strategy.eval()
    memory = strategy.memory
    with torch.no_grad():
        images = made.datamodule.normalize(memory.images, Draw.of(len(memory), 0))
        phi = F.normalize(strategy.network.backbone(images))
    for label in range(10):
        torch.testing.assert_close(strategy.means.means[label], phi[memory.labels == label].mean(0))


def test_while_a_task_is_learnt_the_head_predicts_and_afterwards_the_exemplars():
    seen = []

    class Looks(Callback):
        def on_train_batch_end(self, trainer, strategy, outputs, batch, batch_idx):
            with torch.no_grad():
                scores = strategy.predict(batch.images)
                seen.append(torch.equal(scores, strategy.network(batch.images).logits))

    made = run(SMALL(memory_size=40), Looks(), max_epochs=1)
    assert all(seen)
    images = torch.zeros(2, 1, 8, 8)
    scores = made.strategy.eval().predict(images)
    assert not torch.equal(scores, made.strategy.network(images).logits)
    assert float(scores.detach().abs().max()) <= 1 + 1e-6  # cosines


def test_curves_of_the_head_have_no_jump_where_a_task_begins():
    watch = ContinualEvaluation(every_n_steps=5)
    strategy = ICaRL(backbone=partial(MLP, hidden=(64,)), optimizer=sgd, memory_size=60)
    made = run(strategy, watch, max_epochs=3, data={"scenario": None, "batch_size": 32})
    curves, aware = watch.curves(), watch.curves(task_aware=True)
    for task, end in enumerate(watch.ends[:-1]):
        assert watch.tasks[end : end + 2] == [task, task + 1]
        old = slice(task + 1)
        assert abs(float((curves[end + 1, old] - curves[end, old]).mean())) < 0.02  # new rows take a sample or two
        assert torch.equal(aware[end + 1, old], aware[end, old])
    assert (made.matrix.R_ci[-1] - curves[-1]).abs().max() > 0.1  # that is of the means


@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
def test_when_a_task_is_over_the_nearest_mean_of_exemplars_is_predicted(form):
    made = run(SMALL(memory_size=40, form=form), max_epochs=1)
    strategy, data = made.strategy.eval(), made.datamodule
    memory, source = strategy.memory, data.samples(train=False)
    rows = np.concatenate(made.stream.test)

    def phi(images):
        return F.normalize(strategy.network.backbone(data.normalize(images, Draw.of(len(images), 0))).double())

    with torch.no_grad():
        exemplars, tested = phi(memory.images), phi(source.images[rows])
        scores = strategy.predict(data.normalize(source.images[rows], Draw.of(len(rows), 0)))
    means = F.normalize(torch.stack([exemplars[memory.labels == label].mean(0) for label in range(10)]))
    nearest = torch.cdist(tested, means).argmin(1)
    assert torch.equal(scores.argmax(1), nearest)
    right = nearest == torch.as_tensor(made.stream.columns_of(source.labels[rows]))
    shares = [part.double().mean() for part in right.split([len(part) for part in made.stream.test])]
    torch.testing.assert_close(made.matrix.R_ci[-1], torch.stack(shares))


@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
def test_it_is_far_above_finetuning_and_nearest_means_above_its_own_head(form):
    five = {"scenario": None, "batch_size": 32}
    made = [
        run(strategy, max_epochs=4, data=five).matrix.measures()["average_accuracy"]
        for strategy in (
            ICaRL(backbone=plain_net, memory_size=100, form=form),
            ICaRL(backbone=plain_net, memory_size=100, form=form, classifier="head"),
        )
    ]
    plain = finetuning({"backbone": plain_net}, max_epochs=4, data=five).measures()["average_accuracy"]
    # Measured: .83 (sigmoid) and .76 (softmax), by the own head .58 and .69, fine-tuning .10.
    assert made[0] > made[1] + 0.03
    assert made[0] > plain + 0.3


@pytest.mark.parametrize(
    ("options", "finetuning"),
    [({"form": "softmax", "classifier": "head"}, True), ({"classifier": "head"}, False)],
)
def test_its_variants_conform(options, finetuning):
    checks = ("trains", "resume", "limits", "bytes", "options")
    check_strategy(small(ICaRL, **options), checks=checks, first_task_is_finetuning=finetuning)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_classes": "current"},
        {"form": "softmax", "temperature": 0.0},
        {"form": "tanh"},
        {"classifier": "svm"},
        {"memory_size": 0},
        {"distill_weight": -1.0},
    ],
)
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match="ICaRL"):
        ICaRL(**options)


def test_a_memory_of_exemplars_does_not_go_with_logits_of_the_current_task_alone():
    with pytest.raises(ValueError, match="ICaRL: loss_classes is 'current'"):
        ICaRL(loss_classes="current")
