"""Classes of unequal size: weights of their losses, and an order of samples in which they are equally frequent."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cl_lightning.hashing import IntArray
from cl_lightning.memory import random_per_class
from cl_lightning.stream import Stream

ClassWeights = Literal["balanced"] | dict[str, float] | list[float]


def check_class_weights(owner: str, weights: ClassWeights | None) -> None:
    """Check the values of class weights; their number and names depend on the data, see :func:`class_weight_table`.

    Raises:
        ValueError: If a weight is negative or not finite, all are 0, or the string is not ``balanced``.
    """
    if weights is None:
        return
    if isinstance(weights, str):
        if weights != "balanced":
            raise ValueError(f"{owner}: class_weights is {weights!r}; use 'balanced', a list, a dict by class, or null")
        return
    named = dict(weights) if isinstance(weights, Mapping) else dict(enumerate(weights))
    for name, value in named.items():
        if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
            raise ValueError(f"{owner}: class_weights of {name!r} is {value!r}; give a finite number of at least 0")
    if not any(named.values()):
        raise ValueError(f"{owner}: class_weights has no weight above 0; give at least one")


def class_weight_table(
    owner: str, weights: ClassWeights, stream: Stream, labels: IntArray, class_names: Sequence[str]
) -> Tensor:
    """Weight of the loss of each class in each task.

    ``balanced`` weighs class c of task t by the inverse of its number of labelled training samples n_tc, such that the
    mean over the N_t labelled training samples of the task, with C_t classes, is 1:

        w_tc = N_t / (C_t n_tc)

    Weights of a list or dict hold in all tasks and are used as they are.

    Args:
        owner: Object to name in errors.
        weights: ``balanced``; one number per class, in the order of ``class_names``; or numbers by the names of
            classes, 1 for others.
        stream: The stream.
        labels: Raw labels of the training samples, int64 ``(N,)``.
        class_names: Name of each raw label.

    Returns:
        float32 ``(tasks, columns)``; 1 for a class without labelled training samples in a task.

    Raises:
        ValueError: If a list has another length, or a dict names an unknown class.
    """
    table = torch.ones(len(stream.tasks), len(stream.order), dtype=torch.float64)
    if isinstance(weights, str):
        for task, (indices, hidden) in enumerate(zip(stream.train, stream.unlabelled, strict=True)):
            columns = stream.columns_of(labels[np.setdiff1d(indices, hidden)])
            counts = torch.bincount(torch.as_tensor(columns), minlength=table.shape[1]).double()
            present = counts > 0
            table[task, present] = counts.sum() / (present.sum() * counts[present])
        return table.float()
    if isinstance(weights, Mapping):
        by_name = {str(name): float(value) for name, value in weights.items()}
        if unknown := [name for name in by_name if name not in class_names]:
            shown = ", ".join(class_names[:8]) + (", ..." if len(class_names) > 8 else "")
            raise ValueError(f"{owner}: class_weights names {unknown[0]!r}, which is no class; classes are {shown}")
        weights = [by_name.get(name, 1.0) for name in class_names]
    if len(weights) != len(class_names):
        raise ValueError(f"{owner}: class_weights has {len(weights)} numbers; give one per class, {len(class_names)}")
    table[:] = torch.tensor(weights, dtype=torch.float64)[list(stream.order)]
    return table.float()


def balanced_order(columns: Tensor, generator: torch.Generator) -> Tensor:
    """A random order of one epoch in which all classes are equally frequent.

    The epoch keeps its length: samples of small classes occur several times, and samples of large classes not at all.
    Frequencies of classes differ by at most 1, and so do the frequencies of the samples of one class. Where all classes
    have the same size, each sample occurs once. Samples without a label (-1) occur once each.

    Args:
        columns: Column of each sample, int64 ``(n,)``, on the CPU.
        generator: Source of the random numbers.

    Returns:
        Indices into ``columns``, int64 ``(n,)``.
    """
    free = (columns < 0).nonzero().squeeze(1)
    present = torch.unique(columns[columns >= 0])  # type: ignore[no-untyped-call]
    if not len(present):
        return torch.randperm(len(columns), generator=generator)
    share, rest = divmod(len(columns) - len(free), len(present))
    more = set(torch.randperm(len(present), generator=generator)[:rest].tolist())
    chosen = [free]
    for place, column in enumerate(present.tolist()):
        members = (columns == column).nonzero().squeeze(1)
        count = share + (place in more)
        rounds = [torch.randperm(len(members), generator=generator) for _ in range(-(-count // len(members)))]
        chosen += [members[torch.cat(rounds)[:count]]] if rounds else []
    order = torch.cat(chosen)
    return order[torch.randperm(len(order), generator=generator)]


def balanced_subset(labels: Tensor, key: int) -> Tensor:
    """Choose equally many random samples of each class that occurs: as many as the smallest of them has.

    Args:
        labels: Columns of the samples, int64 ``(n,)``; samples without a label (-1) are never chosen.
        key: Key of the random numbers.

    Returns:
        Mask of the chosen samples, bool ``(n,)``.
    """
    labelled = labels >= 0
    if not labelled.any():
        return labelled
    counts = labels[labelled].bincount()
    return random_per_class(labels, counts[counts > 0].min(), key)


def left_out(labels: Tensor, share: float, key: int) -> Tensor:
    """Random samples of each class that are left out: ``floor(share * n_c)`` of the n_c samples of class c.

    Args:
        labels: Labels of the samples, int64 ``(n,)``, at least 0.
        share: In [0, 1).
        key: Key of the random numbers.

    Returns:
        Mask of the samples, bool ``(n,)``.
    """
    return random_per_class(labels, (share * labels.bincount().double() + 1e-9).floor().long()[labels], key)
