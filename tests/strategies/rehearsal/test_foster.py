from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from support.baselines import finetuning
from support.fakes import normal
from support.runs import NormNet, assert_same, plain_net, run, sgd
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.losses import softmax_distillation
from cl_lightning.measures import last_accuracy
from cl_lightning.memory import PrototypeHead
from cl_lightning.models import MLP, CosineHead
from cl_lightning.strategies.rehearsal.foster import FOSTER, class_weights, rebalanced_distillation
from cl_lightning.strategy import PhaseOptions
from cl_lightning.stream import ClassIncremental, RotatedDomains
from cl_lightning.testing import check_strategy, small

SLOW = "each task has two phases, which are killed and resumed one by one"
PUBLISHED = {
    "foster_cifar100": {
        "source": "G-U-N/ECCV22-FOSTER: configs/cifar/b50inc10.json, utils/data.py (jitter 63/255)",
        "memory_size": 2000,
        "boost_beta": 0.94,
        "compress_beta": 0.97,
        "backbone": "ResNet32",
        "optimizer": "SGD(lr=0.1, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase()",
        "compress_options": {"epochs": 130, "optimizer": "SGD(lr=0.1, momentum=0.9)", "scheduler": "CosineOverPhase()"},
        "data.scenario": "ClassIncremental(class_order=1993, first=50, increment=10)",
        "data.batch_size": 128,
        "data.transforms": [
            "RandomCrop(padding=4)",
            "RandomHorizontalFlip()",
            "ColorJitter(brightness=0.247)",
            "AutoAugment()",
            "Cutout(size=16)",
        ],
        "loop.first_task_epochs": 200,
        "trainer.max_epochs": 170,
    },
}

SMALL = partial(FOSTER, backbone=plain_net, optimizer=sgd, memory_size=60)


# ---------------------------------------------------------------------- the maths


def test_weights_match_the_effective_numbers_of_samples():
    counts, beta = [20, 20, 500], 0.96
    raw = [(1 - beta) / (1 - beta**n) for n in counts]
    expected = torch.tensor([3 * value / sum(raw) for value in raw], dtype=torch.float64)
    torch.testing.assert_close(class_weights(torch.tensor(counts), beta), expected)


def test_without_beta_all_weights_are_one_and_with_beta_near_one_they_are_inverse_counts():
    counts = torch.tensor([3, 20, 500, 0])
    assert torch.equal(class_weights(counts, 0.0), torch.ones(4, dtype=torch.float64))
    inverse = 1 / counts.clamp(min=1).double()
    torch.testing.assert_close(class_weights(counts, 1 - 1e-10), 4 * inverse / inverse.sum(), rtol=1e-4, atol=0)
    torch.testing.assert_close(class_weights(counts, 0.9).sum(), torch.tensor(4.0, dtype=torch.float64))


def test_rebalanced_distillation_is_the_cross_entropy_to_reweighed_probabilities():
    student, teacher, weights = (
        normal(4, 3).requires_grad_(),
        normal(4, 3, seed=1),
        class_weights(torch.tensor([5, 9, 200]), 0.97),
    )
    p = (teacher / 2).softmax(1) * weights
    p = p / p.sum(1, keepdim=True)
    loss = rebalanced_distillation(student, teacher, weights, 2.0)
    torch.testing.assert_close(loss, -(p * (student / 2).log_softmax(1)).sum(1).mean())
    (gradient,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, ((student / 2).softmax(1) - p) / (2 * 4))


def test_with_equal_weights_it_is_plain_distillation_which_is_still_at_the_teacher():
    student, teacher = normal(4, 3).requires_grad_(), normal(4, 3, seed=1)
    ones = class_weights(torch.tensor([5, 9, 200]), 0.0)
    torch.testing.assert_close(rebalanced_distillation(student, teacher, ones), softmax_distillation(student, teacher))
    for loss in (rebalanced_distillation(student, student.detach(), ones), softmax_distillation(student, student)):
        (gradient,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-16)


# ---------------------------------------------------------------------- the two phases


class Watch(Callback):
    """Notes, by task and phase, the state at the first step and at the end, and the steps' terms."""

    def __init__(self):
        self.first, self.last, self.sizes, self.weights = {}, {}, {}, {}

    def _state(self, strategy):
        return {name: value.detach().clone() for name, value in strategy.state_dict().items()}

    def on_train_batch_start(self, trainer, strategy, batch, batch_idx):
        place = (strategy.task.index, strategy.phase.name)
        if place not in self.first:
            self.first[place], self.weights[place] = self._state(strategy), strategy._weights
            self.sizes[place] = sum(parameter.numel() for parameter in strategy.network.parameters())

    def on_train_batch_end(self, trainer, strategy, outputs, batch, batch_idx):
        self.last[strategy.task.index, strategy.phase.name] = self._state(strategy)


@pytest.fixture(scope="module")
def watched():
    """A stream of 4, 3 and 3 classes, with batch normalisation and dropout."""
    watch = Watch()
    loop = run(FOSTER(backbone=NormNet, optimizer=sgd, memory_size=60), watch)
    return watch, loop


def part(state, prefix):
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def test_each_task_but_the_first_is_boosted_and_compressed(watched):
    watch, loop = watched
    assert list(watch.last) == [(0, "train"), *((task, phase) for task in (1, 2) for phase in ("boost", "compress"))]
    # Samples of each class: 60 // 4 and then 60 // 7 exemplars, and what the stream has.
    counts = [[15] * 4, [8] * 7]
    data = loop.datamodule
    for task, old in zip((1, 2), counts, strict=True):
        new = data.stream.columns_of(data.samples(train=True).labels[loop.stream.train[task]])
        every = torch.cat([torch.tensor(old), torch.as_tensor(new).bincount()[len(old) :]])
        for phase, beta in (("boost", 0.96), ("compress", 0.97)):
            torch.testing.assert_close(watch.weights[task, phase], class_weights(every, beta).float())


def test_the_old_extractor_and_its_statistics_are_frozen_while_boosting(watched):
    watch, _ = watched
    for task in (1, 2):
        before, after = watch.first[task, "boost"], watch.last[task, "boost"]
        for prefix in ("network.backbone.extractors.0.", "old_head."):
            assert_same(part(before, prefix), part(after, prefix))
        old, new = (part(before, f"network.backbone.extractors.{number}.") for number in (0, 1))
        assert_same(old, new)  # it starts as a copy
        moved = part(after, "network.backbone.extractors.1.")
        assert all(not torch.equal(value, new[name]) for name, value in moved.items())


def test_the_boosted_network_teaches_the_old_one_and_stays_as_it_is(watched):
    watch, _ = watched
    for task in (1, 2):
        boosted = watch.last[task, "boost"]
        before, after = watch.first[task, "compress"], watch.last[task, "compress"]
        assert_same(part(before, "teacher.network."), part(boosted, "network."))
        assert_same(part(after, "teacher.network."), part(boosted, "network."))
        assert_same(
            part(before, "network.backbone.extractors.0."), part(boosted, "network.backbone.extractors.0.")
        )  # of the student
        for name, value in part(boosted, "old_head.").items():
            assert torch.equal(before[f"network.head.{name}"], value)
        assert not part(before, "network.backbone.extractors.1.")


def test_nothing_but_one_backbone_and_exemplars_is_left(watched):
    watch, loop = watched
    of_net, of_row = 64 * 16 + 16 + 2 * 16, 17
    assert watch.sizes[0, "train"] == of_net + 4 * of_row
    for task, classes in ((1, 7), (2, 10)):
        assert watch.sizes[task, "boost"] == 2 * of_net + classes * 33
        assert watch.sizes[task, "compress"] == of_net + classes * of_row
    assert [task.parameters for task in loop.meter.tasks] == [of_net + n * of_row for n in (4, 7, 10)]
    kept = loop.strategy.bytes_kept()
    assert kept.pop("exemplars") > 0
    assert not any(kept.values())
    outside = {
        name for name in loop.strategy.state_dict() if not name.startswith(("network.", "memory.", "task_columns"))
    }
    assert not outside


class Boosting(FOSTER):
    """Compares the first step of the second task's boosting with the equations."""

    def losses(self, batch, output):
        terms = super().losses(batch, output)
        if self.phase.name == "boost" and not hasattr(self, "seen"):
            self.seen, head, size = terms, self.network.head, self.backbone.width
            f_o, f_n = (extractor(batch.images) for extractor in self.backbone.extractors)
            rows, biases = head.weight(), torch.cat([block.bias for block in head.blocks])
            z = f_o @ rows[:, :size].T + f_n @ rows[:, size:].T + biases
            z_o = self.old_head(f_o)
            torch.testing.assert_close(rows[:4, :size], self.old_head.weight())
            expected = {
                "ce": F.cross_entropy(z / self._weights, batch.labels),
                "new_ce": F.cross_entropy(self.new_head(f_n), batch.labels),
                "distill": -self.distill_weight * ((z_o / 2).softmax(1) * (z[:, :4] / 2).log_softmax(1)).sum(1).mean(),
            }
            for name, value in expected.items():
                torch.testing.assert_close(terms[name], value)
        return terms


def test_the_boosting_losses_match_the_paper():
    strategy = Boosting(backbone=plain_net, optimizer=sgd, memory_size=60, distill_weight=0.7)
    run(strategy, max_epochs=1)
    assert set(strategy.seen) == {"ce", "new_ce", "distill"}


def test_new_rows_can_be_kept_from_seeing_old_features():
    watch = Watch()
    run(SMALL(sees_old_features=False), watch)
    for task, old in ((1, 4), (2, 7)):
        for state in (watch.first[task, "boost"], watch.first[task, "compress"]):
            prefix = (
                "network.head." if "network.backbone.extractors.1.layers.1.weight" in state else "teacher.network.head."
            )
            rows = torch.cat([state[f"{prefix}blocks.{block}.weight"] for block in range(task + 1)])
            assert not rows[old:, :16].any()
            assert rows[:old, :16].abs().min() > 0
            assert rows[old:, 16:].abs().min() > 0


def test_alignment_makes_new_rows_as_long_as_old_ones():
    watch = Watch()
    strategy = run(SMALL(align_boosted=True, align_compressed=True), watch).strategy
    taught = watch.first[2, "compress"]
    for rows in (
        torch.cat([taught[f"teacher.network.head.blocks.{block}.weight"] for block in range(3)]),
        strategy.network.head.weight(),
    ):
        norms = rows.norm(dim=1)
        torch.testing.assert_close(norms[7:].mean(), norms[:7].mean())


def test_compression_has_an_optimizer_and_a_length_of_its_own():
    watch = Watch()
    loop = run(
        SMALL(compress_options=PhaseOptions(epochs=3, optimizer=partial(torch.optim.SGD, lr=0.0))),
        watch,
        max_epochs=1,
    )
    assert loop.meter.tasks[1].epochs == {"boost": 1, "compress": 3}
    before, after = watch.first[1, "compress"], watch.last[1, "compress"]
    assert_same(part(before, "network."), part(after, "network."))


def test_both_phases_can_use_the_epochs_of_the_loop():
    loop = run(
        SMALL(compress_options=PhaseOptions(epochs=3)),
        options={"phase_epochs": {"boost": 2, "compress": 4}},
        max_epochs=1,
    )
    assert [task.epochs for task in loop.meter.tasks] == [{"train": 1}, *[{"boost": 2, "compress": 4}] * 2]


class Evaluated(Callback):
    """Accuracy on all classes seen, at the end of each phase, of the boosted network and of the student."""

    def __init__(self):
        self.found = {}

    def on_train_end(self, trainer, strategy):
        if strategy.phase.name == "train":
            return
        data, boosted = trainer.datamodule, strategy.teacher.network
        source, rows = data.samples(train=False), np.concatenate(data.stream.test[: strategy.task.index + 1])
        labels = torch.as_tensor(data.stream.columns_of(source.labels[rows]))
        images = data.normalize(source.images[rows], Draw.of(len(rows), 0))
        with torch.no_grad():
            right = [network(images).logits.argmax(1) == labels for network in (boosted, strategy.network)]
        self.found.setdefault(strategy.phase.name, []).append([float(part.double().mean()) for part in right])


def test_what_two_backbones_have_learnt_is_nearly_all_in_the_one_that_is_left():
    tested = Evaluated()
    five = {"data": {"scenario": ClassIncremental(tasks=5), "batch_size": 32}, "max_epochs": 4}
    run(FOSTER(backbone=partial(MLP, hidden=(64,)), memory_size=100), tested, **five)
    boosted, before = torch.tensor(tested.found["boost"]).mean(0)
    same, after = torch.tensor(tested.found["compress"]).mean(0)
    assert same == boosted
    assert boosted > before + 0.2
    assert after > boosted - 0.06


def test_domains_without_new_classes_are_learnt_too():
    loop = run(SMALL(), data={"scenario": RotatedDomains(tasks=3)}, max_epochs=1)
    assert loop.matrix.learned == 3
    assert loop.strategy.network.head.num_columns == 10


def test_it_forgets_far_less_than_fine_tuning_in_one_backbone():
    five = {"data": {"scenario": ClassIncremental(tasks=5), "batch_size": 32}, "max_epochs": 4}
    common = {"backbone": partial(MLP, hidden=(64,))}
    plain = last_accuracy(finetuning(common, **five).R_ci)
    ours = last_accuracy(run(FOSTER(**common, memory_size=100), **five).matrix.R_ci)
    # Measured: .81 against .17.
    assert ours > plain + 0.3


def test_it_resumes_at_every_place_of_both_phases():
    check_strategy(small(FOSTER), checks=("resume",), every_place=True)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_classes": "current"},
        {"temperature": 0.0},
        {"distill_weight": -0.5},
        {"boost_beta": 1.0},
        {"compress_beta": -0.1},
        {"compress_options": PhaseOptions(epochs=0)},
        {"freeze_backbone": True},
        {"memory_size": -1},
    ],
)
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match=r"FOSTER|Memory"):
        FOSTER(**options)


@pytest.mark.parametrize("head", [CosineHead, PrototypeHead])
def test_a_head_that_cannot_take_more_features_is_reported(head):
    with pytest.raises(ValueError, match=f"FOSTER: head is {head.__name__}"):
        FOSTER(head=head).build((1, 8, 8))
