from functools import partial

import pytest
import torch
from support.pretrained import TinyViT, finetuning_in_tasks, in_tasks, samples_right
from torch.nn import functional as F

from cl_lightning.batch import mix
from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP, SSF, Adapter, RidgeHead
from cl_lightning.strategies.pretrained.ranpac import RanPAC
from cl_lightning.testing import Subject, small

# SSF: the small net has no transformer blocks for an adapter.
SUBJECTS = {
    "RanPAC": Subject(
        small(RanPAC, peft=SSF, projection=40, ridge=[0.1, 10.0, 1000.0]),
        first_task_is_finetuning=False,
        reason="the head is fitted in closed form when the session ends",
    ),
}

PUBLISHED = {
    "ranpac": {
        "source": "RanPAC/RanPAC: CIFAR-100, M 10000, phase 1 with adapters",
        "backbone": "Timm(name=vit_base_patch16_224.augreg_in21k, pretrained=True)",
        "projection": 10000,
        "peft": "Adapter(bottleneck=64, dropout=0.1, place=parallel, scale=0.1)",
        "session_epochs": 20,
        "optimizer": "SGD(lr=0.01, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase",
        "data.resize": 224,
        "data.center_crop": None,
        "data.interpolation": "bicubic",
        "data.mean": [0],
        "data.std": [1],
        "data.transforms": ["RandomResizedCrop(scale=[0.05, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 48,
    },
}

random_features = partial(MLP, hidden=(64,))
adam = partial(torch.optim.Adam, lr=3e-3)
SMALL = partial(RanPAC, backbone=random_features, peft=SSF, projection=300, optimizer=adam)


def test_without_phase_1_and_for_a_fixed_ridge_the_split_into_tasks_does_not_matter():
    made = [in_tasks(partial(SMALL, adapt=False, ridge=10.0), count) for count in (1, 2, 5, 10)]
    assert len({samples_right(one.matrix) for one in made}) == 1
    first, *others = [one.strategy.network.head.weight() for one in made]
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-3, atol=1e-5)  # features are float32


class Noting(RanPAC):
    """Notes the features that each task gives the head."""

    def build(self, image_shape):
        super().build(image_shape)
        head, self.noted = self.network.head, []
        fit = head.fit_features
        head.fit_features = lambda features, labels: (self.noted.append((features, labels)), fit(features, labels))[1]


def test_the_ridge_is_the_power_of_ten_of_least_error_on_a_held_out_fifth():
    torch.manual_seed(0)
    made = in_tasks(partial(Noting, backbone=random_features, projection=300, adapt=False), 2)
    head, (features, labels) = made.strategy.network.head, made.strategy.noted[-1]
    projection = head.random.double()
    assert float(projection.var()) == pytest.approx(1.0, rel=0.05)  # 19,200 numbers of N(0, 1)
    assert float(projection.abs().max()) > 3
    inputs, targets = (features.double() @ projection).clamp(min=0), F.one_hot(labels, 10).double()
    seen = sum(len(part) for part, _ in made.strategy.noted)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(mix(0x41D6E, seen)))
    judged, fitted = order[: len(labels) // 5], order[len(labels) // 5 :]

    def error(ridge):
        gram = inputs[fitted].T @ inputs[fitted] + ridge * torch.eye(300, dtype=torch.float64)
        weight = torch.linalg.solve(gram, inputs[fitted].T @ targets[fitted])
        return float((inputs[judged] @ weight - targets[judged]).square().mean())

    ridges = [10.0**power for power in range(-4, 9)]  # smaller ones make this plain solution inexact
    assert float(head.chosen) == min(ridges, key=error)


def test_the_ridge_and_the_projection_are_kept():
    strategy = in_tasks(SMALL, 2).strategy
    head = strategy.network.head.final
    assert isinstance(head, RidgeHead)
    fresh = SMALL()
    fresh.build((1, 8, 8))
    fresh.load_state_dict(strategy.state_dict())
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(fresh.eval().predict(images), strategy.eval().predict(images))


def test_the_gram_matrix_is_symmetric_and_semi_definite():
    made = in_tasks(partial(SMALL, adapt=False, projection=64, ridge=1.0), 5)
    gram = made.strategy.network.head.gram
    torch.testing.assert_close(gram, gram.T, rtol=0, atol=1e-9)
    assert torch.linalg.eigvalsh(gram).min() > -1e-9 * gram.diagonal().max()


def test_a_random_projection_beats_plain_regression_and_forgets_nothing():
    plain = finetuning_in_tasks({"backbone": random_features, "optimizer": adam}, 5, max_epochs=3)
    without = in_tasks(partial(SMALL, projection=None), 5, max_epochs=3)
    made = in_tasks(SMALL, 5, max_epochs=3)
    right = [samples_right(matrix) for matrix in (plain, without.matrix, made.matrix)]
    assert right == sorted(right)
    # Measured: .97, fine-tuning .17.
    assert last_accuracy(made.matrix.R_ci) > last_accuracy(plain.R_ci) + 0.35


def test_a_transformer_is_adapted_by_adapters():
    made = in_tasks(partial(RanPAC, backbone=TinyViT, projection=100, optimizer=adam), 5)
    assert isinstance(made.strategy.network.backbone.peft, Adapter)
    assert made.strategy.network.head.num_features == 24  # the adapted ones alone


@pytest.mark.parametrize(
    ("options", "words"), [({"ridge": -1.0}, "ridge is -1"), ({"projection": 0}, "projection is 0")]
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        RanPAC(**options)
