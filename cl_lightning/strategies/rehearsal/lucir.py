"""Learning a Unified Classifier Incrementally via Rebalancing, LUCIR or UCIR (Hou et al., CVPR 2019).

The head is a cosine classifier z_c(x) = sigma <f(x) / ||f(x)||, w_c / ||w_c||> with a learnt scale sigma, which starts
at 1. From the second task on, with g the features of the network before the task,

    L = CE(z(x), y) + lambda (1 - cos(f(x), g(x))) + weight * M(x, y),   lambda = lambda_base sqrt(C_old / C_new)
    M(x, y) = 1/K sum_k max(0, m - cos_y + cos_k)     for samples of old classes y; k: the K new classes of largest cos

on the data of the task and on herded exemplars (eq. 6 to 9). The first two terms are means over all samples, the third
over the samples of old classes; its cosines are without sigma. lambda_base -> less_forget_weight, K -> num_negatives,
m -> margin, weight -> margin_weight. Rows of old classes are frozen; the row of a new class starts as the mean of its
normalised features, at the mean norm of the old rows. The optional second phase, "class balance finetuning", trains the
head alone by CE + weight * M on a class-balanced set of exemplars. The prediction is the class of the largest logit, or
of the nearest mean of exemplars.
Use a backbone without a ReLU at the end (``last_relu: false``), so that cosines can be negative.
Departs from the paper: eq. 8 is the sum over k; the mean is taken in the authors' code. Departs from that code: in the
second phase normalisation layers are in eval mode.
The setting of the paper with 20 exemplars of each class is ``exemplars_per_class: 20``; without this limit a memory of
fixed size holds more of each class in earlier tasks.
"""

import math
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from cl_lightning.checks import at_least, within
from cl_lightning.losses import cosine_feature_distillation, full_precision, mean_over_selected
from cl_lightning.memory import Teacher
from cl_lightning.strategies.base import BALANCED, Classifier, CosineExemplars
from cl_lightning.strategy import Batch, Output, Task, Traits


def ranking_losses(cosines: Tensor, labels: Tensor, num_old: int, *, margin: float, num_negatives: int) -> Tensor:
    """Margin ranking loss M of each sample: its class should exceed the nearest new classes by the margin.

    Args:
        cosines: ``(B, C)``.
        labels: Columns, int64 ``(B,)``.
        num_old: Number of old classes, the first columns; less than C.
        margin: m.
        num_negatives: K; all new classes if there are fewer.

    Returns:
        ``(B,)``, meant for samples of old classes.
    """
    own = cosines.gather(1, labels.clamp(min=0)[:, None])  # (B, 1)
    new = cosines[:, num_old:]
    nearest = new.topk(min(num_negatives, new.shape[1]), dim=1).values
    return F.relu(margin - own + nearest).mean(dim=1)


class LUCIR(CosineExemplars):
    """Cosine classifier, distillation of the directions of features, and a margin between old and new classes.

    Args:
        memory_size: K of :class:`ExemplarReplay`, in samples.
        less_forget_weight: lambda_base, at least 0: 5 for CIFAR-100 and 10 for ImageNet in the paper.
        margin_weight: Weight of the margin ranking loss, at least 0.
        margin: m, in [0, 2].
        num_negatives: K, number of new classes that a sample of an old class is compared with, at least 1.
        classifier: ``head``, or ``nme`` for the nearest mean of exemplars.
        kwargs: Options of the base class: ``imprint``, ``balanced_options``, ``exemplars_per_class``, ....
    """

    traits = Traits(
        family="rehearsal",
        paper="Hou et al., CVPR 2019",
        keeps_exemplars=True,
        scenarios=("class-incremental", "online"),
    )

    def __init__(
        self,
        *,
        memory_size: int = 2000,
        less_forget_weight: float = 5.0,
        margin_weight: float = 1.0,
        margin: float = 0.5,
        num_negatives: int = 2,
        classifier: Classifier = "head",
        **kwargs: Any,
    ) -> None:
        super().__init__(memory_size=memory_size, classifier=classifier, **kwargs)
        at_least(self, 0, less_forget_weight=less_forget_weight, margin_weight=margin_weight)
        within(self, "[0, 2]", margin=margin)
        at_least(self, 1, num_negatives=num_negatives)
        self.less_forget_weight, self.margin_weight = less_forget_weight, margin_weight
        self.margin, self.num_negatives = margin, num_negatives
        self.teacher = Teacher()

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms = {"ce": self.classification_loss(output, batch)}
        if not self.teacher:
            return terms
        old, new = self.teacher.num_columns, self.task.num_new
        if self.phase.name != BALANCED:  # there the features do not change
            before = self.teacher(batch.images).features
            weight = self.less_forget_weight * math.sqrt(old / new)
            terms["less_forget"] = weight * cosine_feature_distillation(output.features, before)
        cosines = full_precision(output.logits) / self.cosine_head.scale
        ranking = ranking_losses(cosines, batch.labels, old, margin=self.margin, num_negatives=self.num_negatives)
        of_old = (batch.labels >= 0) & (batch.labels < old)
        terms["margin"] = self.margin_weight * mean_over_selected(ranking, of_old, batch)
        return terms

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.teacher.learn_from(self.network)
