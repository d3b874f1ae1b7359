"""Center Loss Regularization for Continual Learning (arXiv:2110.11314), for the same classes in new domains.

Each class has a centre c_y in feature space. With f the backbone and z the logits:

    L = CE(z(x), y) + lambda / 2 * mean_i || f(x_i) - c_{y_i} ||^2

In the first task the centres follow the features, once per step, over the rows i of a batch (Wen et al., ECCV 2016):

    c_j <- c_j - alpha sum_{i: y_i = j} (c_j - f(x_i)) / (1 + n_j),   n_j rows of class j

At its end they are set to the class means of the un-augmented images (``exact``), and from then on both the centres and
the head are frozen: the features of a new domain move to the centres, where the classifier separates them already.
lambda -> center_weight, alpha -> center_rate.
The squared distance is a sum over the d features (``mean_over_features`` divides it by d), so lambda depends on d. No
code is available and the hyper-parameters are not known; that centres and head are both frozen is from the paper, the
exact means at the end of the first task are our choice. Nothing protects old domains except the shared centres and the
head, and the statistics of batch normalisation are of the new domain. On small streams of rotated and of permuted
digits the last accuracy equals the one of fine-tuning (.65 and .79); distillation of features reaches .82 and .90.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.checks import at_least, within
from cl_lightning.distributed import all_sum
from cl_lightning.losses import feature_distillation, full_precision
from cl_lightning.memory import Prototypes
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Task, Traits


def updated_centers(centers: Tensor, sums: Tensor, counts: Tensor, rate: float) -> Tensor:
    """Centres after a step: ``c_j - alpha (n_j c_j - sum_{i of class j} f_i) / (1 + n_j)``.

    Args:
        centers: c, ``(C, d)``.
        sums: Sum of the features of each class, ``(C, d)``.
        counts: Number of rows of each class n, ``(C,)``.
        rate: alpha.
    """
    n = counts[:, None]
    return centers - rate * (n * centers - sums) / (1 + n)


class CenterLoss(ContinualStrategy):
    """Features of each class are drawn to its centre; centres and head are frozen after the first domain.

    Args:
        center_weight: lambda, at least 0.
        center_rate: alpha, in [0, 1].
        exact: Whether the centres become the class means at the end of the first task; False to keep their last values.
        mean_over_features: Whether the squared distance is divided by d.
        freeze_head: Whether the head is frozen after the first task.
        kwargs: Options of the base class.
    """

    traits = Traits(
        family="exemplar-free",
        paper="arXiv:2110.11314",
        scenarios=("domain-incremental", "online"),
        remedy="use a method for new classes, such as PASS",
    )

    def __init__(
        self,
        *,
        center_weight: float = 0.01,
        center_rate: float = 0.5,
        exact: bool = True,
        mean_over_features: bool = False,
        freeze_head: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        at_least(self, 0, center_weight=center_weight)
        within(self, "[0, 1]", center_rate=center_rate)
        self.center_weight, self.center_rate = center_weight, center_rate
        self.exact, self.mean_over_features, self.freeze_head = exact, mean_over_features, freeze_head
        self.centers: Prototypes
        self._of_step: Tensor | None = None  # sums of features and number of rows of each class, (C, d + 1)

    @property
    def prototypes(self) -> Prototypes:
        return self.centers

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.centers = Prototypes(self.network.head.num_features)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.centers.grow(task.num_seen)

    def frozen(self) -> Iterable[nn.Module]:
        yield from super().frozen()
        if self.freeze_head and not self.task.is_first:
            yield self.network.head

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        labelled = batch.labels >= 0
        features, centers = full_precision(output.features), self.centers.means[batch.labels]
        gaps = feature_distillation(features.where(labelled[:, None], 0.0), centers.where(labelled[:, None], 0.0))
        if self.task.is_first:
            rows = torch.cat([features.detach(), torch.ones_like(features[:, :1])], dim=1) * labelled[:, None]
            sums = rows.new_zeros(len(self.centers), rows.shape[1])
            self._of_step = sums.index_add_(0, batch.labels.clamp(min=0), rows)
        size = features.shape[1] if self.mean_over_features else 1
        return {"ce": self.classification_loss(output, batch), "centers": self.center_weight / 2 / size * gaps}

    def after_step(self, batch: Batch) -> None:
        if not self.task.is_first:
            return
        means = self.centers.means
        mine = means.new_zeros(len(means), means.shape[1] + 1) if self._of_step is None else self._of_step
        sums, self._of_step = all_sum(mine), None
        means.copy_(updated_centers(means, sums[:, :-1], sums[:, -1], self.center_rate))

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        if task.is_first and self.exact:
            self.centers.update(*self.passes.features(), num_classes=task.num_seen, replace=True)
