"""Small runs through the task loop, and comparisons between them, for the tests of callbacks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.datamodules.digits import Digits
from cl_lightning.loop import LoopOptions, TaskLoop
from cl_lightning.models import MLP, Backbone
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.stream import ClassIncremental


class NormNet(Backbone):
    """One hidden layer with batch normalisation and dropout."""

    def __init__(self, image_shape: ImageShape, units: int = 16) -> None:
        super().__init__(image_shape)
        channels, height, width = image_shape
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * height * width, units),
            nn.BatchNorm1d(units),
            nn.ReLU(),
            nn.Dropout(0.2),
        )
        self.num_features = units

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def plain_net(image_shape: ImageShape) -> Backbone:
    return MLP(image_shape, hidden=(16,))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """With momentum and weight decay, which move weights that have no gradient."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


class StopAt(Callback):
    """Raises after a step of a task, as a crash does."""

    class CrashError(Exception):
        pass

    def __init__(self, task: int, batch: int) -> None:
        self.task, self.batch = task, batch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.task.index == self.task and batch_idx == self.batch:
            raise self.CrashError


def loop(
    strategy: ContinualStrategy,
    /,
    *callbacks: Callback,
    folder: Path | None = None,
    options: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    **trainer: Any,
) -> TaskLoop:
    """A loop over three tasks of the digits, with some seven steps per epoch."""
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    source = Digits(**{"scenario": ClassIncremental(sizes=[4, 3, 3]), "batch_size": 64, **(data or {})})
    return TaskLoop(
        Trainer(callbacks=list(callbacks), **{**settings, **trainer}),
        strategy,
        source,
        options=LoopOptions(**{"dry_run": False, **(options or {})}),  # tests count and record what hooks do
        run_dir=folder,
    )


def run(strategy: ContinualStrategy, /, *callbacks: Callback, **options: Any) -> TaskLoop:
    """Learn the stream."""
    made = loop(strategy, *callbacks, **options)
    made.fit()
    return made


def assert_same(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Equal to the bit: nested dicts of tensors and plain values."""
    assert first.keys() == second.keys()
    for key, value in first.items():
        other = second[key]
        if isinstance(value, Mapping):
            assert_same(value, other)
        elif isinstance(value, Tensor):
            assert value.dtype == other.dtype, key
            assert value.shape == other.shape, key
            # equal, where nan is equal to nan
            assert torch.equal(value.nan_to_num(), other.nan_to_num()), key
            assert torch.equal(value.isnan(), other.isnan()), key
        else:
            assert value == other, key


def assert_same_run(first: TaskLoop, second: TaskLoop) -> None:
    """The same network and the same accuracies, to the bit."""
    assert_same(first.strategy.network.state_dict(), second.strategy.network.state_dict())
    for mine, other in ((first.matrix.R_ci, second.matrix.R_ci), (first.matrix.R_ti, second.matrix.R_ti)):
        assert torch.equal(mine.nan_to_num(-1), other.nan_to_num(-1))


def assert_resumes(make: Callable[[], tuple[ContinualStrategy, list[Callback]]], folder: Path, **options: Any) -> None:
    """A run that crashes in the middle of task 1 and is resumed ends as an uninterrupted one."""
    strategy, callbacks = make()
    whole = run(strategy, *callbacks, **options)
    saving = {"save_every_n_steps": 2, "save_every_seconds": 0.0}
    strategy, crashed = make()
    broken = loop(strategy, *crashed, StopAt(1, 4), folder=folder, options=saving, **options)
    try:
        broken.fit()
    except StopAt.CrashError:
        pass
    else:
        raise AssertionError("the run did not crash")
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["cl_lightning"]["place"]
    assert saved["task"] == 1
    assert saved["running"]
    strategy, again = make()
    resumed = loop(strategy, *again, folder=folder, options=saving, **options)
    resumed.fit("last")
    assert_same_run(whole, resumed)
    for mine, other in zip(callbacks, again, strict=True):
        assert_same(mine.state_dict(), other.state_dict())
