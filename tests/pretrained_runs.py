"""Runs and models for the tests of methods on pretrained backbones."""

from collections.abc import Callable
from typing import Any

import torch
from callback_runs import run
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from cl_lightning.backbones import Backbone, ImageShape
from cl_lightning.loop import TaskLoop
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.stream import ClassIncremental


class TinyViT(Backbone):
    """A transformer of timm for digits, small and not pretrained, as attribute ``model``."""

    def __init__(self, image_shape: ImageShape, depth: int = 2, **options: Any) -> None:
        super().__init__(image_shape)
        self.model = tiny_vit(depth=depth, in_chans=image_shape[0], **options)
        self.num_features = 24

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


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


def samples_right(made: TaskLoop) -> int:
    """Test samples of all tasks that are right after the last one."""
    state = made.matrix.state_dict()
    return round(float((state["R_ci"][-1] * state["totals"]).sum()))
