"""Loss Decoupling, LODE (Liang & Li, NeurIPS 2023).

The cross-entropy of a sample of the new task t, with logits z and label y, is the sum of two terms: telling the new
classes from the old ones, and telling the new classes from one another,

    CE = inter + intra,   inter = log sum_all exp(z_c) - log sum_new exp(z_c),   intra = log sum_new exp(z_c) - z_y

The first one pushes the logits of old classes down, for which the stream has no samples. With B the batch of the
stream, R samples of earlier tasks from a memory, and (x', z') samples of the memory with their stored logits,

    L = rho / t * mean inter(B) + C * mean intra(B) + beta * CE(R) + alpha * mean_c (f_c(x') - z'_c)^2

rho -> inter_weight, C -> intra_weight, t -> number of earlier tasks, and as in DER++ beta -> label_weight, alpha ->
logit_weight. In the first task L is the loss of DER++. LODE on ER is alpha = 0 and beta = 1, and LODE on DER++ has its
weights. The new classes are the classes of the task.
Departs from the authors' code: there the loss on ER is divided by 2, which is half the learning rate, and all outputs
of the head from the first class of the task on count as new, also of later tasks; here the head grows. With
``inter_weight`` t and ``intra_weight`` 1 the terms are the cross-entropy over all classes.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from cl_lightning.checks import at_least
from cl_lightning.losses import cross_entropy, masked_logits
from cl_lightning.strategies.rehearsal.derpp import DERpp
from cl_lightning.strategy import Batch, Output


def decoupled(logits: Tensor, labels: Tensor, new: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The two parts of the cross-entropy of samples of new classes, means over the labelled rows, in nats.

        inter = mean( log sum_c exp(z_c) - log sum_{c new} exp(z_c) ),   intra = mean( log sum_{c new} exp(z_c) - z_y )

    Args:
        logits: z, ``(B, C)``.
        labels: y, new columns, int64 ``(B,)``; rows with -1 are ignored.
        new: The new columns, bool ``(C,)``, at least one.
        weights: A factor for each row, ``(B,)``; None for 1.

    Returns:
        Two scalars, whose sum is the cross-entropy over all columns.
    """
    intra = cross_entropy(masked_logits(logits, new), labels, weights=weights)
    return cross_entropy(logits, labels, weights=weights) - intra, intra


class LODE(DERpp):
    """Cross-entropy on the batch with a smaller weight for new against old classes, and on samples of earlier tasks.

    Args:
        inter_weight: rho, at least 0; the weight of new against old classes is rho / t.
        intra_weight: C, at least 0.
        logit_weight: alpha, at least 0.
        label_weight: beta, at least 0.
        kwargs: Options of ``DERpp``.
    """

    traits = DERpp.traits.but(paper="Liang & Li, NeurIPS 2023", uses_old_logits=True, task_free=False)

    def __init__(
        self,
        *,
        inter_weight: float = 0.1,
        intra_weight: float = 1.0,
        logit_weight: float = 0.0,
        label_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(logit_weight=logit_weight, label_weight=label_weight, **kwargs)
        at_least(self, 0, inter_weight=inter_weight, intra_weight=intra_weight)
        if self.loss_classes != "all":
            raise ValueError(
                f"LODE: loss_classes is {self.loss_classes!r}, but the two parts of the loss are of all classes; use "
                "'all'"
            )
        self.inter_weight, self.intra_weight = inter_weight, intra_weight

    def draw(self, batch: Batch, *salt: int, tasks: Iterable[int] | None = None) -> Batch | None:
        if not salt and not self.task.is_first:  # the draw for the labels; stored logits are of all samples
            tasks = range(self.task.index)
        return super().draw(batch, *salt, tasks=tasks)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms = super().losses(batch, output)
        if self.task.is_first:
            return terms
        samples, of_part, share = batch.part("stream", output)
        weights = self.data.weights_of(samples)
        inter, intra = decoupled(of_part.logits, samples.labels, self.task_columns[-1], weights)
        del terms["ce"]
        of_inter = self.inter_weight / self.task.index
        return {"inter": of_inter * share * inter, "intra": self.intra_weight * share * intra, **terms}
