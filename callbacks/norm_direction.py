"""Distillation of the norm and the direction of features."""

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Batch
from cl_lightning.callbacks._snapshot import Taught
from cl_lightning.checks import at_least
from cl_lightning.losses import norm_and_direction
from cl_lightning.memory import Prototypes
from cl_lightning.models import Output
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


class NormDirection(Taught):
    """Draws features towards the class means of the network before the task, and to at least its norm.

    With f the features of the network, t those of a frozen copy of the network after the previous task, and e_c the
    normalised mean of t over the training images of class c of the task, the term ``norm_direction`` is

        lambda * mean_i [ 1 - <f_i, e_{y_i}> / max(||f_i||, ||t_i||) ]

    the ND loss of KD++ (Wang et al., arXiv:2305.17007). lambda -> weight. Together with ``Distillation`` of logits and
    the cross-entropy of the strategy, it is the loss of KD++. Departs from the paper: the teacher is the network
    before the task, of the same width, so that no embedding is needed; samples of other classes, such as samples of a
    memory, have no term.

    Args:
        weight: lambda, at least 0; with 0 no term is added. 1.5 or 2 in the paper.
    """

    paper: str = "Wang et al., arXiv:2305.17007"

    def __init__(self, *, weight: float = 2.0) -> None:
        super().__init__()
        at_least(self, 0, weight=weight)
        self.weight = weight
        self._means: Prototypes | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Class means of the teacher on the task, the same in each fit of the task."""
        strategy: ContinualStrategy = pl_module  # type: ignore[assignment]
        self._means = None
        if self.weight and self.teacher and strategy.phase.features is None:
            features, labels = strategy.passes.features(self.teacher.network)
            self._means = Prototypes(features.shape[1]).to(features.device)
            self._means.update(features, labels, num_classes=strategy.task.num_seen)

    def losses(self, strategy: "ContinualStrategy", batch: Batch, output: Output) -> dict[str, Tensor]:
        if self._means is None:
            return {}
        with torch.no_grad():
            before = self.teacher(batch.images).features
        labels = batch.labels.clamp(min=0)
        known = self._means.known[labels] & (batch.labels >= 0)
        directions = F.normalize(self._means.means[labels], dim=1)
        return {"norm_direction": self.weight * norm_and_direction(output.features, before, directions, known)}

    def on_task_end(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        self._means = None
        self.teacher.forget()  # before the copy is made, so that one teacher at a time is in memory
        if self.weight:
            self.teacher.learn_from(strategy.network)
