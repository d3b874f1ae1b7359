"""Runs and models for the tests of methods on pretrained backbones."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import ImageShape
from cl_lightning.loop import TaskLoop
from cl_lightning.measures import AccuracyMatrix
from cl_lightning.models import Backbone, Timm
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.stream import ClassIncremental
from support.baselines import finetuning
from support.runs import run
from support.shared import made_once

_TINY = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
tiny_transformer = partial(Timm, name="vit_tiny_patch16_224", kwargs=_TINY)
"""Builds a transformer of timm that takes prompts."""


class TinyViT(Backbone):
    """A transformer of timm for digits, small and not pretrained, as attribute ``model``."""

    def __init__(self, image_shape: ImageShape, depth: int = 2, **options: Any) -> None:
        super().__init__(image_shape)
        self.model = tiny_vit(depth=depth, in_chans=image_shape[0], **options)
        self.num_features = 24

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


class PretrainedViT(TinyViT):
    """As ``TinyViT``, with features that were learnt on digits that are mirrored, so that no task is known to it."""

    def __init__(self, image_shape: ImageShape) -> None:
        super().__init__(image_shape)
        self.model.load_state_dict(made_once("transformer for digits", _pretrained))


def _pretrained() -> dict[str, Tensor]:
    """Learnt in some three seconds."""
    digits = load_digits()
    images = (torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 16 - 0.305) / 0.376
    labels = torch.as_tensor(digits.target)
    images, labels = torch.cat([images.transpose(2, 3), images.flip(2)]), torch.cat([labels, labels + 10])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(
            img_size=8, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=20, in_chans=1
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for rows in (rows for _ in range(8) for rows in torch.randperm(len(images)).split(64)):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    model.reset_classifier(0)
    return model.state_dict()


def tiny_vit(**options: Any) -> VisionTransformer:
    """The same at each call, with all weights drawn: those that begin at 0 or 1 would hide faults."""
    settings = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = VisionTransformer(**{**settings, **options})
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def in_tasks(make: Callable[[], ContinualStrategy], count: int, **options: Any) -> TaskLoop:
    """Learn the digits in so many tasks."""
    return run(make(), data={"scenario": ClassIncremental(tasks=count)}, **{"max_epochs": 1, **options})


def finetuning_in_tasks(strategy: Mapping[str, Any], count: int, **options: Any) -> AccuracyMatrix:
    """Accuracies of fine-tuning on the digits in so many tasks, as ``in_tasks`` learns them."""
    return finetuning(strategy, data={"scenario": ClassIncremental(tasks=count)}, **{"max_epochs": 1, **options})


def samples_right(matrix: AccuracyMatrix) -> int:
    """Test samples of all tasks that are right after the last one."""
    return round(float((matrix.R_ci[-1] * matrix.totals).sum()))
