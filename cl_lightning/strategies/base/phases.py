"""Phases: a task is trained in one or several fits."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, Self, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from cl_lightning.checks import at_least, one_of
from cl_lightning.data import FeaturePool, LabelledRows

Interval = Literal["epoch", "step"]


@dataclass(frozen=True)
class PhaseOptions:
    """Options of a phase that a configuration may set: epochs, optimizer, schedule and batch size.

    Attributes:
        epochs: Number of epochs, at least 0; None for the number of the Trainer.
        optimizer: Builds the optimizer; None for the optimizer of the strategy.
        scheduler: Builds its schedule; None for the schedule of the strategy where ``optimizer`` is None too, else for
            a constant learning rate.
        batch_size: Rows per step of a phase on features, over all processes, at least 1; None for the batch size of the
            data module.
        interval: Whether ``scheduler`` is stepped after each ``epoch`` or after each optimizer ``step``; None for the
            interval of the strategy.
    """

    epochs: int | None = None
    optimizer: OptimizerCallable | None = None
    scheduler: LRSchedulerCallable | None = None
    batch_size: int | None = None
    interval: Interval | None = None

    def filled(self, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None = None) -> Self:
        """A copy with this optimizer and schedule as defaults; the options themselves if they have an optimizer."""
        if self.optimizer is not None:
            return self
        return replace(self, optimizer=optimizer, scheduler=self.scheduler or scheduler)

    def __post_init__(self) -> None:
        at_least(self, 0, epochs=self.epochs, optional=True)
        at_least(self, 1, batch_size=self.batch_size, optional=True)
        one_of(self, get_args(Interval), interval=self.interval, optional=True)


@dataclass(frozen=True)
class Phase:
    """One fit inside a task: what is trained, on what, and how.

    Attributes:
        name: Name of the phase in logs, in ``loop.phase_epochs`` and in checkpoints.
        options: Epochs, optimizer, schedule and batch size.
        trains: Returns the parameters that the phase trains, from which parameters of frozen modules are excluded; None
            for ``trainable`` of the strategy.
        freezes: Returns the modules that are frozen: in eval mode and without gradient; None for ``frozen`` of the
            strategy.
        samples: Chooses the samples that the phase trains on. Called with the columns of the available samples, int64
            ``(n,)``, and a mask of the samples that are from a memory, bool ``(n,)``; returns a mask, bool ``(n,)``, or
            None for all samples. Available are the samples of the task, followed by the samples of ``replay_memory``.
            Called on every process when the phase begins and when it is resumed. The result must be the same each time,
            so draw by seed and task.
        features: Makes the pool of features whose rows replace the images of the batches; the head alone is trained,
            and callbacks add no losses, since their losses are of images. Called on every process when the fit begins
            or is resumed, with the network on its device. The rows must be the same each time.
        labelled: Numbers of labelled samples of each step, in addition to the batch, which is then unlabelled; None for
            batches of samples as they come.
        unaugmented: Whether batches are not augmented, for a method with its own augmentation or none.
        on_memory: Whether the phase trains only on samples that the memory keeps from then on: a stream whose samples
            are seen once does not limit its epochs.
        needed: Called when the phase is about to begin; if False, the phase is skipped. None for True.
    """

    name: str = "train"
    options: PhaseOptions = field(default_factory=PhaseOptions)
    trains: Callable[[], Iterable[nn.Parameter]] | None = None
    freezes: Callable[[], Iterable[nn.Module]] | None = None
    samples: Callable[[Tensor, Tensor], Tensor | None] | None = None
    features: Callable[[], FeaturePool] | None = None
    labelled: LabelledRows | None = None
    unaugmented: bool = False
    on_memory: bool = False
    needed: Callable[[], bool] | None = None


def sigmoid_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with learning rate 0.02 and momentum 0.9, for the sigmoid cross-entropy that is summed over the classes.

    The code of iCaRL (Rebuffi et al., CVPR 2017) has the learning rate 2.0 for the mean over 100 classes.
    """
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
