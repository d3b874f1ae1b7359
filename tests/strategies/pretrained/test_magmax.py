from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.pretrained import finetuning_in_tasks, in_tasks, samples_right
from support.runs import NormNet, loop, plain_net, run

from cl_lightning.memory import Average, Ties
from cl_lightning.models import MLP, SimplexHead
from cl_lightning.strategies.pretrained.magmax import MagMax
from cl_lightning.stream import ClassIncremental, RotatedDomains
from cl_lightning.testing import Subject, check_strategy, small

SUBJECTS = {
    "MagMax": Subject(
        small(MagMax),
        first_task_is_finetuning=False,
        reason="the first task predicts with half of its change of the weights",
    ),
}

PUBLISHED = {
    "magmax": {
        "source": "danielm1405/magmax: CLIP ViT-B/16, CIFAR-100, AdamW 1e-5, 10 epochs, 500 steps of warm-up",
        "backbone": "Timm(name=vit_base_patch16_clip_224.openai, pretrained=True, projection=True)",
        "head": "TextHead(embeddings=class_embeddings.npz, key=clip_text512, learn_scale=False, scale=100.0)",
        "scale": 0.5,
        "rule": "MaxMagnitude",
        "optimizer": "AdamW(lr=1e-05, weight_decay=0.1)",
        "scheduler": "CosineOverPhase(warmup=500)",
        "scheduler_interval": "step",
        "data.resize": 256,
        "data.center_crop": 224,
        "data.interpolation": "bicubic",
        "data.mean": [0.48145466, 0.4578275, 0.40821073],
        "data.std": [0.26862954, 0.26130258, 0.27577711],
        "data.transforms": ["RandomResizedCrop(scale=[0.05, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 128,
        "trainer.max_epochs": 10,
        "trainer.gradient_clip_val": 1.0,
    },
}


wide = partial(MLP, hidden=(64,))
LOCAL = {"loss_classes": "current"}


class Look(MagMax):
    """Keeps the weights before the first task, after the training of each task, and at the start of each fit."""

    def begin_task(self, task):
        if task.is_first:
            self.before, self.ends, self.starts = weights(self), [], []
        super().begin_task(task)
        self.starts.append(weights(self))

    def end_task(self, task):
        self.ends.append(weights(self))
        super().end_task(task)


def weights(strategy):
    return {name: value.detach().clone() for name, value in strategy.network.named_parameters()}


def learnt(tasks=3, data=None, **options):
    made = loop(
        Look(**{"backbone": plain_net, **options}),
        data=data or {"scenario": ClassIncremental(tasks=5)},
        options={"stop_after_task": tasks - 1},
        max_epochs=1,
    )
    made.fit()
    return made.strategy


def test_it_predicts_with_the_largest_change_of_each_weight():
    strategy = learnt()
    start, found = strategy.before, weights(strategy)
    changed = 0
    for name, value in start.items():
        vectors = torch.stack([end[name] - value for end in strategy.ends])
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))[0]
        torch.testing.assert_close(found[name], value + 0.5 * largest, rtol=1e-5, atol=1e-7)
        changed += int((vectors.abs().argmax(0) != 2).sum())
    assert changed > 20  # an earlier task has changed these more
    assert [key.partition("/")[0] for key in strategy.weights._buffers].count("task_0") == len(start)
    assert int(strategy.weights.sets) == 3


def test_rows_of_classes_keep_their_trained_values():
    strategy = learnt()
    found = weights(strategy)
    for index in range(3):
        for part in ("weight", "bias"):
            name = f"head.blocks.{index}.{part}"
            assert torch.equal(found[name], strategy.ends[index][name])


def test_a_task_begins_with_the_trained_weights_and_running_statistics_of_the_last_one():
    strategy = learnt(backbone=NormNet)
    for index in (1, 2):
        for name, value in strategy.ends[index - 1].items():
            assert torch.equal(strategy.starts[index][name], value), name
    trained = strategy.weights["trained"]
    strategy.begin_task(strategy.task)  # as the next task would
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(strategy.network.backbone.layers[2], name), trained[f"backbone.layers.2.{name}"])


def test_with_other_rules_all_vectors_are_kept_and_merged():
    strategy = learnt(rule=Average(), scale=1.0)
    for name in strategy.before:
        mean = torch.stack([end[name] for end in strategy.ends]).mean(0)
        torch.testing.assert_close(weights(strategy)[name], mean, rtol=1e-5, atol=1e-6)
    assert int(strategy.weights.sets) == 5


@pytest.mark.parametrize(("scale", "place"), [(0.0, "before"), (1.0, "ends")])
def test_with_scale_0_it_keeps_the_first_weights_and_with_1_a_single_task_its_own(scale, place):
    strategy = learnt(tasks=1, scale=scale)
    expected = strategy.before if place == "before" else strategy.ends[0]
    for name in strategy.before:
        torch.testing.assert_close(weights(strategy)[name], expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("freeze_norm", ["never", "always"])
def test_running_statistics_are_those_of_the_merged_weights_unless_they_are_frozen(freeze_norm):
    strategy = learnt(backbone=NormNet, freeze_norm=freeze_norm)
    norm, linear = strategy.network.backbone.layers[2], strategy.network.backbone.layers[1]
    if freeze_norm == "always":
        assert torch.equal(norm.running_mean, torch.zeros(16))
        return
    inputs = torch.cat([batch.images for batch in strategy.passes.batches()]).flatten(1)
    with torch.no_grad():
        expected = linear(inputs).mean(0)
    torch.testing.assert_close(norm.running_mean, expected, rtol=1e-4, atol=1e-5)


def test_tasks_without_new_classes_are_merged_too():
    strategy = learnt(data={"scenario": RotatedDomains(degrees=[0.0, 30.0, 60.0])})
    assert len(strategy.network.head.blocks) == 1
    name = next(iter(strategy.before))
    vectors = torch.stack([end[name] - strategy.before[name] for end in strategy.ends])
    torch.testing.assert_close(
        (weights(strategy)[name] - strategy.before[name]).abs(), 0.5 * vectors.abs().amax(0), rtol=1e-4, atol=1e-6
    )


def test_the_projection_of_a_fixed_head_is_merged():
    strategy = learnt(head=partial(SimplexHead, size=10))
    assert "head.projection.weight" in strategy.before
    assert not torch.equal(weights(strategy)["head.projection.weight"], strategy.ends[-1]["head.projection.weight"])


def test_it_forgets_less_than_fine_tuning():
    plain, local = (finetuning_in_tasks({"backbone": wide, **o}, 5, max_epochs=3) for o in ({}, LOCAL))
    made = in_tasks(partial(MagMax, backbone=wide), 5, max_epochs=3)
    # Measured: 62, 133 and 153 of 360.
    right = [samples_right(matrix) for matrix in (plain, local, made.matrix)]
    assert right == sorted(right)
    assert right[2] > right[0] + 50


def test_it_forgets_less_on_domains():
    settings = {"data": {"scenario": RotatedDomains(degrees=[0.0, 40.0, 80.0])}, "max_epochs": 3}
    plain, made = finetuning({"backbone": wide}, **settings), run(MagMax(backbone=wide), **settings)
    # Measured: .637 and .545; on the first domain .296 and .189.
    assert made.matrix.R_ci[-1, 0] > plain.R_ci[-1, 0] + 0.05
    assert made.matrix.R_ci[-1].mean() > plain.R_ci[-1].mean() + 0.01


def test_with_a_rule_that_keeps_all_vectors_they_are_saved():
    make = small(MagMax, rule=Ties(), backbone=partial(MLP, hidden=(8,)))
    check_strategy(make, checks=["restores", "bytes"])


def test_a_negative_scale_is_an_error():
    with pytest.raises(ValueError, match=r"MagMax: scale is -0\.5"):
        MagMax(scale=-0.5)
