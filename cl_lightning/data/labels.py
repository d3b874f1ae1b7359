"""Labels of users' data: what they mean, and their numbers from 0."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from cl_lightning.data.images import _reason

_MOST_CLASSES = 2**20  # limit without class names: a single label of 10^12 would create 10^12 classes


def names_in(dataset: Any, name: str) -> list[str] | None:
    """Class names from the attribute ``classes`` of a user's data set; None without it, or if it is a method.

    Raises:
        ValueError: If the attribute is not iterable.
    """
    classes = getattr(dataset, "classes", None)
    if classes is None or callable(classes):
        return None
    if not isinstance(classes, Iterable):
        raise ValueError(f"{name}: the attribute `classes` is a {type(classes).__name__}; make it a list of names")
    return [str(item) for item in classes]


def check_labels(
    labels: Tensor | np.ndarray | Sequence[int], count: int, class_names: Sequence[str] | None, name: str
) -> np.ndarray:
    """Labels as int64, after checks of their number and range.

    Raises:
        ValueError: If there are not ``count`` integer labels, or one is outside ``0 .. number of classes - 1``.
    """
    try:
        array = np.asarray(labels)
    except (TypeError, ValueError, RuntimeError) as error:  # lists of unequal length, bfloat16, tensors with a gradient
        raise ValueError(
            f"{name}: labels are no array of numbers ({_reason(error)}); give {count} integers, one per image"
        ) from error
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: labels are {array.dtype} of shape {array.shape}; give {count} integers, one per image"
        )
    limit = len(class_names) if class_names is not None else _MOST_CLASSES
    wrong = (array < 0) | (array >= limit)
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        why = f"as there are {limit} class names" if class_names is not None else "where classes have no names"
        allowed = f"0 .. {limit - 1}, {why}" if limit else "limited to class names, of which there are none"
        raise ValueError(f"{name}: label {array[first]} of sample {first} is outside the range; labels are {allowed}")
    return array.astype(np.int64)
