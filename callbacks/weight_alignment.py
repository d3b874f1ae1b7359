"""Weight Aligning for any strategy with a linear head."""

from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from cl_lightning.heads import align_head
from cl_lightning.hooks import ContinualCallback
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


class WeightAlignment(ContinualCallback):
    """Scales the new rows of the head to the length of the old ones when a task is learnt.

        w_c <- gamma w_c for new c,   gamma = mean_c ||w_c||, c old  /  mean_c ||w_c||, c new

    (WA: Zhao et al., CVPR 2020, arXiv:1911.07053). It undoes the bias of a classifier to the classes that it saw last
    where their rows came out longer than those of old ones: with weight decay, and where old classes are still trained,
    by a memory or by distillation. It comes before the strategy chooses exemplars, measures features or copies a
    teacher: ``WA(align=False)`` with it is ``WA``, to the bit. Biases stay. Needs a ``LinearHead``.
    """

    paper: str = "Zhao et al., CVPR 2020, arXiv:1911.07053"

    def on_task_start(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        if task.is_first:
            align_head(strategy.network.head)  # changes nothing yet; tells now that a head cannot be aligned

    def on_task_learnt(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        if task.num_new:
            align_head(strategy.network.head)
