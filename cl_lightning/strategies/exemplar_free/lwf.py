"""Learning without Forgetting (Li & Hoiem, ECCV 2016, arXiv:1606.09282), and LwF.MC (Rebuffi et al., CVPR 2017).

A frozen copy g of the network after the previous task teaches the network f on the images of the new one:

    L(x, y) = CE_new(f(x), y) + lambda * CE(softmax(g(x) / T), softmax(f_old(x) / T))                       softmax form

CE_new is over the classes of the new task, f_old(x) are f's logits for the classes that g knows. The second term is a
cross-entropy without the factor T^2 (``scale_by_temperature`` puts it in). lambda -> distill_weight, T -> temperature.
LwF.MC (iCaRL, arXiv:1611.07725, sec. 4.2, without exemplars) takes sigmoids over all classes instead,

    L(x, y) = sum_c BCE(sigmoid f_c(x), t_c),  t_c = sigmoid g_c(x) for old classes, 1[y = c] for new ones  sigmoid form

where the teacher's targets replace the zeros of the old classes, so that there is no lambda.
Departs from the paper: one softmax spans all old classes, since no task id is given at test time; old rows of the head
are trained by the distillation (the survey framework of Masana et al. leaves them out of the optimizer).
"""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from cl_lightning.batch import Batch
from cl_lightning.losses import binary_cross_entropy, lwf_mc_targets, softmax_distillation
from cl_lightning.network import Output
from cl_lightning.strategy import ContinualStrategy, Phase, Visible
from cl_lightning.stream import Task
from cl_lightning.teacher import Teacher

WARMUP = "warmup"


class LwF(ContinualStrategy):
    """Cross-entropy on the new task, distillation from the network before it.

    Args:
        distill_weight: lambda, at least 0.
        temperature: T, above 0.
        form: ``softmax`` for LwF, ``sigmoid`` for LwF.MC.
        scale_by_temperature: Multiply the distillation by T^2.
        warmup_epochs: Epochs in which the new rows of the head are trained alone, before each task with new classes but
            the first (the paper's warm-up step).
        visible: Of the softmax form; see the base.
        kwargs: Of the base.
    """

    family: ClassVar[str] = "exemplar-free"
    paper: ClassVar[str] = "Li & Hoiem, ECCV 2016, arXiv:1606.09282"

    def __init__(
        self,
        *,
        distill_weight: float = 1.0,
        temperature: float = 2.0,
        form: Literal["softmax", "sigmoid"] = "softmax",
        scale_by_temperature: bool = False,
        warmup_epochs: int = 0,
        visible: Visible = "current",
        **kwargs: Any,
    ) -> None:
        super().__init__(visible=visible, **kwargs)
        if distill_weight < 0 or temperature <= 0:
            raise ValueError(
                f"LwF: distill_weight={distill_weight}, temperature={temperature}; at least 0 and above 0 are allowed"
            )
        if form not in ("softmax", "sigmoid"):
            raise ValueError(f"LwF: form is {form!r}; use 'softmax' or 'sigmoid'")
        self.distill_weight, self.temperature, self.form = distill_weight, temperature, form
        self.scale_by_temperature, self.warmup_epochs = scale_by_temperature, warmup_epochs
        self.uses_old_logits = distill_weight > 0 or form == "sigmoid"
        self.teacher = Teacher()
        self.plain_first_task = form == "softmax"

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.form == "sigmoid":
            taught = self.teacher(batch.images).logits if self.teacher else None
            targets = lwf_mc_targets(batch.labels, output.logits.shape[1], taught)
            return {"bce": binary_cross_entropy(output.logits, targets)}
        terms = {"ce": self.classification_loss(output, batch)}
        if self.teacher and self.distill_weight and self.phase.name != WARMUP:
            target = self.teacher(batch.images).logits  # (batch, classes before this task)
            old = output.logits[:, : target.shape[1]]
            terms["distill"] = self.distill_weight * softmax_distillation(
                old, target, self.temperature, scale_by_temperature=self.scale_by_temperature
            )
        return terms

    def phases(self, task: Task) -> list[Phase]:
        warms_up = self.warmup_epochs > 0 and task.num_new > 0 and not task.is_first
        return [Phase(WARMUP, self.warmup_epochs), Phase()] if warms_up else [Phase()]

    def frozen(self) -> Iterable[nn.Module]:
        return [self.network.backbone] if self.phase.name == WARMUP else super().frozen()

    def trainable(self) -> Iterable[nn.Parameter]:
        return self.network.head.blocks[-1].parameters() if self.phase.name == WARMUP else super().trainable()

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.teacher.learn_from(self.network)
