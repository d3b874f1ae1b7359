"""What a callback can add to a strategy beside Lightning's own hooks."""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from cl_lightning.batch import Batch
from cl_lightning.network import Output
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


class ContinualCallback(Callback):
    """Callback with the two moments that Lightning does not know: the start and the end of a task.

    Lightning's hooks belong to a fit, and a task may be several fits, or a fit that is resumed half-way. The two hooks
    here run once per task, whatever happens. State that must outlive a restart goes into ``state_dict``, as tensors
    and plain values: checkpoints are loaded with ``weights_only=True``.
    """

    paper: str = ""
    """Where the mechanism comes from, for the table of methods."""

    uses_old_logits: bool = False
    """Whether the loss that is added depends on the logits of earlier classes, so that their rows must be trained."""

    def on_task_start(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        """The head has grown and no step was taken yet; the network is on the CPU."""

    def on_task_end(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        """All phases and the strategy's own ``end_task`` are over; the network is on its device, in eval mode."""

    def bytes_kept(self) -> dict[str, int]:
        """Memory kept from task to task, in bytes by kind ("teachers", "importance", ...)."""
        return {}


@runtime_checkable
class AddsLosses(Protocol):
    """A callback with terms to add to the loss of each step."""

    def losses(self, strategy: "ContinualStrategy", batch: Batch, output: Output) -> dict[str, Tensor]:
        """Further terms, by name; ``output`` is the one forward pass of this step."""
        ...
