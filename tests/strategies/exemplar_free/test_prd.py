import math
from copy import deepcopy
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from support import forks
from support.baselines import finetuning
from support.fakes import batch_of, normal
from support.runs import NormNet, plain_net, run, sgd
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.data import RandomCrop
from cl_lightning.distributed import all_gather_rows, gather_rows
from cl_lightning.losses import cosine_feature_distillation, rows_of_all, supervised_contrastive
from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP, CosineHead, LinearHead, batch_norms
from cl_lightning.strategies.exemplar_free.prd import PRD, relation_distillation, relation_scores
from cl_lightning.stream import ClassIncremental, RotatedDomains
from cl_lightning.testing import Subject, check_strategy, small

SLOW = "both relation axes pass the suite and learn a stream"

SUBJECTS = {
    "PRD": Subject(
        small(PRD, projection_hidden=16, projection_size=8),
        first_task_is_finetuning=False,
        reason="a contrastive loss takes the place of cross-entropy",
    ),
    "PRD(released=True)": Subject(
        small(PRD, projection_hidden=16, projection_size=8, released=True),
        first_task_is_finetuning=False,
        reason="a contrastive loss takes the place of cross-entropy",
    ),
}

PUBLISHED = {
    "prd_cifar100": {
        "source": "naderAsadi/Probing-Continual-Learning: the command for Split-CIFAR100, defaults of utils/parser.py "
        "(--lr_decay_epochs 120,160 for epoch > 120)",
        "released": True,
        "prototype_weight": 2.0,
        "distill_weight": 4.0,
        "contrast_temperature": 0.1,
        "prototype_lr": 0.01,
        "backbone": "ResNet18",
        "optimizer": "SGD(lr=0.01, momentum=0.9, weight_decay=0.0001)",
        "scheduler": "MultiStepLR(gamma=0.1, milestones=[121, 161])",
        "data.scenario": "ClassIncremental(class_order=1993, tasks=20)",
        "data.batch_size": 128,
        "data.transforms": [
            "RandomCrop(padding=4)",
            "RandomHorizontalFlip()",
            "ColorJitter(brightness=0.4, contrast=0.4, p=0.8, saturation=0.4)",
            "RandomGrayscale(p=0.2)",
        ],
        "loop.first_task_epochs": 220,
        "trainer.max_epochs": 100,
    },
}

SMALL = partial(PRD, backbone=plain_net, optimizer=sgd, projection_hidden=16, projection_size=8)


# ---------------------------------------------------------------------- the contrastive loss


def contrast(rows: Tensor, labels: list[int], t: float) -> float:
    """The contrastive loss, pair by pair."""
    z, every, of_row = [row / row.norm() for row in rows.double()], range(len(labels)), []
    for i in every:
        positives = [p for p in every if p != i and labels[p] == labels[i]]
        if positives:
            total = sum(math.exp(z[i] @ z[a] / t) for a in every if a != i)
            logs = [float(z[i] @ z[p] / t) - math.log(total) for p in positives]
            of_row.append(-sum(logs) / len(logs))
    return t / 0.07 * sum(of_row) / len(of_row)


def test_the_contrastive_loss_is_its_definition():
    rows, labels = normal(7, 3), [0, 1, 0, 2, 1, 0, 3]
    loss = supervised_contrastive(rows, torch.tensor(labels), 0.2)
    assert float(loss) == pytest.approx(contrast(rows, labels, 0.2))


def test_the_contrastive_loss_knows_neither_order_nor_length_nor_a_common_turn():
    rows, labels = normal(8, 4), torch.arange(8) % 3
    loss = supervised_contrastive(rows, labels)
    order, turn = (
        torch.randperm(8, generator=torch.Generator().manual_seed(1)),
        torch.linalg.qr(normal(4, 4, seed=2))[0],
    )
    lengths = normal(8, 1, seed=3).exp()
    for same in (
        supervised_contrastive(rows[order], labels[order]),
        supervised_contrastive(rows * lengths, labels),
        supervised_contrastive(rows @ turn, labels),
    ):
        torch.testing.assert_close(same, loss)


def test_classes_that_are_points_far_apart_have_the_least_contrastive_loss():
    corners, labels = torch.eye(3, dtype=torch.float64).repeat(4, 1), torch.arange(3).repeat(4)
    least = 0.1 / 0.07 * (math.log(3 * math.exp(10) + 8) - 10)
    assert float(supervised_contrastive(corners, labels)) == pytest.approx(least)
    assert supervised_contrastive(corners + 0.1 * normal(12, 3), labels) > least


def test_rows_without_another_of_their_class_are_no_anchors():
    alone = normal(3, 2).requires_grad_()
    loss = supervised_contrastive(alone, torch.arange(3))
    loss.backward()
    assert loss == 0
    assert torch.equal(alone.grad, torch.zeros_like(alone))
    assert supervised_contrastive(alone[:1], torch.zeros(1, dtype=torch.int64)) == 0


def _shares(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    every, labels = normal(7, 3), torch.arange(7) % 3
    mine = slice(0, 2) if rank == 0 else slice(2, 7)
    whole = every.clone().requires_grad_()
    supervised_contrastive(whole, labels).backward()
    rows = every[mine].clone().requires_grad_()
    gathered = gather_rows(rows)
    assert torch.equal(gathered.detach(), every)
    assert torch.equal(gather_rows(labels[mine]), labels)
    loss = supervised_contrastive(gathered, all_gather_rows(labels[mine]))
    torch.testing.assert_close(loss.detach(), supervised_contrastive(every, labels))
    loss.backward()
    torch.testing.assert_close(rows.grad / 2, whole.grad[mine])  # the mean of two processes takes the half
    batch = batch_of(labels[mine])
    batch = batch.replace(draw=Draw(0, mine.start, mine.stop, 7), weight=2 * len(batch) / 7)
    gather, factor = rows_of_all(batch)
    rows.grad = None
    (batch.weight * factor * supervised_contrastive(gather(rows), gather(batch.labels))).backward()
    torch.testing.assert_close(rows.grad / 2, whole.grad[mine])
    few, factor = rows_of_all(batch.replace(draw=Draw(0, 0, 1, 1)))
    assert few(rows) is rows  # a process without rows would be missing in the exchange
    assert factor == 1
    dist.destroy_process_group()


def test_two_processes_share_the_gradient_of_a_loss_that_compares_rows(tmp_path: Path):
    both = [forks.start(_shares, rank, str(tmp_path)) for rank in range(2)]
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]


def test_on_one_process_gathered_rows_are_the_rows():
    rows = normal(4, 2).requires_grad_()
    assert gather_rows(rows) is rows


# ---------------------------------------------------------------------- prototypes and relations


def test_scores_are_projections_on_the_direction_of_each_prototype():
    features, prototypes = normal(5, 3), normal(4, 3, seed=1)
    expected = torch.stack([features @ (p / p.norm()) for p in prototypes], 1)
    torch.testing.assert_close(relation_scores(features, prototypes), expected)
    torch.testing.assert_close(relation_scores(features, 7 * prototypes), expected)


def kl(q: Tensor, p: Tensor) -> float:
    return float((q * (q / p).log()).sum())


def test_relations_are_distributions_over_samples_or_over_the_prototypes_of_a_task():
    new, old, sizes, t = normal(6, 5), normal(6, 5, seed=1), [2, 3], 1.5
    over_samples = [kl((old[:, c] / t).softmax(0), (new[:, c] / t).softmax(0)) for c in range(5)]
    expected = sum(over_samples[:2]) / 2 + sum(over_samples[2:]) / 3
    assert float(relation_distillation(new, old, sizes, t)) == pytest.approx(expected)
    pairs = product(range(6), (slice(0, 2), slice(2, 5)))
    expected = sum(kl((old[i, c] / t).softmax(0), (new[i, c] / t).softmax(0)) for i, c in pairs) / 6
    assert float(relation_distillation(new, old, sizes, t, "prototypes")) == pytest.approx(expected)


@pytest.mark.parametrize("axis", ["samples", "prototypes"])
def test_relations_that_are_what_they_were_give_no_loss_and_no_gradient(axis):
    features, prototypes = normal(6, 4).requires_grad_(), normal(5, 4, seed=1).requires_grad_()
    scores = relation_scores(features, prototypes)
    loss = relation_distillation(scores, scores.detach(), [2, 3], axis=axis)
    loss.backward()
    for value in (loss, features.grad, prototypes.grad):
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-15)


def test_over_samples_a_common_shift_of_a_prototypes_scores_is_free():
    new, old = normal(6, 5), normal(6, 5, seed=1)
    loss = relation_distillation(new, old, [2, 3])
    torch.testing.assert_close(relation_distillation(new + normal(1, 5, seed=2), old, [2, 3]), loss)
    assert not torch.isclose(relation_distillation(new + normal(6, 1, seed=2), old, [2, 3]), loss)


def test_prototypes_are_pulled_to_the_directions_of_their_features_which_stay():
    features, prototypes = normal(6, 3).requires_grad_(), normal(2, 3, seed=1).requires_grad_()
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    for _ in range(400):
        loss = cosine_feature_distillation(prototypes[labels], features)
        assert 0 <= loss <= 2
        (gradient,) = torch.autograd.grad(loss, prototypes)
        prototypes = (prototypes - gradient).detach().requires_grad_()
    cosine_feature_distillation(prototypes[labels], features).backward()
    assert features.grad is None
    for c in range(2):  # the least loss is at the mean direction
        mean = F.normalize(features.detach(), dim=1)[labels == c].mean(0)
        torch.testing.assert_close(F.normalize(prototypes[c].detach(), dim=0), F.normalize(mean, dim=0))


# ---------------------------------------------------------------------- the method


class Watch(Callback):
    """Notes the terms of each step, and the prototypes and the optimizer of each task."""

    def __init__(self):
        self.before, self.after, self.groups = {}, {}, {}

    def on_train_start(self, trainer, strategy):
        task = strategy.task.index
        self.before[task] = [block.weight.detach().clone() for block in strategy.network.head.blocks]
        self.groups[task] = [
            {name: value for name, value in group.items() if name != "params"} | {"count": len(group["params"])}
            for group in trainer.optimizers[0].param_groups
        ]

    def on_train_end(self, trainer, strategy):
        self.after[strategy.task.index] = [block.weight.detach().clone() for block in strategy.network.head.blocks]


class Steps(PRD):
    """Keeps the terms of each step with what they are of."""

    def losses(self, batch, output):
        terms = super().losses(batch, output)
        if not hasattr(self, "steps"):
            self.steps = []
        self.steps.append(SimpleNamespace(task=self.task.index, terms=terms, batch=batch, features=output.features))
        return terms


def test_each_image_is_seen_twice_in_two_crops():
    strategy = Steps(backbone=plain_net, optimizer=sgd, projection_hidden=16, projection_size=8)
    run(strategy, max_epochs=1, data={"transforms": [RandomCrop(padding=1)]})
    for step in strategy.steps:
        rows = step.batch.draw.total
        first, second = step.batch.images[:rows], step.batch.images[rows:]
        assert len(second) == rows
        assert torch.equal(step.batch.labels[:rows], step.batch.labels[rows:])
        assert torch.equal(step.batch.raw[:rows], step.batch.raw[rows:])
        assert not torch.equal(first, second)


def test_the_first_step_of_a_task_has_no_relation_loss_and_the_first_task_has_none_at_all():
    slow = partial(torch.optim.SGD, lr=0.01)
    strategy = Steps(backbone=plain_net, optimizer=slow, projection_hidden=16, projection_size=8)
    run(strategy, max_epochs=1)
    for task in range(3):
        steps = [step for step in strategy.steps if step.task == task]
        assert {"distill" in step.terms for step in steps} == {task > 0}
        assert all(0 <= step.terms["prototypes"] <= 2 * 2.0 for step in steps)
        if task > 0:
            assert abs(float(steps[0].terms["distill"])) < 1e-5
            assert float(steps[-1].terms["distill"]) > 1e-3


@pytest.mark.parametrize("axis", ["samples", "prototypes"])
def test_the_terms_of_a_step_match_the_paper(axis):
    alpha, beta, tau, t, seen = 3.0, 5.0, 0.4, 0.3, []

    class Learning(PRD):
        def losses(self, batch, output):
            terms = super().losses(batch, output)
            features, rows = output.features.detach().double(), self.network.head.weight().detach().double()
            angles = F.cosine_similarity(features, rows[batch.labels], dim=1)
            expected = {
                "contrast": contrast(self.projection(output.features).detach(), batch.labels.tolist(), tau),
                "prototypes": alpha * float((1 - angles).mean()),
            }
            if not self.task.is_first:
                before, sizes = self.teacher.network, [4, 3][: self.task.index]
                old = before.head.weight().double()
                taught = before.backbone(batch.images).detach().double() @ (old / old.norm(dim=1, keepdim=True)).T
                scores = features @ (rows / rows.norm(dim=1, keepdim=True)).T[:, : len(old)]
                distill = 0.0
                for new, kept in zip(scores.split(sizes, 1), taught.split(sizes, 1), strict=True):
                    pairs = zip(new.T, kept.T, strict=True) if axis == "samples" else zip(new, kept, strict=True)
                    values = [kl((b / t).softmax(0), (a / t).softmax(0)) for a, b in pairs]
                    distill += sum(values) / len(values)
                expected["distill"] = beta * distill
            assert {name: float(term.detach()) for name, term in terms.items()} == pytest.approx(expected, 1e-3, 1e-6)
            seen.append(expected)
            return terms

    options = {"contrast_temperature": tau, "distill_temperature": t, "relation_axis": axis}
    options |= {"prototype_weight": alpha, "distill_weight": beta, "projection_hidden": 16, "projection_size": 8}
    fast = partial(torch.optim.SGD, lr=0.3)
    run(Learning(backbone=plain_net, optimizer=fast, **options), limit_train_batches=4, data={"batch_size": 8})
    assert len(seen) == 3 * 2 * 4
    assert max(terms.get("distill", 0) for terms in seen) > 0.1


def test_the_released_relation_loss_is_over_prototypes_with_a_copy_that_normalises_by_the_batch():
    seen = []

    class Learning(PRD):
        def losses(self, batch, output):
            if self.task.is_first:
                return super().losses(batch, output)
            copy = deepcopy(self.teacher.network)
            for layer in batch_norms(copy):
                layer.train()
            new, old = self.network.head.weight().detach(), copy.head.weight()
            with torch.no_grad():
                taught = relation_scores(copy.backbone(batch.images), old)
            before = [value.clone() for value in self.teacher.buffers()]
            terms = super().losses(batch, output)
            scores = relation_scores(output.features.detach(), new[: len(old)])
            sizes = [4, 3][: self.task.index]
            expected = 4.0 * relation_distillation(scores, taught, sizes, 1.0, "prototypes")
            torch.testing.assert_close(terms["distill"].detach(), expected, rtol=1e-4, atol=1e-6)
            assert all(torch.allclose(a, b) for a, b in zip(copy.buffers(), self.teacher.buffers(), strict=True))
            moved = [not torch.equal(a, b) for a, b in zip(before, self.teacher.buffers(), strict=True)]
            seen.append(float(expected))
            assert sum(moved) == 3  # mean, variance and number of batches of one layer
            return terms

    made = run(
        Learning(backbone=NormNet, optimizer=sgd, projection_hidden=16, projection_size=8, released=True),
        limit_train_batches=3,
        max_epochs=1,
        data={"val_fraction": 0.1},
    )
    assert len(seen) == 6
    assert max(seen) > 1e-3
    assert not any(module.training for module in made.strategy.eval().teacher.modules())
    kept = PRD(released=True, relation_axis="samples")
    assert (kept.relation_axis, kept.teacher.adapts, PRD().teacher.adapts) == ("samples", True, False)


def test_the_teacher_is_asked_only_where_its_answer_counts():
    asked = {}
    for weight in (0.0, 1.0):
        strategy = SMALL(distill_weight=weight)
        strategy.teacher.register_forward_hook(lambda *_, weight=weight: asked.update({weight: True}))
        run(strategy, max_epochs=1)
    assert asked == {1.0: True}


def test_prototypes_have_a_group_of_their_own():
    watch = Watch()
    run(SMALL(prototype_lr=0.7), watch, max_epochs=1)
    for task in range(3):
        others, prototypes = watch.groups[task]
        assert (others["lr"], others["momentum"], others["weight_decay"], others["count"]) == (0.05, 0.9, 0.01, 2 + 6)
        found = (prototypes["lr"], prototypes["momentum"], prototypes["weight_decay"], prototypes["count"])
        assert found == (0.7, 0.0, 0.0, task + 1)


def test_without_a_weight_new_prototypes_stay_and_old_ones_follow():
    watch = Watch()
    run(SMALL(prototype_weight=0.0), watch, max_epochs=1)
    for task in range(3):
        before, after = watch.before[task], watch.after[task]
        assert torch.equal(before[-1], after[-1])
        assert all(not torch.equal(old, new) for old, new in zip(before[:-1], after[:-1], strict=True))


def test_without_distillation_old_prototypes_stay():
    watch = Watch()
    run(SMALL(distill_weight=0.0), watch, max_epochs=1)
    for task in range(3):
        before, after = watch.before[task], watch.after[task]
        assert not torch.equal(before[-1], after[-1])
        assert all(torch.equal(old, new) for old, new in zip(before[:-1], after[:-1], strict=True))


def test_the_prototype_loss_does_not_reach_the_backbone():
    class Learning(PRD):
        def losses(self, batch, output):
            terms = super().losses(batch, output)
            parameters = list(self.network.backbone.parameters()) + list(self.projection.parameters())
            found = torch.autograd.grad(terms["prototypes"], parameters, allow_unused=True, retain_graph=True)
            assert all(gradient is None for gradient in found)
            return terms

    run(Learning(backbone=plain_net, projection_hidden=16, projection_size=8), max_epochs=1)


def test_the_nearest_prototype_predicts():
    strategy = run(SMALL(), max_epochs=1).strategy.eval()
    images = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, scores = strategy.network.backbone(images), strategy.predict(images)
    angles = F.cosine_similarity(features[:, None], strategy.network.head.weight()[None], dim=2)
    assert torch.equal(scores.argmax(1), angles.argmax(1))
    assert set(strategy.bytes_kept()) == {"teachers", "heads"}


def test_domains_without_new_classes_are_learnt_too():
    loop = run(SMALL(), data={"scenario": RotatedDomains(tasks=3)}, max_epochs=1)
    assert loop.matrix.learned == 3
    assert loop.strategy.network.head.num_columns == 10


@pytest.mark.parametrize("axis", ["samples", "prototypes"])
def test_it_forgets_less_than_fine_tuning_and_knows_each_task(axis):
    five = {"scenario": ClassIncremental(tasks=5), "batch_size": 32, "transforms": [RandomCrop(padding=1)]}
    common = {"backbone": partial(MLP, hidden=(64,)), "optimizer": partial(torch.optim.SGD, lr=0.003, momentum=0.9)}
    ours = PRD(**common, projection_hidden=64, projection_size=32, prototype_lr=0.1, relation_axis=axis)
    plain, made = finetuning(common, data=five, max_epochs=4), run(ours, data=five, max_epochs=4).matrix
    # Measured: .55 and .57 against .18; .92 and .93 of each task where it is known, of which chance gives .5.
    assert last_accuracy(made.R_ci) > last_accuracy(plain.R_ci) + 0.18
    assert last_accuracy(made.R_ti) > 0.7


def test_it_resumes_at_every_place():
    check_strategy(
        small(PRD, projection_hidden=16, projection_size=8, prototype_lr=0.2), checks=("resume",), every_place=True
    )


@pytest.mark.parametrize(
    "options",
    [
        {"prototype_weight": -1.0},
        {"distill_weight": -1.0},
        {"contrast_temperature": 0.0},
        {"distill_temperature": 0.0},
        {"relation_axis": "rows"},
        {"prototype_lr": -0.1},
        {"projection_hidden": 0},
        {"projection_size": 0},
    ],
)
def test_wrong_options_are_errors(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=rf"PRD: {name} is '?{value}"):
        PRD(**options)


@pytest.mark.parametrize("head", [LinearHead, partial(CosineHead, learn_scale=True)])
def test_a_head_whose_rows_are_no_prototypes_is_reported(head):
    with pytest.raises(ValueError, match="PRD: head is"):
        PRD(head=head).build((1, 8, 8))
