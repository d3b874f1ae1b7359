"""Distillation from the network before this task, for any strategy."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from cl_lightning.batch import Batch
from cl_lightning.callbacks._snapshot import Snapshot
from cl_lightning.hooks import ContinualCallback
from cl_lightning.losses import feature_distillation, sigmoid_distillation, softmax_distillation
from cl_lightning.network import Output
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


class Distillation(ContinualCallback):
    """Keeps what the network says of the current images near what it said before this task.

    A frozen copy g of the network after the previous task teaches the network f on the images of each step:

        logits, softmax   L = weight * CE(softmax(g_old(x) / T), softmax(f_old(x) / T))        term ``distill``
        logits, sigmoid   L = weight * sum_c BCE(sigmoid f_c(x), sigmoid g_c(x)), c old        term ``distill``
        features          L = weight * || f_features(x) - g_features(x) ||^2                   term ``distill_features``

    each the mean over the batch; f_old(x) are f's logits for the classes that g knows. lambda -> weight, T ->
    temperature. The first form is Learning without Forgetting (Li & Hoiem, ECCV 2016, arXiv:1606.09282):
    ``Finetune(visible="current")`` with it is ``LwF``, to the bit. The second is the old-class part of LwF.MC (Rebuffi
    et al., iCaRL, CVPR 2017, arXiv:1611.07725, sec. 4.2), which takes sigmoids for the new classes too: it is LwF.MC
    only beside a strategy whose own loss is the binary cross-entropy of the *new* columns; for the whole of it see
    ``LwF(form="sigmoid")``. Features: Smith et al. (CVPR-W 2023, arXiv:2203.17269), who join it with the logits' form:
    two of these callbacks, one per space, can be used together.

    On logits the rows of earlier classes are trained by this loss, so they are not left out of the optimizer even with
    ``visible="current"``. With weight 0 nothing is added, and the run is what it is without the callback, to the bit.

    Args:
        space: Where teacher and student are compared.
        form: Of the logits' comparison; features know one form only.
        weight: lambda, at least 0.
        temperature: T of the softmax form, above 0.
        scale_by_temperature: Multiply the softmax form by T^2 (Hinton et al., arXiv:1503.02531).
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
        if space not in ("logits", "features"):
            raise ValueError(f"Distillation: space is {space!r}; use 'logits' or 'features'")
        if form not in ("softmax", "sigmoid"):
            raise ValueError(f"Distillation: form is {form!r}; use 'softmax' or 'sigmoid'")
        if weight < 0 or temperature <= 0:
            raise ValueError(
                f"Distillation: weight={weight}, temperature={temperature}; at least 0 and above 0 are allowed"
            )
        self.space, self.form, self.weight = space, form, weight
        self.temperature, self.scale_by_temperature = temperature, scale_by_temperature
        self.uses_old_logits = space == "logits" and weight > 0
        self.teacher = Snapshot()

    @property
    def state_key(self) -> str:
        return self._generate_state_key(space=self.space)

    def losses(self, strategy: "ContinualStrategy", batch: Batch, output: Output) -> dict[str, Tensor]:
        if not self.teacher or self.weight == 0:
            return {}
        target = self.teacher(batch.images)
        if self.space == "features":
            return {"distill_features": self.weight * feature_distillation(output.features, target.features)}
        old = output.logits[:, : target.logits.shape[1]]  # (batch, classes before this task)
        if self.form == "sigmoid":
            return {"distill": self.weight * sigmoid_distillation(old, target.logits)}
        loss = softmax_distillation(
            old, target.logits, self.temperature, scale_by_temperature=self.scale_by_temperature
        )
        return {"distill": self.weight * loss}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.teacher.restore(pl_module.network)  # type: ignore[arg-type]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A fit that goes on half-way reads the checkpoint once more after `setup`.
        self.teacher.restore(pl_module.network)  # type: ignore[arg-type]
        self.teacher.to(pl_module.device)

    def on_task_end(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        self.teacher.forget()  # before the copy is made: one teacher at a time in memory
        self.teacher.learn_from(strategy.network)

    def bytes_kept(self) -> dict[str, int]:
        return {"teachers": self.teacher.num_bytes()}

    def state_dict(self) -> dict[str, Any]:
        state = self.teacher.state()
        return {"teacher": state} if state else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.teacher.keep(state_dict["teacher"])
