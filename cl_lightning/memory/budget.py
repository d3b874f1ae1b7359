"""Budgets of exemplar memories."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_lightning.checks import within


class SharedBudget:
    """A storage that exemplars and new data share, and unequal numbers of exemplars by class, on a fixed schedule.

    RMM, reinforced memory management (Liu, Schiele & Sun, NeurIPS 2021). With K exemplars and n samples of task t, the
    storage of K + n samples is divided by a rate m_t: the memory has K + m_t n exemplars while the task is trained, and
    m_t of the samples of each class of the task are left out, for training, statistics and herding. A rate c_t divides
    the exemplars of the classes of task t, M for each in the mean: classes whose mean cross-entropy is above the median
    have (1 - c_t) M, the others (1 + c_t) M, scaled to the same sum. In later tasks longer lists are cut to the common
    length. In the paper a policy that is trained by reinforcement learning on pseudo tasks finds the rates; here they
    are given.
    The memory for a task is chosen when the task before it ends: its size needs the number of samples of the next task,
    which the stream gives. After the last task it has K samples. Departs from PyCIL, which sizes the memory by the rate
    of the task that ends and cuts new data by the rate of the task that begins, so that the storage is not constant,
    and herds among samples that were left out.

    Args:
        memory_rates: m of the second task, the third, ..., in [0, 1); the last one holds for further tasks.
        class_rates: c of the first task, the second, ..., in [0, 1); the last one holds for further tasks; empty for 0.

    Raises:
        ValueError: If a rate is outside its range, or there is no memory rate.
    """

    def __init__(self, memory_rates: Sequence[float], class_rates: Sequence[float] = ()) -> None:
        if not memory_rates:
            raise ValueError("SharedBudget: memory_rates is empty; give at least one, such as [0.5]")
        for rate in memory_rates:
            within(self, "[0, 1)", memory_rates=rate)
        for rate in class_rates:
            within(self, "[0, 1)", class_rates=rate)
        self.memory_rates, self.class_rates = tuple(memory_rates), tuple(class_rates)

    def class_rate(self, task: int) -> float:
        """c of a task, numbered from 0."""
        return self.class_rates[min(task, len(self.class_rates) - 1)] if self.class_rates else 0.0

    def quotas(self, losses: Tensor, mean: int, task: int) -> Tensor:
        """Number of exemplars of each class of a task.

        Args:
            losses: Mean cross-entropy of each class, ``(C,)``.
            mean: M, mean number of exemplars of a class, at least 1.
            task: Index of the task.

        Returns:
            int64 ``(C,)`` on the CPU, with the sum C M; the remainders of rounding go to the classes with the largest
            fractions.
        """
        losses = losses.double().cpu()
        weights = torch.where(losses > losses.quantile(0.5), 1 - self.class_rate(task), 1 + self.class_rate(task))
        exact = len(losses) * mean * weights.double() / weights.double().sum()
        quotas = (exact + 1e-9).floor()
        rest = int(len(losses) * mean - quotas.sum())
        quotas[(exact - quotas).argsort(descending=True, stable=True)[:rest]] += 1
        return quotas.long()
