from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.fakes import normal
from support.runs import NormNet, loop, plain_net, run
from support.watching import watching
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Draw, ImageShape
from cl_lightning.data import RandomCrop
from cl_lightning.losses import feature_distillation
from cl_lightning.measures import last_accuracy
from cl_lightning.memory import GaussianPrototypes
from cl_lightning.models import MLP, Backbone, CosineHead, batch_norms
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.efc import EFC, empirical_feature_matrix
from cl_lightning.strategies.exemplar_free.efc_pp import EFCpp, RebalancingFeatures
from cl_lightning.strategy import PhaseOptions
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, TinyDigits, check_limit, check_strategy, small

SUBJECTS = {
    "EFC": Subject(small(EFC), first_task_is_finetuning=False, reason="the first task also learns rotations"),
    "EFCpp": Subject(
        small(EFCpp, rebalance_options=PhaseOptions(epochs=2, batch_size=256)),
        first_task_is_finetuning=False,
        reason="the first task also learns rotations",
    ),
}
SLOW = "other options and batch normalisation pass the suite too"

PUBLISHED = {
    "efc": {
        "source": "simomagi/elastic_feature_consolidation: parse_utils.py, OptimizerManager.py; steps at 45, 90 of 100",
        "feature_weight": 10.0,
        "identity_weight": 0.1,
        "drift_sigma": 0.2,
        "first_optimizer": "Adam(lr=0.001, weight_decay=0.0002)",
        "first_scheduler": "StepsOverPhase(at=[0.45, 0.9])",
        "optimizer": "Adam(lr=0.0001, weight_decay=0.0002)",
    },
    "efc_pp": {
        "source": "the same, --balanced_epochs, --balanced_bs, --balanced_lr, and the SGD of balance_head",
        "feature_weight": 10.0,
        "identity_weight": 0.1,
        "drift_sigma": 0.2,
        "rebalance_options": {
            "epochs": 50,
            "batch_size": 256,
            "optimizer": "SGD(lr=0.001, momentum=0.9, weight_decay=0.0005)",
        },
        "first_optimizer": "Adam(lr=0.001, weight_decay=0.0002)",
        "first_scheduler": "StepsOverPhase(at=[0.45, 0.9])",
        "optimizer": "Adam(lr=0.0001, weight_decay=0.0002)",
    },
    "efc_cifar100": {
        "source": "the same, --batch_size, --epochs_first_task, and dataset_utils.py: Pad(4), RandomResizedCrop(32)",
        "backbone": "ResNet18",
        "feature_weight": 10.0,
        "identity_weight": 0.1,
        "drift_sigma": 0.2,
        "first_optimizer": "Adam(lr=0.001, weight_decay=0.0002)",
        "first_scheduler": "StepsOverPhase(at=[0.45, 0.9])",
        "optimizer": "Adam(lr=0.0001, weight_decay=0.0002)",
        "data.scenario": "ClassIncremental(class_order=1993, first=50, increment=10)",
        "data.batch_size": 64,
        "data.transforms": ["RandomResizedCrop(padding=4, size=32)", "RandomHorizontalFlip()"],
        "trainer.max_epochs": 100,
    },
    "efc_pp_cifar100": {
        "source": "the same lines as for EFC",
        "backbone": "ResNet18",
        "feature_weight": 10.0,
        "identity_weight": 0.1,
        "drift_sigma": 0.2,
        "rebalance_options": {
            "epochs": 50,
            "batch_size": 256,
            "optimizer": "SGD(lr=0.001, momentum=0.9, weight_decay=0.0005)",
        },
        "first_optimizer": "Adam(lr=0.001, weight_decay=0.0002)",
        "first_scheduler": "StepsOverPhase(at=[0.45, 0.9])",
        "optimizer": "Adam(lr=0.0001, weight_decay=0.0002)",
        "data.scenario": "ClassIncremental(class_order=1993, first=50, increment=10)",
        "data.batch_size": 64,
        "data.transforms": ["RandomResizedCrop(padding=4, size=32)", "RandomHorizontalFlip()"],
        "trainer.max_epochs": 100,
    },
}

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01)


class Norm(Backbone):
    """Batch normalisation without dropout."""

    def __init__(self, image_shape: ImageShape) -> None:
        super().__init__(image_shape)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU())
        self.num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def test_the_feature_matrix_is_the_expected_outer_product_of_gradients_of_the_log_probability():
    features, weight = normal(6, 5), normal(4, 5, seed=1)
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for f in features:
        jacobian = torch.func.jacrev(lambda g: (weight @ g).log_softmax(0))(f)  # (C, d)
        p = (weight @ f).softmax(0)
        expected += sum(p[c] * jacobian[c].outer(jacobian[c]) for c in range(4)) / len(features)
    torch.testing.assert_close(empirical_feature_matrix(features @ weight.T, weight), expected)


def test_the_feature_matrix_is_symmetric_semi_definite_of_rank_below_the_number_of_classes():
    weight = normal(4, 9, seed=1)
    matrix = empirical_feature_matrix(normal(30, 9) @ weight.T, weight)
    assert torch.equal(matrix, matrix.T)
    values = torch.linalg.eigvalsh(matrix)
    assert values.min() > -1e-12
    assert (values > 1e-9).sum() == 3
    outside = torch.linalg.svd(weight, full_matrices=True).Vh[4:]  # orthogonal to the rows of the head
    torch.testing.assert_close(outside @ matrix, torch.zeros(5, 9, dtype=torch.float64))
    torch.testing.assert_close(empirical_feature_matrix(normal(30, 9) @ weight.T + 7, weight), matrix)  # a common shift


def test_without_lambda_the_loss_is_plain_distillation_of_features():
    student, teacher = normal(6, 5), normal(6, 5, seed=1)
    weight = normal(4, 5, seed=2)
    matrix, identity = empirical_feature_matrix(student @ weight.T, weight), torch.eye(5, dtype=torch.float64)
    plain = 0.1 * (student - teacher).square().sum(1).mean()
    torch.testing.assert_close(feature_distillation(student, teacher, 0 * matrix + 0.1 * identity), plain)
    gap = student - teacher
    full = torch.stack([g @ (10 * matrix + 0.1 * identity) @ g for g in gap]).mean()
    torch.testing.assert_close(feature_distillation(student, teacher, 10 * matrix + 0.1 * identity), full)


def test_features_have_not_moved_at_the_first_step_of_a_task():
    def values(strategy, batch, output, terms):
        return {name: float(term.detach()) for name, term in terms.items()}

    strategy = watching(EFC, values, backbone=Norm, optimizer=SGD)
    run(strategy)
    assert all(set(terms) == {"ce"} for terms in strategy.recorded[0])
    for task in (1, 2):
        first, *later = strategy.recorded[task]
        assert first["features"] == 0.0  # in spite of batch normalisation
        assert all(terms["features"] > 0 for terms in later)
        assert set(first) == {"ce", "features", "balanced"}


def test_the_first_task_classifies_rotated_images_in_four_times_the_columns():
    seen = []

    class Look(EFC):
        def losses(self, batch, output):
            terms = super().losses(batch, output)
            if self.task.is_first:
                images, rows, y = batch.images, batch.draw.total, batch.labels[: batch.draw.total]
                turned = [torch.rot90(images[:rows], turn, (2, 3)) for turn in range(4)]
                assert torch.equal(images, torch.cat(turned))
                weight = torch.cat([self.network.head.weight(), self.rotation_head.weight()])
                labels = torch.cat([y, *(4 + 3 * y + turn for turn in range(3))])
                (block,) = self.rotation_head.blocks
                bias = torch.cat([torch.zeros(4), block.bias])  # of the released code: only rotations have biases
                assert (block.bias != 0).all()
                expected = F.cross_entropy(self.network.backbone(images) @ weight.T + bias, labels)
                torch.testing.assert_close(terms["ce"], expected)
                seen.append(len(weight))
            return terms

    strategy = run(Look(backbone=plain_net, optimizer=SGD), max_epochs=1, options={"stop_after_task": 1}).strategy
    assert set(seen) == {16}
    assert strategy.rotation_head.num_columns == 0  # it was thrown away


def test_later_terms_match_the_paper_with_their_gradients():
    steps = []

    class Look(EFC):
        def losses(self, batch, output):
            terms = super().losses(batch, output)
            if self.task.is_first:
                return terms
            backbone, weight = self.network.backbone, self.network.head.weight()
            features, labels, *of_new = self._balanced
            if of_new:
                features, labels = torch.cat([features, backbone(of_new[0])]), torch.cat([labels, of_new[1]])
            gap = backbone(batch.images) - self.teacher.network.backbone(batch.images)
            identity = torch.eye(len(self.feature_matrix))
            metric = 3.0 * self.feature_matrix + 0.7 * identity
            expected = {
                "balanced": F.cross_entropy(features @ weight.T, labels),
                "features": torch.stack([g @ metric @ g for g in gap]).mean(),
            }
            ours = list(backbone.parameters())
            for name, value in expected.items():
                torch.testing.assert_close(terms[name], value)
                found, plain = (
                    torch.autograd.grad(term, ours, retain_graph=True, materialize_grads=True)
                    for term in (terms[name], value)
                )
                torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-6)
                steps.append((name, max(float(gradient.abs().max()) for gradient in plain)))
            return terms

    run(Look(backbone=plain_net, optimizer=SGD, feature_weight=3.0, identity_weight=0.7), max_epochs=1)
    for name in ("balanced", "features"):
        sizes = [size for term, size in steps if term == name]
        assert sum(size > 0.01 for size in sizes) > len(sizes) / 2


def moved(means: Tensor, matrix: Tensor, old: Tensor, new: Tensor, sigma: float) -> Tensor:
    """Where the means go, with the distances of all pairs at hand."""
    gap = old - means[:, None]  # (c, n, d)
    d = torch.einsum("cni,ij,cnj->cn", gap, matrix, gap)
    weight = (-(d - d.min()) / (d.max() - d.min()) / (2 * sigma**2)).softmax(1)
    return means + weight @ (new - old)


class Following:
    """Works out, when the backbone has learnt a task, where the old means must go, and holds the method to it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.notes = []

    def end_phase(self, phase):
        if self.teacher and phase.name == "train":
            self.eval()
            old, new = (self.passes.features(network)[0].double() for network in (self.teacher.network, self.network))
            means, matrix = self.gaussians.means.double(), self.feature_matrix.double()
            self.expected = moved(means, matrix, old, new, self.drift_sigma).float()
            plain = moved(means, torch.eye(len(matrix)).double(), old, new, self.drift_sigma).float()
            assert (self.expected - plain).abs().max() > 0.01  # that the distances are those of E shows
            self.train()
        super().end_phase(phase)

    def compare(self, where):
        torch.testing.assert_close(self.gaussians.means[: len(self.expected)], self.expected, rtol=1e-4, atol=1e-5)
        self.notes.append((self.task.index, where))

    def begin_phase(self, phase, origin, sources=()):
        super().begin_phase(phase, origin, sources)
        if phase.name == "rebalance":
            self.compare(phase.name)

    def end_task(self, task):
        super().end_task(task)
        if not task.is_first:
            self.compare("end")
        features, head = self.passes.features()[0], self.network.head
        torch.testing.assert_close(
            self.feature_matrix, empirical_feature_matrix(head(features), head.weight()).float(), rtol=1e-4, atol=1e-6
        )


class FollowingEFC(Following, EFC):
    pass


class FollowingEFCpp(Following, EFCpp):
    pass


def test_old_means_follow_the_drift_in_the_metric_of_the_task_before_and_the_matrix_is_recomputed():
    strategy = run(FollowingEFC(backbone=plain_net, optimizer=SGD, drift_sigma=0.3)).strategy
    assert strategy.notes == [(1, "end"), (2, "end")]


def test_heads_are_balanced_with_means_that_have_followed_once():
    options = {"rebalance_options": PhaseOptions(epochs=2, batch_size=64, optimizer=SGD)}
    strategy = run(FollowingEFCpp(backbone=plain_net, optimizer=SGD, **options)).strategy
    assert strategy.notes == [(task, where) for task in (1, 2) for where in ("rebalance", "end")]


@pytest.mark.parametrize("cls", [EFC, partial(EFCpp, rebalance_options=PhaseOptions(epochs=2))])
def test_batch_normalisation_is_frozen_after_the_first_task_and_dropout_is_not(cls):
    modes = []

    class Look(NormNet):
        def forward(self, images):
            if torch.is_grad_enabled():
                modes.append((self.layers[2].training, self.layers[4].training))
            return super().forward(images)

    made = loop(cls(backbone=Look, optimizer=SGD), options={"stop_after_task": 0})
    made.fit()
    assert set(modes) == {(True, True)}
    modes.clear()
    (layer,) = batch_norms(made.strategy.network.backbone)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    weight = made.strategy.network.backbone.layers[1].weight.detach().clone()
    for task in made.stream.tasks[1:]:
        made._run_task(task, None)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert set(modes) == {(False, True)}
    assert not torch.equal(weight, made.strategy.network.backbone.layers[1].weight)  # the others do learn


def test_balanced_features_are_of_classes_drawn_uniformly_and_new_ones_of_the_batch_before():
    drawn, batches = [], []

    class Look(EFC):
        def prepare_batch(self, batch):
            made = super().prepare_batch(batch)
            if self.task.index == 1:
                batches.append(batch)
                drawn.append(self._balanced)
            return made

    run(Look(optimizer=SGD), options={"stop_after_task": 1}, max_epochs=12)
    first, *later = drawn
    assert len(first) == 2  # all are imitated
    assert len(first[1]) == len(batches[0])
    counts = torch.zeros(7)
    for previous, batch, (features, old, images, new) in zip(batches, batches[1:], later, strict=False):
        assert len(old) + len(new) == len(batch)
        assert features.shape == (len(old), features.shape[1])
        counts += torch.cat([old, new]).bincount(minlength=7)
        places = [int((previous.images - image).abs().amax((1, 2, 3)).argmin()) for image in images]
        assert torch.equal(previous.images[places], images)
        assert torch.equal(previous.labels[places], new)
    share = counts[:4] / counts.sum()
    assert (share - 1 / 7).abs().max() < 0.03
    assert abs(counts[4:].sum() / counts.sum() - 3 / 7) < 0.04


def test_the_pool_holds_the_task_and_as_many_draws_of_each_old_class_as_it_had_samples():
    gaussians = GaussianPrototypes(3)
    gaussians.update(normal(9, 3).float(), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2]), num_classes=4)
    labels = torch.tensor([3, 3, 2])  # class 2 comes again
    pool = RebalancingFeatures(torch.full((3, 3), 6.0), labels, gaussians)
    assert len(pool) == 3 + 4 + 2
    rows = torch.tensor([8, 0, 3, 2, 4])
    features, columns = pool.take(rows, Draw.of(5, 1))
    assert columns.tolist() == [3, 2, 1, 0, 0]
    assert torch.equal(features[:2], torch.full((2, 3), 6.0))
    # A process that has some of the rows draws for them what one process draws.
    share, _ = pool.take(rows[3:], Draw(Draw.of(5, 1).key, 3, 5, 5))
    assert torch.equal(share, torch.cat([features[1:2], features[4:]]))


def test_statistics_and_balancing_are_of_images_without_augmentation():
    """With shifts of the training images, the same features make the Gaussian of a class and balance it."""
    balanced, gaussians = [], []

    class Look(EFCpp):
        def losses(self, batch, output):
            if self.phase.features is not None:
                new = batch.labels >= self.task.num_seen - self.task.num_new
                balanced.append((self.task.index, self.epoch, batch.labels[new], output.features[new].double()))
            return super().losses(batch, output)

        def end_task(self, task):
            super().end_task(task)
            parts = [(self.network.backbone(b.images).double(), b.labels) for b in self.passes.batches()]
            features, labels = (torch.cat(column) for column in zip(*parts, strict=True))
            for column in task.columns:
                mine = features[labels == column]
                torch.testing.assert_close(self.gaussians.means[column].double(), mine.mean(0), rtol=1e-4, atol=1e-4)
                gaussians.append((task.index, column, mine))

    options = {"rebalance_options": PhaseOptions(epochs=2, batch_size=64, optimizer=SGD)}
    run(Look(backbone=plain_net, optimizer=SGD, **options), data={"transforms": [RandomCrop(2)]}, max_epochs=1)
    for task, column, plain in gaussians:
        if task == 0:
            continue
        for epoch in range(2):
            parts = [rows[y == column] for t, e, y, rows in balanced if (t, e) == (task, epoch)]
            rows = torch.cat(parts)
            assert len(rows) == len(plain)
            nearest = torch.cdist(rows, plain).min(dim=1)
            assert nearest.values.max() < 1e-4  # each row is a feature of an image without augmentation
            torch.testing.assert_close(rows.T.cov().trace(), plain.T.cov().trace(), rtol=1e-4, atol=1e-6)


def test_old_heads_stay_while_the_backbone_learns_and_all_learn_afterwards():
    log = []

    class Look(EFCpp):
        def on_train_start(self):
            super().on_train_start()
            self.kept = [value.clone() for value in self.network.head.parameters()]
            self.body = [value.clone() for value in self.network.backbone.parameters()]

        def end_phase(self, phase):
            super().end_phase(phase)
            head, body = list(self.network.head.parameters()), list(self.network.backbone.parameters())
            moved = [not torch.equal(a, b) for a, b in zip(self.kept, head, strict=True)]
            log.append((phase.name, not all(map(torch.equal, self.body, body)), moved))

    run(Look(optimizer=SGD, rebalance_options=PhaseOptions(epochs=1, batch_size=64)))
    assert log == [
        ("train", True, [True]),
        ("train", True, [False, True]),
        ("rebalance", False, [True, True]),
        ("train", True, [False, False, True]),
        ("rebalance", False, [True, True, True]),
    ]


def test_without_weights_rebalancing_and_rotations_it_is_fine_tuning():
    plain = small(
        EFCpp, feature_weight=0.0, identity_weight=0.0, rebalance_options=PhaseOptions(epochs=0), rotations=False
    )
    head = plain().build_head
    check_limit(plain, small(Finetune, loss_classes="current", head=head))


@pytest.mark.parametrize("cls", [EFC, partial(EFCpp, rebalance_options=PhaseOptions(epochs=15, batch_size=256))])
def test_it_forgets_far_less_than_fine_tuning(cls):
    options = {"data": {"scenario": ClassIncremental(tasks=5), "batch_size": 32}, "max_epochs": 3}
    common = {"backbone": partial(MLP, hidden=(64,)), "optimizer": partial(torch.optim.Adam, lr=1e-3)}
    plain = last_accuracy(finetuning(common, **options).R_ci)
    # Measured: EFC .71, EFC++ .77, fine-tuning .14.
    assert last_accuracy(run(cls(**common), **options).matrix.R_ci) > plain + 0.28


def test_other_options_and_batch_normalisation_pass_the_suite():
    data = partial(TinyDigits, batch_size=20)  # no batch of a single sample
    check_strategy(small(EFC, rotations=False, backbone=Norm), checks=["resume", "restores", "limits"], data=data)
    check_strategy(
        small(EFCpp, rebalance_options=PhaseOptions(epochs=2, batch_size=256), backbone=Norm),
        checks=["resume", "restores", "options"],
        data=data,
    )


@pytest.mark.parametrize("options", [{"feature_weight": -1.0}, {"identity_weight": -0.1}, {"drift_sigma": 0.0}])
def test_options_out_of_range_are_errors(options: dict):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"EFC: {name} is {value}"):
        EFC(**options)


def test_other_heads_and_rebalancing_out_of_range_are_errors():
    with pytest.raises(ValueError, match="head is CosineHead"):
        EFC(head=CosineHead).build((1, 8, 8))
    with pytest.raises(ValueError, match="batch_size is 0"):
        EFCpp(rebalance_options=PhaseOptions(batch_size=0))
