"""Predictions of a checkpoint: for new image files, and for the test data of the tasks that it has seen."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from cl_lightning.batch import Batch
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.loaders import Plan, PlannedLoader, StreamLoader
from cl_lightning.measures import AccuracyMatrix
from cl_lightning.sources import IMAGE_SUFFIXES, FileSource
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.stream import Stream


def predict_folder(
    trainer: Trainer,
    strategy: ContinualStrategy,
    datamodule: ContinualDataModule,
    saved: Mapping[str, Any],
    images: Path,
    output: Path,
) -> int:
    """Classify image files and write a CSV: path, predicted class, and the probability of each class.

    Args:
        trainer: Runs the pass.
        strategy: Takes over the weights of the checkpoint.
        datamodule: Says how images are normalised.
        saved: The checkpoint.
        images: A file, or a folder that is searched with its sub-folders.
        output: The CSV file.

    Returns:
        Number of images.

    Raises:
        ValueError: If there is no image, or one cannot be read.
    """
    if images.is_file():
        paths, root = [images], images.parent
    else:
        found = images.rglob("*") if images.is_dir() else ()
        paths, root = sorted(p for p in found if p.suffix.lower() in IMAGE_SUFFIXES), images
    if not paths:
        raise ValueError(f"predict: no images under {images}; known endings are {', '.join(IMAGE_SUFFIXES)}")
    strategy.on_load_checkpoint(dict(saved))
    strategy.load_state_dict(saved["state_dict"])
    assert strategy.image_shape is not None
    channels, height, _ = strategy.image_shape
    source = FileSource(
        paths, [0] * len(paths), class_names=["?"], root=root, size=height, mode="L" if channels == 1 else "RGB"
    )
    plan = Plan(
        torch.arange(len(paths)),
        torch.zeros(len(paths), dtype=torch.int64),
        batch_size=datamodule.eval_batch_size,
        shuffle=False,
    )
    loader = StreamLoader(source, torch.zeros(1, dtype=torch.int64), workers=datamodule.workers).over(plan)
    parts = trainer.predict(strategy, dataloaders=_Finished(loader, datamodule))
    assert parts is not None
    probabilities = torch.cat([torch.as_tensor(part) for part in parts])
    names = saved["cl_lightning"]["class_names"][: probabilities.shape[1]]
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "prediction", *names])
        for path, row in zip(paths, probabilities.tolist(), strict=True):
            best = max(range(len(row)), key=row.__getitem__)
            writer.writerow([str(path), names[best], *(f"{value:.6f}" for value in row)])
    return len(paths)


class _Finished:
    """Batches of a loader, normalised as the data module does it."""

    def __init__(self, loader: PlannedLoader, datamodule: ContinualDataModule) -> None:
        self.loader, self.datamodule = loader, datamodule

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        return (self.datamodule.finish(batch, augment=False) for batch in self.loader)


def show_row(matrix: AccuracyMatrix, stream: Stream, console: Console | None = None) -> None:
    """Print the accuracies of the last evaluation, one line per task."""
    last = matrix.learned - 1
    table = Table(title=f"accuracy in % after task {last}")
    for name in ("task", "classes", "images", "all classes", "task known"):
        table.add_column(name, justify="left" if name in ("task", "classes") else "right")
    for task in stream.tasks[: last + 1]:
        names = [stream.class_names[column] for column in task.columns]
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        values = (float(values[last, task.index]) for values in (matrix.R_ci, matrix.R_ti))
        cells = (f"{100 * value:.2f}" if value == value else "" for value in values)
        table.add_row(f"{task.index}  {task.name}", shown, str(int(matrix.totals[task.index])), *cells)
    console = console or Console()
    console.print(table)
    console.print(f"average accuracy {100 * matrix.measures(last)['average_accuracy']:.2f} %")
