from functools import partial

import numpy as np
import pytest
import torch
from support.pretrained import PretrainedViT, TinyViT, finetuning_in_tasks, in_tasks, samples_right
from support.runs import loop
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.models import SSF, Adapter, WholeModel
from cl_lightning.strategies.pretrained.ease import EASE, SubspacePrototypes, synthesised
from cl_lightning.strategies.pretrained.simplecil import SimpleCIL
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, small

# SSF: the small net has no transformer blocks for an adapter.
SUBJECTS = {
    "EASE": Subject(
        small(EASE, peft=SSF, pretrained_weight=0.5),
        first_task_is_finetuning=False,
        reason="a PEFT module is trained, on a frozen backbone",
    ),
}
SLOW = "a transformer, which runs once for each adapter in a prediction"

PUBLISHED = {
    "ease": {
        "source": "sun-hailong/CVPR24-Ease: exps of CIFAR-100, 20 tasks",
        "backbone": "Timm(name=vit_base_patch16_224.augreg_in21k, pretrained=True)",
        "peft": "Adapter(bottleneck=64, dropout=0.1, place=parallel, scale=0.1)",
        "other_weight": 0.1,
        "optimizer": "SGD(lr=0.025, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase",
        "data.resize": 256,
        "data.center_crop": 224,
        "data.interpolation": "bicubic",
        "data.mean": [0],
        "data.std": [1],
        "data.transforms": ["RandomResizedCrop(scale=[0.05, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=20)",
        "data.batch_size": 48,
        "trainer.max_epochs": 20,
    },
}

sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
adapter = partial(Adapter, scale=0.5, dropout=0.0)
SMALL = partial(EASE, backbone=TinyViT, peft=adapter, optimizer=sgd)
IMAGES = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def learnt(make=SMALL, tasks=1, **options):
    made = loop(
        make(),
        data={"scenario": ClassIncremental(tasks=5)},
        options={"stop_after_task": tasks - 1},
        **{"max_epochs": 1, **options},
    )
    made.fit()
    return made


def further(made, number):
    made._run_task(made.stream.tasks[number], None)


# ---------------------------------------------------------------------- the formulas


def test_a_mean_is_synthesised_from_the_classes_that_are_similar_in_its_own_space():
    means = np.zeros((4, 2, 2))
    means[0, 0], means[1, 0] = [2.0, 0.0], [0.0, 0.5]  # classes 0 and 1 have their means in space 0 alone
    means[2], means[3] = [[3.0, 0.0], [1.0, 7.0]], [[0.0, 4.0], [-5.0, 2.0]]
    means[0, 1] = 99.0  # of earlier
    known = torch.tensor([[1, 0], [1, 0], [1, 1], [1, 1]], dtype=torch.bool)
    near, far = np.e / (np.e + 1), 1 / (np.e + 1)  # cosines 1 and 0, the lengths do not count
    expected = torch.tensor(
        np.stack([near * means[2, 1] + far * means[3, 1], far * means[2, 1] + near * means[3, 1], *means[2:, 1]])
    )
    torch.testing.assert_close(synthesised(torch.tensor(means), known, 1), expected)
    assert torch.equal(synthesised(torch.tensor(means), known, 0), torch.tensor(means[:, 0]))


def test_each_class_is_compared_in_the_space_of_its_own_task():
    means = torch.randn(3, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    known = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    filled = synthesised(torch.cat([means, means[2:]]), torch.cat([known, known[2:]]), 1)
    donors = torch.stack([means[1], means[2], means[2]])
    weights = F.cosine_similarity(means[0, 0], donors[:, 0], dim=1).softmax(0)
    torch.testing.assert_close(filled[0], weights @ donors[:, 1])
    last = torch.stack([means[2], -means[2]])
    filled = synthesised(torch.cat([means[:2], last]), torch.cat([known[:2], known[2:], known[2:]]), 2)
    similar = F.cosine_similarity(means[1, 1], last[:, 1], dim=1).softmax(0)  # class 1 in space 1, not 0
    torch.testing.assert_close(filled[1], similar @ last[:, 2])


def test_equal_donors_give_their_mean_and_classes_without_images_stay_0():
    means = torch.randn(4, 2, 3, dtype=torch.float64)
    means[2:, 1] = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    known = torch.tensor([[1, 0], [0, 0], [1, 1], [1, 1]], dtype=torch.bool)
    filled = synthesised(means, known, 1)
    torch.testing.assert_close(filled[0], means[2, 1])
    assert not filled[1].any()


def test_scores_are_cosines_in_each_space_by_itself():
    prototypes = SubspacePrototypes(4)
    prototypes.means = torch.randn(4, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prototypes.counts = torch.tensor([[2, 0, 0], [1, 1, 0], [4, 4, 4], [0, 0, 0]])
    features = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.full((2, 5), -torch.inf, dtype=torch.float64)
    for sample in range(2):
        for column, own in enumerate([0, 1, 2]):
            cosines = F.cosine_similarity(features[:, sample], prototypes.means[column], dim=1)
            expected[sample, column] = cosines[own] + 0.3 / 2 * (cosines.sum() - cosines[own])
    torch.testing.assert_close(prototypes.scores(features, 5, 0.3), expected)
    one = SubspacePrototypes(4)
    one.means, one.counts = prototypes.means[:, :1], prototypes.counts[:, :1]
    torch.testing.assert_close(one.scores(features[:1], 4, 0.3), one.scores(features[:1], 4, 0.0))


def updated(*batches, refresh=True):
    """Prototypes after batches (features, labels, number of classes)."""
    prototypes = SubspacePrototypes(3)
    for features, labels, count in batches:
        prototypes.update(features, torch.tensor(labels), count, refresh=refresh)
    return prototypes


@pytest.mark.parametrize("refresh", [True, False])
def test_means_are_of_images_where_there_are_some_and_else_synthesised(refresh):
    first, second, third = (torch.randn(4, spaces, 3) for spaces in (1, 2, 3))
    batches = [(first, [0, 0, 1, -1], 2), (second, [2, 2, 2, 2], 3), (third, [3, 3, 4, 4], 5)]
    prototypes = updated(*batches, refresh=refresh)
    assert prototypes.counts.tolist() == [[2, 0, 0], [1, 0, 0], [4, 4, 0], [2, 2, 2], [2, 2, 2]]
    torch.testing.assert_close(prototypes.means[0, 0], first[:2, 0].mean(0))
    torch.testing.assert_close(prototypes.means[2, :2], second.mean(0))
    torch.testing.assert_close(prototypes.means[3], third[:2].mean(0))
    early = second[:, 1].mean(0)  # after the second task, class 2 alone is known in space 1
    torch.testing.assert_close(updated(*batches[:2]).means[0, 1], early)
    known = prototypes.known
    expected = synthesised(prototypes.means, known, 1)[:2] if refresh else early.expand(2, 3)
    torch.testing.assert_close(prototypes.means[:2, 1], expected)
    torch.testing.assert_close(prototypes.means[:3, 2], synthesised(prototypes.means, known, 2)[:3])
    assert not torch.allclose(prototypes.means[0, 1], early) or not refresh


def test_a_class_that_recurs_has_the_mean_of_its_images_in_each_space():
    first, second = torch.randn(3, 1, 3), torch.randn(2, 2, 3)
    prototypes = updated((first, [0, 0, 1], 2), (second, [0, 2], 3))
    assert prototypes.counts.tolist() == [[3, 1], [1, 0], [1, 1]]
    torch.testing.assert_close(prototypes.means[0, 0], (first[0, 0] + first[1, 0] + second[0, 0]) / 3)
    torch.testing.assert_close(prototypes.means[0, 1], second[0, 1])  # not pooled with the synthesised mean


# ---------------------------------------------------------------------- the method


def test_before_anything_is_learnt_it_is_simplecil():
    plain = in_tasks(partial(SimpleCIL, backbone=TinyViT), 1)
    make = partial(SMALL, optimizer=partial(torch.optim.SGD, lr=0.0))
    made = in_tasks(make, 1)
    assert samples_right(made.matrix) == samples_right(plain.matrix)
    torch.testing.assert_close(made.strategy.subspaces.means[:, 0], plain.strategy.prototypes.means)


def test_only_the_newest_adapter_and_the_classifier_of_the_task_are_trained_from_their_initial_values():
    made = learnt(tasks=2)
    backbone, head = made.strategy.network.backbone, made.strategy.network.head
    before = {name: value.clone() for name, value in made.strategy.network.state_dict().items()}
    assert float(before.pop("head.scale")) != 1
    begun = []
    begin = made.strategy.begin_task

    def begin_task(task):
        begin(task)
        begun.extend([backbone.sets[-1].sites[0].up.weight.clone(), float(head.scale.detach())])

    made.strategy.begin_task = begin_task
    further(made, 2)
    assert len(backbone.sets) == 3
    assert not begun[0].any()
    assert backbone.sets[2].sites[0].up.weight.any()
    assert begun[1] == 1.0
    trained = [any(parameter.requires_grad for parameter in one.parameters()) for one in backbone.sets]
    assert trained == [False, False, True]
    after = made.strategy.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_scores_are_computed_from_a_forward_pass_for_each_adapter():
    made = learnt(partial(SMALL, other_weight=0.4, pretrained_weight=0.6), tasks=3)
    strategy, sets = made.strategy.eval(), made.strategy.network.backbone
    means = in_tasks(partial(SimpleCIL, backbone=TinyViT), 5).strategy.prototypes.means[:6]
    with torch.no_grad():
        plain = TinyViT((1, 8, 8)).eval()(IMAGES)
        expected = strategy.subspaces.scores(sets.features(IMAGES, [0, 1, 2]), 6, 0.4)
        expected = expected + 0.6 * F.cosine_similarity(plain[:, None], means, dim=2)
        torch.testing.assert_close(strategy.predict(IMAGES), expected, rtol=1e-4, atol=1e-5)
        alone = torch.cat([strategy.predict(image[None]) for image in IMAGES])
        torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)

        strategy.other_weight = 0.0  # then means in the spaces of other tasks do not count
        before = strategy.predict(IMAGES)
        strategy.subspaces.means[:4, 2] += torch.randn(4, 24)
        assert torch.equal(strategy.predict(IMAGES), before)
        strategy.subspaces.means[4:, 2] += torch.randn(2, 24)
        assert not torch.equal(strategy.predict(IMAGES), before)


def test_it_forgets_less_than_fine_tuning():
    plain = finetuning_in_tasks({"backbone": PretrainedViT, "optimizer": partial(torch.optim.Adam, lr=3e-3)}, 5)
    made = in_tasks(partial(SMALL, backbone=PretrainedViT), 5)
    # Measured: .76 against .24.
    assert last_accuracy(made.matrix.R_ci) > last_accuracy(plain.R_ci) + 0.26


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"other_weight": -0.1}, "other_weight is -0.1"),
        ({"pretrained_weight": -1.0}, "pretrained_weight is -1.0"),
        ({"peft": WholeModel}, "of which there is only one"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        learnt(partial(EASE, backbone=TinyViT, **options))
