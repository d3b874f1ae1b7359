"""Calibration of few-shot prototypes (TEEN) for any strategy with class means."""

from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from cl_lightning.callback import ContinualCallback
from cl_lightning.checks import at_least, within
from cl_lightning.memory import calibrate_new
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


class PrototypeCalibration(ContinualCallback):
    """Calibrates the prototypes of new classes by the prototypes of similar classes of the first task.

    This is the calibration of TEEN (Wang et al., NeurIPS 2023, arXiv:2312.05229) at the end of a session, see
    :func:`cl_lightning.memory.calibrate_new`. ``ProtoCosine`` with this callback equals ``TEEN`` to the bit.

    Args:
        shift_weight: beta, weight of the base classes in a new prototype, in [0, 1].
        temperature: tau, inverse temperature of the softmax over base classes, at least 0; with 0 all base classes have
            the same weight.
    """

    paper: str = "Wang et al., NeurIPS 2023, arXiv:2312.05229"

    def __init__(self, *, shift_weight: float = 0.5, temperature: float = 16.0) -> None:
        within(self, "[0, 1]", shift_weight=shift_weight)
        at_least(self, 0, temperature=temperature)
        self.shift_weight, self.temperature = shift_weight, temperature

    def on_task_start(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        _ = strategy.prototypes  # raises here if the head has no prototypes

    def on_task_end(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        calibrate_new(strategy.prototypes, strategy.task_columns, beta=self.shift_weight, tau=self.temperature)
