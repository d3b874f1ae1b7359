"""NC-FSCIL: neural-collapse few-shot class-incremental learning (Yang et al., ICLR 2023, arXiv:2302.03004).

The classifier is fixed before the base session: one corner e_c of a simplex of K unit vectors for each class of all
sessions. A neck g after the backbone f is trained to map samples to the corners of their classes by dot regression:

    h^ = g(f(x)) / ||g(f(x))||,   L = lambda / 2 mean_i (h^_i . e_y_i - 1)^2,   score_c(x) = h^ . e_c

In the base session f and g are trained on images, mixed in a step by mixup, by CutMix or not at all. Then f is frozen.
A later session trains g on features: f(x) of its un-augmented images, the mean feature of each base class, and the mean
feature of each earlier novel class, ``novel_copies`` times. A step of a session

    - weighs each sample by n / (D n_c), with n rows in the batch, D classes, n_c rows of its class (``balance``): the
      target r_c e_c of the authors' code with r_c^2 = n / (D n_c)
    - with probability q takes the means (h_i + h_j) / 2 of random pairs, with the mean of the losses of both labels

lambda -> loss_weight, K -> num_targets, q -> pair_probability. Sums are over the batch of all processes.
Departs from the published code: the last checkpoint of the base session is used instead of the best one by test
accuracy; a session has epochs instead of a number of steps, and a smaller last batch is used. In a stream in which a
class comes back its stored mean stays in the training set and is pooled with the new features when the session ends.
"""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl_lightning.batch import ImageShape
from cl_lightning.checks import above, at_least, one_of, within
from cl_lightning.data import FeaturePool, cutmix, mixed_loss, mixup
from cl_lightning.distributed import all_gather_rows, gather_rows, world_size
from cl_lightning.losses import dot_regression
from cl_lightning.memory import Prototypes
from cl_lightning.models import NeckFactory, ResidualNeck, SimplexHead, head_as
from cl_lightning.strategies.base.schedules import CosineOverPhase
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Phase, PhaseOptions, Task, Traits

_KIND, _PAIRS = 0x4CF, 0x4C9  # salts of the kind of mixture of images, and of the pairs of features


def balanced_weights(labels: Tensor, columns: int) -> Tensor:
    """Weights ``n / (D n_c)`` of n samples of D classes, of which n_c have the class of the sample; their mean is 1.

    Args:
        labels: Columns, int64 ``(n,)``.
        columns: Number of columns, C.

    Returns:
        float32 ``(n,)``.
    """
    counts = torch.zeros(columns, device=labels.device).index_add_(0, labels, torch.ones_like(labels).float())
    return len(labels) / ((counts > 0).sum() * counts[labels])


def paired(embedded: Tensor, labels: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Means ``(h_i + h_j) / 2`` of the rows ``(n, e)`` and the same rows in another order, and its labels."""
    return (embedded + embedded[order]) / 2, labels[order]


class NCFSCIL(ContinualStrategy):
    """Dot regression to a fixed simplex; few-shot sessions train a neck on features and stored class means.

    Args:
        num_targets: K, number of corners, at least 2 and at least the number of classes of the stream.
        embedding_size: Size of the space of the corners, at least K - 1.
        neck: Builds g for the sizes of its input and output; None for ``ResidualNeck``.
        loss_weight: lambda, above 0.
        mixup_probability: Probability that the images of a step of the base session are mixed by mixup, in [0, 1].
        mixup_alpha: Parameter of its Beta distribution, above 0.
        cutmix_probability: Probability that they are mixed by CutMix, in [0, 1]; the sum of both is at most 1.
        cutmix_alpha: Parameter of its Beta distribution, above 0.
        pair_probability: q, in [0, 1].
        balance: Whether the classes of a batch have the same weight in later sessions.
        novel_copies: Number of copies of the mean of each earlier novel class in the set of a session, at least 1.
        session_options: Options of the phase ``session``; 0 epochs for no training after the base session. The default
            is SGD with learning rate 0.25, momentum 0.9 and weight decay 5e-4, with a cosine schedule.
        kwargs: Options of ``ContinualStrategy``.
    """

    traits = Traits(family="few-shot", paper="Yang et al., ICLR 2023, arXiv:2302.03004")

    def __init__(
        self,
        *,
        num_targets: int = 100,
        embedding_size: int = 512,
        neck: NeckFactory | None = None,
        loss_weight: float = 10.0,
        mixup_probability: float = 0.4,
        mixup_alpha: float = 0.8,
        cutmix_probability: float = 0.4,
        cutmix_alpha: float = 1.0,
        pair_probability: float = 0.75,
        balance: bool = True,
        novel_copies: int = 1,
        session_options: PhaseOptions = PhaseOptions(epochs=50, batch_size=64),
        **kwargs: Any,
    ) -> None:
        at_least(self, 2, num_targets=num_targets)
        at_least(self, num_targets - 1, embedding_size=embedding_size)
        above(self, 0, loss_weight=loss_weight, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha)
        within(self, "[0, 1]", mixup_probability=mixup_probability, pair_probability=pair_probability)
        within(self, "[0, 1]", cutmix_probability=cutmix_probability)
        at_least(self, 1, novel_copies=novel_copies)
        if mixup_probability + cutmix_probability > 1:
            raise ValueError(
                f"{type(self).__name__}: mixup_probability is {mixup_probability} and cutmix_probability is "
                f"{cutmix_probability}; their sum must be at most 1"
            )
        super().__init__(
            head=functools.partial(
                SimplexHead, size=num_targets, dimensions=embedding_size, neck=neck or ResidualNeck, cosine=True
            ),
            **kwargs,
        )
        one_of(self, ("all",), loss_classes=self.loss_classes)
        self.loss_weight, self.pair_probability, self.balance = loss_weight, pair_probability, balance
        self.mixup_probability, self.mixup_alpha = mixup_probability, mixup_alpha
        self.cutmix_probability, self.cutmix_alpha = cutmix_probability, cutmix_alpha
        self.novel_copies = novel_copies
        sgd = functools.partial(torch.optim.SGD, lr=0.25, momentum=0.9, weight_decay=5e-4)
        self.session_options = session_options.filled(sgd, CosineOverPhase)
        self.means: Prototypes

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.means = Prototypes(self.network.head.num_features)

    @property
    def head(self) -> SimplexHead:
        """The head of the network."""
        return head_as(self.network, SimplexHead, self, "whose rows do not change from task to task")

    @property
    def backbone_is_final(self) -> bool:
        return self.freeze_backbone or not self.task.is_first

    def phases(self, task: Task) -> list[Phase]:
        if task.is_first:
            return [Phase()]
        if self.session_options.epochs == 0:
            return []
        head = self.network.head
        return [Phase("session", self.session_options, trains=head.parameters, features=self.session_features)]

    def session_features(self) -> FeaturePool:
        """Features of the images of the task, and means of the classes of earlier tasks."""
        features, labels = self.passes.all_features()
        known = self.means.known_columns().to(labels.device)
        base = self.task_columns[0][known]
        copies = torch.where(base, 1, self.novel_copies)
        stored = known.repeat_interleave(copies)
        return FeaturePool(torch.cat([features, self.means.means[stored]]), torch.cat([labels, stored]))

    def prepare_batch(self, batch: Batch) -> Batch:
        if self.phase.features is not None:
            return batch
        chance = np.random.default_rng(batch.draw.fork(_KIND).key).random()  # the same number on every process
        if chance < self.mixup_probability:
            return mixup(batch, 1.0, self.mixup_alpha)
        if chance < self.mixup_probability + self.cutmix_probability:
            return cutmix(batch, 1.0, self.cutmix_alpha)
        return batch

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.phase.features is None:

            def of_images(batch: Batch) -> Tensor:
                return dot_regression(output.logits, batch.labels, weights=self.data.weights_of(batch))

            return {"dot_regression": self.loss_weight * mixed_loss(of_images, batch)}
        embedded, labels, share = self.head.embed(output.features), batch.labels, 1.0
        if batch.draw.total >= world_size():  # a process without rows takes no part in an exchange
            # The base class multiplies by the weight of the rows of this process; this loss is of all rows.
            embedded, labels, share = gather_rows(embedded), all_gather_rows(labels), batch.weight
        return {"dot_regression": self.loss_weight / share * self.session_loss(embedded, labels, batch)}

    def session_loss(self, embedded: Tensor, labels: Tensor, batch: Batch) -> Tensor:
        """Loss of a step of a later session, without lambda.

        Args:
            embedded: h, ``(n, e)``, of all processes.
            labels: Columns, int64 ``(n,)``, at least 0.
            batch: The batch; only its draw is used.
        """
        weights = balanced_weights(labels, self.head.num_columns) if self.balance else None
        random = np.random.default_rng(batch.draw.fork(_PAIRS).key)
        if random.random() >= self.pair_probability:
            return dot_regression(self.head.similarity(embedded), labels, weights=weights)
        order = torch.from_numpy(random.permutation(len(labels))).to(labels.device)
        embedded, others = paired(embedded, labels, order)
        cosines = self.head.similarity(embedded)
        of_others = None if weights is None else weights[order]
        first = dot_regression(cosines, labels, weights=weights)
        return (first + dot_regression(cosines, others, weights=of_others)) / 2

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.means.update(*self.passes.features(), num_classes=task.num_seen)
