"""MOS: Model Surgery (Sun et al., AAAI 2025, arXiv:2412.09441).

A frozen pretrained backbone gets an adapter A_t in each task t, numbered from 0, which starts from A_{t-1}. Phase
``train`` trains A_t and the linear head; after each optimizer step A_t is merged with the earlier adapters:

    L = CE(W phi_t(x), y over the classes of the task) + ortho_weight CE(V V^T / tau, row number)
    A_t <- (1 - alpha) A_t + alpha mean(A_0 .. A_{t-1})                                          from task 1 on

phi_j(x): features with adapter j. The rows of V are the means mu_c of the classes of earlier tasks and the features of
the batch, of all processes; the second term separates them. alpha -> merge_share, tau -> ortho_temperature. Then mu_c
and Sigma_c of the features phi_t of the new classes are stored, and their means p_c under A_0. Phase ``align``, from
task 1 on, trains the head on features drawn from N(mu_c, Sigma_c + jitter I) of all classes, with CE over all of them.

Prediction, self-refined retrieval of the adapter, without training. j: the task whose adapter is used

    y = argmax_c cos(phi_0(x), p_c);   repeat ``rounds`` times: j = task of y, z = W phi_j(x), y = argmax z
    score_c(x) = softmax(z)_c + softmax(T cos(phi_0(x), p))_c             T: number of tasks

Scores are returned as logarithms of their mean. All adapters are evaluated, in one forward pass each. The task of a
class is the last task that contains it. If a class recurs, mu_c and Sigma_c are computed again, and p_c is pooled.
Departs from the code, which merges inside the forward pass, once for each block, also during evaluation, so that the
stored adapters change: here they do not change. ``merges_per_step`` 12 merges a ViT-B as often in a training step.
Here a covariance is stored for each class; the code can store variances or centroids instead.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import ImageShape
from cl_lightning.checks import above, at_least, within
from cl_lightning.distributed import gather_rows, world_size
from cl_lightning.losses import cross_entropy, full_precision
from cl_lightning.memory import Prototypes
from cl_lightning.models import Adapter, Network, PeftFactory, PeftSets, SideBySide
from cl_lightning.strategies.base.schedules import CosineOverPhase
from cl_lightning.strategies.pretrained.alignment import AlignedClassifier, last_tasks
from cl_lightning.strategy import Batch, Output, PhaseOptions, Task, Traits


def self_similarity_loss(vectors: Tensor, temperature: float = 0.8) -> Tensor:
    """Cross-entropy by which each vector is to be most similar to itself: ``CE(V V^T / tau, row number)``, a mean.

    Args:
        vectors: V, not normalised, ``(n, d)``.
        temperature: tau, above 0.

    Returns:
        A scalar, in nats.
    """
    vectors = full_precision(vectors)
    with torch.autocast(vectors.device.type, enabled=False):
        similarities = vectors @ vectors.T / temperature
    return F.cross_entropy(similarities, torch.arange(len(vectors), device=vectors.device))


def retrieved(logits: Tensor, classes: Tensor, tasks: Tensor, rounds: int) -> Tensor:
    """Logits with the adapter that is retrieved for each sample.

    Each round takes the adapter of the task of the predicted class and predicts again.

    Args:
        logits: Logits with each adapter, ``(T, B, C)``.
        classes: Prediction before the first round, int64 ``(B,)``.
        tasks: Task of each class, int64 ``(C,)``.
        rounds: Number of rounds, at least 1; after a round that changes no task, further rounds have no effect.

    Returns:
        ``(B, C)``.
    """
    samples = torch.arange(logits.shape[1], device=logits.device)
    for _ in range(rounds):
        chosen = logits[tasks[classes], samples]
        classes = chosen.argmax(dim=1)
    return chosen


class MOS(AlignedClassifier):
    """An adapter per task, merged with earlier adapters, whose task is found by self-refined predictions.

    Args:
        peft: Builds the module of a task for the backbone; None for ``Adapter`` with 16 units.
        ortho_weight: Weight of the separation of class means and features, at least 0.
        ortho_temperature: tau, above 0.
        merge_share: alpha, in [0, 1].
        merges_per_step: Number of merges after an optimizer step, at least 1; n merges have the share
            ``1 - (1 - alpha)^n``.
        rounds: Rounds of the retrieval, at least 1.
        lr_factors: Factors of the learning rate by patterns of names; None for 0.1 for the head, in both phases.
        align_options: Options of the phase ``align``; 0 epochs to leave it out. The default optimizer is SGD with
            learning rate 0.05 (with the factor of the head 0.005), momentum 0.9 and weight decay 5e-4, with a cosine
            schedule.
        align_samples: Number of features drawn per class and epoch, at least 1: 5 times the batch size in the paper.
        jitter: Variance that is added in each direction, above 0.
        kwargs: Options of the base class.
    """

    traits = Traits(family="pretrained", paper="Sun et al., AAAI 2025, arXiv:2412.09441", needs_pretrained=True)

    def __init__(
        self,
        *,
        peft: PeftFactory | None = None,
        ortho_weight: float = 0.1,
        ortho_temperature: float = 0.8,
        merge_share: float = 0.1,
        merges_per_step: int = 1,
        rounds: int = 4,
        lr_factors: dict[str, float] | None = None,
        align_options: PhaseOptions = PhaseOptions(epochs=30, batch_size=240),
        align_samples: int = 240,
        jitter: float = 1e-4,
        **kwargs: Any,
    ) -> None:
        sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)
        super().__init__(
            lr_factors={"head.*": 0.1} if lr_factors is None else lr_factors,
            loss_classes="current",
            align_options=align_options.filled(sgd, CosineOverPhase),
            align_samples=align_samples,
            jitter=jitter,
            **kwargs,
        )
        at_least(self, 0, ortho_weight=ortho_weight)
        above(self, 0, ortho_temperature=ortho_temperature)
        within(self, "[0, 1]", merge_share=merge_share)
        at_least(self, 1, merges_per_step=merges_per_step, rounds=rounds)
        self.ortho_weight, self.ortho_temperature, self.rounds = ortho_weight, ortho_temperature, rounds
        self.merge_share = 1 - (1 - merge_share) ** merges_per_step
        adapter = functools.partial(Adapter, bottleneck=16)
        self.build_backbone = functools.partial(PeftSets, backbone=self.build_backbone, peft=peft or adapter)
        self.retrieval: Prototypes  # class means under the first adapter
        self._step = 0  # optimizer steps at the last merge
        self._others: Tensor  # columns of the classes with a mean that are not of the task
        self._earlier: list[Tensor] = []  # means of the parameters of earlier adapters

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.retrieval = Prototypes(self._sets.num_features)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self._sets.add(copied=True)

    def frozen(self) -> Iterable[nn.Module]:
        return [self._sets.base, *self._sets.sets[:-1]]

    def on_train_start(self) -> None:
        self._step = self.trainer.global_step
        self._earlier = [] if self.task.is_first else self._sets.mean_of_earlier()
        known = F.pad(self.gaussians.known, (0, self.task.num_seen - len(self.gaussians)))
        self._others = (known & ~self.task_columns[-1]).nonzero().squeeze(1)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.phase.features is not None:
            return {"ce": cross_entropy(output.logits, batch.labels)}  # over all classes
        terms = {"ce": self.classification_loss(output, batch)}  # over the classes of the task
        if self.ortho_weight:
            together = batch.draw.total >= world_size()  # a process without rows takes no part in an exchange
            rows: Callable[[Tensor], Tensor] = gather_rows if together else lambda tensor: tensor
            share = batch.weight if together else 1.0  # the base class multiplies by the weight
            vectors = torch.cat([self.gaussians.means[self._others], rows(full_precision(output.features))])
            terms["ortho"] = self.ortho_weight * self_similarity_loss(vectors, self.ortho_temperature) / share
        return terms

    def after_step(self, batch: Batch) -> None:
        if self.phase.features is None and self._earlier and self.trainer.global_step > self._step:
            self._step = self.trainer.global_step  # not a batch whose gradients are accumulated
            newest = list[Tensor](self._sets.sets[-1].parameters())
            torch._foreach_lerp_(newest, self._earlier, self.merge_share)

    def learn_statistics(self) -> None:
        super().learn_statistics()
        features, labels = self.passes.features(Network(SideBySide(self._sets, [0]), self.network.head))
        self.retrieval.update(features, labels, num_classes=self.task.num_seen)

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        if not len(self.retrieval):  # the first task is being trained
            return self.network.classify(images)
        head, count = self.network.head, len(self._sets.sets)
        features = self._sets.features(images, range(count))
        cosines = self.retrieval.scores(features[0], head.num_columns, "cosine")
        logits = torch.stack([head.classify(part).float() for part in features])
        chosen = retrieved(logits, cosines.argmax(dim=1), last_tasks(self.task_columns), self.rounds)
        both = torch.stack([chosen.log_softmax(dim=1), (count * cosines).log_softmax(dim=1)])
        return both.logsumexp(dim=0) - math.log(2)

    def predict_within_task(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        return self.network.classify(images)

    @property
    def _sets(self) -> PeftSets:
        return cast(PeftSets, self.network.backbone)
