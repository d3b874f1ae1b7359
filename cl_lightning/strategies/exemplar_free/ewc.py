"""Elastic Weight Consolidation (Kirkpatrick et al., PNAS 2017, arXiv:1612.00796), and online EWC (Schwarz et al.,
"Progress & Compress", ICML 2018, arXiv:1805.06370).

With theta*_k the weights after task k and F_k the diagonal of the Fisher information on its data,

    L(x, y) = CE(f(x), y) + lambda/2 * sum_k sum_j F_k,j (theta_j - theta*_k,j)^2            ``online=False``
    L(x, y) = CE(f(x), y) + lambda/2 * sum_j F_j (theta_j - theta*_j)^2,  F <- gamma F + F_k  ``online=True``

where the online form has one anchor, the weights after the last task. lambda -> penalty_weight, gamma -> decay. The sum
over tasks is a single quadratic, kept as one anchor and one importance per weight, with the same value and gradient as
the list. F_j = E_y (d log p(y|x) / d theta_j)^2 per sample, in eval mode, with y drawn from the prediction
(``labels="sampled"``, an unbiased estimate) or summed over all classes (``"exact"``); p is over the classes that the
cross-entropy of the task was over (``visible``).
Departs from the paper: one head for all classes. No lambda suits all streams: it grows with what there is to hold and
falls with the certainty of the network. Frameworks that square the gradient of a batch's mean (``per_sample=False``)
get a Fisher information smaller by about the batch size, and use 5000 or so. A penalty of curvature lambda F makes
gradient descent diverge where lr * lambda * F > 2: then lower the learning rate or set ``trainer.gradient_clip_val``.
In class-incremental streams EWC alone is known to do little better than fine-tuning.
"""

from typing import Any, ClassVar, Literal

from torch import Tensor

from cl_lightning.batch import Batch
from cl_lightning.consolidation import Consolidation
from cl_lightning.network import Output
from cl_lightning.sensitivity import Labels
from cl_lightning.strategy import ContinualStrategy, Phase
from cl_lightning.stream import Task


class EWC(ContinualStrategy):
    """Cross-entropy, and a pull on each weight by how much it mattered to earlier tasks.

    Args:
        penalty_weight: lambda, at least 0.
        online: One decaying Fisher information and anchor instead of a term per task.
        decay: gamma of the online form, in [0, 1].
        labels: Labels of the Fisher information: ``exact`` expectation, ``sampled``, ``predicted`` or ``empirical``.
        per_sample: Square the gradient of each sample; False that of each batch's mean, to reproduce frameworks that
            do.
        on: Hold the ``backbone``, or ``all`` weights that earlier tasks have trained.
        fisher_samples: Samples of a task that the Fisher information is measured on; None for all.
        kwargs: Of the base.
    """

    family: ClassVar[str] = "exemplar-free"
    paper: ClassVar[str] = "Kirkpatrick et al., PNAS 2017, arXiv:1612.00796"

    def __init__(
        self,
        *,
        penalty_weight: float = 100.0,
        online: bool = False,
        decay: float = 1.0,
        labels: Labels = "sampled",
        per_sample: bool = True,
        on: Literal["backbone", "all"] = "all",
        fisher_samples: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.ranks_agree = per_sample  # else a gradient is squared that is the mean of a process's share
        self.consolidation = Consolidation(
            "fisher",
            penalty_weight,
            merge="decay" if online else "add",
            decay=decay,
            labels=labels,
            per_sample=per_sample,
            on=on,
            samples=fisher_samples,
        )

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.consolidation.begin_task(self.network)

    def begin_phase(self, phase: Phase, epochs: int, origin: int) -> None:
        super().begin_phase(phase, epochs, origin)
        self.consolidation.begin_phase(self.network)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms = {"ce": self.classification_loss(output, batch)}
        if self.consolidation.importance:
            terms["penalty"] = self.consolidation.penalty()
        return terms

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        batches = self.statistics_batches(samples=self.consolidation.samples)
        self.consolidation.end_task(self.network, batches, self.visible_columns())
