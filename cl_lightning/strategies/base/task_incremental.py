"""Bases of task-incremental methods, whose network has parts that belong to one task."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cl_lightning.models import TaskHead, batch_norms
from cl_lightning.strategies.base.strategy import ContinualStrategy, HeadFactory, LossClasses
from cl_lightning.stream import Task

BY_TASK = ("class-incremental", "domain-incremental")
"""Streams of methods with a head for each task: their classes may be new or not."""


class TaskIncremental(ContinualStrategy):
    """A method whose network differs from task to task, so that the task of an image must be known to predict it.

    A subclass states ``task_ids="needed"`` in its traits and implements :meth:`predict_task`. The loss is over the
    classes of the task, and the head has a block for each task of which only the current one is trained, also on
    streams whose later tasks have no new classes (``scenarios=BY_TASK``).

    Args:
        loss_classes: Classes of the classification loss, see the base class.
        head: Builds the classifier; None for ``TaskHead``. Any other head has a block for each task with new classes.
        kwargs: Options of the base class.
    """

    def __init__(
        self, *, loss_classes: LossClasses = "current", head: HeadFactory | None = None, **kwargs: Any
    ) -> None:
        super().__init__(loss_classes=loss_classes, head=head or TaskHead, **kwargs)

    @property
    def task_head(self) -> TaskHead | None:
        """The head, if it has rows for each task."""
        head = self.network.head
        return head if isinstance(head, TaskHead) else None

    def begin_task(self, task: Task) -> None:
        if self.task_head is None:
            super().begin_task(task)
        else:
            self.task_head.add_task(task.columns, task.num_seen)

    def trainable(self) -> Iterable[nn.Parameter]:
        head = self.task_head
        if head is None or not head.has_shared_classes:
            return super().trainable()
        return chain(self.network.backbone.parameters(), head.blocks[-1].parameters())

    def predict_task(self, images: Tensor, task: int) -> Tensor:
        """Scores ``(B, classes seen)`` of images ``(B, C, H, W)`` by the network of a task.

        Args:
            images: Finished images.
            task: Index of their task, from 0 to the current task.
        """
        raise NotImplementedError

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        if tasks is None:
            raise ValueError(f"{type(self).__name__}: predictions need the task of each image; give tasks")
        return by_task(images, tasks, self._predict_routed)

    def _predict_routed(self, images: Tensor, task: int) -> Tensor:
        with nullcontext() if self.task_head is None else routed(self.task_head, task):
            return self.predict_task(images, task)


class SharesWeights(TaskIncremental):
    """A task-incremental method that divides the matrices and kernels of the backbone among the tasks.

    All other parameters of the backbone (biases, batch normalisation) are trained in the first task only and frozen
    afterwards, running statistics included. A subclass decides which weights a task trains and predicts with.
    """

    def weights(self) -> dict[str, nn.Parameter]:
        """Matrices and kernels of the backbone, by their names in it."""
        return {name: p for name, p in self.network.backbone.named_parameters() if p.dim() > 1}

    def frozen(self) -> list[nn.Module]:
        later = [] if self.task.is_first else list(batch_norms(self.network.backbone))
        return [*super().frozen(), *later]

    def trainable(self) -> list[nn.Parameter]:
        chosen = list(super().trainable())
        if self.task.is_first:
            return chosen
        once = {id(parameter) for parameter in self.network.backbone.parameters() if parameter.dim() == 1}
        return [parameter for parameter in chosen if id(parameter) not in once]


def by_task(images: Tensor, tasks: Tensor, predict: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Scores of images of several tasks, in the order of the images; one call of ``predict`` for each task.

    Args:
        images: ``(B, C, H, W)``, with B at least 1.
        tasks: Task of each image, int64 ``(B,)``.
        predict: Scores ``(n, columns)`` of images ``(n, C, H, W)`` of one task.
    """
    parts, rows = [], []
    for task in torch.unique(tasks).tolist():
        (chosen,) = (tasks == task).nonzero(as_tuple=True)
        parts.append(predict(images[chosen], task))
        rows.append(chosen)
    return torch.cat(parts)[torch.cat(rows).argsort()]


class HasTask(Protocol):
    """A network or a head whose parts differ between tasks.

    Attributes:
        task: Index of the task whose parts are used; None, in a head, for the newest task.
    """

    task: Any


@contextmanager
def routed(network: HasTask, task: int) -> Iterator[None]:
    """Within this context, a network uses the parts of a task; afterwards the parts of the task that it used before."""
    present, network.task = network.task, task
    try:
        yield
    finally:
        network.task = present
