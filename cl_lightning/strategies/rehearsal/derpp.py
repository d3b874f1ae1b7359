"""Dark Experience Replay, DER and DER++ (Buzzega et al., NeurIPS 2020, arXiv:2004.07211).

A memory stores raw samples x' together with the logits z' of the network f at the time of storage. With (x, y) from the
stream, and (x', z') and (x'', y'') two independent draws from the memory, augmented,

    L = CE(f(x), y) + alpha * mean_c (f_c(x') - z'_c)^2 + beta * CE(f(x''), y'')

where each term is the mean over its samples. alpha -> logit_weight, beta -> label_weight; DER is beta = 0. After each
step its batch is offered to a reservoir, without augmentation, with the logits of the augmented view in this step.

Departs from the paper: the head grows, so z' has no logits of classes that arrive later. In the authors' code the head
has all outputs from the start: cross-entropy lowers the outputs of later classes, and these low logits are stored as
targets. Here the target for a later class is the lowest logit of z' (``new_class_targets``). Without a target, no term
prevents the prediction of new classes for old samples, and DER, which uses no labels of the memory, forgets most of
them. All three parts are in one forward pass, so that batch normalisation computes joint statistics. The squared error
is a mean over the classes, so that the best alpha grows with their number. ``update_memory="every"`` is as in the
authors' code: with several epochs, or several steps per batch, each copy of a sample counts as a separate sample, with
logits from different times of training. ``last`` stores logits of a network that is trained on the task, ``first`` of a
network that is not yet trained on it. (Dynamically Expandable Representation, also called DER, is another method.)
"""

from typing import Any

import torch
from torch import Tensor

from cl_lightning.batch import join
from cl_lightning.checks import at_least, one_of
from cl_lightning.losses import NewClassTargets, logit_matching
from cl_lightning.strategies.base import check_loss_classes
from cl_lightning.strategies.base.replay import UpdateMemory
from cl_lightning.strategy import Batch, Output, Replay, Traits

_DARK = 0xDE2  # salt of the second draw from the memory


class DERpp(Replay):
    """Cross-entropy on the batch and on a memory, and the stored logits of the memory as regression targets.

    Args:
        logit_weight: alpha, at least 0.
        label_weight: beta, at least 0.
        update_memory: Pass over the data of a phase in which batches are offered to the memory: ``first``, ``last`` or
            ``every``.
        new_class_targets: Targets for the logits of classes that arrived after a sample was stored: ``lowest``,
            ``zero`` or ``free``, see ``logit_matching``.
        kwargs: Options of ``Replay``; with ``memory_size`` 0 the method is fine-tuning.
    """

    traits = Traits(
        family="rehearsal",
        paper="Buzzega et al., NeurIPS 2020, arXiv:2004.07211",
        keeps_exemplars=True,
        task_free=True,
    )

    def __init__(
        self,
        *,
        logit_weight: float = 0.1,
        label_weight: float = 0.5,
        update_memory: UpdateMemory = "every",
        new_class_targets: NewClassTargets = "lowest",
        **kwargs: Any,
    ) -> None:
        super().__init__(update_memory=update_memory, **kwargs)
        at_least(self, 0, logit_weight=logit_weight, label_weight=label_weight)
        if label_weight > 0:
            check_loss_classes(self)
        one_of(self, ("lowest", "zero", "free"), new_class_targets=new_class_targets)
        self.logit_weight, self.label_weight = logit_weight, label_weight
        self.new_class_targets: NewClassTargets = new_class_targets
        self.traits = self.traits.but(uses_old_logits=logit_weight > 0)
        self._logits: Tensor | None = None

    def prepare_batch(self, batch: Batch) -> Batch:
        self._logits = None
        replay = self.replay(batch) if self.label_weight > 0 else None
        dark = self.replay(batch, _DARK) if self.logit_weight > 0 else None
        return join({"stream": batch, "replay": replay, "dark": dark})

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        samples, of_part, share = batch.part("stream", output)
        terms = {"ce": share * self.classification_loss(of_part, samples)}
        self._logits = of_part.logits.detach().float()
        if "replay" in batch.parts:
            samples, of_part, share = batch.part("replay", output)
            terms["replay"] = self.label_weight * share * self.classification_loss(of_part, samples)
        if "dark" in batch.parts:
            samples, of_part, share = batch.part("dark", output)
            matching = logit_matching(of_part.logits, samples.extra["logits"], new_class_targets=self.new_class_targets)
            terms["dark"] = self.logit_weight * share * matching
        return terms

    def offer(self, batch: Batch, **extra: Tensor) -> None:
        logits = self._logits
        if logits is None:  # this process has no rows in this step, but takes part in the exchange of rows
            logits = torch.zeros(0, self.network.head.num_columns, device=self.device)
        super().offer(batch, logits=logits, **extra)


class DER(DERpp):
    """Cross-entropy on the batch, and the stored logits of a memory as regression targets; its labels are not used.

    Args:
        logit_weight: alpha, at least 0.
        kwargs: Options of ``DERpp``; with ``memory_size`` 0 the method is fine-tuning.
    """

    def __init__(self, *, logit_weight: float = 0.3, **kwargs: Any) -> None:
        super().__init__(logit_weight=logit_weight, label_weight=0.0, **kwargs)
