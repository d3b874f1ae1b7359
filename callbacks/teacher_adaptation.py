"""Adapt Your Teacher: normalisation statistics of the teacher follow the new data."""

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from cl_lightning.distributed import average_batch_statistics
from cl_lightning.hooks import ContinualCallback
from cl_lightning.stream import Task
from cl_lightning.teacher import Teacher

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


class TeacherAdaptation(ContinualCallback):
    """Lets the batch normalisation of a distillation teacher adapt to the images of the new task.

    A teacher that normalises images of new classes by the statistics of old ones gives wrong targets. With mu_B, var_B
    the mean and variance of a channel over the batch at hand, a the layer's momentum, the teacher computes during
    training

        y = gamma (x - mu_B) / sqrt(var_B + eps) + beta,   mean <- (1 - a) mean + a mu_B,   var <- (1 - a) var + a var_B

    with all its weights, gamma and beta among them, frozen (TA: Szatkowski et al., WACV 2024, arXiv:2308.09544).
    Outside of training steps the adapted ``mean`` and ``var`` are used. Dropout stays off: only normalisation layers
    change mode.

    The teachers are the attribute ``teacher`` of the strategy (``LwF`` and its kin) and those of the callbacks
    (``Distillation``). Networks without batch normalisation are left as they are, with a warning.

    Each process normalises by its own share of the batch, as the student does; the running statistics are averaged over
    processes at the end of each epoch, so with several of them results differ from those of one, unless the backbone
    uses ``SyncBatchNorm``.

    The paper's ablations (a teacher that is trained on the new data, before or meanwhile, as a whole or its
    normalisation alone) are not here, nor is the learning rate of its own that the code gives the warm-up of a new head
    (``LwF.warmup_epochs`` has that of the task).
    """

    paper: str = "Szatkowski et al., WACV 2024, arXiv:2308.09544"

    def on_task_start(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        if not _teachers(trainer, strategy):
            raise ValueError(
                f"TeacherAdaptation: neither {type(strategy).__name__} nor a callback has a teacher; use a strategy "
                "that distils, such as LwF, or add the callback Distillation"
            )
        if strategy.teacher_measures:
            raise ValueError(
                f"TeacherAdaptation: the teacher of {type(strategy).__name__} measures how features drift and must "
                "stay what it was; leave the callback out"
            )
        if not any(_layers(strategy.network)):
            warnings.warn(
                f"TeacherAdaptation: {type(strategy.network.backbone).__name__} has no batch normalisation, so there "
                "is nothing to adapt",
                stacklevel=2,
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._set_mode(trainer, pl_module, training=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._set_mode(trainer, pl_module, training=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        inside = set(pl_module.modules())  # whose statistics the task loop averages
        for teacher in _teachers(trainer, pl_module):
            if teacher not in inside:
                average_batch_statistics(teacher)

    @staticmethod
    def _set_mode(trainer: Trainer, strategy: object, *, training: bool) -> None:
        for teacher in _teachers(trainer, strategy):
            for layer in _layers(teacher):
                layer.training = training


def _teachers(trainer: Trainer, strategy: object) -> list[Teacher]:
    owners = (strategy, *trainer.callbacks)  # type: ignore[attr-defined]
    found = (getattr(owner, "teacher", None) for owner in owners)
    return [teacher for teacher in found if isinstance(teacher, Teacher)]


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    return (layer for layer in module.modules() if isinstance(layer, _BatchNorm))
