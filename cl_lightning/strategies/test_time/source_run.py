"""Source networks of test-time adaptation: the network of a trained run, or a model of timm with its classifier."""

import json
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.memory import restore_shapes
from cl_lightning.models import Head, Timm
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.stream import Stream

TIMM = "timm/"


class RunHead(Head):
    """The head of a trained run, with its columns in the order of this stream.

    Columns of classes that the run does not know are 0; test-time adaptation never predicts them.

    Args:
        inner: Head of the run, of any kind.
        labels: Raw label of each column of the run.
    """

    order: Tensor
    sizes: Tensor

    def __init__(self, inner: Head, labels: list[int]) -> None:
        super().__init__(inner.num_features)
        self.inner, self.labels = inner, labels
        self.register_buffer("order", torch.zeros(0, dtype=torch.int64))  # column of the run of each source class
        self.register_buffer("sizes", torch.zeros(0, dtype=torch.int64))  # columns of each task

    def grow(self, num_new: int) -> None:
        self.sizes = torch.cat([self.sizes, self.sizes.new_full((1,), num_new)]) if num_new else self.sizes

    def block_sizes(self) -> list[int]:
        return [int(size) for size in self.sizes]

    def weight(self) -> Tensor:
        return self.inner.weight()[self.order]

    def choose(self, labels: list[int]) -> None:
        """Set the raw label of each column of the source domain.

        Raises:
            ValueError: If the run has not learnt a class.
        """
        if unknown := sorted(set(labels) - set(self.labels)):
            raise ValueError(
                f"SourceRun: the run has not learnt class {unknown[0]} of the source domain; give a checkpoint of a "
                "run on these classes"
            )
        self.order = torch.tensor([self.labels.index(label) for label in labels], device=self.order.device)

    def forward(self, features: Tensor) -> Tensor:
        return self._in_order(self.inner(features))

    def classify(self, features: Tensor) -> Tensor:
        return self._in_order(self.inner.classify(features))

    def embed(self, features: Tensor) -> Tensor:
        return self.inner.embed(features)

    def _in_order(self, scores: Tensor) -> Tensor:
        unknown = self.num_columns - len(self.order)
        return nn.functional.pad(scores[:, self.order], (0, unknown)) if unknown else scores[:, self.order]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        restore_shapes(self, state_dict, prefix, ("order", "sizes"))
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)


class SourceRun:
    """The network of a trained run, as the source of test-time adaptation.

    The backbone and the head of the run are taken as they are, of any kind. The command line makes it from the path of
    a checkpoint: ``--model Tent --model.source runs/ER/0000/checkpoints/last.ckpt``. A method whose predictions do not
    come from the head of its network (such as the nearest-mean rule of iCaRL) is represented by this head.

    Args:
        strategy: Strategy of the run, not built yet.
        checkpoint: Checkpoint of the run. It is read each time a network is built, also when a run is resumed.
    """

    def __init__(self, strategy: ContinualStrategy, checkpoint: str) -> None:
        self.strategy, self.checkpoint = strategy, checkpoint
        self._labels: list[int] = []

    def backbone(self, image_shape: ImageShape) -> nn.Module:
        """Backbone of the run, for images ``(channels, height, width)``.

        Raises:
            ValueError: If the file cannot be read, or holds another network than the strategy builds.
        """
        try:
            saved = torch.load(self.checkpoint, "cpu", weights_only=True)
            manifest, state = saved["cl_lightning"]["manifest"], saved["state_dict"]
        except Exception as error:  # unpickling a file that is no pickle raises exceptions of any type
            raise ValueError(
                f"SourceRun: {self.checkpoint} is not a readable checkpoint of a run ({type(error).__name__}); give "
                "the path of a .ckpt file of a run of this package"
            ) from error
        strategy = self.strategy
        strategy.build(image_shape)
        strategy.on_load_checkpoint(saved)
        try:
            strategy.load_state_dict(state)
        except RuntimeError as error:
            first = " ".join(line.strip() for line in str(error).splitlines()[1:3])
            raise ValueError(
                f"SourceRun: {self.checkpoint} is of another network or other images ({first}); give the images the "
                "shape that the run has learnt from"
            ) from error
        stream = Stream.from_dict(json.loads(manifest), f"SourceRun: {self.checkpoint}: manifest")
        learnt = [label for task in stream.tasks for label in task.new_classes]
        self._labels = learnt[: strategy.network.head.num_columns]
        return strategy.network.backbone

    def head(self, num_features: int) -> RunHead:
        """Head of the run; call it after :meth:`backbone`."""
        return RunHead(self.strategy.network.head, self._labels)


def timm_backbone(source: str, owner: object) -> Any:
    """Factory of the backbone that a source ``timm/NAME`` names, with pretrained weights.

    Raises:
        ValueError: If the source is not of this form.
    """
    name = source.removeprefix(TIMM)
    if name == source or not name:
        raise ValueError(
            f"{type(owner).__name__}: source is {source!r}; give timm/NAME, or in Python a SourceRun; the command line "
            "also takes the path of a checkpoint of a run (.ckpt)"
        )
    return partial(Timm, name=name, pretrained=True)


def timm_classifier(source: str, num_features: int) -> tuple[Tensor, Tensor | None]:
    """Weight ``(classes, d)`` and bias ``(classes,)`` of the pretrained classifier of ``timm/NAME``.

    Raises:
        ValueError: If the model has no linear classifier on features of the backbone.
    """
    import timm  # the import takes about 1 s

    model: Any = timm.create_model(source.removeprefix(TIMM), pretrained=True)
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear) or classifier.in_features != num_features:
        raise ValueError(f"source {source}: the model has no linear classifier; give another model")
    bias = classifier.bias
    return classifier.weight.detach(), None if bias is None else bias.detach()


def needs_training_images(strategy: ContinualStrategy, option: str, remedy: str) -> None:
    """Check, for a method that trains on labelled source images, that they are training images.

    Args:
        strategy: The method.
        option: The option that asks for it, and its value, such as ``memory_size is 20``.
        remedy: The option and the value that do without.

    Raises:
        ValueError: If the source images of the stream are the clean images of its test set.
    """
    if getattr(strategy.data.module, "source_part", "train") == "test":
        raise ValueError(
            f"{type(strategy).__name__}: {option}, but the source images of this stream are the clean images of its "
            f"test set, and the method would train on their labels; give {remedy}, or a stream with source_part train"
        )
