from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.pretrained import in_tasks, samples_right
from support.runs import assert_same, loop, run
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP
from cl_lightning.strategies.pretrained.simplecil import SimpleCIL
from cl_lightning.stream import Blurry, ClassIncremental
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "SimpleCIL": Subject(
        small(SimpleCIL),
        first_task_is_finetuning=False,
        reason="class means take the place of the head, nothing is trained",
    ),
}

PUBLISHED = {
    "simplecil": {
        "source": "zhoudw-zdw/RevisitingCIL: exps of CIFAR-100, SimpleCIL",
        "metric": "cosine",
        "backbone": "Timm(name=vit_base_patch16_224.augreg_in21k, pretrained=True)",
        "data.resize": 256,
        "data.center_crop": 224,
        "data.interpolation": "bicubic",
        "data.mean": [0],
        "data.std": [1],
        "data.transforms": ["RandomResizedCrop(scale=[0.05, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 128,
    },
}

random_features = partial(MLP, hidden=(256,))


def tasks(count: int) -> dict:
    return {"data": {"scenario": ClassIncremental(tasks=count)}, "max_epochs": 1}


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_final_accuracy_does_not_depend_on_the_split_into_tasks(metric: str):
    make = partial(SimpleCIL, backbone=random_features, metric=metric)
    made = [in_tasks(make, count) for count in (1, 2, 5, 10)]
    assert len({samples_right(one.matrix) for one in made}) == 1
    assert last_accuracy(made[0].matrix.R_ci) > 0.85  # random features of digits
    first, *others = [one.strategy.prototypes.means for one in made]
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_means_of_recurring_classes_are_over_all_their_samples(metric: str):
    make = partial(SimpleCIL, backbone=random_features, metric=metric)
    joint = in_tasks(make, 1)
    blurry = run(make(), data={"scenario": Blurry(tasks=4, disjoint=30, blurry=40)}, max_epochs=1)
    order = torch.tensor(blurry.stream.order)
    expected = joint.strategy.prototypes.means[torch.tensor(joint.stream.order).argsort()[order]]
    torch.testing.assert_close(blurry.strategy.prototypes.means, expected, rtol=1e-6, atol=1e-6)


def test_scores_are_cosines_to_the_means_of_raw_features():
    made = run(SimpleCIL(backbone=random_features), **tasks(5))
    strategy = made.strategy.eval()
    assert made.trainer.global_step == 0
    with torch.no_grad():
        features, labels = strategy.passes.all_features()  # of the last task
        mean = features[labels == 9].double().mean(0)
        images = next(strategy.passes.batches()).images
        scores = strategy.predict(images)
        expected = F.cosine_similarity(strategy.network.backbone(images).double(), mean, dim=1)
    torch.testing.assert_close(scores[:, 9].double(), expected, rtol=1e-5, atol=1e-6)


def test_scaled_features_give_the_same_predictions():
    class Scaled(MLP):
        def forward(self, images):
            return 7.0 * super().forward(images)

    rows = [run(SimpleCIL(backbone=partial(net, hidden=(64,))), **tasks(5)).matrix.R_ci for net in (MLP, Scaled)]
    assert torch.equal(*(row.nan_to_num() for row in rows))


def test_nothing_of_the_network_changes_but_the_head():
    made = loop(SimpleCIL(backbone=random_features), options={"stop_after_task": 0}, **tasks(5))
    made.fit()
    before = {name: value.clone() for name, value in made.strategy.network.backbone.state_dict().items()}
    means = made.strategy.prototypes.means.clone()
    for task in made.stream.tasks[1:]:
        made._run_task(task, None)
    assert_same(before, made.strategy.network.backbone.state_dict())
    assert torch.equal(made.strategy.prototypes.means[:2], means)  # of old classes


def test_it_does_not_forget_while_fine_tuning_does():
    plain = finetuning({"backbone": random_features}, **{**tasks(5), "max_epochs": 3})
    means = run(SimpleCIL(backbone=random_features), **tasks(5))
    # Measured: .92 against .18.
    assert last_accuracy(means.matrix.R_ci) > last_accuracy(plain.R_ci) + 0.35


def test_another_metric_is_an_error():
    with pytest.raises(ValueError, match="SimpleCIL: metric is 'far'"):
        SimpleCIL(metric="far")
