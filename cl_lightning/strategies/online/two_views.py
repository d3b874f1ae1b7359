"""Replay of samples in two views, un-augmented and strongly augmented, and classification by the means of a memory.

Shared by the contrastive methods for online streams (SCR, PCR, HPCR).
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Draw, ImageShape, join
from cl_lightning.data import (
    ColorJitter,
    Compose,
    Context,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    Transform,
)
from cl_lightning.memory import class_means
from cl_lightning.models import NearestMeanHead, head_as, in_eval_mode
from cl_lightning.strategy import Batch, HeadFactory, Phase, Replay, Task

_VIEW = 0x9C2  # salt of the second view
_BATCH = 256  # samples of a pass over the memory


@cache
def strong_augmentation(height: int, width: int) -> Transform:
    """The augmentation of the second view in the papers of SCR and PCR."""
    jitter = ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8)
    crop = RandomResizedCrop((height, width), scale=(0.2, 1.0))
    return Compose([crop, RandomHorizontalFlip(), jitter, RandomGrayscale(p=0.2)])


class TwoViews(Replay):
    """Replay in which each sample of the batch and of the memory is trained in two views; a subclass defines the loss.

    A step has the parts ``stream``, ``strong stream``, ``replay`` and ``strong replay``: un-augmented and strongly
    augmented views. After the step the batch is offered to the memory, without augmentation.

    Args:
        memory_size: Number of samples in the memory, over all processes; with 0 only the stream is trained on.
        transforms: Augmentation of the second view, in order; None for the augmentation of the paper. The latter
            mirrors images: give other transforms if a mirrored image belongs to another class.
        kwargs: Options of ``Replay``.
    """

    def __init__(self, *, memory_size: int = 1000, transforms: list[Transform] | None = None, **kwargs: Any) -> None:
        super().__init__(memory_size=memory_size, **kwargs)
        if self.loss_classes != "all":
            raise ValueError(
                f"{type(self).__name__}: loss_classes is {self.loss_classes!r}, but the loss is over the classes of "
                "the step; use 'all'"
            )
        self.transforms = None if transforms is None else Compose(transforms)

    def phases(self, task: Task) -> list[Phase]:
        return [Phase(unaugmented=True)]

    def views(self, part: Batch) -> tuple[Batch, Batch]:
        """Both views of the samples: un-augmented and strongly augmented."""
        transform = self.transforms or strong_augmentation(*part.raw.shape[-2:])
        context = Context(indices=part.indices, epoch=self.epoch, seed=self.seed)
        strong = transform(part.raw, part.draw.fork(_VIEW), context)
        return part, self.data.finish(part.replace(raw=strong)).replace(raw=part.raw)

    def joined_views(self, batch: Batch, order: Sequence[str], passes: int) -> Batch:
        """The views of the batch and of samples of the memory as one batch.

        Args:
            batch: Batch of the stream, without augmentation.
            order: Names of the four parts, in the order in which they are joined.
            passes: 1, or 2 for one forward pass of the first two parts and one of the last two.
        """
        drawn = self.draw(batch)
        parts: dict[str, Batch] = {}
        for name, part in (("stream", batch), ("replay", drawn and self.data.finish(drawn))):
            if part is not None:
                parts[name], parts[f"strong {name}"] = self.views(part)
        joint = join({name: parts.get(name) for name in order})
        if passes == 1:
            return joint
        first = sum(len(parts[name]) for name in order[:2] if name in parts)
        return joint.replace(passes=(slice(0, first), slice(first, len(joint))))


class MemoryMeans(Replay):
    """Classification by the nearest mean of the features of the samples in the memory, at any time of the stream.

    The means are computed with the present network: at the end of a phase, at the start of each evaluation, and where
    predictions are made between two steps (``ContinualEvaluation``), once for each step. Each process computes all of
    them, so that nothing is exchanged. A class without samples in the memory is never predicted.

    Args:
        memory_size: M, in samples, over all processes, at least 1.
        head: Builds the classifier; None for ``NearestMeanHead``, and others are refused.
        kwargs: Options of ``Replay``.
    """

    def __init__(self, *, memory_size: int = 1000, head: HeadFactory | None = None, **kwargs: Any) -> None:
        super().__init__(memory_size=memory_size, head=head or NearestMeanHead, **kwargs)
        if memory_size < 1:
            raise ValueError(
                f"{type(self).__name__}: memory_size is {memory_size}, but predictions are by the means of the samples "
                "in the memory; give at least one sample for each class"
            )
        self._moved = True  # whether the network or the memory has changed since the means were computed

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        _ = self.mean_head  # raises for another head

    @property
    def mean_head(self) -> NearestMeanHead:
        """The head of the network."""
        return head_as(self.network, NearestMeanHead, self, "since predictions are by the means of the memory")

    def after_step(self, batch: Batch) -> None:
        super().after_step(batch)
        self._moved = True

    def end_phase(self, phase: Phase) -> None:
        super().end_phase(phase)
        self.measure_means()

    def on_validation_start(self) -> None:
        self.measure_means()

    def on_test_start(self) -> None:
        self.measure_means()

    def predict_within_task(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        if self._moved:
            self.measure_means()
        return self.predict(images)

    @torch.no_grad()
    def measure_means(self) -> None:
        """Set the rows of the head to the means of the normalised features of the un-augmented samples in the memory.

        The network is in eval mode meanwhile.
        """
        memory, found = self.memory, [torch.zeros(0, self.network.head.num_features, device=self.device)]
        with in_eval_mode(self.network):
            every = torch.arange(len(memory), device=memory.labels.device)
            for rows in torch.split(every, _BATCH) if len(memory) else ():
                batch = self.data.finish(memory.at(rows, Draw.of(len(rows), 0)))
                with self.trainer.precision_plugin.forward_context():
                    features = self.network.backbone(batch.images)
                found.append(F.normalize(features.float(), dim=1))
        labels = memory.labels.to(self.device)
        self.mean_head.fill(class_means(torch.cat(found), labels, self.network.head.num_columns, reduce=False))
        self._moved = False
