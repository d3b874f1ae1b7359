"""Base class of methods with classifier alignment: the head is trained on features drawn from class-wise Gaussians."""

from typing import Any

import torch
from torch import Tensor

from cl_lightning.batch import ImageShape
from cl_lightning.checks import at_least
from cl_lightning.data import GaussianFeatures
from cl_lightning.memory import GaussianPrototypes
from cl_lightning.strategy import ContinualStrategy, Phase, PhaseOptions, Task


def last_tasks(task_columns: Tensor) -> Tensor:
    """The last task that contains each class, numbered from 0.

    Args:
        task_columns: Whether a task contains the class of a column, bool ``(tasks, C)``.

    Returns:
        ``(C,)``, int64.
    """
    numbers = torch.arange(1, len(task_columns) + 1, device=task_columns.device)
    return (task_columns * numbers[:, None]).amax(dim=0) - 1


class AlignedClassifier(ContinualStrategy):
    """After the phase ``train`` of each later task, a phase ``align`` trains the head on features of all classes.

    When ``train`` ends, mean and covariance of the features of each class of the task are computed, over its images,
    un-augmented, in eval mode; they replace earlier statistics of the class.

    Args:
        align_options: Options of the phase ``align``; 0 epochs to leave it out.
        align_samples: Number of features drawn per class and epoch, at least 1.
        jitter: Variance that is added in each direction, above 0.
        kwargs: Options of the base class.

    Attributes:
        gaussians: Distributions of the features of all classes.
    """

    gaussians: GaussianPrototypes

    def __init__(self, *, align_options: PhaseOptions, align_samples: int, jitter: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        at_least(self, 1, align_samples=align_samples)
        GaussianPrototypes(1, jitter=jitter)  # so that a jitter out of range raises here
        self.align_options, self.align_samples, self.jitter = align_options, align_samples, jitter

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.gaussians = GaussianPrototypes(self.network.head.num_features, jitter=self.jitter)

    def phases(self, task: Task) -> list[Phase]:
        if task.is_first or self.align_options.epochs == 0:
            return [Phase()]
        head = self.network.head
        return [Phase(), Phase("align", self.align_options, trains=head.parameters, features=self.drawn_features)]

    def drawn_features(self) -> GaussianFeatures:
        return GaussianFeatures(self.gaussians, self.align_samples)

    def end_phase(self, phase: Phase) -> None:
        if phase.features is None:
            self.eval()
            self.learn_statistics()
            self.train()

    def learn_statistics(self) -> None:
        """Compute the statistics of the classes of the task; in eval mode, at the end of the phase ``train``."""
        features, labels = self.passes.features()
        self.gaussians.update(features, labels, num_classes=self.task.num_seen, replace=True)
