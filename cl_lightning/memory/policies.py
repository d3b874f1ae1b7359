"""Policies of a replay memory: which samples a full memory keeps."""

from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_lightning.batch import Draw
from cl_lightning.checks import one_of

Group = Literal["class", "task", "both"]
_KEYS = 101  # salt that keeps the keys of a step apart from its other draws


class Policy(ABC):
    """Selection of the samples that a full memory keeps."""

    def keys(self, count: int, seen: int, draw: Draw) -> Tensor:
        """Keys of ``count`` new samples after ``seen`` earlier ones, int64 ``(count,)`` on the CPU; here uniform."""
        return Draw.of(count, draw.key, _KEYS).randint((1 << 63) - 1)  # 63 bits, so that ties do not occur

    @abstractmethod
    def priority(self, keys: Tensor, labels: Tensor, tasks: Tensor) -> Tensor:
        """Priority of each sample; a full memory keeps the samples of the highest priority.

        Args:
            keys: int64 ``(n,)``.
            labels: Columns, int64 ``(n,)``.
            tasks: Task indices, int64 ``(n,)``.

        Returns:
            int64 ``(n,)`` without ties.
        """


class Reservoir(Policy):
    """Reservoir sampling: every sample of the stream is held with equal probability, independent of its class.

    The M samples with the largest of independent uniform keys are a uniform subset without replacement (Efraimidis &
    Spirakis 2006, with equal weights). The distribution is that of algorithm R (Vitter 1985): the n-th sample has one
    of the M largest keys with probability M / n, and the sample that it replaces, the one with the smallest held key,
    is any of the held samples with equal probability. After N samples each of them is in memory with probability M / N.
    Add each sample once: samples added again in later epochs count as new ones.
    """

    def priority(self, keys: Tensor, labels: Tensor, tasks: Tensor) -> Tensor:
        return keys


class ClassBalanced(Policy):
    """Class-balanced memory: equal numbers of every class, and within a class reservoir sampling.

    Samples are ordered by (rank within the class by decreasing key, key), and the first ``size`` are kept: classes are
    filled level by level, so the numbers of classes with enough samples differ by at most one. The held samples depend
    only on the set of (key, class) seen so far, not on the order of the stream or on the batch size.
    Departs from the greedy rule of GDumb (Prabhu et al., ECCV 2020), which never replaces a sample by one of the same
    class while the number of classes is constant, and so prefers the early samples of each class.

    Args:
        by: Groups that get equal numbers: ``class``, ``task``, or ``both``, classes within tasks (for
            domain-incremental streams).
    """

    def __init__(self, by: Group = "class") -> None:
        one_of(self, get_args(Group), by=by)
        self.by = by

    def priority(self, keys: Tensor, labels: Tensor, tasks: Tensor) -> Tensor:
        level, place = rank_in_group(keys, group_ids(labels, tasks, self.by))
        return -(level * keys.shape[0] + place)


class Ring(ClassBalanced):
    """Ring buffer: the latest samples of each class (or task), first in first out, balanced as in ``ClassBalanced``."""

    def keys(self, count: int, seen: int, draw: Draw) -> Tensor:
        return torch.arange(seen, seen + count)


class HerdingPolicy(ClassBalanced):
    """Herded exemplars: the first samples of each class (or task) in the order in which they were added.

    Add the samples of a class in order of choice, as :func:`herding_per_class` returns them. When a new class is added,
    the last exemplars of the other classes are removed (iCaRL, Rebuffi et al., CVPR 2017, alg. 5).
    Departs from iCaRL: the remainder of ``size`` divided by the number of classes is used too, one sample each for the
    first classes; ``reduce_per_class(size // num_classes)`` gives the quota of the paper.
    """

    def keys(self, count: int, seen: int, draw: Draw) -> Tensor:
        return -torch.arange(seen, seen + count)


def group_ids(labels: Tensor, tasks: Tensor, by: Group) -> Tensor:
    """Group of each row, int64 ``(n,)``: the class, the task, or a number for the pair of both.

    Args:
        labels: Columns, int64 ``(n,)``.
        tasks: Task indices, int64 ``(n,)``.
        by: ``class``, ``task`` or ``both``.
    """
    return {"class": labels, "task": tasks, "both": (tasks << 32) + labels}[by]


def rank_in_group(keys: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of each row, from 0 by decreasing key, in its group and among all rows.

    For keys ``[5, 9, 7]`` and groups ``[0, 0, 1]`` the ranks are ``[1, 0, 0]`` and ``[2, 0, 1]``.

    Args:
        keys: int64 ``(n,)``.
        groups: int64 ``(n,)``, such as :func:`group_ids`.

    Returns:
        The two ranks, int64 ``(n,)`` each.
    """
    count = torch.arange(keys.shape[0], device=keys.device)
    by_key = keys.argsort(descending=True, stable=True)
    order = by_key[groups[by_key].argsort(stable=True)]
    ordered = groups[order]
    starts = F.pad(ordered[1:] != ordered[:-1], (1, 0), value=True)[: keys.shape[0]]
    level = count - torch.where(starts, count, 0).cummax(0).values
    return torch.empty_like(count).index_copy_(0, order, level), torch.empty_like(count).index_copy_(0, by_key, count)
