"""Check that a method that states ``task_free`` learns from the samples alone."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from cl_lightning.batch import Batch, mixed_rows
from cl_lightning.data import ArraySource, SampleSource, TensorSource
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.stream import ClassIncremental, Online
from cl_lightning.testing.bench import run
from cl_lightning.testing.compare import trial


class OtherTasks(Callback):
    """Gives the samples of each training batch arbitrary task ids: 1 to 3, by their index, in a stream of one task."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        batch.tasks.copy_(mixed_rows(batch.indices) % 3 + 1)


def drifting(data: Callable[[], ContinualDataModule]) -> ContinualDataModule:
    """The data as a stream of one task, one pass in batches of 10 in the order of the classes."""
    module = data()
    module.scenario = Online(ClassIncremental(tasks=1), batch_size=10)
    source = module.source

    def by_class(*, train: bool) -> SampleSource:
        plain = source(train=train)
        order = np.argsort(plain.labels, kind="stable")
        samples, labels = plain.take(torch.from_numpy(order)).numpy(), np.asarray(plain.labels)[order]
        if samples.dtype == np.uint8:
            return TensorSource(samples, labels, class_names=list(plain.class_names))
        return ArraySource(samples, labels, kind=plain.kind, class_names=list(plain.class_names))  # type: ignore[arg-type]

    module.source = by_class  # type: ignore[method-assign]
    module.shuffles = lambda task: False  # type: ignore[method-assign]
    return module


def check_task_free(case: Any) -> None:
    """Training of a task-free method depends neither on task ids nor on the end of a task.

    On a stream of one task, the method ends with the same state whatever task ids the batches have, apart from the
    task ids in memories, and with the same predictions before and after the end of the task.
    """
    name, strategy = "task_free", case.reference.strategy
    assert strategy is not None
    if not strategy.traits.task_free:
        return
    plain = replace(case.subject, data=partial(drifting, case.subject.data), callbacks=tuple)
    expected = run(plain)
    assert expected.strategy is not None
    assert expected.strategy.image_shape is not None
    before = plain.factory()
    before.build(expected.strategy.image_shape)
    before.load_state_dict(next(state for place, state in expected.snapshots.items() if place.kind == "phase"))
    scores = [_scores(side.cpu()) for side in (before, expected.strategy)]
    case.same(name, "predictions before and after the end of the task", *scores)
    other = run(replace(plain, callbacks=lambda: (OtherTasks(),)))
    states = [
        {key: value for key, value in side.state.items() if not key.endswith(".tasks")} for side in (expected, other)
    ]
    case.same(name, "the state after training with other task ids", *states)


def _scores(strategy: Any) -> torch.Tensor:
    strategy.eval()
    images = trial(strategy, 2).to(strategy.device)
    with torch.no_grad():
        scores: torch.Tensor = strategy.predict(images)
    return scores
