"""Energy-Based Models for continual learning (Li, Du, van de Ven & Mordatch, CoLLAs 2022, arXiv:2011.12216).

A network gives an energy E(x, y) for an image and a class, which gates its hidden units (see ``EnergyHead``). For each
sample a class y- is drawn among other classes, and contrastive divergence lowers the energy of the label and raises the
energy of y-:

    L(x, y) = E(x, y) + log( exp(-E(x, y)) + exp(-E(x, y-)) ) = softplus(E(x, y) - E(x, y-))                  eq. (5)

y- is uniform over the other classes of the task, or, for streams without boundaries, of the batch: old classes never
compete with new ones, and their embeddings are not changed. A sample without another class has loss 0. The prediction
is the class of the lowest energy, over all classes seen so far.
With n negatives L is the cross-entropy over the label and n different classes; ``negatives=None`` takes all of them.
``loss_classes="all"`` draws from all classes seen so far, which the paper shows to forget. The logits are -E.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from cl_lightning.batch import Draw
from cl_lightning.checks import at_least, one_of
from cl_lightning.losses import classes_present, masked_logits
from cl_lightning.models import EnergyHead
from cl_lightning.strategy import Batch, ContinualStrategy, HeadFactory, Output, Traits

_NEGATIVES = 0xEB3  # salt of the draw


def draw_negatives(labels: Tensor, allowed: Tensor, count: int | None, draw: Draw) -> Tensor:
    """Draw different classes for each sample, uniformly among the allowed classes without its label.

    Args:
        labels: Columns, int64 ``(B,)``; -1 for a hidden label.
        allowed: Classes to draw from, bool ``(C,)``.
        count: Number of classes for each sample, at least 1; all if there are not more, or if it is None.
        draw: Random numbers of the step.

    Returns:
        Mask of the drawn classes and the label, bool ``(B, C)``.
    """
    own = torch.zeros(len(labels), len(allowed), dtype=torch.bool, device=labels.device)
    own.scatter_(1, labels.clamp(min=0)[:, None], True)
    others = allowed & ~own
    if count is None or count >= len(allowed):
        return others | own
    keys = draw.rand(len(allowed)).to(labels.device).masked_fill(~others, -1.0)
    drawn = torch.zeros_like(own).scatter_(1, keys.topk(count, dim=1).indices, True)
    return (drawn & others) | own


class EBM(ContinualStrategy):
    """Energies of image and class, trained by the energy of the label against a drawn class of the task.

    Args:
        negatives: Number of classes that are drawn for each sample, at least 1; None for all.
        draw_from: Whether negatives are drawn among the classes of the ``task``, or among the classes of the ``batch``,
            for streams whose tasks are not known.
        loss_classes: ``current``, or ``all`` for negatives among all classes seen so far.
        head: Builds the head; None for ``EnergyHead``. With another head, logits are taken as negative energies.
        kwargs: Options of the base class.
    """

    traits = Traits(
        family="exemplar-free",
        paper="Li et al., CoLLAs 2022, arXiv:2011.12216",
        losses_use_images=False,
    )

    def __init__(
        self,
        *,
        negatives: int | None = 1,
        draw_from: Literal["task", "batch"] = "task",
        loss_classes: Literal["current", "all"] = "current",
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss_classes=loss_classes, head=head or EnergyHead, **kwargs)
        at_least(self, 1, negatives=negatives, optional=True)
        one_of(self, ("task", "batch"), draw_from=draw_from)
        one_of(self, ("current", "all"), loss_classes=loss_classes)
        self.negatives, self.draw_from = negatives, draw_from
        self._allowed: Tensor | None = None

    def prepare_batch(self, batch: Batch) -> Batch:
        own = self.loss_columns()
        allowed = torch.ones_like(self.task_columns[-1]) if own is None else own
        if self.draw_from == "batch":
            allowed = allowed & classes_present(batch.labels, len(allowed))
        self._allowed = allowed
        return batch

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        assert self._allowed is not None
        drawn = draw_negatives(batch.labels, self._allowed, self.negatives, batch.draw.fork(_NEGATIVES))
        logits = masked_logits(output.logits, drawn)
        return {"ce": self.classification_loss(output._replace(logits=logits), batch)}
