"""Memory of a test stream, balanced over predicted classes, that prefers recent and certain samples.

The memory of RoTTA (Yuan et al., CVPR 2023, arXiv:2303.13899).

Samples arrive one after another, with a predicted class and its uncertainty u, the entropy of the prediction. With N
the size of the memory, C the number of classes and an item of age a, the number of samples that arrived since, itself
included,

    score = lambda_t / (1 + exp(-a / N)) + lambda_u u / ln C

A sample whose class has fewer than N / C items is stored if the memory has room, and otherwise competes with the items
of the largest classes; a sample of another class competes with the items of its class. The item of the highest score
leaves if this score exceeds the score of the new sample at age 0; otherwise the new sample is dropped.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cl_lightning.batch import Draw
from cl_lightning.checks import at_least
from cl_lightning.distributed import all_gather_together
from cl_lightning.memory.slots import SlotMemory


class Arrivals(NamedTuple):
    """Samples in the order in which they arrived or are stored.

    Attributes:
        labels: Predicted classes, int64 ``(n,)``.
        places: Number of samples of the stream before each of them, int64 ``(n,)``, distinct.
        uncertainties: Entropies in nats, float64 ``(n,)``.
    """

    labels: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    uncertainties: npt.NDArray[np.float64]


def category_balanced(
    samples: Arrivals,
    held: int,
    size: int,
    num_classes: int,
    *,
    time_weight: float = 1.0,
    uncertainty_weight: float = 1.0,
) -> list[int]:
    """Samples that a memory holds after new ones arrived one after another.

    Among items of equal score the one of the larger label leaves, and of one label the later one.

    Args:
        samples: The items of the memory in the order of its slots, then the new samples in order.
        held: Number of items.
        size: N, at least ``held`` and 1.
        num_classes: C, above all labels.
        time_weight: lambda_t.
        uncertainty_weight: lambda_u.

    Returns:
        The index in ``samples`` of the item in each slot, at least ``held`` and at most ``size`` of them.
    """
    labels, places, uncertainties = samples
    unsure = uncertainty_weight * uncertainties / (math.log(num_classes) if num_classes > 1 else 1.0)
    slots = np.arange(held)
    counts = np.bincount(labels[:held], minlength=num_classes)
    for new in range(held, len(labels)):
        label = labels[new]
        if counts[label] * num_classes >= size:
            rivals = np.flatnonzero(labels[slots] == label)
        elif len(slots) < size:
            slots = np.append(slots, new)
            counts[label] += 1
            continue
        else:
            rivals = np.flatnonzero(counts[labels[slots]] == counts.max())
        items = slots[rivals]
        scores = time_weight / (1 + np.exp((places[items] - places[new]) / size)) + unsure[items]
        worst = np.lexsort((places[items], labels[items], scores))[-1]
        if scores[worst] > time_weight / 2 + unsure[new]:
            counts[labels[items[worst]]] -= 1
            counts[label] += 1
            slots[rivals[worst]] = new
    found: list[int] = slots.tolist()
    return found


class CategoryBalancedMemory(SlotMemory):
    """Memory balanced over predicted classes that prefers recent and certain samples, see :func:`category_balanced`.

    :meth:`arrive` is used instead of ``add``. Labels are predicted classes, and :attr:`num_seen` counts the samples
    that arrived.

    Args:
        size: N, at least 1.
        time_weight: lambda_t, at least 0.
        uncertainty_weight: lambda_u, at least 0.

    Attributes:
        fields: ``places``, the number of samples that arrived before each item, int64, and ``uncertainties``, entropies
            in nats.
    """

    def __init__(self, size: int, *, time_weight: float = 1.0, uncertainty_weight: float = 1.0) -> None:
        at_least(self, 1, size=size)
        at_least(self, 0, time_weight=time_weight, uncertainty_weight=uncertainty_weight)
        super().__init__(size)
        self.time_weight, self.uncertainty_weight = time_weight, uncertainty_weight

    @torch.no_grad()
    def arrive(
        self, images: Tensor, labels: Tensor, tasks: Tensor, uncertainties: Tensor, draw: Draw, num_classes: int
    ) -> None:
        """Store or drop samples one after another; every process must call this.

        A decision depends on the decision before, so they are made on the host, in one exchange with the device.

        Args:
            images: Raw images, uint8 ``(n, C, H, W)``: this process's rows of the global batch.
            labels: Predicted classes, int64 ``(n,)``, from 0 to ``num_classes - 1``.
            tasks: Task indices, int64 ``(n,)``.
            uncertainties: Entropies of the predictions in nats, ``(n,)``.
            draw: Random numbers of the step; only its key is used.
            num_classes: Number of classes that can be predicted.
        """
        images, labels, tasks, uncertainties = all_gather_together([images, labels, tasks, uncertainties])
        seen, held, count = int(self.num_seen), len(self), len(labels)
        columns = [labels.double(), torch.arange(seen, seen + count).to(labels.device).double(), uncertainties.double()]
        if held:
            old = (self.labels, self.fields["places"], self.fields["uncertainties"])
            columns = [torch.cat([mine.double(), new]) for mine, new in zip(old, columns, strict=True)]
        of_class, places, unsure = torch.stack(columns).cpu().numpy()
        slots = category_balanced(
            Arrivals(of_class.astype(np.int64), places.astype(np.int64), unsure),
            held,
            self.size,
            num_classes,
            time_weight=self.time_weight,
            uncertainty_weight=self.uncertainty_weight,
        )
        rows = {"images": images, "labels": labels, "tasks": tasks, "uncertainties": uncertainties}
        rows["places"] = columns[1][held:].long()
        replaced = [slot for slot in range(held) if slots[slot] >= held]
        if replaced:
            chosen = torch.tensor([slots[slot] - held for slot in replaced]).to(labels.device)
            into = torch.tensor(replaced).to(labels.device)
            new = {name: value[chosen] for name, value in rows.items()}
            self.exchange(into, torch.ones_like(into, dtype=torch.bool), draw=draw, **new)
        if len(slots) > held:
            chosen = torch.tensor(slots[held:]).to(labels.device) - held
            self.add(draw=draw, gathered=True, **{name: value[chosen] for name, value in rows.items()})
        self.num_seen.fill_(seen + count)

    def num_bytes(self) -> int:
        """Size of the items in bytes, and of the counter of arrivals, from which ages follow."""
        return super().num_bytes() + self.num_seen.nbytes

    def clear(self) -> None:
        """Drop all items; the next sample is the first one of the stream."""
        self.keep(torch.zeros(0, dtype=torch.int64, device=self.labels.device))
        self.num_seen.zero_()
