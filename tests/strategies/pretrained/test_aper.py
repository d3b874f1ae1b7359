from functools import partial

import pytest
import torch
from support.pretrained import PretrainedViT, TinyViT, in_tasks, samples_right
from support.runs import loop
from torch.nn import functional as F

from cl_lightning.models import SSF, VPT, Adapter, FiLM, LoRA
from cl_lightning.strategies.pretrained.aper import APER
from cl_lightning.strategies.pretrained.simplecil import SimpleCIL
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, check_strategy, small

# SSF: the small net has no transformer blocks for an adapter.
SUBJECTS = {
    "APER": Subject(
        small(APER, peft=SSF),
        first_task_is_finetuning=False,
        reason="the head is fitted in closed form when the session ends",
    ),
}

PUBLISHED = {
    "aper": {
        "source": "zhoudw-zdw/RevisitingCIL: exps of CIFAR-100, adapter",
        "backbone": "Timm(name=vit_base_patch16_224.augreg_in21k, pretrained=True)",
        "peft": "Adapter(bottleneck=64, dropout=0.1, place=parallel, scale=0.1)",
        "session_epochs": 20,
        "optimizer": "SGD(lr=0.01, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase",
        "data.resize": 256,
        "data.center_crop": 224,
        "data.interpolation": "bicubic",
        "data.mean": [0],
        "data.std": [1],
        "data.transforms": ["RandomResizedCrop(scale=[0.05, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=20)",
        "data.batch_size": 48,
    },
    "aper_finetune": {
        "source": "the same, fine-tuning",
        "backbone": "Timm(name=vit_base_patch16_224.augreg_in21k, pretrained=True)",
        "peft": "WholeModel",
        "session_epochs": 5,
        "optimizer": "SGD(lr=0.01, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase",
        "data.resize": 256,
        "data.center_crop": 224,
        "data.interpolation": "bicubic",
        "data.mean": [0],
        "data.std": [1],
        "data.transforms": ["RandomResizedCrop(scale=[0.05, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=20)",
        "data.batch_size": 128,
    },
    "aper_ssf": {
        "source": "the same, SSF",
        "backbone": "Timm(name=vit_base_patch16_224.augreg_in21k, pretrained=True)",
        "peft": "SSF",
        "session_epochs": 20,
        "optimizer": "SGD(lr=0.01, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase",
        "data.resize": 256,
        "data.center_crop": 224,
        "data.interpolation": "bicubic",
        "data.mean": [0],
        "data.std": [1],
        "data.transforms": ["RandomResizedCrop(scale=[0.05, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=20)",
        "data.batch_size": 48,
    },
    "aper_vpt": {
        "source": "the same, deep VPT",
        "backbone": "Timm(name=vit_base_patch16_224.augreg_in21k, pretrained=True)",
        "peft": "VPT(deep=True, length=5)",
        "session_epochs": 5,
        "optimizer": "SGD(lr=0.05, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase",
        "data.resize": 256,
        "data.center_crop": 224,
        "data.interpolation": "bicubic",
        "data.mean": [0],
        "data.std": [1],
        "data.transforms": ["RandomResizedCrop(scale=[0.05, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=20)",
        "data.batch_size": 16,
    },
    "aper_vpt_shallow": {
        "source": "the same, shallow VPT",
        "backbone": "Timm(name=vit_base_patch16_224.augreg_in21k, pretrained=True)",
        "peft": "VPT(deep=False, length=5)",
        "session_epochs": 20,
        "optimizer": "SGD(lr=0.01, momentum=0.9, weight_decay=0.0005)",
        "scheduler": "CosineOverPhase",
        "data.resize": 256,
        "data.center_crop": 224,
        "data.interpolation": "bicubic",
        "data.mean": [0],
        "data.std": [1],
        "data.transforms": ["RandomResizedCrop(scale=[0.05, 1.0], size=224)", "RandomHorizontalFlip()"],
        "data.scenario": "ClassIncremental(class_order=1993, tasks=20)",
        "data.batch_size": 48,
    },
}

still = partial(torch.optim.SGD, lr=0.0)
sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


@pytest.mark.parametrize("peft", [Adapter, LoRA, FiLM])
def test_before_anything_is_learnt_it_is_simplecil(peft):
    plain = in_tasks(partial(SimpleCIL, backbone=TinyViT), 5)
    made = in_tasks(partial(APER, backbone=TinyViT, peft=peft, optimizer=still), 5)
    assert samples_right(made.matrix) == samples_right(plain.matrix)
    torch.testing.assert_close(made.matrix.R_ci, plain.matrix.R_ci, equal_nan=True)
    means = plain.strategy.prototypes.means
    torch.testing.assert_close(made.strategy.prototypes.means, torch.cat([means, means], dim=1))


@pytest.mark.parametrize("peft", [Adapter, partial(VPT, deep=False), VPT, SSF])
def test_scores_are_cosines_of_both_features_side_by_side_and_old_means_stay(peft):
    made = loop(
        APER(backbone=TinyViT, peft=peft, optimizer=sgd),
        data={"scenario": ClassIncremental(tasks=5)},
        options={"stop_after_task": 0},
        max_epochs=1,
    )
    made.fit()
    strategy = made.strategy.eval()
    old = strategy.prototypes.means.clone()
    for task in made.stream.tasks[1:]:
        made._run_task(task, None)
    assert torch.equal(strategy.prototypes.means[: len(old)], old)
    images = torch.randn(7, 1, 8, 8)
    with torch.no_grad():
        plain = TinyViT((1, 8, 8)).eval()(images)
        tuned = strategy.network.backbone.base(images)
        assert not torch.allclose(plain, tuned)
        both = torch.cat([plain, tuned], dim=1)
        expected = F.cosine_similarity(both[:, None], strategy.prototypes.means, dim=2)
        torch.testing.assert_close(strategy.predict(images), expected, rtol=1e-4, atol=1e-5)


def test_shallow_prompts_are_trained_before_the_first_block_alone():
    strategy = APER(backbone=TinyViT, peft=partial(VPT, deep=False, length=3), optimizer=sgd)
    made = loop(strategy, data={"scenario": ClassIncremental(tasks=5)}, options={"stop_after_task": 0}, max_epochs=1)
    made.fit()
    adapted = made.strategy.network.backbone
    (tokens,) = adapted.adapted_parameters()
    assert tokens.shape == (3, 24)
    assert bool((tokens != 0).any(dim=1).all())
    model, images = adapted.base.model, torch.randn(4, 1, 8, 8)
    with torch.no_grad(), adapted.peft.disabled():
        sequence = model._pos_embed(model.patch_embed(images))
        count = sequence.shape[1]
        sequence = torch.cat([sequence, tokens.expand(4, -1, -1)], dim=1)
        for block in model.blocks:
            sequence = block(sequence)
        expected = model.norm(sequence[:, :count])[:, 0]
    with torch.no_grad():
        torch.testing.assert_close(adapted(images)[:, 24:], expected, rtol=1e-4, atol=1e-5)


def test_features_with_shallow_prompts_help_next_to_pretrained_ones_and_not_alone():
    options = {"backbone": PretrainedViT, "peft": partial(VPT, deep=False), "optimizer": sgd}
    plain = in_tasks(partial(SimpleCIL, backbone=PretrainedViT), 2)
    made = in_tasks(partial(APER, **options), 2, max_epochs=4)
    alone = in_tasks(partial(APER, **options, concatenate=False), 2, max_epochs=4)
    # Measured: 236, 267 and 269 of 360. As in the paper's tables, shallow prompts gain little over class means.
    assert samples_right(alone.matrix) + 15 < samples_right(plain.matrix) <= samples_right(made.matrix)


def test_a_transformer_with_an_adapter_passes_the_suite():
    make = small(APER, backbone=TinyViT, peft=partial(Adapter, dropout=0.0))
    check_strategy(make, checks=["trains", "resume", "restores", "options", "data", "bytes"])
