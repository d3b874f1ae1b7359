"""What a callback can add to a strategy beside Lightning's own hooks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from cl_lightning.batch import Batch
from cl_lightning.network import Output
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.cost import CostMeter
    from cl_lightning.strategy import ContinualStrategy


class ContinualCallback(Callback):
    """Callback with the moments that Lightning does not know: the start and the end of a task.

    Lightning's hooks belong to a fit, and a task may be several fits, or a fit that is resumed half-way. The hooks here
    run once per task, whatever happens. State that must outlive a restart goes into ``state_dict``, as tensors
    and plain values: checkpoints are loaded with ``weights_only=True``.
    """

    paper: str = ""
    """Where the mechanism comes from, for the table of methods."""

    uses_old_logits: bool = False
    """Whether the loss that is added depends on the logits of earlier classes, so that their rows must be trained."""

    looks_on: bool = False
    """Whether it changes nothing and only looks at what others did: such callbacks come after all others."""

    test_data_use: str | None = None
    """What it uses test data for, in a few words, for the protocol of a run; None if it does not."""

    meter: "CostMeter | None" = None
    """Where the seconds go; set by the task loop."""

    def on_task_start(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        """The head has grown and no step was taken yet; the network is on the CPU."""

    def on_task_learnt(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        """All phases are over and the strategy's ``end_task`` is still to come: what changes the network belongs here,
        so that teachers and statistics are those of the changed one. The network is on its device, in eval mode."""

    def on_task_end(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        """All phases and the strategy's own ``end_task`` are over; the network is on its device, in eval mode."""

    def bytes_kept(self) -> dict[str, int]:
        """Memory kept from task to task, in bytes by kind ("teachers", "importance", ...)."""
        return {}

    def results(self) -> dict[str, Any]:
        """What it found, as plain values for ``results.json``, where they lie under the class name in snake case."""
        return {}


@dataclass(frozen=True)
class Progress:
    """How far a run is at the beginning of a phase, for whoever shows it; ``strategy.progress``, set by the task loop.

    Attributes:
        tasks: Number of tasks, up to the one that the run stops after.
        phase: Index of the phase in its task.
        phases: Number of phases of the task.
        work: Samples, times epochs, that the phase trains on; features count as a fiftieth of an image.
        ahead: The same from here to the end of the run; later tasks are taken to have the phases of this one.
        accuracy: Average accuracy after the last finished task, in [0, 1]; None before.
    """

    tasks: int
    phase: int
    phases: int
    work: float
    ahead: float
    accuracy: float | None


@runtime_checkable
class AddsLosses(Protocol):
    """A callback with terms to add to the loss of each step."""

    def losses(self, strategy: "ContinualStrategy", batch: Batch, output: Output) -> dict[str, Tensor]:
        """Further terms, by name; ``output`` is the one forward pass of this step."""
        ...
