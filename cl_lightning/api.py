"""The Python front door: ``fit`` learns a stream and returns a ``Run``, ``load`` gives a model that predicts.

    import cl_lightning as cl

    run = cl.fit(cl.ER(memory_size=500), cl.Digits(), epochs=5, seed=0)
    print(run.matrix)
    run.matrix.plot().savefig("matrix.pdf")
    model = cl.load(run.folder)
    model.predict(images)

The package gives all strategies, data modules, scenarios, backbones, heads and callbacks by name.
"""

import json
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor

from cl_lightning import report
from cl_lightning.batch import Batch, Draw
from cl_lightning.callbacks.stream_progress import StreamProgress
from cl_lightning.cli import trust
from cl_lightning.cli.arguments import complete
from cl_lightning.cli.commands import ContinualCLI
from cl_lightning.cli.prediction import find_images
from cl_lightning.cli.processes import process_arguments, quiet
from cl_lightning.data import FileSource, TensorSource
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.loop import LoopOptions, TaskLoop, reserved_folder, restore
from cl_lightning.loop import checkpoint as checkpoints
from cl_lightning.measures import AccuracyMatrix
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.stream import Stream

Images = str | Path | np.ndarray | Tensor | Sequence[Any]


class Run:
    """A finished run.

    Attributes:
        folder: Folder of its checkpoints, results and manifest.
        strategy: The trained strategy.
        matrix: Accuracies on each task after each task.
        stream: Tasks and classes.
        results: Content of ``results.json``.
    """

    def __init__(self, loop: TaskLoop) -> None:
        assert loop.run_dir is not None
        self.folder, self.strategy, self.matrix = loop.run_dir, loop.strategy, loop.matrix
        self.stream: Stream = loop.stream
        self.results: dict[str, Any] = loop.results()

    @property
    def measures(self) -> dict[str, float]:
        """Measures after the last task, by name, in [0, 1]."""
        return dict(self.results["measures"])

    def report(self, path: str | Path | None = None) -> Path:
        """Write the page of the run, by default ``report.html`` in its folder, and return its path."""
        return report.write([self.folder], Path(path) if path is not None else self.folder / "report.html")

    def __repr__(self) -> str:
        last = self.measures.get("average_accuracy", self.measures.get("task_aware/average_accuracy", float("nan")))
        method, score = type(self.strategy).__name__, self.results["score"]["title"]
        return f"Run({method}, {self.matrix.learned} tasks, last {score} {100 * last:.1f} %, {self.folder})"


def fit(
    strategy: ContinualStrategy,
    data: ContinualDataModule,
    *,
    epochs: int = 5,
    seed: int = 0,
    run_dir: str | Path | None = None,
    ckpt_path: str | Path | None = None,
    options: LoopOptions | None = None,
    callbacks: Iterable[Callback] = (),
    **trainer: Any,
) -> Run:
    """Learn a stream, as ``python -m cl_lightning fit`` does.

    Args:
        strategy: The method.
        data: Data and scenario.
        epochs: Epochs per task.
        seed: Seed of the run.
        run_dir: Folder of the run; None for the next number under ``runs/METHOD``, or the folder of ``ckpt_path``.
        ckpt_path: Checkpoint from which an interrupted run is resumed.
        options: Options of the loop.
        callbacks: Callbacks; a progress line is added, unless there is one or ``enable_progress_bar`` is False.
        trainer: Further options of Lightning's Trainer, such as ``devices=2``.

    Raises:
        ValueError: Before training, if the parts do not fit.
    """
    added = list(callbacks)
    if trainer.get("enable_progress_bar", True) and not any(isinstance(item, ProgressBar) for item in added):
        added.append(StreamProgress())
    chosen: dict[str, Any] = {
        "max_epochs": epochs,
        "logger": False,
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "callbacks": added,
    }
    quiet()
    built = Trainer(**{**chosen, **trainer})
    if run_dir is None and ckpt_path is not None:
        run_dir = Path(ckpt_path).resolve().parents[1]
    folder = reserved_folder(Path("runs") / type(strategy).__name__) if run_dir is None else Path(run_dir)
    loop = TaskLoop(built, strategy, data, options=options, run_dir=folder, seed=seed)
    loop.fit(ckpt_path)
    return Run(loop)


class Model:
    """A trained strategy that predicts on images as they come.

    Attributes:
        strategy: The strategy, in eval mode, on the CPU.
        class_names: Name of each class that it has learnt.
        image_shape: Channels, height and width of the images of the run; other sizes are resized.
    """

    def __init__(self, strategy: ContinualStrategy, data: ContinualDataModule, saved: dict[str, Any]) -> None:
        part = saved["cl_lightning"]
        strategy.on_load_checkpoint(dict(saved))
        trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        restore(strategy, trainer, saved)
        data.load_state_dict(saved.get(type(data).__qualname__, {}))
        seen = Stream.from_dict(json.loads(part["manifest"])).tasks[: strategy.task_columns.shape[0]]
        if not seen:
            raise ValueError("load: the checkpoint has seen no task yet")
        strategy.task = seen[-1]
        self.strategy, self._data = strategy.eval(), data
        self.class_names: tuple[str, ...] = tuple(part["class_names"][: strategy.task_columns.shape[1]])
        self.image_shape: tuple[int, ...] = tuple(part.get("raw_shape", strategy.image_shape))

    @torch.no_grad()
    def probabilities(self, images: Images, task: int | None = None) -> Tensor:
        """Probability of each class, float ``(N, classes)``.

        Args:
            images: A file or a folder, files, images ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)`` of 8 bits, or
                samples of the run's own shape.
            task: Index of the task of the images, for a method that makes use of it.
        """
        raw = self._samples(images)
        nothing = torch.zeros(len(raw), dtype=torch.int64)
        found = []
        for start in range(0, len(raw), 256):
            part = raw[start : start + 256]
            zeros = nothing[: len(part)]
            batch = self._data.finish(Batch(part, zeros, zeros, zeros, part, Draw.of(len(part), 0)), augment=False)
            tasks = () if task is None else (torch.full_like(zeros, task),)
            found.append(self.strategy.predict(batch.images, *tasks).float().softmax(dim=1))
        return torch.cat(found) if found else torch.zeros(0, len(self.class_names))

    def predict(self, images: Images, task: int | None = None) -> list[str]:
        """Names of the predicted classes; arguments as for :meth:`probabilities`."""
        return [self.class_names[column] for column in self.probabilities(images, task).argmax(dim=1).tolist()]

    def _samples(self, images: Images) -> Tensor:
        """Raw samples in the shape of the run."""
        if isinstance(images, str | Path) or (
            isinstance(images, Sequence) and images and all(isinstance(item, str | Path) for item in images)
        ):
            paths = find_images(Path(images))[0] if isinstance(images, str | Path) else [Path(item) for item in images]
            channels, height, _ = self.image_shape
            mode = "L" if channels == 1 else "RGB"
            files = FileSource(paths, [0] * len(paths), class_names=["?"], root=Path(), size=height, mode=mode)
            return files.take(torch.arange(len(paths)))
        values = images if isinstance(images, Tensor | np.ndarray) else np.stack([np.asarray(item) for item in images])
        if len(self.image_shape) != 3 or tuple(values.shape[1:]) == self.image_shape:
            return torch.as_tensor(values)
        source = TensorSource(values, [0] * len(values), class_names=["?"], name="predict")
        if source.images.shape[1] != self.image_shape[0]:
            raise ValueError(
                f"predict: images have {source.images.shape[1]} channels, the model takes {self.image_shape[0]}"
            )
        size = list(self.image_shape[1:])
        if list(source.images.shape[2:]) == size:
            return source.images
        scaled = torch.nn.functional.interpolate(source.images.float(), size=size, mode="bilinear", antialias=True)
        return scaled.round().clamp(0, 255).to(torch.uint8)

    def __repr__(self) -> str:
        return f"Model({type(self.strategy).__name__}, {len(self.class_names)} classes, images {self.image_shape})"


def load(
    path: str | Path,
    *,
    strategy: ContinualStrategy | None = None,
    data: ContinualDataModule | None = None,
    trust_checkpoint: bool = False,
) -> Model:
    """A model from the folder of a run, or from a checkpoint.

    Args:
        path: Folder of a run, or a ``.ckpt`` file.
        strategy: Strategy with the options of the run, for a run that was made in Python; the command line stores its
            configuration in the checkpoint.
        data: Data module whose normalisation is used, likewise.
        trust_checkpoint: Build whatever classes the checkpoint names, which can run any code.

    Raises:
        ValueError: If there is no checkpoint, or its configuration is missing or names foreign classes.
    """
    path = Path(path)
    file = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"load: there is no checkpoint at {file}; give the folder of a run, or a .ckpt file")
    saved = checkpoints.load(str(file))
    if strategy is not None and data is not None:
        return Model(strategy, data, dict(saved))
    if not saved["cl_lightning"].get("config"):
        raise ValueError(
            f"load: the run of {file} was made in Python, and its checkpoint has no configuration; give strategy and "
            "data with the options of the run"
        )
    quiet()
    arguments = ["test", "--ckpt_path", str(file), *([trust.FLAG] if trust_checkpoint else [])]
    completed, config = complete(arguments)
    guard = nullcontext() if trust_checkpoint else trust.only_allowed_imports(arguments)
    with process_arguments(completed), guard:
        cli = ContinualCLI(None if trust_checkpoint else config, str(file))
    return Model(cli.model, cli.datamodule, dict(saved))


__all__ = ["AccuracyMatrix", "Model", "Run", "fit", "load"]
