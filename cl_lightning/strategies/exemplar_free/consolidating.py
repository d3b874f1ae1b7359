"""Base of the methods whose only addition to fine-tuning is a quadratic penalty on changes of the weights."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from cl_lightning.data import TARGET_KINDS
from cl_lightning.memory import Consolidation
from cl_lightning.strategies.base import AddsLosses
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Phase, Task


class Consolidating(ContinualStrategy):
    """Cross-entropy, and the penalty of a :class:`~cl_lightning.memory.Consolidation` (EWC, MAS, SI, RWalk, L2).

    The callback ``ImportancePenalty`` adds the same penalty to any other strategy.

    Args:
        consolidation: Anchors, importances and penalty.
        hold_initial: For the estimator ``l2``: whether changes from the initial weights of the backbone are penalised
            during the first task, for pretrained backbones.
        kwargs: Options of the base class.
    """

    def __init__(self, *, consolidation: Consolidation, hold_initial: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.consolidation, self.hold_initial = consolidation, hold_initial

        taken: tuple[str, ...] = ("class",)
        if consolidation.estimator == "fisher":
            exact = consolidation.labels in ("exact", "sampled") and consolidation.per_sample
            taken = ("class", "labels", "number") if exact else taken
        elif consolidation.estimator != "rwalk":
            taken = TARGET_KINDS
        self.traits = self.traits.but(targets=taken)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.consolidation.begin_task(self.network, anchor_now=self.hold_initial and task.is_first)

    def begin_phase(self, phase: Phase, origin: int, sources: Sequence[AddsLosses] = ()) -> None:
        super().begin_phase(phase, origin, sources)
        self.consolidation.begin_phase(self.network)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms = {"ce": self.classification_loss(output, batch)}
        if self.consolidation.importance and self.consolidation.weight:
            terms["penalty"] = self.consolidation.penalty()
        return terms

    def edit_gradients(self, batch: Batch) -> None:
        self.consolidation.before_step()

    def after_step(self, batch: Batch) -> None:
        self.consolidation.after_step()

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        batches = self.passes.batches(samples=self.consolidation.samples)
        kind = self.data.target_kind
        columns = self.task_columns[-1] if kind == "labels" else self.loss_columns()
        self.consolidation.end_task(self.network, batches, columns, kind)
