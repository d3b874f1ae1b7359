"""Base of the methods that learn features which stay comparable over the tasks (CL2R, HOC)."""

from typing import Any

import torch
from torch import Tensor

from cl_lightning.batch import join, mix
from cl_lightning.checks import at_least, one_of
from cl_lightning.memory import Memory, Teacher, random_per_class
from cl_lightning.models import SimplexHead, head_as
from cl_lightning.strategy import Batch, ContinualStrategy, HeadFactory, Output, Task

_CHOICE = 0xC12  # salt of the choice of samples


class CompatibleReplay(ContinualStrategy):
    """Cross-entropy over all corners of a fixed simplex, on the batch and on a memory of random samples of each class.

    The features that are compared are the features of the head, P f(x) of ``SimplexHead``.

    Args:
        memory_per_class: Number of samples of each class in the memory, at least 0; 0 for no replay. They are chosen at
            random when a task ends.
        replay_size: Number of samples drawn per step, over all processes, at least 1; None for the size of the batch.
        head: Builds the classifier, a ``SimplexHead``; None for one with 100 corners.
        kwargs: Options of the base class.
    """

    def __init__(
        self,
        *,
        memory_per_class: int = 20,
        replay_size: int | None = None,
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(head=head or SimplexHead, **kwargs)
        at_least(self, 0, memory_per_class=memory_per_class)
        at_least(self, 1, replay_size=replay_size, optional=True)
        one_of(self, ("all",), loss_classes=self.loss_classes)
        self.memory_per_class, self.replay_size = memory_per_class, replay_size
        self.memory = Memory(0)
        self.teacher = Teacher(reference=True)

    @property
    def head(self) -> SimplexHead:
        """The head of the network.

        Raises:
            ValueError: If it is no ``SimplexHead``.
        """
        return head_as(self.network, SimplexHead, self, "whose rows do not change from task to task")

    def prepare_batch(self, batch: Batch) -> Batch:
        if not len(self.memory):
            return batch
        drawn = self.memory.sample(self.replay_size or batch.draw.total, batch.draw)
        return join({"stream": batch, "replay": self.data.augment(drawn)})

    def simplex_loss(self, features: Tensor, output: Output, batch: Batch) -> Tensor:
        """Mean cross-entropy over all corners, of embedded features ``(B, K - 1)``, in nats."""
        return self.classification_loss(output._replace(logits=self.head.all_logits(features)), batch)

    def taught(self, images: Tensor) -> Tensor:
        """Features ``(B, K - 1)`` of the network before the task, without gradient."""
        assert self.teacher.network is not None
        with torch.no_grad():
            return self.teacher.network.head.embed(self.teacher(images).features)

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.teacher.learn_from(self.network)
        held = int((self.memory.counts() > 0).sum())
        self.memory.resize(self.memory_per_class * (held + len(task.columns)))
        if not self.memory_per_class:
            return
        for batch in self.passes.batches(where=self._choose):
            self.memory.add(batch.raw, batch.labels, batch.tasks, batch.draw)
        self.memory.reduce_per_class(self.memory_per_class)

    def _choose(self, labels: Tensor, replayed: Tensor) -> Tensor:
        return random_per_class(labels, self.memory_per_class, mix(self.seed, _CHOICE, self.task.index))
