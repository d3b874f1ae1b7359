"""Labels of users' data: what they mean, and their numbers from 0."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cl_lightning.checks import reason
from cl_lightning.hashing import IntArray

RawLabels = Tensor | np.ndarray | Sequence[Any]


_MOST_CLASSES = 2**20  # limit without class names: a single label of 10^12 would create 10^12 classes


@dataclass(frozen=True)
class Classes:
    """The labels of a data set as users write them, and their names; class c is the c-th of them.

    Attributes:
        values: The labels, sorted and all different: integers, or strings.
        names: Name of each class.
    """

    values: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(
        cls, labels: RawLabels, count: int, names: Sequence[str] | None, name: str, kind: str = "class"
    ) -> "Classes":
        """The classes of training samples.

        Without names, the labels that occur are the classes, in ascending order, and their values are the names: labels
        1, 5 and 10 are the classes 0, 1 and 2, called "1", "5" and "10". With names, integers from 0 count the names,
        integers from 1 to the number of names count them from 1, and strings are names.

        Args:
            labels: Labels, see :func:`plain_labels`.
            count: Number of samples.
            names: Name of each class, or None.
            name: Name of the data in errors.
            kind: What the labels are, in errors.

        Raises:
            ValueError: If the labels cannot be understood, or do not fit the names.
        """
        array = plain_labels(labels, count, name)
        values = np.unique(array)
        if names is None:
            if values.dtype.kind == "b":
                return cls(values.astype(np.int64), tuple(str(value) for value in values.tolist()))
            return cls(values, tuple(str(value) for value in values.tolist()))
        names = tuple(str(each) for each in names)
        if values.dtype.kind == "U":
            if unknown := [value for value in values.tolist() if value not in names]:
                raise ValueError(f"{name}: the label {unknown[0]!r} is not among the {kind} names ({_some(names)})")
            return cls._sorted(names, names)
        numbers = values.astype(np.int64)
        if len(numbers) and numbers[0] >= 1 and numbers[-1] == len(names):
            return cls(np.arange(1, len(names) + 1), names)
        if len(numbers) and numbers[-1] >= len(names):
            first = int(np.flatnonzero(array >= len(names))[0])
            allowed = (
                f"0 .. {len(names) - 1}, or 1 .. {len(names)} throughout, as there are {len(names)} {kind} names"
                if names
                else f"limited to {kind} names, of which there are none"
            )
            raise ValueError(
                f"{name}: label {array[first]} of sample {first} is outside the range; labels are {allowed}; or leave "
                "the names out, and the labels are the names"
            )
        return cls(np.arange(len(names)), names)

    @classmethod
    def _sorted(cls, values: Sequence[str], names: tuple[str, ...]) -> "Classes":
        return cls(np.array(values, dtype=np.str_), names)

    def present(self, numbers: IntArray) -> "Classes":
        """The classes that occur among the classes of samples, int64 ``(N,)``, in their order."""
        kept = np.unique(numbers)
        return Classes(self.values[kept], tuple(self.names[place] for place in kept.tolist()))

    def number(self, labels: RawLabels, count: int, name: str, kind: str = "class") -> IntArray:
        """Class of each sample, int64 ``(N,)``.

        Raises:
            ValueError: If a label cannot be understood, or is none of the classes.
        """
        array = plain_labels(labels, count, name)
        if (array.dtype.kind == "U") != (self.values.dtype.kind == "U") and len(array):
            kinds = ["strings" if each.dtype.kind == "U" else "numbers" for each in (array, self.values)]
            raise ValueError(f"{name}: labels are {kinds[0]}, labels of the training samples {kinds[1]}; use one kind")
        order = np.argsort(self.values, kind="stable")
        ranks = np.searchsorted(self.values, array, sorter=order).clip(max=max(len(order) - 1, 0))
        places = order[ranks] if len(order) else np.zeros(len(array), dtype=np.int64)
        known = self.values[places] == array if len(order) else np.zeros(len(array), dtype=bool)
        if not known.all():
            first = int(np.flatnonzero(~known)[0])
            raise ValueError(
                f"{name}: label {array[first]!s} of sample {first} is no {kind} of the training samples "
                f"({_some(self.names)}); remove the sample, or add training samples"
            )
        return places.astype(np.int64)


def plain_labels(labels: RawLabels, count: int, name: str) -> np.ndarray:
    """One label per sample, as integers, booleans or strings, ``(N,)``.

    Understood are integers of any type, whole numbers as floating point, booleans, strings (also bytes), columns
    ``(N, 1)`` of these, and one-hot rows ``(N, C)`` with a single 1 among zeros.

    Args:
        labels: An array, a tensor, or a list of numbers, strings or tensors.
        count: N.
        name: Name of the data in errors.

    Raises:
        ValueError: If the labels are something else (several labels per sample, values to be predicted, rows of
            probabilities, missing or negative labels), in one line that says what they are.
    """
    expected = f"give {count} labels, one per image, as integers or strings"
    try:
        array = _as_array(labels)
    except (TypeError, ValueError, RuntimeError) as error:  # lists of unequal length, tensors with a gradient
        raise ValueError(f"{name}: labels are no array of numbers ({reason(error)}); {expected}") from error
    if array.dtype.kind == "O":
        array = _of_one_kind(array, name, expected)
    if array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8", "backslashreplace")
    if array.dtype.kind not in "iubfU":
        raise ValueError(f"{name}: labels are {array.dtype} of shape {array.shape}; {expected}")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim == 2 and len(array) == count and array.dtype.kind in "iubf":
        return _from_rows(array, name)
    if array.shape != (count,):
        raise ValueError(f"{name}: labels are {array.dtype} of shape {array.shape}; {expected}")
    if array.dtype.kind == "f":
        if (missing := np.flatnonzero(~np.isfinite(array))).size:
            raise ValueError(f"{name}: the label of sample {missing[0]} is {array[missing[0]]}; remove such samples")
        if (broken := np.flatnonzero(array != np.round(array))).size:
            raise ValueError(
                f"{name}: the label of sample {broken[0]} is {array[broken[0]]:g}, a value to be predicted "
                "(regression); labels are classes, given as integers or strings"
            )
        array = array.astype(np.int64)
    if array.dtype.kind in "iu":
        if (beyond := np.flatnonzero(array > np.iinfo(np.int64).max)).size:
            raise ValueError(
                f"{name}: label {array[beyond[0]]} of sample {beyond[0]} is outside the range; labels are below 2**63"
            )
        array = array.astype(np.int64)
        if (negative := np.flatnonzero(array < 0)).size:
            raise ValueError(
                f"{name}: label {array[negative[0]]} of sample {negative[0]} is outside the range: negative labels "
                "usually mark samples without a label; remove such samples"
            )
    return array


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


def check_labels(labels: RawLabels, count: int, class_names: Sequence[str] | None, name: str) -> IntArray:
    """Labels that are classes already: integers from 0, int64 ``(N,)``.

    Raises:
        ValueError: If the labels cannot be understood, or one is outside ``0 .. number of classes - 1``.
    """
    array = plain_labels(labels, count, name)
    if array.dtype.kind == "U":
        raise ValueError(f"{name}: labels are strings; give {count} integers, one per image")
    numbers: IntArray = array.astype(np.int64)
    limit = _MOST_CLASSES if class_names is None else len(class_names)
    if (wrong := np.flatnonzero(numbers >= limit)).size:
        why = "where classes have no names" if class_names is None else f"as there are {limit} class names"
        allowed = f"0 .. {limit - 1}, {why}" if limit else "limited to class names, of which there are none"
        raise ValueError(
            f"{name}: label {numbers[wrong[0]]} of sample {wrong[0]} is outside the range; labels are {allowed}"
        )
    return numbers


def _as_array(labels: RawLabels) -> np.ndarray:
    if isinstance(labels, Tensor):
        return (labels.float() if labels.dtype == torch.bfloat16 else labels).detach().cpu().numpy()
    if isinstance(labels, np.ndarray):
        return labels
    if isinstance(labels, set | frozenset | dict):
        raise ValueError(f"a {type(labels).__name__} is not in the order of the images")
    rows = [_as_array(row) if isinstance(row, Tensor) else row for row in labels]
    kinds = {isinstance(row, str | bytes) for row in rows}
    if len(kinds) > 1:
        raise ValueError("strings and numbers are mixed")
    return np.asarray(rows)


def _of_one_kind(array: np.ndarray, name: str, expected: str) -> np.ndarray:
    """Strings or numbers from an array of Python objects, such as a column of a table."""
    if array.ndim == 1 and (missing := [place for place, each in enumerate(array) if each is None or each != each]):
        raise ValueError(f"{name}: the label of sample {missing[0]} is {array[missing[0]]}; remove such samples")
    if array.ndim == 1 and all(isinstance(each, str) for each in array):
        return array.astype(np.str_)
    try:
        plain = np.array(array.tolist())
    except ValueError:
        plain = array
    mixed = plain.dtype.kind == "U" and any(not isinstance(each, str) for each in array.flat)
    if plain.dtype.kind == "O" or mixed:
        kinds = sorted({type(each).__name__ for each in array.flat})
        raise ValueError(f"{name}: labels are of the types {', '.join(kinds[:5])}; {expected}")
    return plain


def _from_rows(array: np.ndarray, name: str) -> np.ndarray:
    """Classes of one-hot rows."""
    ones, others = (array == 1).sum(axis=1), ((array != 0) & (array != 1)).any(axis=1)
    wrong = np.flatnonzero(others | (ones != 1))
    if not wrong.size:
        classes: np.ndarray = array.argmax(axis=1)
        return classes
    row = int(wrong[0])
    shown = ", ".join(f"{value:g}" for value in array[row][:8].tolist()) + (", ..." if array.shape[1] > 8 else "")
    if not others.any():
        what = f"has {ones[row]} classes: several labels per sample are not supported"
    elif array.dtype.kind == "f" and np.allclose(array.sum(axis=1), 1, atol=1e-3) and array.min() >= 0:
        what = "is a row of probabilities; use the most probable class"
    else:
        what = "has several numbers per sample"
    raise ValueError(f"{name}: the label of sample {row}, ({shown}), {what}; give one class per image")


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(map(str, names[:limit])) + (", ..." if len(names) > limit else "") or "none"


class HasStream(Protocol):
    """A data module, with what :func:`training_labels` reads."""

    stream: Any

    def samples(self, *, train: bool) -> Any: ...


def training_labels(module: HasStream) -> IntArray:
    """Raw labels of the training samples as training sees them, int64 ``(N,)``: noisy where the stream makes noise.

    Whatever trains reads labels here or from batches; the labels of ``samples`` are the labels of the data.
    """
    labels: IntArray = module.stream.given_labels(module.samples(train=True).labels)
    return labels
