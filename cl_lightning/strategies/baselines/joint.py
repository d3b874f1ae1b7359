"""Joint training: the upper bound, which keeps all data.

At each task the network is trained by cross-entropy on the union of the data of all tasks so far. With ``from_scratch``
it is built anew at every task, so that each row of the accuracy matrix is that of ordinary training; else it goes on
from the weights of the task before ("incremental joint" of the survey by Masana et al., TPAMI 2022, arXiv:2010.15277).
The number of epochs per task is fixed, so later tasks take more steps.
"""

from typing import Any, ClassVar

from torch import Tensor

from cl_lightning.batch import Batch
from cl_lightning.network import Output
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.stream import Task


class Joint(ContinualStrategy):
    """Cross-entropy on the data of all tasks so far.

    Args:
        from_scratch: Build the network anew at each task instead of going on with the one before.
        kwargs: Of the base.
    """

    family: ClassVar[str] = "baseline"
    paper: ClassVar[str] = "upper bound"
    needs_all_data: ClassVar[bool] = True
    losses_of_output: ClassVar[bool] = True

    def __init__(self, *, from_scratch: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.visible == "current":
            raise ValueError("Joint: visible is 'current', but it trains on all tasks; use 'all' or 'task'")
        self.from_scratch = from_scratch

    def begin_task(self, task: Task) -> None:
        if self.from_scratch and not task.is_first:
            assert self.image_shape is not None
            sizes = self.network.head.block_sizes()
            self.build(self.image_shape)
            for size in sizes:
                self.network.head.grow(size)
        super().begin_task(task)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}
