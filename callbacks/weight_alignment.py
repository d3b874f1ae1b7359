"""Weight Aligning for any strategy with a linear head."""

from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from cl_lightning.callback import ContinualCallback
from cl_lightning.models import align_head
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


class WeightAlignment(ContinualCallback):
    """Scales the new rows of the head to the mean norm of the old rows at the end of a task.

        w_c <- gamma w_c for new c,   gamma = mean_c ||w_c||, c old  /  mean_c ||w_c||, c new

    (WA: Zhao et al., CVPR 2020, arXiv:1911.07053). The alignment removes the bias of a classifier towards the latest
    classes if their rows have larger norms than the rows of old classes. This is the case with weight decay, and if old
    classes are still trained, by a memory or by distillation. The rows are scaled before the strategy chooses
    exemplars, computes statistics of features or copies a teacher: ``WA(align=False)`` with this callback equals ``WA``
    to the bit. Biases are unchanged. Needs a ``LinearHead``.
    """

    paper: str = "Zhao et al., CVPR 2020, arXiv:1911.07053"

    def on_task_start(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        if task.is_first:
            align_head(strategy.network.head)  # raises here if the head cannot be aligned; changes nothing yet

    def on_task_learnt(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        if task.num_new:
            align_head(strategy.network.head)
