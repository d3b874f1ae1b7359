"""Callbacks with hooks for the start and the end of a task, in addition to Lightning's hooks."""

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, Trainer

from cl_lightning.measures import CostMeter
from cl_lightning.strategies.base import AddsLosses
from cl_lightning.strategy import ContinualStrategy, Task

__all__ = ["AddsLosses", "ContinualCallback", "Progress"]


@dataclass(frozen=True)
class Progress:
    """Progress of a run at the beginning of a phase, for progress bars.

    Attributes:
        tasks: Number of tasks, up to the task after which the run stops.
        phase: Index of the phase in its task.
        phases: Number of phases of the task.
        work: Samples times epochs of the phase; a row of stored features counts as 0.02 samples.
        ahead: Samples times epochs from this phase to the end of the run, if later tasks have the phases of this task.
        accuracy: Average accuracy after the last finished task, in [0, 1]; None during the first task.
    """

    tasks: int
    phase: int
    phases: int
    work: float
    ahead: float
    accuracy: float | None


class ContinualCallback(Callback):
    """Callback with hooks for the start and the end of a task.

    Lightning's hooks belong to a fit. A task may be several fits, or a fit that is resumed in the middle; the hooks
    of this class run once per task in every case. State that must outlive a restart goes into ``state_dict``, as
    tensors and plain values: checkpoints are loaded with ``weights_only=True``.
    """

    paper: str = ""
    """Source of the mechanism (authors, venue, arXiv id), for the table of methods."""

    uses_old_logits: bool = False
    """Whether the added loss depends on the logits of earlier classes, so that their rows of the head are trained."""

    observer_only: bool = False
    """Whether the callback only observes and changes nothing; such callbacks run after all others."""

    test_data_use: str | None = None
    """Use of test data in a few words, for the protocol of a run; None if no test data are used."""

    meter: CostMeter | None = None
    """Seconds spent by kind; set by the task loop."""

    progress: Progress | None = None
    """Progress of the run; set by the task loop."""

    def on_task_start(self, trainer: Trainer, strategy: ContinualStrategy, task: Task) -> None:
        """Called when the head has grown, before the first step of the task; the network is on the CPU."""

    def on_task_learnt(self, trainer: Trainer, strategy: ContinualStrategy, task: Task) -> None:
        """Called after all phases and before the strategy's ``end_task``. Change the network here, so that teachers
        and statistics are computed from the changed network. The network is on its device, in eval mode."""

    def on_task_end(self, trainer: Trainer, strategy: ContinualStrategy, task: Task) -> None:
        """Called after all phases and the strategy's ``end_task``; the network is on its device, in eval mode."""

    def bytes_kept(self) -> dict[str, int]:
        """Memory kept from task to task, in bytes by kind ("teachers", "importance", ...)."""
        return {}

    def results(self) -> dict[str, Any]:
        """Plain values for ``results.json``, which stores them under the class name in snake case."""
        return {}
