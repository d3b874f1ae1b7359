"""Predictions of a checkpoint: for image files, and accuracies on the test data of the tasks that it has seen."""

import csv
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image, ImageOps
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from cl_lightning.batch import Batch
from cl_lightning.data import FileSource, Plan, PlannedLoader, StreamLoader
from cl_lightning.data.images import IMAGE_SUFFIXES, pixels
from cl_lightning.data.sources import checked
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.escape_control import printable, spreadsheet_cell, spreadsheet_path
from cl_lightning.files import replaced
from cl_lightning.loop import restore
from cl_lightning.loop.checkpoint_parts import named
from cl_lightning.measures import AccuracyMatrix
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.stream import Stream


def predict_folder(
    trainer: Trainer,
    strategy: ContinualStrategy,
    datamodule: ContinualDataModule,
    saved: Mapping[str, Any],
    images: Path,
    output: Path,
    *,
    skip_unreadable: bool = False,
    task: int | None = None,
    path: str | Path | None = None,
) -> tuple[int, list[Path]]:
    """Classify image files and write a CSV file: path, predicted class, and the probability of each class.

    The training data of the checkpoint are not needed. The images are resized to the image size of the checkpoint.

    Args:
        trainer: Runs the prediction, on one device.
        strategy: Loads the weights of the checkpoint.
        datamodule: Normalises the images.
        saved: The checkpoint.
        images: A file, or a folder, which is searched recursively.
        output: The CSV file; written only if no error occurs.
        skip_unreadable: Leave out files that are not readable images.
        task: Index of the task that the images belong to, for a strategy that makes use of it; None where it is not
            known.
        path: Path of the checkpoint, for messages.

    Returns:
        Number of images, and the files that were left out.

    Raises:
        ValueError: If there is no image, an image cannot be read, or the checkpoint does not fit or has seen no task.
    """
    part = saved["cl_lightning"]
    paths, root = find_images(images)
    with named(path):
        strategy.on_load_checkpoint(dict(saved))
        restore(strategy, trainer, saved)
        datamodule.load_state_dict(saved.get(type(datamodule).__qualname__, {}))
        seen = Stream.from_dict(json.loads(part["manifest"])).tasks[: strategy.task_columns.shape[0]]
        names = part["class_names"][: strategy.task_columns.shape[1]]
        if not len(seen) == strategy.task_columns.shape[0] or not len(names) == strategy.task_columns.shape[1]:
            raise ValueError("its parts manifest, class_names and state_dict are of different streams")
    tasks = len(seen)
    if not tasks:
        raise ValueError("predict: the checkpoint has seen no task yet")
    if strategy.traits.task_ids == "needed" and task is None:
        raise ValueError(
            f"predict: {type(strategy).__name__} needs the task of the images; give --task, an index from 0 to "
            f"{tasks - 1}"
        )
    if task is not None and (strategy.traits.task_ids == "unused" or not 0 <= task < tasks):
        allowed = f"give an index from 0 to {tasks - 1}"
        if strategy.traits.task_ids == "unused":
            allowed = f"predictions of {type(strategy).__name__} do not depend on the task; leave it out"
        raise ValueError(f"predict: task is {task}; {allowed}")
    shape = part.get("raw_shape", strategy.image_shape)
    if shape is not None and len(shape) != 3:
        raise ValueError(
            f"predict: it classifies images, and the run learnt samples of shape {tuple(shape)}; call predict of the "
            "strategy in Python"
        )
    strategy.task = seen[-1]
    source = file_source(paths, root, shape, skip_unreadable=skip_unreadable)
    kept = set(source.paths)
    plan = Plan(
        torch.arange(len(source)),
        torch.full((len(source),), task or 0, dtype=torch.int64),
        batch_size=datamodule.eval_batch_size_for(strategy.image_shape or shape),
        shuffle=False,
    )
    loader = StreamLoader(source, torch.zeros(1, dtype=torch.int64), workers=datamodule.workers).over(plan)
    with replaced(output) as file:
        writer = _Writer(file, source.paths, names)
        trainer.callbacks.append(writer)  # type: ignore[attr-defined]
        try:
            trainer.predict(strategy, dataloaders=_NormalisedLoader(loader, datamodule), return_predictions=False)
        finally:
            trainer.callbacks.remove(writer)  # type: ignore[attr-defined]
    return len(source), [path for path in paths if path not in kept]


def find_images(images: Path) -> tuple[list[Path], Path]:
    """The image files of a folder and its sub-folders, sorted, and the folder; or a single file and its folder.

    Raises:
        ValueError: If there is no image.
    """
    if images.is_file():
        return [images], images.parent
    found = images.rglob("*") if images.is_dir() else ()
    paths = sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not paths:
        raise ValueError(f"predict: no images under {images}; known endings are {', '.join(IMAGE_SUFFIXES)}")
    return paths, images


def file_source(paths: list[Path], root: Path, shape: Sequence[int], *, skip_unreadable: bool) -> FileSource:
    """The files as images of shape ``(channels, height, width)``; each file is checked.

    Raises:
        ValueError: If a file cannot be read and is not to be skipped, or the number of channels is not 1 or 3.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise ValueError(f"predict: the network takes images of {channels} channels; files have 1 or 3")
    source = FileSource(
        paths,
        [0] * len(paths),
        class_names=["?"],
        root=root,
        size=height,
        mode="L" if channels == 1 else "RGB",
        load=None if height == width else partial(cover, height=height, width=width),
        skip_unreadable=skip_unreadable,
        name="predict",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*They are left out.*")  # the caller reports them
        return checked(source)


def cover(image: Image.Image, *, height: int, width: int) -> Tensor:
    """Scale an image until it covers ``(height, width)``, and crop the centre; uint8 ``(C, height, width)``."""
    return pixels(ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR))


class _Writer(Callback):
    """Writes the probabilities of each batch when it is predicted."""

    def __init__(self, file: TextIO, paths: list[Path], names: list[str]) -> None:
        names = [spreadsheet_cell(name) for name in names]
        self.rows, self.paths, self.names = csv.writer(file), iter(paths), names
        self.rows.writerow(["path", "prediction", *names])

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        best: list[int] = outputs.argmax(1).tolist()
        for row, column in zip(outputs.tolist(), best, strict=True):
            path = spreadsheet_path(str(next(self.paths)))
            self.rows.writerow([path, self.names[column], *(f"{value:.6f}" for value in row)])


class _NormalisedLoader:
    """Batches of a loader, normalised by the data module."""

    def __init__(self, loader: PlannedLoader, datamodule: ContinualDataModule) -> None:
        self.loader, self.datamodule = loader, datamodule

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        return (self.datamodule.finish(batch, augment=False) for batch in self.loader)


def show_row(matrix: AccuracyMatrix, stream: Stream, console: Console | None = None) -> None:
    """Print the accuracies of the last evaluation, one line per task."""
    console = console or Console()
    last = matrix.learned - 1
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("task", no_wrap=True)
    table.add_column("classes", ratio=1)
    for name in ("images", "all classes", "task known"):
        table.add_column(name, justify="right", no_wrap=True)
    for task in stream.tasks[: last + 1]:
        names = stream.names_of(task)
        classes = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        values = (float(values[last, task.index]) for values in (matrix.R_ci, matrix.R_ti))
        cells = (f"{100 * value:.1f}" if value == value else "" for value in values)
        name = "" if task.name == f"task {task.index}" else f" {printable(task.name)}"
        table.add_row(
            Text(f"{task.index}{name}"), Text(printable(classes)), str(int(matrix.totals[task.index])), *cells
        )
    console.print(f"accuracy in % after task {last}", style="italic", highlight=False)
    console.print(table)
    measures = matrix.measures(last)
    known = measures["task_aware/average_accuracy"]
    said = f"with the task known {100 * known:.1f} %"
    if (average := measures.get("average_accuracy")) is not None:
        said = f"{100 * average:.1f} %; {said}"
    console.print(f"average accuracy {said}", highlight=False)
