"""Tasks of a stream, shifts of their images, and segments of tasks. Labels are raw labels of the data set."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Literal

import numpy as np

from cl_lightning.hashing import IntArray


def _integers(values: Any, what: str) -> IntArray:
    """Read-only int64 copy of a flat sequence of integers."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{what} must be a flat array of integers, got {array.dtype} of shape {array.shape}")
    array = array.astype(np.int64)
    array.flags.writeable = False
    return array


def repeats(items: Sequence[Any]) -> list[Any]:
    """The items that occur more than once."""
    return [item for item, count in Counter(items).items() if count > 1]


@dataclass(frozen=True)
class Shift:
    """Transform of all images of a task.

    Attributes:
        kind: ``permute``: one permutation of the pixels for all images; ``rotate``: rotation of the image.
        value: Seed of the permutation in ``0 .. 2**32 - 1``, or degrees counter-clockwise.
    """

    kind: Literal["permute", "rotate"]
    value: int | float

    def __post_init__(self) -> None:
        if self.kind not in ("permute", "rotate"):
            raise ValueError(f"Shift: kind {self.kind!r}; use permute or rotate")
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or not math.isfinite(self.value):
            raise ValueError(f"Shift: value {self.value!r} of {self.kind} is not a finite number")
        if self.kind == "permute" and not (isinstance(self.value, int) and 0 <= self.value < 2**32):
            raise ValueError(f"Shift: the seed of a permutation is an integer in 0 .. 2**32 - 1, got {self.value!r}")


RequestKind = Literal["learn", "hold", "keep", "forget"]
"""What a task asks of the learner, see :class:`Task`."""


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Attributes:
        index: Position in the stream, from 0.
        name: Name of the task in tables.
        classes: Raw labels of the classes with training samples in this task, sorted by column.
        columns: Their columns in the logits.
        new_classes: Raw labels of the classes that no earlier task had.
        num_new: Number of columns that the task adds; 0 if all its classes are known.
        num_seen: Number of columns after this task.
        domain: Transform of its images, or None.
        request: What the task asks. ``learn``: its samples are learnt; ``hold``: they are learnt so that a later task
            may ask to keep or to forget them; ``keep``: held samples of earlier tasks are learnt permanently;
            ``forget``: samples of earlier tasks are forgotten. Tasks that keep or forget have no test samples.
    """

    index: int
    name: str
    classes: tuple[int, ...]
    columns: tuple[int, ...]
    new_classes: tuple[int, ...]
    num_new: int
    num_seen: int
    domain: Shift | None = None
    request: RequestKind = "learn"

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def learns(self) -> bool:
        """Whether the task brings samples to learn."""
        return self.request in ("learn", "hold")


def number_tasks(
    classes: Sequence[Sequence[int]],
    names: Sequence[str],
    shifts: Sequence[Shift | None],
    requests: Sequence[RequestKind] | None = None,
) -> tuple[tuple[Task, ...], tuple[int, ...]]:
    """Number the tasks, and assign columns to the classes in order of arrival.

    Args:
        classes: Raw labels present in each task; new labels get their columns in this order.
        names: Name of each task.
        shifts: Shift of each task.
        requests: Request of each task; None for ``learn``.

    Returns:
        The tasks, and the raw label of each column.
    """
    column: dict[int, int] = {}
    tasks: list[Task] = []
    asked: Sequence[RequestKind] = ["learn"] * len(names) if requests is None else requests
    for place, (present, name, shift, request) in enumerate(zip(classes, names, shifts, asked, strict=True)):
        new = [label for label in present if label not in column]
        for label in new:
            column[label] = len(column)
        classes_here = tuple(sorted(present, key=column.__getitem__))
        columns = tuple(column[label] for label in classes_here)
        tasks.append(Task(place, name, classes_here, columns, tuple(new), len(new), len(column), shift, request))
    return tuple(tasks), tuple(column)


@dataclass(frozen=True)
class Segment:
    """Consecutive tasks that were made at once: by the scenario when the stream was made, or by one extension.

    Attributes:
        tasks: Number of tasks, at least 1.
        seed: Seed of all random choices for these tasks.
        val_fraction: Fraction of the training samples that is held out for validation, in [0, 1).
    """

    tasks: int
    seed: int
    val_fraction: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", index(self.seed))  # a numpy integer too; the manifest takes plain numbers only
        object.__setattr__(self, "val_fraction", float(self.val_fraction))
        if self.tasks < 1:
            raise ValueError(f"Segment: tasks must be at least 1, got {self.tasks}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"Segment: val_fraction must be at least 0 and below 1, got {self.val_fraction}")
