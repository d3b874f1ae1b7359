"""Calibration of few-shot prototypes (TEEN) for any strategy with class means."""

from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from cl_lightning.hooks import ContinualCallback
from cl_lightning.prototypes import calibrate_new
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


class PrototypeCalibration(ContinualCallback):
    """Moves the prototypes of new classes towards those of similar classes of the first task.

    It is what TEEN (Wang et al., NeurIPS 2023, arXiv:2312.05229) does when a session ends, see
    :func:`cl_lightning.prototypes.calibrated`: ``ProtoCosine`` with it is ``TEEN``, to the bit. For cosines: a mean
    that is moved has a length of at most 1.

    Args:
        shift_weight: Share of the base classes in a new prototype, in [0, 1].
        temperature: How much the most similar of them outweigh the others, at least 0.
    """

    paper: str = "Wang et al., NeurIPS 2023, arXiv:2312.05229"

    def __init__(self, *, shift_weight: float = 0.5, temperature: float = 16.0) -> None:
        if not 0 <= shift_weight <= 1 or not temperature >= 0:
            raise ValueError(
                f"PrototypeCalibration: shift_weight={shift_weight}, temperature={temperature}; in [0, 1], at least 0"
            )
        self.shift_weight, self.temperature = shift_weight, temperature

    def on_task_start(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        _ = strategy.prototypes  # tells now that a head keeps none

    def on_task_end(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        calibrate_new(strategy.prototypes, strategy.task_columns, beta=self.shift_weight, tau=self.temperature)
