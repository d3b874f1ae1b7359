"""The task loop: one Trainer learns a stream, task after task, and can be stopped and resumed anywhere in it."""

import json
import time
import warnings
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn

from cl_lightning import checkpoint as checkpoints
from cl_lightning import distributed, results, sealed
from cl_lightning.batch import Batch, mix
from cl_lightning.cost import CostMeter
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.feature_cache import FeatureCache
from cl_lightning.finite import FiniteLoss
from cl_lightning.hooks import ContinualCallback, Progress
from cl_lightning.lean import install as make_lean
from cl_lightning.live_views import LiveViews
from cl_lightning.loaders import FeatureLoader, PlannedLoader
from cl_lightning.loop_setup import LoopOptions, check_phases, check_trainer, check_watched
from cl_lightning.measures import AccuracyMatrix
from cl_lightning.network import Network
from cl_lightning.stopping import Interrupted, StopRequest
from cl_lightning.strategy import ContinualStrategy, Phase
from cl_lightning.stream import Stream, Task


@dataclass(frozen=True)
class Place:
    """How far a stream is learnt.

    Attributes:
        task: Index of the task.
        phase: Index of its phase; the number of phases when all are over and ``end_task`` is due.
        running: Whether the phase has begun, so that its fit is to be resumed rather than started.
        origin: Epoch of the Trainer at which the phase began.
        done: Whether the task is over and evaluated.
    """

    task: int = 0
    phase: int = 0
    running: bool = False
    origin: int = 0
    done: bool = False


class TaskLoop:
    """Learns a stream with one Trainer.

    Each task is prepared (the head grows), learnt in one fit per phase, closed (statistics, snapshots) and evaluated on
    the test data of all tasks so far in one pass; then a checkpoint and the results are written.

    Args:
        trainer: The one Trainer; its ``max_epochs`` are epochs per task.
        strategy: What learns.
        datamodule: What serves the stream.
        options: How the stream is gone through.
        run_dir: Folder for checkpoints and results; None to write nothing.
        seed: Of everything that is drawn.
        config: The configuration as YAML, kept in checkpoints and results.

    Raises:
        ValueError: If the Trainer is set up in a way that a stream cannot be learnt with.
    """

    def __init__(
        self,
        trainer: Trainer,
        strategy: ContinualStrategy,
        datamodule: ContinualDataModule,
        *,
        options: LoopOptions | None = None,
        run_dir: str | Path | None = None,
        seed: int = 0,
        config: str = "",
    ) -> None:
        self.trainer, self.strategy, self.datamodule = trainer, strategy, datamodule
        self.options = options or LoopOptions()
        self._files = checkpoints.CheckpointFiles(self.options.keep_last)
        self.run_dir = Path(run_dir) if run_dir is not None else None
        self.seed, self.config = seed, results.without_secrets(config)
        self.epochs = check_trainer(trainer, self.options)
        trainer.strategy.checkpoint_io = self._files
        self.place = Place()
        self.matrix = AccuracyMatrix()
        self.measured: list[dict[str, float]] = []  # of each finished task, kept by ``results.collect``
        self.meter = CostMeter()
        self.fingerprints: list[str] = []
        self.stream: Stream
        self.started = False  # whether a step was taken, or a task closed
        self._phases: list[Phase] = []
        self._feature_cache: FeatureCache | None = None
        if self.options.feature_cache is not None:
            folder = None if self.options.feature_cache == "memory" else self.options.feature_cache
            self._feature_cache = FeatureCache(folder, int(self.options.feature_cache_gb * 1e9))
        self._last_save = time.monotonic()
        self._driver = _Driver(self)
        self.stop_request = StopRequest(trainer)
        self.views = LiveViews(self)
        self.finite = FiniteLoss(self.options.nan_loss) if self.options.nan_loss != "ignore" else None
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.append(self.views)
        # Those that only look on come last, to see what the others have done in the same hook.
        callbacks.sort(key=lambda callback: isinstance(callback, ContinualCallback) and callback.looks_on)
        own = [self._driver] if self.finite is None else [self._driver, self.finite]
        callbacks[:0] = own  # before all others, see _Driver
        self.own_callbacks = (*own, self.views)
        for callback in callbacks:
            if isinstance(callback, ContinualCallback):
                callback.meter = self.meter
        # Values written in no_grad mode can take part in later gradients; those of inference mode cannot.
        trainer.test_loop.inference_mode = trainer.validate_loop.inference_mode = False
        make_lean(trainer)

    # ------------------------------------------------------------------ what a user calls

    def fit(self, ckpt_path: str | Path | None = None) -> AccuracyMatrix:
        """Learn the stream, from its beginning or from a checkpoint.

        Args:
            ckpt_path: Checkpoint to go on from, ``last`` for that of the run folder, None to begin.

        Returns:
            The accuracies after each task on each task.

        Raises:
            ValueError: Before training starts, if data, configuration or checkpoint do not fit together.
            Interrupted: If SIGINT or SIGTERM came; a checkpoint was written.
        """
        path = self._path_of(ckpt_path) if ckpt_path is not None else None
        saved = self._files.read(path) if path is not None else None
        if saved is None and self.run_dir is not None and sealed.candidates(self._last):
            raise ValueError(
                f"{self.run_dir} holds a run already; add --ckpt_path last to go on with it, or give another --run_dir"
            )
        self._prepare(saved)
        stop, count = self.options.stop_after_task, len(self.stream)
        if stop is not None and stop >= count:
            raise ValueError(f"loop: stop_after_task is {stop}; the stream has {count} tasks, so at most {count - 1}")
        check_phases(self.strategy, self.stream, self.options.phase_epochs)
        check_watched(self.trainer, self.strategy, self.stream)
        with self.stop_request.listening(), self.views, closing(self.datamodule):
            self._write_start(path, saved)
            for task in self.stream.tasks[self.place.task + self.place.done :]:
                self._run_task(task, path if saved is not None and task.index == self.place.task else None)
                saved = None
                self._files.forget()
                if task.index == self.options.stop_after_task:
                    break
        return self.matrix

    def test(self, ckpt_path: str | Path) -> AccuracyMatrix:
        """Evaluate a checkpoint on the test data of the tasks that it has seen: the last row of the matrix."""
        self._prepare(checkpoints.load(self._path_of(ckpt_path)))
        task = self._last_seen()
        self.datamodule.begin(task)
        with closing(self.datamodule):
            self._evaluate(task)
        return self.matrix

    def validate(self, ckpt_path: str | Path) -> dict[str, float]:
        """Accuracy and loss of a checkpoint on the validation samples of the tasks that it has seen."""
        self._prepare(checkpoints.load(self._path_of(ckpt_path)))
        self.datamodule.begin(self._last_seen())
        if not self.datamodule.val_dataloader():
            raise ValueError("there are no validation samples; give data.val_fraction the value it was trained with")
        with closing(self.datamodule):
            self.trainer.validate(self.strategy, datamodule=self.datamodule, verbose=False)
        return {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    # ------------------------------------------------------------------ the stream

    def _run_task(self, task: Task, resume: Path | None) -> None:
        strategy, data = self.strategy, self.datamodule
        data.begin(task, cumulative=strategy.needs_all_data, with_unlabelled=strategy.uses_unlabelled)
        strategy.task = task
        if resume is None:
            self.place = Place(task.index)
            self._seed(task.index)
            self.meter.begin_task(self.trainer.strategy.root_device)
            self.meter.enter("statistics")
            strategy.mark_columns(task)
            strategy.begin_task(task)
            self._call("on_task_start", task)
            self.meter.enter(None)
        else:
            self.meter.resume_task(self.trainer.strategy.root_device)
        self._phases = strategy.phases(task)
        strategy.progress = self._standing(task, self.place.phase)
        for index in range(self.place.phase, len(self._phases)):
            self._run_phase(task, index, resume if self.place.running else None)
            # Here, when all that callbacks do and log at the end of a fit is done.
            if self.stop_request.made(now=True):
                self.stop()
            if self.save_is_due():
                self.save(needed=False)
        self._driver.closing = task
        self._evaluate(task)
        self.place = Place(task.index, len(self._phases), origin=self.trainer.current_epoch, done=True)
        self._write_task(task)
        if self._feature_cache is not None:
            self._feature_cache.close()

    def _run_phase(self, task: Task, index: int, resume: Path | None) -> None:
        phase, trainer = self._phases[index], self.trainer
        epochs = self._epochs(task, phase)
        origin = self.place.origin if resume is not None else trainer.current_epoch
        # A callback that looks at a metric begins each phase with nothing to compare with.
        trainer.should_stop = False
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping) and resume is None:
                callback.wait_count, callback.stopped_epoch = 0, 0
                callback.best_score = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
        self.place = Place(task.index, index, running=True, origin=origin)
        self._seed(task.index, index)
        self.strategy.trainer = trainer
        self.strategy.begin_phase(phase, epochs, origin)
        self.strategy.progress = self._standing(task, index)
        at = _progress(self._files.read(resume)) if resume is not None else None
        self.datamodule.begin_phase(
            index,
            self.strategy.rehearsal(),
            origin,
            at,
            select=self.strategy.select,
            features=self.strategy.feature_pool if phase.on_features else None,
            batch_size=phase.batch_size,
            augments=not self.strategy.plain_batches,
        )
        self._compile()
        trainer.fit_loop.max_epochs = origin + epochs
        path = str(resume) if resume is not None else None
        trainer.fit(self.strategy, datamodule=self.datamodule, ckpt_path=path, weights_only=True)

    def _evaluate(self, task: Task) -> None:
        self.strategy.task = task
        self._compile()
        self.trainer.test(self.strategy, datamodule=self.datamodule, verbose=False)
        assert self.strategy.row is not None
        self.matrix.fill(task.index, self.strategy.row)

    def _compile(self) -> None:
        """Compile the backbones that are new, in place: names of parameters stay, and copies are not compiled ones."""
        if self.options.compile is None:
            return
        for module in self.strategy.modules():
            if isinstance(module, Network) and module.backbone._compiled_call_impl is None:
                module.backbone.compile(backend=self.options.compile)

    def _epochs(self, task: Task, phase: Phase) -> int:
        if self.stream.one_pass:
            return 1
        if phase.name in self.options.phase_epochs:
            return self.options.phase_epochs[phase.name]
        if phase.epochs is not None:
            return phase.epochs
        return self.options.first_task_epochs or self.epochs if task.is_first else self.epochs

    def _standing(self, task: Task, index: int) -> Progress:
        """How far the run is at the beginning of phase ``index`` of a task."""
        stop = self.options.stop_after_task
        tasks = self.stream.tasks[: None if stop is None or stop < task.index else stop + 1]
        sizes = np.array([len(part) for part in self.stream.train], dtype=np.float64)
        sizes = sizes.cumsum() if self.strategy.needs_all_data else sizes
        work = [self._epochs(task, phase) * sizes[task.index] * _effort(phase) for phase in self._phases]
        later = sum(self._epochs(t, phase) * sizes[t.index] for t in tasks[task.index + 1 :] for phase in self._phases)
        return Progress(
            tasks=len(tasks),
            phase=index,
            phases=len(self._phases),
            work=float(sum(work[index : index + 1])),
            ahead=float(sum(work[index:]) + later),
            accuracy=self.matrix.measures()["average_accuracy"] if self.matrix.learned else None,
        )

    def _call(self, hook: str, task: Task) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ContinualCallback):
                getattr(callback, hook)(self.trainer, self.strategy, task)

    def _seed(self, *place: int) -> None:
        """Start the global generators from a place that only the seed and the place in the stream decide."""
        torch.manual_seed(mix(self.seed, 0x7A5C, *place) & 0x7FFFFFFFFFFFFFFF)

    # ------------------------------------------------------------------ before training

    def _prepare(self, saved: Mapping[str, Any] | None) -> None:
        self._prepare_data()
        self.strategy.seed = self.seed
        self.datamodule.whole_batches = self.strategy.uses_test_batch
        self.strategy.augment = lambda batch: self.datamodule.finish(batch, augment=True)
        self.strategy.feature_cache = self._feature_cache
        self.stream = self._match(saved) if saved is not None else self.datamodule.make_stream(self.seed)
        self.fingerprints = [self.datamodule.fingerprint(task.index) for task in self.stream.tasks]
        if not self.strategy.is_built:
            self._seed()
            self.strategy.build(self.datamodule.image_shape)
        self.datamodule.feature_views = self.options.feature_views
        self.datamodule.pin_memory = self.trainer.strategy.root_device.type == "cuda"
        if self.options.channels_last:
            self.datamodule.channels_last = True
            self.strategy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if saved is not None:
            self._restore(saved)

    def _prepare_data(self) -> None:
        """Let one process per machine download; the others wait."""
        environment = (
            self.trainer.strategy.cluster_environment if isinstance(self.trainer.strategy, DDPStrategy) else None
        )
        if environment is None or isinstance(environment, LightningEnvironment):
            # The process that starts the others comes here before they exist.
            if self.trainer.local_rank == 0:
                self.datamodule.prepare_data()
            return
        self.trainer.strategy.setup_environment()
        if self.trainer.local_rank == 0:
            self.datamodule.prepare_data()
        self.trainer.strategy.barrier("prepare_data")

    def _match(self, saved: Mapping[str, Any]) -> Stream:
        """The stream of a checkpoint, with the tasks that the data have gained since."""
        earlier = Stream.from_dict(json.loads(saved["cl_lightning"]["manifest"]))
        data = self.datamodule
        data.load_state_dict(saved.get(type(data).__qualname__, {}))
        stream = data.make_stream(self.seed, earlier)
        for index, expected in enumerate(saved["cl_lightning"]["fingerprints"]):
            if index < len(stream.tasks) and data.fingerprint(index) != expected:
                raise ValueError(
                    f"the checkpoint is of another stream: task {index} ({stream.tasks[index].name}) has other "
                    "classes or other samples than when it was learnt; give the data, class order and seed of that run"
                )
        return stream

    def _restore(self, saved: Mapping[str, Any]) -> None:
        part, strategy = saved["cl_lightning"], self.strategy
        restore(strategy, self.trainer, saved)
        fit_loop = self.trainer.fit_loop
        fit_loop.load_state_dict(saved["loops"]["fit_loop"])
        fit_loop.restarting = False  # a fit that goes on half-way restores the loop once more
        self.place = Place(**part["place"])
        self.matrix.load_state_dict(part["matrix"])
        self.meter.load_state_dict(part["costs"])
        strategy.task = self.stream.tasks[self.place.task]

    @property
    def _last(self) -> Path:
        assert self.run_dir is not None
        return self.run_dir / "checkpoints" / "last.ckpt"

    def _path_of(self, ckpt_path: str | Path) -> Path:
        if str(ckpt_path) != "last":
            return Path(ckpt_path)
        if self.run_dir is None:
            raise ValueError("ckpt_path 'last' needs a run folder; give run_dir, or the path of a checkpoint")
        path, problems = sealed.newest(self._last)
        if path is None:
            found = problems[0] if problems else f"ckpt_path 'last': there is no checkpoint under {self.run_dir}"
            raise ValueError(found)
        for problem in problems:
            rank_zero_warn(f"{problem}; the run goes on from {path.name}", stacklevel=3)
        return path

    def _last_seen(self) -> Task:
        if self.place.task == 0 and not self.place.done and not self.strategy.task_columns.numel():
            raise ValueError("the checkpoint has seen no task yet")
        return self.stream.tasks[self.strategy.task_columns.shape[0] - 1]

    # ------------------------------------------------------------------ what is written

    def state(self) -> dict[str, Any]:
        """The part of a checkpoint that belongs to the stream: plain values and tensors."""
        return {
            "schema": checkpoints.SCHEMA,
            "place": vars(self.place).copy(),
            "strategy": _class_path(self.strategy),
            "manifest": json.dumps(self.stream.to_dict()),
            "fingerprints": self.fingerprints,
            "class_names": list(self.stream.class_names),
            "raw_shape": list(self.datamodule.samples(train=True).image_shape),
            "matrix": self.matrix.state_dict(),
            "costs": self.meter.state_dict(),
            "config": self.config,
            "seed": self.seed,
            "versions": results.versions(),
        }

    def save(self, *, needed: bool = True) -> Path | None:
        """Write a checkpoint; called on all processes.

        Args:
            needed: Whether the run cannot go on without it; else a checkpoint that cannot be written is told, the
                earlier ones stay, and the next one that is due is tried again.

        Raises:
            WriteError: On all processes, if a needed one cannot be written.
        """
        if self.run_dir is None:
            return None
        if self.finite is not None and self.place.running:
            self.finite.check(self.strategy)
        before = self.meter.enter("saving")
        distributed.average_batch_statistics(self.strategy)  # one process writes for all
        self.trainer.save_checkpoint(self._last)
        self.meter.enter(before)
        self._last_save = time.monotonic()
        failure = self.trainer.strategy.broadcast(self._files.failure and _in_words(self._files.failure))
        if failure is None:
            return self._last
        message = f"checkpoint {self._last}: cannot be written ({failure}); "
        if needed:
            left = next(iter(sealed.candidates(self._last)), "none")
            raise checkpoints.WriteError(f"{message}the one before it: {left}")
        rank_zero_warn(message + "the run goes on, and tries again when the next one is due")
        return None

    def save_is_due(self) -> bool:
        """Whether enough time has passed since the last checkpoint; the same answer on all processes."""
        due = time.monotonic() - self._last_save >= self.options.save_every_seconds
        return bool(self.trainer.strategy.broadcast(due)) if distributed.is_distributed() else due

    def _write_start(self, resumed: Path | None, saved: Mapping[str, Any] | None) -> None:
        self.views.open(saved["cl_lightning"] if saved is not None else None)
        if self.run_dir is not None and self.trainer.is_global_zero:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            sealed.clear_torn(self._last.parent)
            if resumed is not None:
                sealed.go_on_from(self._last, resumed)
            if self.config:
                (self.run_dir / "config.yaml").write_text(self.config, encoding="utf-8")
            self.stream.save(self.run_dir / "manifest.json")
            results.write(self.run_dir / "results.json", self.results())

    def _write_task(self, task: Task) -> None:
        self.views.task_done(task)  # first, so that no checkpoint is ahead of the logs
        last = self.save()
        if last is not None and self.trainer.is_global_zero:
            if self.options.keep_tasks != 0:
                sealed.give_name(last, last.with_name(f"task_{task.index:03d}.ckpt"))
            kept = sorted(last.parent.glob("task_*.ckpt"))
            for old in kept[: -self.options.keep_tasks] if self.options.keep_tasks else []:
                old.unlink()
            results.write(last.parents[1] / "results.json", self.results())

    def results(self) -> dict[str, Any]:
        """All that is known of the run so far, as plain values for JSON."""
        return results.collect(self)

    def stop(self) -> NoReturn:
        """Write a checkpoint and leave; called on all processes, once they know that one was asked to stop."""
        assert self.stop_request.signum is not None
        raise Interrupted(self.save() or Path("nowhere"), self.stop_request.signum)


class _Driver(Callback):
    """Does the loop's work inside a fit. It comes first: what it saves in a hook is the state before that hook."""

    def __init__(self, loop: TaskLoop) -> None:
        self.loop = loop
        self.closing: Task | None = None
        self._mid_epoch = False
        self._since_save = 0
        self._step = 0
        self._share = 1.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        loader = trainer.train_dataloader
        # A loader may mix samples of a memory with those of the stream, or serve no images at all.
        self._share = 0.0 if isinstance(loader, FeatureLoader) else 1.0
        if isinstance(loader, PlannedLoader) and len(loader.plan.indices) > 0:
            self._share = float((loader.plan.indices < loader.num_data).double().mean())
        self.loop.meter.enter("training")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch > self.loop.place.origin:
            self._mid_epoch = False
            self._check(self.loop.save_is_due())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.loop.started = True
        if batch_idx == 0 or batch_idx % trainer.accumulate_grad_batches:
            return
        self._since_save += 1
        every = self.loop.options.save_every_n_steps
        self._mid_epoch = True
        self._check(every is not None and self._since_save % every == 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        draw, passed = batch.draw, self.loop.strategy.samples_in_step
        whole = draw.total / max(draw.stop - draw.start, 1)  # of what this process has to what all have
        step, self._step = self._step, trainer.global_step
        self.loop.meter.add(
            images=draw.total * self._share,
            samples=draw.total if passed is None else passed * whole,
            steps=trainer.global_step - step,
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        distributed.average_batch_statistics(pl_module)
        self.loop.meter.end_epoch(self.loop.strategy.phase.name)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = self.loop.meter.enter("evaluation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loop.meter.enter(self._before)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop, place = self.loop, self.loop.place
        loop.meter.enter("statistics")
        loop._seed(place.task, place.phase, 1)  # the last step has left the generators where this process's draws ended
        loop.strategy.end_phase(loop.strategy.phase)
        loop.place = Place(place.task, place.phase + 1, origin=trainer.current_epoch)
        self._mid_epoch = False
        loop.meter.enter(None)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.closing is not None:
            self.loop.started = True
            self.loop.meter.enter("statistics")
            self.loop._seed(self.closing.index, len(self.loop._phases), 2)
            self.loop._call("on_task_learnt", self.closing)
            self.loop.strategy.end_task(self.closing)
            self.loop._call("on_task_end", self.closing)
        self.loop.meter.enter("evaluation")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loop.meter.enter(None)
        if self.closing is not None:
            self.closing = None
            self.loop.meter.close_task(self.loop.strategy, results.bytes_kept(trainer, self.loop.strategy))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        place = self.loop.place
        checkpoints.settle_progress(checkpoint["loops"]["fit_loop"], mid_epoch=self._mid_epoch and place.running)
        if not place.running:  # the next fit begins with a new optimizer
            checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []
        checkpoint["cl_lightning"] = self.loop.state()

    def _check(self, due: bool) -> None:
        if self.loop.stop_request.made():
            self.loop.stop()
        if due:
            self.loop.save(needed=False)


def restore(strategy: ContinualStrategy, trainer: Trainer, saved: Mapping[str, Any]) -> None:
    """Load what a checkpoint holds of a strategy, whose network is built, and of the callbacks.

    Raises:
        ValueError: If the checkpoint is of another strategy or of another network.
    """
    mine, its = _class_path(strategy), saved["cl_lightning"]["strategy"]
    if its != mine:
        raise ValueError(f"the checkpoint is of another strategy: {its}, not {mine}")
    try:
        strategy.load_state_dict(saved["state_dict"])
    except RuntimeError as error:
        first = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ValueError(f"the checkpoint is of another network or other options: {first}") from error
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if (state := saved["callbacks"].get(callback.state_key)) is not None:
            callback.load_state_dict(state)


def _effort(phase: Phase) -> float:
    """What a row of a phase costs, as a share of an image through the backbone and back; for the time left."""
    return 0.02 if phase.on_features else 1.0


def _in_words(error: OSError) -> str:
    return error.strerror or str(error)


def _class_path(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _progress(saved: Mapping[str, Any]) -> tuple[int, int]:
    """Epoch of the Trainer and step at which a checkpoint goes on."""
    loops = saved["loops"]["fit_loop"]
    epochs, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]["current"]
    mid_epoch = epochs["ready"] != epochs["processed"]
    return epochs["processed"], batches["completed"] if mid_epoch else 0


warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
# Lightning looks for a state_dict of the loader; here the loader starts at the step that the loop tells it.
warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
