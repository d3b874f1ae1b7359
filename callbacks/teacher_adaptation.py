"""Adapt Your Teacher: the normalisation statistics of a teacher adapt to the new data."""

import warnings
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer

from cl_lightning.callback import ContinualCallback
from cl_lightning.distributed import average_batch_statistics
from cl_lightning.memory import Teacher
from cl_lightning.models import batch_norms
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


class TeacherAdaptation(ContinualCallback):
    """Adapts the batch-normalisation statistics of a distillation teacher to the images of the new task.

    A teacher that normalises images of new classes by the statistics of old classes gives wrong targets. With mu_B and
    var_B the mean and variance of a channel over the batch and a the momentum of the layer, the teacher computes in
    training steps

        y = gamma (x - mu_B) / sqrt(var_B + eps) + beta,   mean <- (1 - a) mean + a mu_B,   var <- (1 - a) var + a var_B

    All weights are frozen, including gamma and beta (TA: Szatkowski et al., WACV 2024, arXiv:2308.09544). Outside of
    training steps the adapted ``mean`` and ``var`` are used. Only normalisation layers change their mode: dropout stays
    off.

    The teachers are the attribute ``teacher`` of the strategy (for example ``LwF``) and the attributes ``teacher`` of
    callbacks (``Distillation``). For a network without batch normalisation there is a warning, and no other effect.

    Each process normalises by its own share of the batch, as the student does. The running statistics are averaged over
    processes at the end of each epoch. Results with several processes therefore differ from results with one process,
    unless the backbone uses ``SyncBatchNorm``.

    Not implemented are the ablations of the paper (a teacher that is trained on the new data, before or during the
    task, as a whole or its normalisation alone) and the separate learning rate of the code for the warm-up of a new
    head (``LwF.warmup_epochs`` uses the learning rate of the task).
    """

    paper: str = "Szatkowski et al., WACV 2024, arXiv:2308.09544"

    def on_task_start(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        if not _teachers(trainer, strategy):
            raise ValueError(
                f"TeacherAdaptation: neither {type(strategy).__name__} nor a callback has a teacher; use a strategy "
                "with distillation, such as LwF, or add the callback Distillation"
            )
        if any(isinstance(part, Teacher) and part.reference for part in strategy.modules()):
            raise ValueError(
                f"TeacherAdaptation: remove the callback; the teacher of {type(strategy).__name__} is a reference for "
                "the drift of features and must not change"
            )
        if not any(batch_norms(strategy.network)):
            warnings.warn(
                f"TeacherAdaptation: {type(strategy.network.backbone).__name__} has no batch normalisation, so the "
                "callback has no effect",
                stacklevel=2,
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._set_mode(trainer, pl_module, training=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._set_mode(trainer, pl_module, training=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        inside = set(pl_module.modules())  # the task loop averages the statistics of these modules
        for teacher in _teachers(trainer, pl_module):
            if teacher not in inside:
                average_batch_statistics(teacher)

    @staticmethod
    def _set_mode(trainer: Trainer, strategy: object, *, training: bool) -> None:
        for teacher in _teachers(trainer, strategy):
            teacher.train_norms(training)


def _teachers(trainer: Trainer, strategy: object) -> list[Teacher]:
    owners = (strategy, *trainer.callbacks)  # type: ignore[attr-defined]
    found = (getattr(owner, "teacher", None) for owner in owners)
    return [teacher for teacher in found if isinstance(teacher, Teacher)]
