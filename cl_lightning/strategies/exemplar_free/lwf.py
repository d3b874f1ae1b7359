"""Learning without Forgetting (Li & Hoiem, ECCV 2016, arXiv:1606.09282), and LwF.MC (Rebuffi et al., CVPR 2017).

The network f is distilled on the images of the new task from g, a frozen copy of the network after the previous task:

    L(x, y) = CE_new(f(x), y) + lambda * CE(softmax(g(x) / T), softmax(f_old(x) / T))                       softmax form

CE_new is over the classes of the new task; f_old(x) are the logits of f for the classes that g knows. The second term
is a cross-entropy without the factor T^2 (with the factor if ``scale_by_temperature``). lambda -> distill_weight,
T -> temperature. LwF.MC (iCaRL, arXiv:1611.07725, sec. 4.2, without exemplars) uses sigmoids over all classes instead,

    L(x, y) = sum_c BCE(sigmoid f_c(x), t_c),  t_c = sigmoid g_c(x) for old classes, 1[y = c] for new ones  sigmoid form

where the targets of old classes are the sigmoids of g instead of zeros, so that there is no lambda. The learning rate
2.0 in the code of iCaRL is for the mean over 100 classes; for this sum it is 0.02, the default of the sigmoid form.
Where the target is not one class, the distillation is ``target_distillation``: sigmoids of several labels, squared
differences of numbers, a softmax for each pixel.
Departs from the paper: one softmax is over all old classes, since no task id is given at test time; old rows of the
head are trained by the distillation (the survey framework of Masana et al. excludes them from the optimizer).
"""

from typing import Any, Literal

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from cl_lightning.checks import above, at_least, one_of
from cl_lightning.data import TARGET_KINDS, TARGETS
from cl_lightning.losses import binary_cross_entropy, lwf_mc_targets, softmax_distillation, target_distillation
from cl_lightning.memory import Teacher
from cl_lightning.strategies.base import LossClasses, sigmoid_optimizer
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Phase, PhaseOptions, Task, Traits

WARMUP = "warmup"


class LwF(ContinualStrategy):
    """Cross-entropy on the new task, and distillation of the old logits from the network before the task.

    Args:
        distill_weight: lambda, at least 0.
        temperature: T, above 0.
        form: ``softmax`` for LwF, ``sigmoid`` for LwF.MC.
        scale_by_temperature: Whether the distillation is multiplied by T^2.
        warmup_epochs: Number of epochs in which only the new rows of the head are trained, at the start of each task
            with new classes apart from the first task (the paper's warm-up step), at least 0.
        loss_classes: Classes of CE_new in the softmax form, see the base class.
        optimizer: As in the base class; None for SGD with momentum 0.9 and learning rate 0.05 in the softmax form,
            0.02 in the sigmoid form.
        kwargs: Options of the base class.
    """

    traits = Traits(family="exemplar-free", paper="Li & Hoiem, ECCV 2016, arXiv:1606.09282", targets=TARGET_KINDS)

    def __init__(
        self,
        *,
        distill_weight: float = 1.0,
        temperature: float = 2.0,
        form: Literal["softmax", "sigmoid"] = "softmax",
        scale_by_temperature: bool = False,
        warmup_epochs: int = 0,
        loss_classes: LossClasses = "current",
        optimizer: OptimizerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        default = sigmoid_optimizer if form == "sigmoid" else None
        super().__init__(loss_classes=loss_classes, optimizer=optimizer or default, **kwargs)
        at_least(self, 0, distill_weight=distill_weight, warmup_epochs=warmup_epochs)
        above(self, 0, temperature=temperature)
        one_of(self, ("softmax", "sigmoid"), form=form)
        self.distill_weight, self.temperature, self.form = distill_weight, temperature, form
        self.scale_by_temperature, self.warmup_epochs = scale_by_temperature, warmup_epochs
        self.traits = self.traits.but(uses_old_logits=distill_weight > 0 or form == "sigmoid")
        if form == "sigmoid":
            self.traits = self.traits.but(targets=("class",))
        self.teacher = Teacher()

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.form == "sigmoid":
            old = self.teacher(batch.images).logits if self.teacher else None  # (batch, classes before this task)
            mixed = lwf_mc_targets(batch.labels, output.logits.shape[1], old)
            return {"bce": binary_cross_entropy(output.logits, mixed)}
        terms = {"ce": self.classification_loss(output, batch)}
        if self.teacher and self.distill_weight and self.phase.name != WARMUP:
            before, target = self.teacher.pair(batch.images, output)  # (batch, classes before this task) each
            if (targets := batch.extra.get(TARGETS)) is not None:
                terms["distill"] = self.distill_weight * target_distillation(before, target, targets, self.temperature)
                return terms
            terms["distill"] = self.distill_weight * softmax_distillation(
                before, target, self.temperature, scale_by_temperature=self.scale_by_temperature
            )
        return terms

    def phases(self, task: Task) -> list[Phase]:
        warms_up = self.warmup_epochs > 0 and task.num_new > 0 and not task.is_first
        if not warms_up:
            return [Phase()]
        warmup = Phase(
            WARMUP,
            PhaseOptions(epochs=self.warmup_epochs),
            trains=lambda: self.network.head.blocks[-1].parameters(),
            freezes=lambda: [self.network.backbone],
        )
        return [warmup, Phase()]

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.teacher.learn_from(self.network)
