from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.baselines import finetuning
from support.fakes import batch_of, normal, task_of
from support.runs import loop, plain_net, run
from torch.nn import functional as F

from cl_lightning.models import MLP, Backbone, CosineHead, LinearHead
from cl_lightning.strategies.rehearsal.coil import COIL, class_plan, projections, prospective_rows, retrospective_rows
from cl_lightning.strategy import Phase, PhaseOptions
from cl_lightning.stream import ClassIncremental, RotatedDomains, Subset
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "COIL": Subject(
        small(COIL, transport_weight=1.0, classifier="nme"),
        first_task_is_finetuning=False,
        reason="the head compares cosines",
    ),
}

PUBLISHED = {
    "coil_cifar100": {
        "source": "PyCIL: exps/coil.json, models/coil.py",
        "memory_size": 2000,
        "temperature": 2.0,
        "transport_reg": 0.464,
        "transport_weight": 1e-3,
        "backbone": "ResNet32(last_relu=False)",
        "optimizer": "SGD(lr=0.1, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "MultiStepLR(gamma=0.1, milestones=[80, 120])",
        "data.scenario": "ClassIncremental(class_order=1993, tasks=20)",
        "data.batch_size": 128,
        "data.transforms": ["RandomCrop(padding=4)", "RandomHorizontalFlip()", "ColorJitter(brightness=0.247)"],
        "trainer.max_epochs": 160,
    },
}


SMALL = Subset(ClassIncremental(sizes=[3, 2, 5]), per_class=8)


class Features(Backbone):
    """The images are the features."""

    def __init__(self, image_shape):
        super().__init__(image_shape)
        self.num_features = image_shape[2]

    def forward(self, images):
        return images


def between(old, new, *, epoch, epochs=4, **options):
    """COIL in an epoch of a task of ``new`` classes after ``old`` ones, of 5 features, with rows that are drawn."""
    strategy = COIL(backbone=Features, **options)
    strategy.build((1, 1, 5))
    head = strategy.network.head
    head.grow(old)
    strategy.teacher.learn_from(strategy.network)
    head.grow(new)
    strategy.task = replace(task_of(1), num_new=new, num_seen=old + new)
    strategy.phase = Phase(options=PhaseOptions(epochs=epochs))
    strategy._trainer = SimpleNamespace(current_epoch=7 + epoch, datamodule=None)
    strategy._phase_origin = 7
    strategy.double()
    with torch.no_grad():
        head.scale.fill_(3.0)
        strategy.teacher.network.head.scale.fill_(2.5)
        for number, block in enumerate(head.blocks):
            block.weight.copy_(normal(*block.weight.shape, seed=30 + number))
    return strategy


def soft(target, logits, temperature=2.0):
    """Mean cross-entropy of softened targets and logits."""
    return -((target / temperature).softmax(1) * (logits / temperature).log_softmax(1)).sum(1).mean()


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def test_the_cost_is_the_3_norm_and_the_marginals_are_uniform():
    old, new = normal(4, 6), normal(3, 6, seed=1)
    plan = class_plan(old, new, 0.3)
    torch.testing.assert_close(plan.sum(1), torch.full((4,), 1 / 4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(plan.sum(0), torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=1e-12)
    cost = (old[:, None] - new[None]).abs().pow(3).sum(2).pow(1 / 3)
    potentials = 0.3 * plan.log() + cost  # f_i + g_j
    cross = potentials[1:, 1:] - potentials[:1, 1:] - potentials[1:, :1] + potentials[:1, :1]
    torch.testing.assert_close(cross, torch.zeros_like(cross), rtol=0, atol=1e-11)


def test_with_equal_costs_each_new_row_is_the_mean_direction_at_the_mean_norm():
    rows = normal(4, 6)
    found = prospective_rows(class_plan(torch.zeros(4, 6), torch.ones(3, 6), 0.464), rows)
    direction = unit(unit(rows).mean(0, keepdim=True)) * rows.norm(dim=1).mean()
    torch.testing.assert_close(found, direction.expand(3, 6))


def test_prospective_rows_are_weighted_sums_with_the_mean_norm_of_the_old_rows():
    plan = torch.tensor([[0.3, 0.1, 0.1], [1 / 30, 7 / 30, 7 / 30]]).double()
    rows = torch.tensor([[3.0, 4.0], [0.0, 2.0]]).double()
    directions = torch.tensor([[0.6, 0.8], [0.0, 1.0]]).double()
    moved = torch.stack([sum(2 * plan[i, j] * directions[i] for i in (0, 1)) for j in (0, 1, 2)])
    found = prospective_rows(plan, rows)
    torch.testing.assert_close(found, moved * 3.5 / moved.norm(dim=1).mean())
    assert float(found.norm(dim=1).mean()) == pytest.approx(3.5)
    assert found.norm(dim=1).std() > 0.01  # one factor for all rows


def test_rows_of_equal_distant_classes_are_copied():
    means, order = 10 * torch.eye(4).double(), torch.tensor([2, 0, 3, 1])
    rows = normal(4, 5)
    plan = class_plan(means, means[order], 0.02)
    copied = unit(rows)[order] * rows.norm(dim=1).mean()
    torch.testing.assert_close(prospective_rows(plan, rows), copied)
    torch.testing.assert_close(retrospective_rows(plan, rows)[order], unit(rows))


def test_retrospective_rows_are_the_directions_of_weighted_sums():
    plan = torch.tensor([[0.3, 0.1, 0.1], [1 / 30, 7 / 30, 7 / 30]]).double()
    rows = normal(3, 4)
    torch.testing.assert_close(retrospective_rows(plan, rows), unit(plan @ unit(rows)))


def test_projections_normalise_the_features_alone():
    features, rows = normal(3, 4), 2 * normal(5, 4, seed=1)
    torch.testing.assert_close(projections(features, rows), unit(features) @ rows.T)


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_terms_match_their_formulas(epoch):
    strategy = between(3, 2, epoch=epoch, transport_weight=0.7)
    rows = 1.5 * normal(2 if epoch == 0 else 3, 5, seed=9)
    strategy.transported.keep("rows", {"rows": rows})
    features, labels = normal(6, 5, requires_grad=True), torch.tensor([0, 4, 3, 2, 1, 4])
    own = unit(torch.cat([normal(3, 5, seed=30), normal(2, 5, seed=31)]))
    logits = 3.0 * unit(features) @ own.T
    taught = 2.5 * unit(features.detach()) @ unit(strategy.teacher.network.head.weight()).T
    found = strategy.losses(batch_of(labels, images=features), strategy.network(features))
    assert list(found) == ["ce", "distill", "transport"]
    torch.testing.assert_close(found["ce"], 2 / 5 * F.cross_entropy(logits, labels))
    torch.testing.assert_close(found["distill"], 3 / 5 * soft(taught, logits[:, :3]))
    made = unit(features) @ rows.T
    expected = 0.7 * (soft(taught, made) * (epoch / 4) ** 2 if epoch else soft(made.detach(), logits[:, 3:]))
    torch.testing.assert_close(found["transport"], expected)
    slopes = [torch.autograd.grad(value, features, retain_graph=True)[0] for value in (found["transport"], expected)]
    torch.testing.assert_close(*slopes)


def test_without_weight_or_rows_there_is_no_term_and_in_the_first_task_the_cross_entropy_alone():
    features, labels = normal(4, 5), torch.tensor([0, 1, 4, 3])
    for weight, rows in ((0.0, True), (1.0, False)):
        strategy = between(3, 2, epoch=0, transport_weight=weight)
        if rows:
            strategy.transported.keep("rows", {"rows": normal(2, 5)})
        batch = batch_of(labels, images=features)
        assert strategy.losses(batch, strategy.network(features)).keys() == {"ce", "distill"}
    strategy.teacher.network = None
    found = strategy.losses(batch, strategy.network(features))
    torch.testing.assert_close(found["ce"], F.cross_entropy(strategy.network(features).logits, labels))


class Look(COIL):
    """Keeps means, rows of the head and transported rows at the start of each epoch of later tasks."""

    def begin_task(self, task):
        self.seen = []
        super().begin_task(task)

    def on_train_epoch_start(self):
        before = self.cosine_head.weight().detach().clone()
        super().on_train_epoch_start()
        if self.teacher:
            self.eval()
            pairs = self.passes.features(memory=self.memory), self.passes.features()
            self.train()
            features, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            after, made = self.cosine_head.weight().detach().clone(), self.transported["rows"]["rows"].clone()
            self.seen.append((features.double(), labels, before, after, made))


def test_each_epoch_begins_with_rows_that_are_transported_by_the_present_means():
    made = run(
        Look(backbone=plain_net, memory_size=12),
        data={"scenario": SMALL},
        options={"stop_after_task": 1},
        max_epochs=3,
    )
    strategy = made.strategy
    for epoch, (features, labels, before, after, made) in enumerate(strategy.seen):
        directions = unit(features)
        means = unit(torch.stack([directions[labels == column].mean(0) for column in range(5)]))
        plan = class_plan(means[:3], means[3:], 0.464)
        assert torch.equal(before[:3], after[:3])
        if epoch == 0:
            assert [int((labels == column).sum()) for column in range(5)] == [4, 4, 4, 8, 8]
            expected = prospective_rows(plan, before[:3]).float()
            torch.testing.assert_close(after[3:], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(made, unit(after[3:]))
        else:
            assert torch.equal(before, after)
            expected = retrospective_rows(plan, before[3:]).float()
            torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    assert len(strategy.seen) == 3
    assert "rows" not in strategy.transported


def test_classes_without_exemplars_keep_their_own_rows():
    made = loop(
        Look(backbone=plain_net, memory_size=12),
        data={"scenario": SMALL},
        options={"stop_after_task": 0},
        max_epochs=2,
    )
    made.fit()
    strategy = made.strategy
    strategy.memory.keep((strategy.memory.labels != 1).nonzero()[:, 0])
    made._run_task(made.stream.tasks[1], None)
    features, labels, before, _, found = strategy.seen[1]
    torch.testing.assert_close(found[1], unit(before)[1])
    assert not (labels == 1).any()
    means = unit(torch.stack([unit(features)[labels == column].mean(0) for column in (0, 2, 3, 4)]))
    expected = retrospective_rows(class_plan(means[:2], means[2:], 0.464), before[3:]).float()
    torch.testing.assert_close(found[[0, 2]], expected, rtol=1e-4, atol=1e-5)


def test_streams_whose_later_tasks_have_no_new_classes_are_refused():
    with pytest.raises(ValueError, match="COIL"):
        run(COIL(backbone=plain_net), data={"scenario": RotatedDomains(tasks=3)}, max_epochs=1)


def test_it_is_far_above_finetuning():
    five = {"data": {"scenario": None, "batch_size": 32}, "max_epochs": 4}
    common = {"backbone": partial(MLP, hidden=(64,))}
    plain = finetuning(common, **five).measures()["average_accuracy"]
    ours = run(COIL(**common, memory_size=100), **five).matrix.measures()["average_accuracy"]
    assert ours > plain + 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory_size": 0}, "COIL: memory_size is 0"),
        ({"temperature": 0.0}, r"COIL: temperature is 0\.0"),
        ({"transport_reg": 0.0}, r"COIL: transport_reg is 0\.0"),
        ({"transport_weight": -1.0}, r"COIL: transport_weight is -1\.0"),
        ({"classifier": "svm"}, "COIL: classifier is 'svm'"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        COIL(**options)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (LinearHead, "COIL: head is LinearHead; use a CosineHead"),
        (partial(CosineHead, proxies=3), "COIL: its head has 3 proxies"),
    ],
)
def test_other_heads_are_errors(head, words):
    with pytest.raises(ValueError, match=words):
        COIL(backbone=plain_net, head=head).build((1, 8, 8))
