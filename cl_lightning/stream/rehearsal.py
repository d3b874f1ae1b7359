"""Environments that bring earlier tasks back: tasks of a stream contain samples of earlier tasks."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from cl_lightning.hashing import IntArray, hash64
from cl_lightning.stream import draws
from cl_lightning.stream.core import DatasetInfo, Stream
from cl_lightning.stream.dealing import Scenario, arrivals, remaining_classes
from cl_lightning.stream.modifiers import Modifier

_RATES = {"power": 1.0, "recency": 5.0, "exponential": 1.0}


def apportioned(weights: npt.NDArray[np.float64], total: int) -> IntArray:
    """Whole numbers in proportion to weights, with the given sum; the largest remainders are rounded up.

    Args:
        weights: At least 0 and not all 0, ``(n,)``. Of equal remainders the later ones are rounded up.
        total: Sum of the numbers.

    Returns:
        int64 ``(n,)``.
    """
    shares = weights / weights.sum() * total
    counts: IntArray = np.floor(shares + 1e-9).astype(np.int64)
    remainders = np.round(shares - counts, 9)
    latest = np.lexsort((-np.arange(len(weights)), -remainders))[: total - counts.sum()]
    counts[latest] += 1
    return counts


@dataclass(frozen=True)
class PowerLawRehearsal(Modifier):
    """An environment in which earlier tasks come back, the more rarely the older they are (arXiv:2401.10393).

    A task of n training samples gets ``fraction`` times n further training samples of earlier tasks, drawn again for
    each task, without replacement. The share of an earlier task of age a (1 for the previous task) is proportional to

        power         (a + offset)^-rate             human memory has a rate of about 1; 0 is uniform
        recency       x^(rate - 1), x = 0.1 + 0.01 p     the form of the paper, p = 0, 1, ... the place of the task
        exponential   exp(-a / rate)

    Any strategy trains on the stream; for methods with a memory the samples come in addition to it. An earlier task
    with fewer samples than its share gives all of them. Validation and test samples stay in their tasks.
    Departs from the paper: there the numbers are truncated to integers, here they add up to the budget.

    Args:
        base: Scenario to which samples of earlier tasks are added; its images have no shifts.
        fraction: Added samples relative to the number of training samples of the task, at least 0.
        law: ``power``, ``recency`` or ``exponential``.
        rate: Rate of the law, at least 0, above 0 for ``exponential``; None for 1, 5 and 1.
        offset: Added to the age by ``power``, at least 0; the other laws have none.

    Raises:
        ValueError: If tasks have shifted images, or labels are hidden or noisy already.
    """

    base: Scenario
    fraction: float = 0.1
    law: Literal["power", "recency", "exponential"] = "power"
    rate: float | None = None
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < float("inf"):
            self.fail(f"fraction must be at least 0 and finite, got {self.fraction}")
        if self.law not in _RATES:
            self.fail(f"law {self.law!r}; use {', '.join(_RATES)}")
        if self.rate is not None and not 0 <= self.rate < float("inf"):
            self.fail(f"rate must be at least 0 and finite, got {self.rate}")
        if self.rate == 0 and self.law == "exponential":
            self.fail("rate must be above 0 for the exponential law, got 0")
        if not 0 <= self.offset < float("inf"):
            self.fail(f"offset must be at least 0 and finite, got {self.offset}")
        if self.offset and self.law != "power":
            self.fail(f"offset is {self.offset}, but law is {self.law!r}; leave offset out, or use the law power")

    def shares(self, task: int) -> npt.NDArray[np.float64]:
        """Share of each earlier task in the samples that are added to a task, ``(task,)``; they sum to 1.

        Args:
            task: Index of the task, at least 1.
        """
        place, rate = np.arange(task, dtype=np.float64), _RATES[self.law] if self.rate is None else self.rate
        age = task - place
        if self.law == "power":
            logarithms = -rate * np.log(age + self.offset)
        elif self.law == "recency":
            logarithms = (rate - 1) * np.log(0.1 + 0.01 * place)
        else:
            logarithms = -age / rate
        weights: npt.NDArray[np.float64] = np.exp(logarithms - logarithms.max())
        weights /= weights.sum()
        return weights

    def change(self, stream: Stream, info: DatasetInfo) -> Stream:
        if any(part.size for part in (*stream.unlabelled, *stream.noisy)):
            self.fail(f"labels are hidden or noisy already; put those modifiers around {type(self).__name__}")
        if info.train_sets is not None:
            self.fail("samples have several classes, of which a task shows its own alone; use data of one class each")
        if any(stream.shifts):
            self.fail("images of the tasks are shifted, and a sample would come back with another shift; use classes")
        train = list(stream.train)
        for task in stream.tasks[1:]:
            own = stream.train[task.index]
            counts = apportioned(self.shares(task.index), int(np.floor(len(own) * self.fraction + 1e-9)))
            seed = int(hash64(stream.task_parts[task.index].seed, draws.REHEARSAL, task.index)[0])
            taken = np.concatenate([own, stream.val[task.index]])
            for earlier, count in zip(stream.train, counts.tolist(), strict=False):
                pool = np.setdiff1d(earlier, taken)
                chosen = np.argsort(info.keys(pool, seed, draws.REHEARSAL), kind="stable")[:count]
                taken = np.concatenate([taken, pool[chosen]])
            train[task.index] = np.setdiff1d(taken, stream.val[task.index])
        names = [task.name for task in stream.tasks]
        tasks, order = arrivals(
            info, remaining_classes(info, stream.tasks, train), np.array(stream.order), names, stream.shifts
        )
        return replace(stream, tasks=tasks, order=order, train=tuple(train))
