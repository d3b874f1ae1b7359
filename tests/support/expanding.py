"""Strategies that add an extractor per task: states at the borders of phases, and one in the middle of a stream."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from cl_lightning.strategies.base import ExpandingReplay
from cl_lightning.strategy import Phase
from support.fakes import task_of
from support.runs import NormNet


def grown(cls: type[ExpandingReplay], tasks: int = 3, *, backbone: Any = NormNet, **options: Any) -> Any:
    """A strategy at the start of the last of some tasks of two classes each, in float64."""
    torch.manual_seed(0)
    strategy: Any = cls(backbone=backbone, **options)
    strategy.build((1, 8, 8))
    for index in range(tasks):
        begin(strategy, index)
        if index < tasks - 1:
            strategy.aux_head = strategy.extractor_head()  # as at the end of a task
    return strategy.double()


def begin(strategy: Any, index: int) -> None:
    """Begin a task of two classes."""
    strategy.task, strategy.phase = task_of(index), Phase()
    strategy.mark_columns(strategy.task)
    strategy.begin_task(strategy.task)


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of a state dict whose names begin with a prefix."""
    return {name: value for name, value in state.items() if name.startswith(prefix)}


class Watch(Callback):
    """Notes, by task and phase, the state at the first step and at the end, labels, and modes of the extractors."""

    def __init__(self) -> None:
        self.first: dict[Any, Any] = {}
        self.last: dict[Any, Any] = {}
        self.labels: dict[Any, list[Tensor]] = {}
        self.modes: dict[Any, list[bool]] = {}

    def on_train_batch_start(self, trainer: Any, strategy: Any, batch: Any, batch_idx: int) -> None:
        place = (strategy.task.index, strategy.phase.name)
        if place not in self.first:
            self.first[place] = {name: value.clone() for name, value in strategy.state_dict().items()}
        self.labels.setdefault(place, []).append(batch.labels)
        self.modes[place] = [extractor.training for extractor in strategy.network.backbone.extractors]

    def on_train_epoch_end(self, trainer: Any, strategy: Any) -> None:
        place = (strategy.task.index, strategy.phase.name)
        self.last[place] = {name: value.clone() for name, value in strategy.state_dict().items()}
