"""Knowledge distillation from the network before the task, for any strategy."""

from typing import TYPE_CHECKING, Literal

from lightning.pytorch import Trainer
from torch import Tensor

from cl_lightning.batch import Batch
from cl_lightning.callbacks._snapshot import Taught
from cl_lightning.checks import above, at_least, one_of
from cl_lightning.losses import feature_distillation, sigmoid_distillation, softmax_distillation
from cl_lightning.models import Output
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


class Distillation(Taught):
    """Distillation of logits or features on the current images, from the network before the task.

    With f the network and g a frozen copy of the network after the previous task, one of these terms is added to the
    loss:

        logits, softmax   L = weight * CE(softmax(g_old(x) / T), softmax(f_old(x) / T))        term ``distill``
        logits, sigmoid   L = weight * sum_c BCE(sigmoid f_c(x), sigmoid g_c(x)), c old        term ``distill``
        features          L = weight * || f_features(x) - g_features(x) ||^2                   term ``distill_features``

    Each term is the mean over the batch. f_old(x) and g_old(x) are the logits for the classes that g knows.
    lambda -> weight, T -> temperature. The first form is Learning without Forgetting (Li & Hoiem, ECCV 2016,
    arXiv:1606.09282): ``Finetune(loss_classes="current")`` with this callback equals ``LwF`` to the bit. The second
    form is the old-class part of LwF.MC (Rebuffi et al., iCaRL, CVPR 2017, arXiv:1611.07725, sec. 4.2). LwF.MC uses
    sigmoids for the new classes too, so the callback gives LwF.MC only if the loss of the strategy is the binary
    cross-entropy of the *new* columns; ``LwF(form="sigmoid")`` is the complete method. Distillation of features is from
    Smith et al. (CVPR-W 2023, arXiv:2203.17269), who combine it with distillation of logits: use two of these
    callbacks, one per space.

    With ``space="logits"`` the loss trains the rows of earlier classes, so they are in the optimizer even with
    ``loss_classes="current"``. With weight 0 no term is added, and the run equals the run without the callback to the
    bit.

    Args:
        space: Outputs that are distilled: ``logits`` or ``features``.
        form: Form of the distillation of logits: ``softmax`` or ``sigmoid``; ignored for features.
        weight: lambda, at least 0.
        temperature: T of the softmax form, above 0.
        scale_by_temperature: Whether the softmax form is multiplied by T^2 (Hinton et al., arXiv:1503.02531).
    """

    paper: str = "Li & Hoiem, ECCV 2016, arXiv:1606.09282"

    def __init__(
        self,
        *,
        space: Literal["logits", "features"] = "logits",
        form: Literal["softmax", "sigmoid"] = "softmax",
        weight: float = 1.0,
        temperature: float = 2.0,
        scale_by_temperature: bool = False,
    ) -> None:
        super().__init__()
        one_of(self, ("logits", "features"), space=space)
        one_of(self, ("softmax", "sigmoid"), form=form)
        at_least(self, 0, weight=weight)
        above(self, 0, temperature=temperature)
        self.space, self.form, self.weight = space, form, weight
        self.temperature, self.scale_by_temperature = temperature, scale_by_temperature
        self.uses_old_logits = space == "logits" and weight > 0

    @property
    def state_key(self) -> str:
        return self._generate_state_key(space=self.space)

    def losses(self, strategy: "ContinualStrategy", batch: Batch, output: Output) -> dict[str, Tensor]:
        if not self.teacher or self.weight == 0:
            return {}
        if self.space == "features":
            before = self.teacher(batch.images).features
            return {"distill_features": self.weight * feature_distillation(output.features, before)}
        old, target = self.teacher.pair(batch.images, output)  # (batch, classes before this task) each
        if self.form == "sigmoid":
            return {"distill": self.weight * sigmoid_distillation(old, target)}
        loss = softmax_distillation(old, target, self.temperature, scale_by_temperature=self.scale_by_temperature)
        return {"distill": self.weight * loss}

    def on_task_end(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        self.teacher.forget()  # before the copy is made, so that one teacher at a time is in memory
        self.teacher.learn_from(strategy.network)
