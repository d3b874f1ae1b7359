"""Targets of samples that are not one class: several labels, a number, a class for each pixel."""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from cl_lightning.batch import Draw
from cl_lightning.checks import one_of
from cl_lightning.data.transforms import Context, Transform
from cl_lightning.hashing import BoolArray, IntArray

TARGETS = "targets"
"""Key in ``Batch.extra`` of the targets of the samples; absent where the target is the class in ``Batch.labels``."""
TargetKind = Literal["class", "labels", "number", "pixels"]
"""What the target of a sample is: its class, several labels at once, a number, or a class for each pixel."""
TARGET_KINDS: tuple[str, ...] = get_args(TargetKind)
IGNORED = 255
"""Pixel without an annotation: it counts neither in losses nor in scores."""
UNKNOWN = -1
"""Label of which it is not known whether the sample has it."""


class Targets:
    """Targets of all samples of a source.

    Args:
        kind: ``labels``: bool or 0/1 ``(N, C)``, at least one label in each row; ``number``: finite numbers ``(N,)``;
            ``pixels``: integers ``(N, H, W)``, raw classes below C, or 255 for pixels without annotation.
        values: The targets.
        classes: C, the number of classes; ignored for numbers.
        name: Name of the data in errors.

    Attributes:
        values: bool ``(N, C)``, float32 ``(N,)`` or uint8 ``(N, H, W)``.
        sets: Classes of each sample, bool ``(N, C)``; None for numbers.

    Raises:
        ValueError: If the values have another shape, type or range.
    """

    def __init__(self, kind: TargetKind, values: Tensor | np.ndarray, classes: int, name: str = "data") -> None:
        one_of(self, TARGET_KINDS[1:], kind=kind)
        self.kind, self.classes = kind, classes
        array = values.numpy() if isinstance(values, Tensor) else np.asarray(values)
        self.values = torch.from_numpy(
            np.ascontiguousarray({"labels": _sets, "number": _numbers, "pixels": _pixels}[kind](array, classes, name))
        )
        self.sets: BoolArray | None = None
        if kind == "labels":
            self.sets = self.values.numpy()
        elif kind == "pixels":
            self.sets = classes_of_pixels(self.values, classes)

    def __len__(self) -> int:
        return len(self.values)

    def select(self, rows: IntArray) -> "Targets":
        """The targets of some samples, by their indices, int64 ``(n,)``."""
        return Targets(self.kind, self.values[torch.from_numpy(rows)], self.classes)

    def labels(self) -> IntArray:
        """A label for each sample, int64 ``(N,)``: its first class after the background (class 0 of pixels), if any."""
        if self.sets is None:
            return np.zeros(len(self), np.int64)
        sets = self.sets.copy()
        if self.kind == "pixels":
            sets[:, 0] &= ~sets[:, 1:].any(axis=1)
        first: IntArray = sets.argmax(axis=1).astype(np.int64)
        return first

    def digest(self, indices: np.ndarray) -> bytes:
        """Hash of the targets of the given samples."""
        rows = self.values[torch.tensor(indices, dtype=torch.int64)]
        return hashlib.blake2b(rows.numpy().tobytes(), digest_size=16).digest()


class TargetTable:
    """Targets of samples as a strategy sees them: classes as columns, and in training the classes of the task alone.

    Args:
        targets: Targets of all samples.
        order: Raw label of each column.
        task_columns: Columns of each task, bool ``(T, columns)``, to hide the classes of other tasks; None to hide
            none, for evaluations.
        scale: Mean and standard deviation by which numbers are standardised.
    """

    def __init__(
        self,
        targets: Targets,
        order: Sequence[int],
        task_columns: Tensor | None,
        scale: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.targets, self.task_columns = targets, task_columns
        self.mean, self.std = scale
        self.order = torch.tensor(list(order), dtype=torch.int64)
        self.column = torch.zeros(256, dtype=torch.uint8)
        self.column[IGNORED] = IGNORED
        if targets.kind == "pixels":
            self.column[self.order] = torch.arange(len(self.order), dtype=torch.uint8)

    def __call__(self, indices: Tensor, tasks: Tensor) -> Tensor:
        """Targets of samples.

        Args:
            indices: Indices into the data set, int64 ``(B,)``.
            tasks: Task of each sample, int64 ``(B,)``.

        Returns:
            ``labels``: int8 ``(B, columns)``, 1, 0, or -1 for a class of another task; ``number``: float32 ``(B,)``,
            standardised; ``pixels``: uint8 ``(B, H, W)``, columns, 0 for a class of another task, 255 for pixels
            without annotation.
        """
        rows = self.targets.values[indices]
        if self.targets.kind == "number":
            return (rows - self.mean) / self.std
        if self.targets.kind == "labels":
            marks = rows[:, self.order].to(torch.int8)
            return marks if self.task_columns is None else marks.where(self.task_columns[tasks], UNKNOWN)
        columns = self.column[rows.long()]
        if self.task_columns is None:
            return columns
        shown = torch.ones(len(self.task_columns), 256, dtype=torch.bool)
        shown[:, : self.task_columns.shape[1]] = self.task_columns
        return columns.where(shown[tasks[:, None, None], columns.long()], 0)


def with_masks(
    transform: Transform, images: Tensor, masks: Tensor, draw: Draw, context: Context
) -> tuple[Tensor, Tensor]:
    """Augment images and their masks together, by a transform that only moves pixels.

    Pixels that come from outside the image are not annotated.

    Args:
        transform: The transform.
        images: uint8 ``(B, C, H, W)``.
        masks: uint8 ``(B, H, W)``.
        draw, context: See :class:`Transform`.
    """
    both = torch.cat([images, (IGNORED - masks)[:, None]], dim=1)  # 0, the value outside, becomes 255
    both = transform(both, draw, context)
    return both[:, :-1], IGNORED - both[:, -1]


def targets_of(source: Any) -> Targets | None:
    """Targets of a source of samples; None where the target is the class."""
    found: Targets | None = getattr(source, "targets", None)
    return found


def check_targets(targets: Targets | None, labels: IntArray, image_shape: Sequence[int], name: str) -> Targets | None:
    """Check that targets are there for each sample of a source, and masks have the size of the images.

    Raises:
        ValueError: If they do not fit.
    """
    if targets is None:
        return None
    if len(targets) != len(labels):
        raise ValueError(f"{name}: {len(targets)} targets for {len(labels)} samples; give one for each")
    if targets.kind == "pixels" and tuple(targets.values.shape[1:]) != tuple(image_shape[1:]):
        sizes = f"{tuple(targets.values.shape[1:])}, images {tuple(image_shape[1:])}"
        raise ValueError(f"{name}: masks have the size {sizes}; give both one size")
    return targets


def classes_of_pixels(values: Tensor, classes: int) -> BoolArray:
    """Classes of each mask, bool ``(N, C)``, of masks uint8 ``(N, H, W)``."""
    found = torch.zeros(len(values), 256, dtype=torch.bool)
    for label in range(classes):
        found[:, label] = (values == label).flatten(1).any(dim=1)
    return found[:, :classes].numpy()


def _sets(values: np.ndarray, classes: int, name: str) -> np.ndarray:
    if values.ndim != 2 or values.shape[1] != classes or values.dtype.kind not in "bifu":
        raise ValueError(
            f"{name}: labels are {values.dtype} of shape {values.shape}; give 0 and 1 of shape (N, {classes}), a "
            "column for each class"
        )
    if not np.isin(values, (0, 1)).all():
        row = int(np.flatnonzero(~np.isin(values, (0, 1)).all(axis=1))[0])
        raise ValueError(f"{name}: the labels of sample {row} are not 0 and 1 alone")
    sets = values.astype(bool)
    if (empty := np.flatnonzero(~sets.any(axis=1))).size:
        raise ValueError(f"{name}: sample {empty[0]} has no label; leave such samples out, or give them a class")
    return sets


def _numbers(values: np.ndarray, classes: int, name: str) -> np.ndarray:
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or values.dtype.kind not in "biuf":
        raise ValueError(
            f"{name}: targets are {values.dtype} of shape {values.shape}; give one number per sample, (N,)"
        )
    if (wrong := np.flatnonzero(~np.isfinite(values))).size:
        raise ValueError(f"{name}: the target of sample {wrong[0]} is {values[wrong[0]]}; remove such samples")
    return values.astype(np.float32)


def _pixels(values: np.ndarray, classes: int, name: str) -> np.ndarray:
    if values.ndim != 3 or values.dtype.kind not in "biu":
        raise ValueError(f"{name}: masks are {values.dtype} of shape {values.shape}; give integers (N, H, W)")
    if classes > IGNORED:
        raise ValueError(f"{name}: masks of {classes} classes; at most {IGNORED} are possible")
    wrong = (values < 0) | ((values >= classes) & (values != IGNORED))
    if wrong.any():
        row = int(np.flatnonzero(wrong.any(axis=(1, 2)))[0])
        value = values[row][wrong[row]][0]
        raise ValueError(
            f"{name}: the mask of sample {row} has the class {value}; allowed are 0 .. {classes - 1}, and {IGNORED} "
            "for pixels without annotation"
        )
    if (empty := np.flatnonzero((values == IGNORED).all(axis=(1, 2)))).size:
        raise ValueError(f"{name}: the mask of sample {empty[0]} has no annotated pixel; leave such samples out")
    return values.astype(np.uint8)
