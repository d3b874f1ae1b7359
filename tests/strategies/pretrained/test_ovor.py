import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from support.fakes import batch_of, normal
from support.pretrained import PretrainedViT, TinyViT, in_tasks, tiny_transformer
from support.runs import loop
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.measures import last_accuracy
from cl_lightning.models import Output
from cl_lightning.strategies.pretrained.one_prompt import OnePrompt
from cl_lightning.strategies.pretrained.ovor import OVOR, OutlierFeatures, neighbour_distance, virtual_outliers
from cl_lightning.strategy import PhaseOptions
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, small

FEW = {"per_class": 3, "neighbours": 3, "boundary": 4, "draws": 10}

SUBJECTS = {
    "OVOR": Subject(
        small(
            OVOR,
            backbone=tiny_transformer,
            lengths=(2, 3),
            blocks=(0, 1),
            outlier_options=PhaseOptions(epochs=1),
            **FEW,
        ),
        first_task_is_finetuning=False,
        reason="prompts are trained, on a frozen backbone",
    ),
}

PUBLISHED = {
    "ovor": {
        "source": "jpmorganchase/ovor: configs/cifar-100_prompt.yaml, experiments/cifar-100.sh and learners/ood.py",
        "backbone": "Timm(name=vit_base_patch16_224.augreg_in21k_ft_in1k, pretrained=True)",
        "lengths": [5, 5, 20, 20, 20],
        "blocks": [0, 1, 2, 3, 4],
        "outlier_weight": 0.1,
        "energy_in": -15.0,
        "energy_out": -3.0,
        "per_class": 40,
        "neighbours": 50,
        "boundary": 50,
        "draws": 600,
        "spread": 0.1,
        "outlier_options": {"epochs": 4, "optimizer": "Adam(lr=0.0002)"},
        "optimizer": "Adam(lr=0.001)",
        "scheduler": "QuarterCosineOverPhase(late=1)",
        "data.resize": 224,
        "data.center_crop": None,
        "data.interpolation": "bilinear",
        "data.mean": [0],
        "data.std": [1],
        "data.transforms": ["RandomResizedCrop(scale=[0.08, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 128,
        "data.drop_last": True,
        "trainer.max_epochs": 16,
    },
}

adam = partial(torch.optim.Adam, lr=0.01)
SMALL = partial(
    OVOR,
    backbone=TinyViT,
    lengths=(2, 3),
    blocks=(0, 1),
    optimizer=adam,
    outlier_options=PhaseOptions(epochs=2),
    **FEW,
)


def learnt(make, tasks=1):
    made = loop(
        make(), data={"scenario": ClassIncremental(tasks=5)}, options={"stop_after_task": tasks - 1}, max_epochs=1
    )
    made.fit()
    return made


def unit(*degrees):
    angles = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_the_distance_to_a_neighbour_is_counted_from_1():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    points = torch.tensor([[0.0, 0.0], [6.0, 8.0]])
    for rank, expected in ((1, [0, 5]), (2, [1, math.sqrt(85)]), (3, [5, 10]), (9, [5, 10])):
        torch.testing.assert_close(neighbour_distance(points, features, rank), torch.tensor(expected).float())


def test_outliers_are_drawn_around_the_feature_without_neighbours_and_have_its_norm():
    features = unit(0, 1, 2, 3, 90) * torch.tensor([1.0, 1, 1, 1, 3])[:, None]
    made = virtual_outliers(features, 2000, draw=Draw.of(1, 0), neighbours=2, boundary=1, draws=2000, spread=0.05)
    assert made.dtype == torch.float64
    noise = made / 3 - unit(90)
    torch.testing.assert_close(noise.mean(dim=0), torch.zeros(2).double(), rtol=0, atol=0.005)
    torch.testing.assert_close(noise.std(dim=0), torch.full((2,), 0.05).double(), rtol=0.05, atol=0)
    around = virtual_outliers(
        features, 2000, draw=Draw.of(1, 0), neighbours=2, boundary=1, draws=2000, spread=0.05, around="origin"
    )
    torch.testing.assert_close(around.std(dim=0), torch.full((2,), 0.05).double(), rtol=0.05, atol=0)
    torch.testing.assert_close(around.mean(dim=0), torch.zeros(2).double(), rtol=0, atol=0.005)


def test_a_feature_is_not_its_own_neighbour():
    features = torch.cat([unit(0, 4, 8, 12, 16), unit(90, 90)])  # the last two are alone, but together
    options = {"draw": Draw.of(1, 0), "boundary": 1, "draws": 1, "spread": 1e-9}
    first = virtual_outliers(features, 1, neighbours=1, **options)
    assert float((features[:5] - first).norm(dim=1).min()) < 1e-6
    second = virtual_outliers(features, 1, neighbours=2, **options)
    torch.testing.assert_close(second, unit(90), rtol=0, atol=1e-6)


def test_the_draws_that_are_farthest_from_all_features_are_kept():
    features = 5 * F.normalize(normal(20, 4), dim=1)
    options = {"draw": Draw.of(1, 3), "neighbours": 4, "boundary": 3, "draws": 50, "spread": 0.3}
    everything = virtual_outliers(features, 150, **options)
    distances = (everything[:, None] - features).norm(dim=2).sort(dim=1).values[:, 3]
    assert (distances[:-1] >= distances[1:] - 1e-9).all()
    torch.testing.assert_close(virtual_outliers(features, 40, **options), everything[:40])


def test_with_few_features_all_of_them_are_used():
    made = virtual_outliers(unit(10, 40), 20, draw=Draw.of(1, 0), draws=10, spread=1e-9)
    both = {round(float(angle)) for angle in torch.atan2(made[:, 1], made[:, 0]) * 180 / math.pi}
    assert both == {10, 40}


def test_each_epoch_draws_outliers_that_follow_the_features():
    features, labels, epoch = normal(4, 2), torch.tensor([3, 2, 3, 2]), [0]
    pool = OutlierFeatures(features, labels, 2, lambda e: torch.full((2, 2), 10.0 + e).double(), lambda: epoch[0])
    assert len(pool) == 6
    for epoch[0] in (0, 0, 1):
        taken, columns = pool.take(torch.tensor([5, 0, 4, 1]), Draw.of(4, 0))
        assert columns.tolist() == [-1, 3, -1, 2]
        assert torch.equal(taken[[1, 3]], features[:2])
        assert (taken[[0, 2]] == 10 + epoch[0]).all()


def test_the_losses_match_the_paper():
    strategy = learnt(partial(SMALL, outlier_weight=0.5, energy_in=-1.5, energy_out=-1.0), tasks=2).strategy
    strategy.phase = replace(strategy.phase, features=strategy.features_and_outliers)
    logits = torch.tensor(
        [
            [9.0, 9, 1, 0],  # E = -log(e + 1) = -1.3133, too high by 0.1867
            [0.0, 0, -4, 2],  # E = -2.0025, low enough
            [0.0, 9, -1, -2],  # E = 0.6867, too high by 2.1867
            [7.0, 0, 3, 3],  # an outlier with E = -3.6931, too low by 2.6931
            [7.0, 0, 0, 0],  # E = -0.6931, high enough
        ],
        dtype=torch.float64,
    )
    batch = batch_of(torch.tensor([3, 3, 2, -1, -1]))
    terms = strategy.losses(batch, Output(torch.zeros(5, 24), logits))
    ce = [math.log(1 + math.e), math.log(1 + math.exp(-6)), math.log(1 + math.exp(-1))]
    assert float(terms["ce"]) == pytest.approx(sum(ce) / 3, abs=1e-6)
    too_high = [-math.log(1 + math.e) + 1.5, 0, -math.log(math.exp(-1) + math.exp(-2)) + 1.5]
    assert float(terms["energy_in"]) == pytest.approx(0.5 * (too_high[0] ** 2 / 2 + too_high[2] - 0.5) / 3, abs=1e-6)
    too_low = -1.0 + 3 + math.log(2)
    assert float(terms["energy_out"]) == pytest.approx(0.5 * (too_low - 0.5) / 2, abs=1e-6)
    batch = batch_of(torch.tensor([3, 2, 2, 3, 2]))
    output = strategy.network(torch.randn(5, 1, 8, 8))
    strategy.phase = replace(strategy.phase, features=None)
    assert strategy.losses(batch, output).keys() == {"ce"}


def test_the_phase_trains_the_rows_of_the_task_alone():
    plain = learnt(partial(OnePrompt, backbone=TinyViT, lengths=(2, 3), blocks=(0, 1), optimizer=adam), tasks=2)
    whole, names = learnt(SMALL, tasks=2), set()
    expected = plain.strategy.network.state_dict()
    for name, value in whole.strategy.network.state_dict().items():
        if name.startswith("head") and not torch.equal(value, expected[name]):
            names.add(name)
    # The first task had the phase too, with rows that the prefixes of the second task do not depend on.
    assert names == {f"head.blocks.{block}.{part}" for block in (0, 1) for part in ("weight", "bias")}
    backbone = whole.strategy.network.backbone.state_dict()
    assert all(torch.equal(value, expected[f"backbone.{name}"]) for name, value in backbone.items())
    assert not any(parameter.requires_grad for parameter in whole.strategy.network.backbone.parameters())
    first = whole.strategy.network.head.blocks[0].weight.clone()
    whole._run_task(whole.stream.tasks[2], None)
    assert torch.equal(whole.strategy.network.head.blocks[0].weight, first)


def test_without_epochs_it_is_one_prompt():
    same = learnt(partial(SMALL, outlier_options=PhaseOptions(epochs=0)), tasks=2)
    plain = learnt(partial(OnePrompt, backbone=TinyViT, lengths=(2, 3), blocks=(0, 1), optimizer=adam), tasks=2)
    expected = plain.strategy.network.state_dict()
    assert all(torch.equal(v, expected[name]) for name, v in same.strategy.network.state_dict().items())


def test_as_many_outliers_are_drawn_as_there_are_classes():
    made = learnt(SMALL)
    pool = made.strategy.features_and_outliers()
    assert int((pool.labels == -1).sum()) == 2 * 3
    made.strategy.per_class = 100
    assert int((made.strategy.features_and_outliers().labels == -1).sum()) == 4 * 10


def test_outliers_separate_tasks_better_than_cross_entropy_alone():
    options = {"lengths": (1, 1), "high": 0.01, "neighbours": 10, "boundary": 20, "draws": 50, "per_class": 20}
    learn = partial(SMALL, backbone=PretrainedViT, **options)
    made, without = (in_tasks(partial(learn, outlier_weight=weight), 5, max_epochs=2) for weight in (0.1, 0.0))
    # Measured: .52 against .37.
    assert last_accuracy(made.matrix.R_ci) > last_accuracy(without.matrix.R_ci) + 0.08


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"outlier_weight": -1.0}, "outlier_weight is -1.0"),
        ({"energy_in": math.nan}, "energy_in is nan"),
        ({"per_class": 0}, "per_class is 0"),
        ({"neighbours": 0}, "neighbours is 0"),
        ({"boundary": 0}, "boundary is 0"),
        ({"draws": 0}, "draws is 0"),
        ({"spread": 0.0}, "spread is 0.0"),
        ({"around": "class"}, "around is 'class'"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        partial(SMALL, **options)()
