"""eXtended Dark Experience Replay."""

import math
from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.fakes import batch_of, normal, task_of
from support.runs import plain_net, run
from torch.nn import functional as F

from cl_lightning.batch import join
from cl_lightning.losses import supervised_contrastive
from cl_lightning.models import CosineHead, Output
from cl_lightning.strategies.rehearsal.xder import XDER, similarity_distance, transplanted, violation
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "XDER": Subject(
        small(XDER, views=2, similarity_weight=1.0, replay_size=8),
        first_task_is_finetuning=False,
        matches_single_process=False,
        reason="outputs of later tasks are trained too, by a contrastive loss among the samples of a process",
    ),
}

PUBLISHED = {
    "xder_cifar100": {
        "source": "aimagelab/mammoth: models/config/xder.yaml, seq-cifar100 with a memory of 500; models/xder.py",
        "memory_size": 500,
        "logit_weight": 0.3,
        "label_weight": 0.8,
        "decay": 0.85,
        "contrastive_weight": 0.05,
        "temperature": 5.0,
        "views": 4,
        "similarity_weight": 3000.0,
        "constraint_weight": 0.1,
        "margin": 0.3,
        "released": True,
        "backbone": "ResNet18",
        "optimizer": "SGD(lr=0.03)",
        "scheduler": "MultiStepLR(gamma=0.2, milestones=[35, 45])",
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 32,
        "data.transforms": ["RandomCrop(padding=4)", "RandomHorizontalFlip()"],
        "trainer.max_epochs": 50,
    },
}

FIVE = {"scenario": ClassIncremental(tasks=5), "batch_size": 32}
SMALL = partial(XDER, backbone=plain_net, memory_size=60, views=2)


# ---------------------------------------------------------------------- the maths


def test_an_edit_scales_new_logits_below_the_logit_of_the_label_and_keeps_the_other_columns():
    old = torch.tensor([[2.0, 1.0, 0.5, 0.1], [1.0, 4.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    new = torch.tensor([[9.0, 9.0, 4.0, -2.0], [9.0, 9.0, 3.0, 1.0], [9.0, 9.0, 2.0, 1.0]], dtype=torch.float64)
    columns = torch.tensor([False, False, True, True])
    found = transplanted(old, new, torch.tensor([0, 1, 0]), columns, 0.5)
    assert torch.equal(found[:, :2], old[:, :2])
    assert found[0, 2:].tolist() == [1.0, -0.5]  # 0.5 * 2 / 4 of the new ones: the largest is 0.5 * old_y
    assert found[1, 2:].tolist() == [3.0, 1.0]  # below the label's 4
    assert found[2, 2:].tolist() == [0.0, 0.0]  # a negative logit of the label does not change signs
    assert torch.equal(transplanted(old, new, torch.tensor([0, 1, 0]), torch.zeros(4, dtype=torch.bool), 0.5), old)


def test_the_similarity_distance_is_that_of_normalised_products():
    a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double(), torch.tensor([[1.0, 0.0], [1.0, 0.0]]).double()
    # G(a) is the identity, all entries of G(b) are 1 / sqrt 2
    expected = (2 * (1 - math.sqrt(0.5)) ** 2 + 2 * 0.5) / 4
    assert float(similarity_distance(a, b)) == pytest.approx(expected)
    assert float(similarity_distance(a, b, 1.0)) == pytest.approx((2 * 0.5**2 + 2 * 0.5**2) / 4)
    assert float(similarity_distance(a, 3 * a)) == pytest.approx(0.0, abs=1e-12)


def test_the_constraint_is_a_mean_over_violators():
    future, own = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([2.0, 2.0, 0.1])
    assert float(violation(future, own, 0.3)) == pytest.approx((0.3 + 0.2) / 2)
    assert float(violation(future, own + 9, 0.3)) == 0.0


class Fixed(XDER):
    """Task 1 of three tasks with two classes each, and given outputs of all classes."""

    def __init__(self, logits, **options):
        super().__init__(**options)
        self.given = logits
        self.task = task_of(1)
        self.task_columns = torch.tensor([[True, True, False, False], [False, False, True, True]])
        self.future.grow(6, 3)

    def all_logits(self, output):
        return self.given

    def _sizes(self):
        return [2]


@pytest.mark.parametrize("released", [False, True])
def test_the_terms_are_those_of_their_outputs_and_samples(released):
    labels, tasks = torch.tensor([2, 3, 3, 0, 1, 1, 0]), torch.tensor([1, 1, 1, 0, 0, 0, 0])
    logits, stored = normal(7, 6), normal(2, 6, seed=1)
    rows = {"stream": slice(0, 3), "dark": slice(3, 5), "replay": slice(5, 7)}
    parts = {name: batch_of(labels[part], tasks=tasks[part]) for name, part in rows.items()}
    parts["dark"] = parts["dark"].replace(extra={"logits": stored}, weight=0.5)
    weights = {"logit_weight": 0.3, "label_weight": 0.7, "constraint_weight": 0.2, "margin": 0.4}
    strategy = Fixed(logits, similarity_weight=0.6, released=released, **weights)
    found = strategy.losses(join(parts), Output(logits, logits[:, :4]))
    gap = logits[:, 4:].amax(1) + 0.4 - torch.cat([logits[:3, 2:4], logits[3:, :2]]).amax(1)
    expected = {
        "ce": F.cross_entropy(logits[:3, 2:4], labels[:3] - 2),
        "dark": 0.5 * 0.3 * (logits[3:5] - stored).square().mean(),
        "similarity": 0.5 * 0.6 * similarity_distance(logits[3:5, 4:], stored[:, 4:], 2.0 - released),
        "replay": 0.7 * F.cross_entropy(logits[5:, :2], labels[5:]),
        "constraint": 0.2 * gap[gap > 0].mean(),
    }
    torch.testing.assert_close(found, expected)


def test_the_views_are_contrasted_in_each_future_output():
    labels = torch.tensor([2, 3])
    logits = normal(6, 6)
    parts = {"stream": batch_of(labels), "view 0": batch_of(labels), "view 1": batch_of(labels)}
    strategy = Fixed(logits, contrastive_weight=0.3, temperature=2.0, views=2, constraint_weight=0.0)
    found = strategy.losses(join(parts), Output(logits, logits[:, :4]))
    z = F.normalize(logits[2:, 4:], dim=1)
    expected = supervised_contrastive(z, labels.repeat(2), 2.0, base_temperature=2.0)
    torch.testing.assert_close(found["contrastive"], 0.3 * expected)


# ---------------------------------------------------------------------- runs


class Follows(XDER):
    """Notes the outputs before and after the head grows, and the stored logits around each step."""

    def __init__(self, **options):
        super().__init__(**options)
        self.prepared, self.edited, self.chances = [], 0, []

    def begin_task(self, task):
        images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        before = None
        if task.index:
            with torch.no_grad():
                before = self.all_logits(self.network(images))
        super().begin_task(task)
        if before is not None:
            with torch.no_grad():
                after = self.all_logits(self.network(images))
            torch.testing.assert_close(before, after)
            self.prepared.append(self.network.head.num_columns)

    def _edit(self, rows, outputs, random=None):
        before, draws = self.memory.fields["logits"].clone(), self.memory.fields["draws"].clone()
        super()._edit(rows, outputs, random)
        after = self.memory.fields["logits"]
        first = self.task.num_seen - self.task.num_new
        assert torch.equal(before[:, :first], after[:, :first])
        changed = (before != after).any(dim=1)
        assert not changed[~torch.isin(torch.arange(len(after)), rows)].any()
        largest = after[changed][:, first:].amax(dim=1)
        of_label = after.gather(1, self.memory.labels[:, None])[changed, 0]
        assert (largest <= of_label.clamp(min=0) + 1e-5).logical_or(largest <= of_label).all()
        if random is None:
            assert not len(rows) or (before[:, first] != after[:, first]).any()  # the first output of the task too
        else:
            expected = random < 1 / (draws[rows] + 1)
            assert not changed[rows[~expected]].any()
            self.chances.append(bool((draws[rows] == 0).all()))
        self.edited += int(changed.sum())


def test_future_outputs_become_the_rows_of_the_head_and_stored_logits_follow_the_network():
    strategy = Follows(backbone=plain_net, memory_size=60, views=2)
    made = run(strategy, max_epochs=2)
    assert strategy.prepared == [7, 10]
    assert strategy.edited > 50
    assert any(strategy.chances)
    assert not all(strategy.chances)
    memory = made.strategy.memory
    assert memory.counts(10).tolist() == [6] * 10
    assert memory.fields["logits"].shape == (60, 10)
    assert memory.fields["logits"].isfinite().all()
    assert not memory.fields["draws"].any()  # counted in each task again


def test_a_sample_is_stored_with_past_outputs_below_its_label():
    class Looks(XDER):
        checked = 0

        def end_task(self, task):
            super().end_task(task)
            mine = self.memory.tasks == task.index
            if task.index:
                stored, labels = self.memory.fields["logits"][mine], self.memory.labels[mine]
                past = stored[:, : task.num_seen - task.num_new].amax(1)
                of_label = stored.gather(1, labels[:, None])[:, 0]
                assert (past <= of_label.clamp(min=0) + 1e-6).all()
                self.checked += int(mine.sum())

    strategy = Looks(backbone=plain_net, memory_size=60, views=2)
    run(strategy, max_epochs=1)
    assert strategy.checked > 20


def test_it_is_far_above_finetuning():
    made = run(SMALL(memory_size=100), max_epochs=2, data=FIVE)
    none = finetuning({"backbone": plain_net}, max_epochs=2, data=FIVE).measures()["average_accuracy"]
    # Measured: .73 against .10.
    assert made.matrix.measures()["average_accuracy"] > none + 0.3


def test_a_head_without_rows_of_weights_is_refused():
    with pytest.raises(ValueError, match="XDER: head is CosineHead, whose rows cannot be prepared; use LinearHead"):
        run(SMALL(head=CosineHead))


@pytest.mark.parametrize(
    "options",
    [{"logit_weight": -1}, {"decay": 1.1}, {"temperature": 0}, {"views": 1}, {"margin": -1}, {"loss_classes": "new"}],
)
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match="XDER"):
        XDER(**options)
