"""Sequential fine-tuning: the lower bound of continual learning.

Each task is learnt by cross-entropy on its own data, from the weights of the task before:

    L(x, y) = CE(f(x), y)

over all classes seen so far (``visible="all"``: old classes are pushed down and forgotten at once), over those of the
current task (``"current"``: old rows of the head receive no gradient and are left out of the optimizer, so that neither
weight decay nor momentum moves them), or with the task known for each sample (``"task"``).
"""

from typing import ClassVar

from torch import Tensor

from cl_lightning.batch import Batch
from cl_lightning.network import Output
from cl_lightning.strategy import ContinualStrategy


class Finetune(ContinualStrategy):
    """Cross-entropy on the current task, nothing else."""

    family: ClassVar[str] = "baseline"
    paper: ClassVar[str] = "lower bound"
    losses_of_output: ClassVar[bool] = True

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}
