"""DER: Dynamically Expandable Representation (Yan et al., CVPR 2021, arXiv:2103.16788).

In each task a feature extractor f_t is added, initialised as a copy of f_{t-1}. All earlier extractors are frozen, with
their batch normalisation in eval mode. With phi(x) = [f_1(x), ..., f_t(x)], a linear head W on phi and an auxiliary
head A on f_t with one output for all old classes together and one per new class,

    L = CE(W phi(x), y) + lambda CE(A f_t(x), y_aux),   y_aux = 0 for an old class, 1 + y - C_old for a new one

on the data of the task and herded exemplars; the first task is ordinary training. The old weights of W stay its
top-left block when it grows. The auxiliary head makes f_t learn what distinguishes the new classes from each other and
from the old ones; it is removed at the end of the task. lambda -> aux_weight.

A classifier that is trained on few samples of old classes prefers the new ones. At the end of a task (``classifier``):

    align     new rows of W are scaled to the mean norm of the old ones (``align_head``), as in PyCIL
    retrain   a second phase: W is initialised again and trained on frozen features, with CE(W phi(x) / delta, y), on
              equally many samples of each class; delta -> retrain_temperature
    plain     W stays as it is

After few steps the new rows are shorter than the old ones, and alignment can lower the accuracy (see ``WA``).
The paper retrains; the temperature 5 and the subset, the smallest class's number of random samples of each class, are
ours. Departs from the paper: its masks of channels, the loss that makes them sparse and the pruning of each extractor
are left out, as in published implementations, so that the network grows by a whole extractor per task.
The name stands apart from Dark Experience Replay, which is ``DERpp``.
"""

import functools
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cl_lightning.batch import ImageShape, mix
from cl_lightning.checks import above, at_least, one_of
from cl_lightning.data.balance import balanced_subset
from cl_lightning.losses import cross_entropy
from cl_lightning.models import Head, align_head
from cl_lightning.strategies.base import ExpandingReplay
from cl_lightning.strategy import Batch, Output, Phase, PhaseOptions, Task, Traits

Classifier = Literal["align", "retrain", "plain"]


def auxiliary_labels(labels: Tensor, num_old: int) -> Tensor:
    """y_aux: 0 for each of the ``num_old`` old classes, 1 for the first new class, and so on; -1 stays -1.

    Args:
        labels: Columns, int64 ``(B,)``.
        num_old: C_old, at least 1.

    Returns:
        int64 ``(B,)``.
    """
    return torch.where(labels < 0, labels, (labels - num_old + 1).clamp(min=0))


class DERExpand(ExpandingReplay):
    """A feature extractor is added per task and the earlier ones are frozen, with an auxiliary loss on the newest one.

    Args:
        memory_size: K, in samples, over all classes and processes.
        aux_weight: lambda, at least 0.
        classifier: What corrects the head at the end of a task: ``align``, ``retrain`` or ``plain``.
        retrain_temperature: delta, above 0.
        retrain_options: Options of the phase ``retrain``, at least 1 epoch.
        kwargs: Options of the base class, apart from ``freeze_backbone``; the head must be a ``LinearHead``.
    """

    traits = Traits(family="rehearsal", paper="Yan et al., CVPR 2021, arXiv:2103.16788", keeps_exemplars=True)

    def __init__(
        self,
        *,
        memory_size: int = 2000,
        aux_weight: float = 1.0,
        classifier: Classifier = "align",
        retrain_temperature: float = 5.0,
        retrain_options: PhaseOptions = PhaseOptions(),
        **kwargs: Any,
    ) -> None:
        super().__init__(memory_size=memory_size, **kwargs)
        at_least(self, 0, aux_weight=aux_weight)
        one_of(self, get_args(Classifier), classifier=classifier)
        above(self, 0, retrain_temperature=retrain_temperature)
        at_least(self, 1, **{"retrain_options.epochs": retrain_options.epochs}, optional=True)
        if classifier != "retrain" and (retrain_temperature, retrain_options) != (5.0, PhaseOptions()):
            raise ValueError(
                f"{type(self).__name__}: classifier is {classifier!r}, which has no phase 'retrain'; remove "
                "retrain_temperature and retrain_options, or use 'retrain'"
            )
        self.aux_weight, self.classifier = aux_weight, classifier
        self.retrain_temperature, self.retrain_options = retrain_temperature, retrain_options
        self.aux_head: Head  # A; empty between tasks

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.aux_head = self.extractor_head()

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if not task.is_first and task.num_new:
            self.aux_head.grow(task.num_new + 1)

    def phases(self, task: Task) -> list[Phase]:
        if self.classifier != "retrain" or task.is_first:
            return [Phase()]
        retrain = Phase(
            "retrain",
            self.retrain_options,
            trains=lambda: self.network.head.parameters(),
            freezes=lambda: [self.network.backbone],
            samples=functools.partial(self._balance, task=task),
        )
        return [Phase(), retrain]

    def _balance(self, labels: Tensor, replayed: Tensor, *, task: Task) -> Tensor:
        return balanced_subset(labels, mix(self.seed, 0xDE2, task.index))

    def trainable(self) -> Iterable[nn.Parameter]:
        yield from super().trainable()
        yield from self.aux_head.parameters()

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.phase.name == "retrain":
            return {
                "ce": self.classification_loss(output._replace(logits=output.logits / self.retrain_temperature), batch)
            }
        terms = {"ce": self.classification_loss(output, batch)}
        if self.aux_head.num_columns:
            _, newest = self.backbone.split(output.features)
            labels = auxiliary_labels(batch.labels, self.task.num_seen - self.task.num_new)
            aux = cross_entropy(self.aux_head(newest), labels, weights=self.data.weights_of(batch))
            terms["aux"] = self.aux_weight * aux
        return terms

    def end_phase(self, phase: Phase) -> None:
        if self.classifier == "retrain" and phase.name == "train" and not self.task.is_first:
            head = self.network.head
            for place, size in enumerate(head.block_sizes()):
                head.blocks[place] = head.new_block(size).to(self.device)

    def end_task(self, task: Task) -> None:
        self.aux_head = self.extractor_head().to(self.device)
        if self.classifier == "align" and task.num_new:
            align_head(self.network.head)
        super().end_task(task)
