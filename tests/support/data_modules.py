"""A small data module, runs with it, and folders of images, for tests of data modules."""

import copy
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from lightning.pytorch import Trainer
from PIL import Image

from cl_lightning.data import (
    DecodedSource,
    FileSource,
    TensorSource,
)
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.datamodules.folder import ImageFolder
from cl_lightning.loop import LoopOptions, TaskLoop
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.stream import Stream
from support import ROOT

EXPERIMENTS = ROOT / "experiments" / "data"


class Toy(ContinualDataModule):
    """80 training and 20 test images of 4 classes, told apart by their brightness."""

    mean: ClassVar[tuple[float, ...]] = (0.5,)
    std: ClassVar[tuple[float, ...]] = (0.25,)

    def source(self, *, train: bool) -> TensorSource:
        chance, count = np.random.default_rng(int(train)), 80 if train else 20
        labels = np.arange(count) % 4
        noise = chance.integers(0, 40, (count, 1, 6, 6))
        images = (labels[:, None, None, None] * 60 + noise).astype(np.uint8)
        return TensorSource(images, labels, class_names=["a", "b", "c", "d"], name="toy")


def begun(data: ContinualDataModule, task: int = 0, seed: int = 0, **options: Any) -> ContinualDataModule:
    """The data module at the start of a task."""
    if not hasattr(data, "stream"):
        data.make_stream(seed)
    data.begin(data.stream.tasks[task], **options)
    data.begin_phase(0, None, 0)
    return data


def loop(data: ContinualDataModule, folder: Path | None, epochs: int = 2, **options: Any) -> TaskLoop:
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    return TaskLoop(trainer, Finetune(), data, run_dir=folder, options=LoopOptions(**options))


def image(value: int, size: tuple[int, int] = (8, 8), seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 30, (size[1], size[0], 3))
    return Image.fromarray((value + noise).astype(np.uint8))


def class_folder(root: Path, name: str, count: int = 12, value: int = 60) -> None:
    (root / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image(value, seed=index).save(root / name / f"{index:03}.png")


def names_of(data: ImageFolder, *, train: bool) -> set[str]:
    source = data.samples(train=train)
    files = source.origin if isinstance(source, DecodedSource) else source
    assert isinstance(files, FileSource)
    return {path.relative_to(data.root).as_posix() for path in files.paths}


def arrays(**changes: Any) -> dict[str, Any]:
    chance = np.random.default_rng(0)
    whole = {
        "x_train": chance.integers(0, 256, (20, 5, 5, 3), dtype=np.uint8),
        "y_train": (np.arange(20) % 4).astype(np.uint8),
        "x_test": chance.integers(0, 256, (8, 5, 5, 3), dtype=np.uint8),
        "y_test": np.arange(8) % 4,
        "class_names": np.array(["a", "b", "\u00fc", "d"]),
        "yc_train": np.arange(20) % 4 // 2,
        "yc_test": np.arange(8) % 4 // 2,
        "coarse_names": np.array([b"left", b"right"]),
    }
    whole.update(changes)
    return {key: value for key, value in whole.items() if value is not None}


def again(stream: Stream) -> Stream:
    return Stream.from_dict(copy.deepcopy(stream.to_dict()))
