"""A dry run before training: a few images pass through everything that a run will use."""

import copy
import random
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from cl_lightning import distributed
from cl_lightning.callback import AddsLosses, ContinualCallback
from cl_lightning.checks import origin
from cl_lightning.data import Transform
from cl_lightning.data.labels import training_labels
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.loop.run import begin_task
from cl_lightning.measures import CostMeter
from cl_lightning.models import AdaptedBackbone, Backbone, Head, joined_rows
from cl_lightning.strategies.base.evaluation import check_monitor
from cl_lightning.strategy import ContinualStrategy, Phase
from cl_lightning.stream import Stream, Task
from cl_lightning.stream.draws import rank_in_group

_IMAGES = 2
_TASKS = 2  # a memory, a teacher or a second block of the head is first used in the second task
_MISFITS = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)
"""Errors of shapes, types and options."""
_LEFT = (AttributeError, KeyError, AssertionError, ArithmeticError, torch.OutOfMemoryError)
"""Errors that are left to the first step, with their traceback: mistakes in a program, or of the dry run itself."""
_LIBRARIES = ("torch", "torchvision", "timm", "lightning", "numpy")
_NEVER = 2**62


Epochs = Callable[[Task, Phase], int]


class MisfitError(ValueError):
    """A part of a run does not fit the images, the classes or another part."""


class _LeftError(Exception):
    """An error that is left to the first step."""


def dry_run(
    strategy: ContinualStrategy,
    datamodule: ContinualDataModule,
    trainer: Trainer,
    *,
    callbacks: Sequence[Any] = (),
    epochs: Epochs | None = None,
) -> None:
    """Run the first two tasks on copies, with two images of each: views, phases, heads, statistics, predictions.

    Strategy, callbacks and data module stay as they are to the bit, as do all random generators; processes do not
    communicate. A failure counts only if it occurs again with a batch of the usual size and two images of each class,
    because statistics of two images alone may be undefined. A strategy that cannot be copied gets no dry run, and an
    AttributeError, KeyError or AssertionError, or an error that a class of a user raises, is left to the first step,
    which raises it again with its traceback.

    Args:
        strategy: Strategy whose network is built, before its first task.
        datamodule: Data module with its stream.
        trainer: Trainer of the run.
        callbacks: Callbacks; those that add losses take part.
        epochs: Number of epochs of a phase of a task, for its schedule; None for 1.

    Raises:
        ValueError: If anything fails: in one line, with the class that does not fit and the shape of the images.
    """

    def attempt(images: int) -> None:
        copies = _copies(strategy, callbacks)
        if copies is not None:
            with _without_trace(trainer.strategy.root_device):
                _DryRun(*copies, datamodule, images, trainer, epochs or _one).run()

    try:
        attempt(_IMAGES)
    except MisfitError as error:
        classes = max(len(task.classes) for task in datamodule.stream.tasks[:_TASKS])
        try:
            attempt(max(datamodule.batch_size, 2 * classes))
        except MisfitError:
            raise error from error.__cause__
        except (_LeftError, *_LEFT):
            return
    except (_LeftError, *_LEFT):
        return


def _copies(strategy: ContinualStrategy, callbacks: Sequence[Any]) -> tuple[ContinualStrategy, list[Any]] | None:
    """Copies of the strategy and of the callbacks that add losses; None if they cannot be copied."""
    passes = strategy.passes
    of_run = {name: getattr(passes, name) for name in ("cache", "on_batch", "watch")}
    passes.cache, passes.on_batch, passes.watch = None, [], None
    adding = [callback for callback in callbacks if isinstance(callback, AddsLosses)]
    meters: list[Any] = [callback.meter for callback in adding if isinstance(callback, ContinualCallback)]
    try:
        return copy.deepcopy((strategy, adding), {id(meter): CostMeter() for meter in meters if meter is not None})
    except (RuntimeError, TypeError, NotImplementedError, AttributeError):
        return None
    finally:
        vars(passes).update(of_run)


class _DryRun:
    """The calls of the task loop and of Lightning's fit and test, on copies, with one step per phase."""

    def __init__(
        self,
        strategy: ContinualStrategy,
        callbacks: Sequence[Any],
        whole: ContinualDataModule,
        images: int,
        trainer: Trainer,
        epochs: Epochs,
    ) -> None:
        data = _few(whole, images)
        self.strategy, self.callbacks, self.data, self.epochs = strategy, callbacks, data, epochs
        self.whole = whole
        stage: Any = _Stage(trainer, strategy, data, callbacks)
        self.stage = stage
        self.device = trainer.strategy.root_device
        self.place, self.configures = "", False
        strategy.trainer = stage
        strategy.passes.brief = True
        data.trainer = stage
        for name in ("log", "log_dict"):
            setattr(strategy, name, _nothing)
        for module in strategy.modules():
            # The number of features of an adapted backbone is the one after its adaptation; its base is checked.
            if isinstance(module, Backbone | Head) and not isinstance(module, AdaptedBackbone):
                module.register_forward_hook(_check_output)

    def run(self) -> None:
        shape = tuple(self.data.image_shape)
        for task in self.data.stream.tasks[:_TASKS]:
            try:
                self._task(task)
            except (MisfitError, *_LEFT):
                raise
            except _MISFITS as error:
                if not _is_misfit(error):
                    raise _LeftError from error
                name, text = type(self.strategy).__name__, _in_words(error)
                if not self.configures:
                    is_said = isinstance(error, ValueError) and origin(error)[0] == "cl_lightning"  # in its own words
                    if is_said:
                        text = text.removeprefix(f"{name}: ").removeprefix(f"{name} ")
                    with_what = "with" if is_said else "does not fit"
                    text = f"{name} {with_what} images of shape {shape} ({self.place}): {text}"
                elif text.startswith(f"{name}: ") or not _names_an_object(text):
                    text = f"{name}: {self.place}: {text.removeprefix(f'{name}: ')}"
                raise MisfitError(text) from error

    def _task(self, task: Task) -> None:
        strategy, data = self.strategy, self.data
        data.begin(task, **strategy.traits.data_options(task.index))
        strategy.task = task
        self.place = f"task {task.index}, begin_task"
        strategy.cpu()
        begin_task(strategy, task, data.stream)
        self._call("on_task_start", task)
        for index, phase in enumerate(strategy.phases(task)):
            if phase.needed is None or phase.needed():
                self.place = f"task {task.index}, phase {phase.name!r}"
                self._phase(index, phase)
        self.place = f"task {task.index}, end_task"
        self.stage.training = False
        strategy.to(self.device).eval()
        self._hook("setup", "test")
        self._hook("on_test_start")
        with torch.no_grad():
            self._call("on_task_learnt", task)
            strategy.end_task(task)
            self._call("on_task_end", task)
            self.place = f"task {task.index}, predictions"
            strategy.evaluation.begin(confusion=True)
            for batch in data.test_dataloader():
                with self._precision():
                    strategy.evaluation.update(data.on_after_batch_transfer(batch.to(self.device), 0))
            strategy.evaluation.finish()
        self._hook("on_test_end")

    def _phase(self, index: int, phase: Phase) -> None:
        strategy, data, stage = self.strategy, self.data, self.stage
        strategy.cpu()
        task, epochs = strategy.task, self.epochs(strategy.task, phase)
        phase = replace(phase, options=replace(phase.options, epochs=epochs))
        stage.max_epochs, stage.estimated_stepping_batches = epochs, self._least_steps(task, phase, epochs)
        strategy.begin_phase(phase, 0, self.callbacks)
        data.begin_phase(
            index,
            strategy.replay_memory(),
            0,
            samples=phase.samples,
            features=phase.features,
            batch_size=phase.options.batch_size,
            labelled=phase.labelled,
            augments=not phase.unaugmented,
        )
        stage.training = True
        self._hook("setup", "fit")
        strategy.to(self.device)
        self.configures = True
        built = strategy.configure_optimizers()
        stage.optimizers = _optimizers(built)
        for name, monitor in _monitors(built):
            check_monitor(name, monitor, data.stream)
        self.configures = False
        self._hook("on_fit_start")
        stage.train_dataloader = data.train_dataloader()
        self._hook("on_train_start")
        self._hook("on_train_epoch_start")
        for batch in stage.train_dataloader:
            self._step(data.on_after_batch_transfer(batch.to(self.device), 0))
            break
        self._hook("on_train_epoch_end")
        self._hook("on_train_end")
        strategy.end_phase(phase)
        self._hook("on_fit_end")

    def _least_steps(self, task: Task, phase: Phase, epochs: int) -> int:
        """Least number of optimizer steps of a phase; 1 where it is not known before the phase."""
        trainer: Any = self.stage
        chosen = phase.samples is not None or phase.features is not None or phase.labelled is not None
        if chosen or trainer.limit_train_batches != 1.0:
            return 1
        stream, batch_size = self.whole.stream, self.whole.stream.batch_size or self.whole.batch_size
        labelled = len(stream.train[task.index]) - len(stream.unlabelled[task.index])
        batches = labelled // batch_size if self.whole.drop_last else -(-labelled // batch_size)
        steps = epochs * (batches // int(trainer.accumulate_grad_batches))
        return max(steps, 1)

    def _step(self, batch: Any) -> None:
        self._hook("on_train_batch_start", batch, 0)
        optimizers = self.stage.optimizers
        arguments: Any = (batch, 0)
        if not is_param_in_hook_signature(self.strategy.training_step, "batch_idx", min_args=2):
            arguments = (batch,)  # as Lightning does

        def closure() -> Any:
            with self._precision():
                output = self.strategy.training_step(*arguments)
            loss: Any = output["loss"] if isinstance(output, Mapping) else output
            for optimizer in optimizers:
                optimizer.zero_grad()
            if loss is not None:
                loss.backward()
            for optimizer in optimizers[:1]:
                self._hook("on_before_optimizer_step", optimizer)
            return loss

        optimizers[0].step(closure) if optimizers else closure()
        self.stage.global_step += 1
        self._hook("on_train_batch_end", None, batch, 0)

    def _hook(self, name: str, *args: Any) -> None:
        """Call a hook of Lightning, of the callbacks and of the strategy."""
        for callback in self.callbacks:
            getattr(callback, name)(self.stage, self.strategy, *args)
        getattr(self.strategy, name)(*args)

    def _call(self, name: str, task: Task) -> None:
        for callback in self.callbacks:
            if isinstance(callback, ContinualCallback):
                getattr(callback, name)(self.stage, self.strategy, task)

    def _precision(self) -> Any:
        return self.stage.precision_plugin.forward_context()


class _Stage:
    """What strategy, callbacks and data see of the Trainer. Further attributes are those of the Trainer, to be read."""

    def __init__(
        self, trainer: Trainer, strategy: ContinualStrategy, data: ContinualDataModule, callbacks: Sequence[Any]
    ) -> None:
        self._trainer = trainer
        self.lightning_module = self.model = strategy
        self.datamodule, self.callbacks = data, list(callbacks)
        self.current_epoch = self.global_step = 0
        self.num_training_batches = self.max_epochs = self.estimated_stepping_batches = 1
        self.world_size, self.global_rank, self.is_global_zero = 1, 0, True
        self.training = self.is_last_batch = True
        self.sanity_checking = False
        self.logger = DummyLogger()
        self.loggers: list[Any] = []
        self.log_every_n_steps = _NEVER
        self.optimizers: list[torch.optim.Optimizer] = []
        self.train_dataloader: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


def _few(datamodule: ContinualDataModule, count: int) -> ContinualDataModule:
    """A data module over the same sources, with at most ``count`` samples of each task, of as many classes as
    possible, and as many further samples without a label."""
    stream = datamodule.stream
    labels = {True: training_labels(datamodule), False: datamodule.samples(train=False).labels}

    def chosen(indices: np.ndarray, *, train: bool = True) -> np.ndarray:
        places, _ = rank_in_group(labels[train][indices])
        return np.sort(indices[np.argsort(places, kind="stable")[:count]])

    hidden = tuple(chosen(part) for part in stream.unlabelled)
    labelled = [np.setdiff1d(part, out) for part, out in zip(stream.train, stream.unlabelled, strict=True)]
    train = tuple(np.concatenate([chosen(part), out]) for part, out in zip(labelled, hidden, strict=True))
    train = _with_requested(stream, train, chosen)
    left = [np.isin(noisy, part) for noisy, part in zip(stream.noisy, train, strict=True)]
    few = copy.copy(datamodule)
    few.stream = replace(
        stream,
        train=train,
        val=tuple(chosen(part) for part in stream.val),
        test=tuple(chosen(part, train=False) for part in stream.test),
        unlabelled=hidden,
        noisy=tuple(part[rows] for part, rows in zip(stream.noisy, left, strict=True)),
        given=tuple(part[rows] for part, rows in zip(stream.given, left, strict=True)),
    )
    few._loaders, few.workers, few.drop_last, few.pin_memory = {}, 0, False, False
    return few


def _with_requested(
    stream: Stream, few: tuple[np.ndarray, ...], chosen: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, ...]:
    """Few samples of each task: requests ask for samples among them, and tasks have some of each request."""
    if all(task.learns for task in stream.tasks):
        return few
    asked = np.concatenate([chosen(stream.train[task.index]) for task in stream.tasks if not task.learns])
    learnt = [np.union1d(part, np.intersect1d(whole, asked)) for part, whole in zip(few, stream.train, strict=True)]
    pool = np.concatenate([learnt[task.index] for task in stream.tasks if task.learns])
    return tuple(
        learnt[task.index] if task.learns else np.intersect1d(stream.train[task.index], pool) for task in stream.tasks
    )


@contextmanager
def _without_trace(device: torch.device) -> Iterator[None]:
    """Restore all random generators at the end; the processes are on their own, and nothing warns."""
    python, arrays = random.getstate(), np.random.get_state()
    cuda = [device] if device.type == "cuda" else []
    modes = torch.is_grad_enabled()
    try:
        with (
            torch.random.fork_rng(devices=cuda),
            torch.enable_grad(),
            distributed.alone(),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        torch.set_grad_enabled(modes)
        random.setstate(python)
        np.random.set_state(arrays)
        if cuda:
            torch.cuda.empty_cache()


def _check_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of backbones and heads: one vector per image, and one logit per class."""
    rows = len(args[0]) + joined_rows(module) if args and isinstance(args[0], Tensor) else None
    name, images = type(module).__name__, tuple(args[0].shape) if rows is not None else "unknown"
    if isinstance(module, Head):
        width, what, remedy = module.num_columns, "logits", "return one logit per class"
    else:
        width, what = module.num_features, "features"  # type: ignore[assignment]
        remedy = f"return a tensor (images, {width}), or set num_features to its width"
    found = f"{type(output).__name__}"
    if isinstance(output, Tensor):
        dimensions = 4 if getattr(module, "for_pixels", False) else 2
        if output.dim() == dimensions and output.shape[1] == width and rows in (None, len(output)):
            if output.is_floating_point():
                return
            found = f"{output.dtype}"
        else:
            found = f"a tensor of shape {tuple(output.shape)}"
    elif isinstance(output, Sequence):
        found += f" of {', '.join(_described(part) for part in output)}"
    elif isinstance(output, Mapping):
        found += f" of {', '.join(f'{key!r}: {_described(part)}' for key, part in output.items())}"
    raise MisfitError(
        f"{name}: {remedy}; for {'images' if what == 'features' else 'features'} of shape {images} its forward returns "
        f"{found}, and {what} of shape {(rows or 'images', width)} are needed"
    )


def _described(part: Any) -> str:
    return str(tuple(part.shape)) if isinstance(part, Tensor) else type(part).__name__


def _optimizers(built: Any) -> list[torch.optim.Optimizer]:
    """The optimizers in a result of ``configure_optimizers``."""
    if isinstance(built, torch.optim.Optimizer):
        return [built]
    if isinstance(built, Mapping):
        return _optimizers(built.get("optimizer"))
    if isinstance(built, Sequence):
        return [found for part in built for found in _optimizers(part)]
    return []


def _monitors(built: Any) -> Iterator[tuple[str, str]]:
    """Names of the schedules that follow a metric, and the metrics, in a result of ``configure_optimizers``."""
    if isinstance(built, Mapping):
        scheduler, monitor = built.get("scheduler"), built.get("monitor")
        if isinstance(scheduler, ReduceLROnPlateau) and isinstance(monitor, str):
            yield type(scheduler).__name__, monitor
        yield from _monitors(built.get("lr_scheduler"))
    elif isinstance(built, Sequence):
        for part in built:
            yield from _monitors(part)


def _one(task: Task, phase: Phase) -> int:
    return 1


def _is_misfit(error: BaseException) -> bool:
    """Whether parts do not fit: messages of this package, and errors of libraries and of tensor operations.

    An error that a class of a user raises, or a function of Python in this package, is a mistake in a program.
    """
    package, is_raised = origin(error)
    if package in _LIBRARIES:
        return True
    if is_raised or isinstance(error, ValueError):
        return isinstance(error, ValueError) and (package, is_raised) == ("cl_lightning", True)
    return isinstance(error, RuntimeError) or package == "cl_lightning"


def _in_words(error: BaseException) -> str:
    """An error in one line: the object in which it occurred, its type unless its message is made for readers."""
    text = " ".join(str(error).split()) or type(error).__name__
    frames = list(traceback.walk_tb(error.__traceback__))
    owner = next((type(found).__name__ for frame, _ in reversed(frames) if (found := _owner(frame)) is not None), "")
    if isinstance(error, ValueError) and _is_ours(frames[-1][0]):
        return text if not owner or _names_an_object(text) else f"{owner}: {text}"
    frame, line = next(((f, n) for f, n in reversed(frames) if not _is_library(f)), frames[-1])
    where = f"{Path(frame.f_code.co_filename).name}, line {line}"
    return f"{owner + ': ' if owner else ''}{type(error).__name__}: {text} ({where})"


def _names_an_object(text: str) -> bool:
    return re.match(r"\w+: ", text) is not None


def _owner(frame: FrameType) -> Any:
    found = frame.f_locals.get("self")
    return found if isinstance(found, Backbone | Head | Transform | ContinualStrategy | AddsLosses) else None


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("cl_lightning.")


def _is_library(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES


def _nothing(*_: Any, **__: Any) -> None: ...
