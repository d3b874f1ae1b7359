"""The task loop: one Trainer learns a stream, task after task; a run can be stopped and resumed at any step."""

import json
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn

from cl_lightning import distributed
from cl_lightning.batch import mix
from cl_lightning.callback import AddsLosses, ContinualCallback, Progress
from cl_lightning.data import FeatureCache
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.lightning_private import carry_timer, log_at_global_step
from cl_lightning.loop import checkpoint as checkpoints
from cl_lightning.loop import results, run_lock
from cl_lightning.loop.checkpoint_parts import named
from cl_lightning.loop.dry_run import dry_run
from cl_lightning.loop.fast_step import install_fast_steps
from cl_lightning.loop.hooks import LoopHooks
from cl_lightning.loop.lightning_support import count_steps_per_fit, reset_best
from cl_lightning.loop.logger_guard import silent_writers
from cl_lightning.loop.logging import RunLogging
from cl_lightning.loop.nan_guard import NanGuard
from cl_lightning.loop.option_changes import changes, held
from cl_lightning.loop.options import (
    LoopOptions,
    check_balance,
    check_fit,
    check_kinds,
    check_memory,
    check_names,
    check_network,
    check_phases,
    check_requests,
    check_trainer,
    check_watched,
)
from cl_lightning.loop.run import Position, _class_path, begin_task, check_processes, extended_stream, restore
from cl_lightning.loop.run_files import RunFiles
from cl_lightning.loop.stopping import Interrupted, StopRequest
from cl_lightning.loop.warning_filters import ignore_lightning_warnings
from cl_lightning.measures import AccuracyMatrix, CostMeter, headline_accuracy
from cl_lightning.models import Network
from cl_lightning.strategy import ContinualStrategy, Phase
from cl_lightning.stream import Stream, Task


class TaskLoop:
    """Trains and evaluates a strategy on a stream of tasks with one Trainer.

    For each task the head grows, each phase is one fit, ``end_task`` computes statistics and copies networks, and one
    pass evaluates the test data of all tasks so far. Then a checkpoint and the results are written.

    Args:
        trainer: Trainer of all fits; its ``max_epochs`` are epochs per task.
        strategy: Strategy to train.
        datamodule: Data of the stream.
        options: Options of the run.
        run_dir: Folder for checkpoints and results; None to write nothing.
        seed: Seed of all random numbers of the run.
        config: The configuration as YAML; it is stored in checkpoints and results.

    Raises:
        ValueError: If an option of the Trainer does not work with a stream.
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
        self.run_dir = Path(run_dir) if run_dir is not None else None
        self.seed, self.config = seed, results.without_secrets(config)
        self.epochs = check_trainer(trainer, self.options)
        self.recorded = "" if config else results.recorded(self)
        self.option_changes: list[dict[str, Any]] = []  # of this and earlier resumptions
        self._min_epochs = trainer.min_epochs
        self.files = RunFiles(self)
        trainer.strategy.checkpoint_io = self.files.io
        self.position = Position()
        self._origin = 0  # epoch of the Trainer at which the last fit began
        self.matrix = AccuracyMatrix()
        self.measured: list[dict[str, float]] = []  # measures of each finished task, filled by ``results.collect``
        self.meter = CostMeter()
        self.fingerprints: list[str] = []
        self._optimizers: list[dict[str, Any]] = []  # of the checkpoint from which the run was resumed
        self.stream: Stream
        self._manifest = ""  # of the stream, for checkpoints
        self.started = False  # whether a step was taken, or a task closed
        self._phases: list[Phase] = []
        self._feature_cache: FeatureCache | None = None
        if self.options.feature_cache is not None:
            folder = None if self.options.feature_cache == "memory" else self.options.feature_cache
            self._feature_cache = FeatureCache(folder, int(self.options.feature_cache_gb * 1e9))
        self._driver = LoopHooks(self)
        self.stop_request = StopRequest(trainer)
        self.run_logging = RunLogging(self)
        self.nan_guard = NanGuard(self.options.nan_loss) if self.options.nan_loss != "ignore" else None
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.append(self.run_logging)
        # Callbacks that only observe come last, so that they see the effect of the others in the same hook.
        callbacks.sort(key=lambda callback: isinstance(callback, ContinualCallback) and callback.observer_only)
        own = [self._driver] if self.nan_guard is None else [self._driver, self.nan_guard]
        callbacks[:0] = own  # before all others, see LoopHooks
        self.own_callbacks = (*own, self.run_logging)
        for callback in callbacks:
            if isinstance(callback, ContinualCallback):
                callback.meter = self.meter
        # Tensors created under no_grad can be used in later gradients; tensors of inference mode cannot.
        trainer.test_loop.inference_mode = trainer.validate_loop.inference_mode = False
        install_fast_steps(trainer)
        log_at_global_step(trainer)
        count_steps_per_fit(trainer, lambda: self._origin)

    # ------------------------------------------------------------------ public methods

    def fit(self, ckpt_path: str | Path | None = None) -> AccuracyMatrix:
        """Learn the stream, from its beginning or from a checkpoint.

        Args:
            ckpt_path: Checkpoint to resume from; ``last`` for the newest checkpoint of the run folder; None to start a
                new run.

        Returns:
            The accuracy on each task after each task.

        Raises:
            ValueError: Before training starts, if data, configuration or checkpoint do not fit together.
            Interrupted: After SIGINT or SIGTERM, or after a stop of the Trainer by ``max_time`` or a callback, when a
                checkpoint was written.
        """
        path = self.files.path_of(ckpt_path) if ckpt_path is not None else None
        self.files.io.process = (self.trainer.global_rank, self.trainer.world_size)
        saved = self.files.io.read(path) if path is not None else None
        if saved is not None and not saved["cl_lightning"].get("exact", True):
            raise ValueError(
                f"checkpoint {path}: a callback wrote it inside a step or an epoch (ModelCheckpoint does), so a run "
                "cannot be resumed from it exactly; use --ckpt_path last, and this file for test and predict"
            )
        self.files.check_are_free(saved)
        if saved is not None:
            check_processes(saved, self.trainer.world_size)
        self._prepare(saved, path, resume=True)
        stop, count = self.options.stop_after_task, len(self.stream)
        if stop is not None and stop >= count:
            raise ValueError(f"loop: stop_after_task is {stop}; the stream has {count} tasks, so at most {count - 1}")
        check_fit(self.strategy, self.stream)
        check_requests(self.strategy, self.stream)
        check_phases(self.strategy, self.stream, self.options.phase_epochs)
        check_balance(self.strategy, self.datamodule, self.stream)
        check_watched(self.trainer, self.strategy, self.stream)
        check_memory(self.strategy, self.stream)
        if saved is None and self.options.dry_run:
            callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            dry_run(self.strategy, self.datamodule, self.trainer, callbacks=callbacks, epochs=self._epochs)
        if self.run_dir is not None:
            check_names(self.trainer, self.files.last.parent)
        held = self.run_dir if self.trainer.is_global_zero else None
        with (
            run_lock.hold(held) if held is not None else nullcontext(),
            ignore_lightning_warnings(),
            self.stop_request.listening(),
            silent_writers(),
            self.run_logging,
            closing(self.datamodule),
        ):
            self.files.check_are_free(saved)  # a run may have ended there since
            self.run_logging.open(saved["cl_lightning"] if saved is not None else None)
            with self.files.writing(path):
                for task in self.stream.tasks[self.position.task + self.position.done :]:
                    self._run_task(task, path if saved is not None and task.index == self.position.task else None)
                    saved = None
                    self.files.io.forget()
                    if task.index in (self.options.stop_after_task, count - 1):
                        break
                    if self.stop_request.made(now=True):
                        self._interrupt()
        return self.matrix

    def test(self, ckpt_path: str | Path) -> AccuracyMatrix:
        """Evaluate a checkpoint on the test data of all tasks so far, and return the matrix with this row."""
        path = self.files.path_of(ckpt_path)
        self._prepare(checkpoints.load(path), path)
        task = self._last_seen()
        self.datamodule.begin(task)
        with ignore_lightning_warnings(), closing(self.datamodule):
            self._evaluate(task)
        return self.matrix

    def validate(self, ckpt_path: str | Path) -> dict[str, float]:
        """Accuracy and loss of a checkpoint on the validation samples of all tasks so far."""
        path = self.files.path_of(ckpt_path)
        self._prepare(checkpoints.load(path), path)
        self.datamodule.begin(self._last_seen())
        if not self.datamodule.val_dataloader():
            raise ValueError("there are no validation samples; give data.val_fraction the value of the training run")
        with ignore_lightning_warnings(), closing(self.datamodule):
            self.trainer.validate(self.strategy, datamodule=self.datamodule, verbose=False)
        return {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    # ------------------------------------------------------------------ the stream

    def _run_task(self, task: Task, resume: Path | None) -> None:
        strategy, data = self.strategy, self.datamodule
        data.begin(task, **strategy.traits.data_options(task.index))
        strategy.task, strategy.data.stream = task, self.stream
        if resume is None:
            self.position = Position(task.index)
            self._seed(task.index)
            self.meter.begin_task(self.trainer.strategy.root_device)
            self.meter.enter("statistics")
            begin_task(strategy, task, self.stream)
            self._call("on_task_start", task)
            self.meter.enter(None)
        else:
            self.meter.resume_task(self.trainer.strategy.root_device)
        self._phases = strategy.phases(task)
        self._show_progress(task, self.position.phase)
        for index in range(self.position.phase, len(self._phases)):
            needed = self._phases[index].needed
            if not self.position.running and needed is not None and not needed():
                self.position = Position(task.index, index + 1, origin=self.trainer.current_epoch)
                continue
            self._run_phase(task, index, resume if self.position.running else None)
            # Not earlier: all hooks of callbacks at the end of the fit are over here, and their values are logged.
            if self.stop_request.made(now=True):
                self.stop()
            if self.files.save_is_due():
                self.files.save(needed=False)
        self._driver.closing = task
        self._evaluate(task)
        self.position = Position(task.index, len(self._phases), origin=self.trainer.current_epoch, done=True)
        self.run_logging.task_done(task)  # first, so that no checkpoint is ahead of the logs
        self.files.write_task(task)
        if self._feature_cache is not None:
            self._feature_cache.close()

    def _run_phase(self, task: Task, index: int, resume: Path | None) -> None:
        phase, trainer = self._phases[index], self.trainer
        epochs = self._epochs(task, phase)
        origin = self._origin = self.position.origin if resume is not None else trainer.current_epoch
        trainer.should_stop = False
        if resume is None:
            reset_best(trainer.callbacks)  # type: ignore[attr-defined]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Timer):
                carry_timer(callback)
        self.position = Position(task.index, index, running=True, origin=origin)
        self._seed(task.index, index)
        self.strategy.trainer = trainer
        phase = replace(phase, options=replace(phase.options, epochs=epochs))
        sources = [callback for callback in trainer.callbacks if isinstance(callback, AddsLosses)]  # type: ignore[attr-defined]
        self.strategy.begin_phase(phase, origin, sources)
        self._show_progress(task, index)
        with named(resume):
            at = _resumed_at(self.files.io.read(resume)) if resume is not None else None
        self.datamodule.begin_phase(
            index,
            self.strategy.replay_memory(),
            origin,
            at,
            samples=phase.samples,
            features=phase.features,
            batch_size=phase.options.batch_size,
            labelled=phase.labelled,
            augments=not phase.unaugmented,
        )
        self._compile()
        trainer.fit_loop.max_epochs = origin + epochs
        trainer.fit_loop.min_epochs = origin + self._min_epochs if self._min_epochs else None
        path = str(resume) if resume is not None else None
        with named(resume, until=lambda: self._driver.restored):
            trainer.fit(self.strategy, datamodule=self.datamodule, ckpt_path=path, weights_only=True)

    def _evaluate(self, task: Task) -> None:
        self.strategy.task = task
        self._compile()
        self.trainer.test(self.strategy, datamodule=self.datamodule, verbose=False)
        assert self.strategy.evaluation.result is not None
        self.matrix.fill(task.index, self.strategy.evaluation.result)

    def _watch_pass(self, batches: int) -> Callable[[int], None]:
        """End the run before a batch of a pass, after a request to stop, if there is a checkpoint to resume from.

        The state inside a pass is not saved: the run is resumed from the newest checkpoint.
        """
        made = self.stop_request.watch(batches) if self.files.newest is not None else None

        def stop_before(number: int) -> None:
            if made is not None and made(number):
                self._interrupt()

        return stop_before

    def _compile(self) -> None:
        """Compile the backbones that are not compiled yet, in place; names of parameters do not change."""
        if self.options.compile is None:
            return
        for module in self.strategy.modules():
            if isinstance(module, Network) and module.backbone._compiled_call_impl is None:
                module.backbone.compile(backend=self.options.compile)

    def _epochs(self, task: Task, phase: Phase) -> int:
        if self.stream.one_pass and not phase.on_memory:
            return 1
        if phase.name in self.options.phase_epochs:
            return self.options.phase_epochs[phase.name]
        if phase.options.epochs is not None:
            return phase.options.epochs
        return self.options.first_task_epochs or self.epochs if task.is_first else self.epochs

    def _show_progress(self, task: Task, index: int) -> None:
        """Set the progress of the run on all callbacks, at the beginning of phase ``index`` of a task."""
        progress = self._progress(task, index)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ContinualCallback):
                callback.progress = progress

    def _progress(self, task: Task, index: int) -> Progress:
        stop = self.options.stop_after_task
        tasks = self.stream.tasks[: None if stop is None or stop < task.index else stop + 1]
        sizes = np.array([len(part) for part in self.stream.train], dtype=np.float64)
        sizes = sizes.cumsum() if self.strategy.traits.needs_all_data else sizes
        work = [self._epochs(task, phase) * sizes[task.index] * _effort(phase) for phase in self._phases]
        later = sum(self._epochs(t, phase) * sizes[t.index] for t in tasks[task.index + 1 :] for phase in self._phases)
        return Progress(
            tasks=len(tasks),
            phase=index,
            phases=len(self._phases),
            work=float(sum(work[index : index + 1])),
            ahead=float(sum(work[index:]) + later),
            accuracy=headline_accuracy(self._last_measures()) if self.matrix.learned else None,
        )

    def _last_measures(self) -> dict[str, float]:
        """Measures after the last task learnt, which ``results.collect`` has computed on the process that writes."""
        known = self.measured
        return known[-1] if len(known) == self.matrix.learned else self.matrix.measures()

    def _call(self, hook: str, task: Task) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ContinualCallback):
                getattr(callback, hook)(self.trainer, self.strategy, task)

    def _seed(self, *place: int) -> None:
        """Seed the global generators with a function of the seed of the run and the position in the stream."""
        torch.manual_seed(mix(self.seed, 0x7A5C, *place) & 0x7FFFFFFFFFFFFFFF)

    # ------------------------------------------------------------------ before training

    def _prepare(self, saved: Mapping[str, Any] | None, path: Path | None = None, *, resume: bool = False) -> None:
        self._prepare_data()
        self.strategy.seed = self.seed
        self.datamodule.whole_batches = self.strategy.traits.transductive
        self.strategy.passes.cache = self._feature_cache
        self.strategy.passes.watch = self._watch_pass
        data, seed = self.datamodule, self.seed
        self.stream = data.make_stream(seed) if saved is None else extended_stream(saved, data, seed, path)
        self._manifest = json.dumps(self.stream.to_dict())
        self.fingerprints = [self.datamodule.fingerprint(task.index) for task in self.stream.tasks]
        if not self.strategy.is_built:
            self._seed()
            check_kinds(self.strategy, self.datamodule)
            self.strategy.build(self.datamodule.image_shape)
        check_network(self.strategy, self.datamodule)
        self.datamodule.feature_views = self.options.feature_views
        self.datamodule.pin_memory = self.trainer.strategy.root_device.type == "cuda"
        if self.options.channels_last:
            self.datamodule.channels_last = True
            self.strategy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if saved is not None:
            with named(path):
                if resume:
                    self._note_changes(saved)
                self._restore(saved)

    def _prepare_data(self) -> None:
        """Download data in one process per machine; the other processes wait."""
        environment = (
            self.trainer.strategy.cluster_environment if isinstance(self.trainer.strategy, DDPStrategy) else None
        )
        if environment is None or isinstance(environment, LightningEnvironment):
            # The main process runs this before it starts the other processes.
            if self.trainer.local_rank == 0:
                self.datamodule.prepare_data()
            return
        self.trainer.strategy.setup_environment()
        if self.trainer.local_rank == 0:
            self.datamodule.prepare_data()
        self.trainer.strategy.barrier("prepare_data")

    def _note_changes(self, saved: Mapping[str, Any]) -> None:
        """Record options that differ from the checkpoint; report those that do not hold from now on."""
        found = changes(saved, self.config or self.recorded, self.strategy, from_config=bool(self.config))
        self.config, self.recorded = held(self.config, found), held(self.recorded, found)
        self.option_changes = [*saved["cl_lightning"].get("option_changes", ()), *(item._asdict() for item in found)]
        if late := [item for item in found if item.holds != "now"]:
            listed = "; ".join(map(str, late))
            rank_zero_warn(f"options that differ from the checkpoint: {listed}")

    def _restore(self, saved: Mapping[str, Any]) -> None:
        part, strategy = saved["cl_lightning"], self.strategy
        restore(strategy, self.trainer, saved)
        fit_loop = self.trainer.fit_loop
        fit_loop.load_state_dict(saved["loops"]["fit_loop"])
        fit_loop.restarting = False  # a fit that is resumed within a phase restores the loop again
        self.position = Position(**part["place"])
        if self.position.running and not saved["optimizer_states"]:
            raise ValueError("its part optimizer_states is empty, in the middle of a phase")
        self.matrix.load_state_dict(part["matrix"])
        self.meter.load_state_dict(part["costs"])
        self._optimizers = part.get("optimizers", [])  # missing in checkpoints of earlier releases
        strategy.task = self.stream.tasks[self.position.task]

    def _last_seen(self) -> Task:
        if self.position.task == 0 and not self.position.done and not self.strategy.task_columns.numel():
            raise ValueError("the checkpoint has seen no task yet")
        return self.stream.tasks[self.strategy.task_columns.shape[0] - 1]

    # ------------------------------------------------------------------ checkpoints and results

    def state(self) -> dict[str, Any]:
        """The part ``cl_lightning`` of a checkpoint: plain values and tensors."""
        return {
            "schema": checkpoints.SCHEMA,
            "place": vars(self.position).copy(),
            "strategy": _class_path(self.strategy),
            "manifest": self._manifest,
            "fingerprints": self.fingerprints,
            "class_names": list(self.stream.class_names),
            "normalisation": {"mean": list(self.datamodule.normalize.mean), "std": list(self.datamodule.normalize.std)},
            "raw_shape": list(self.datamodule.samples(train=True).image_shape),
            "matrix": self.matrix.state_dict(),
            "costs": self.meter.state_dict(),
            "config": self.config,
            "recorded": self.recorded,
            "option_changes": self.option_changes,
            "seed": self.seed,
            "processes": distributed.world_size(),
            "versions": results.versions(),
            "optimizers": self.optimizers,
            "exact": self.files.is_saving,  # ModelCheckpoint and others save in the middle of the hooks of a step
        }

    @property
    def optimizers(self) -> list[dict[str, Any]]:
        """Names and options of the optimizers of the last fit, also after a resumption that no fit followed."""
        return [results.optimizer_options(optimizer) for optimizer in self.trainer.optimizers] or self._optimizers

    def results(self) -> dict[str, Any]:
        """Results of the run so far, as plain values for JSON."""
        return results.collect(self)

    def stop(self) -> NoReturn:
        """Write a checkpoint and raise ``Interrupted``; called on all processes after they agreed to stop."""
        self.files.save()
        self._interrupt()

    def _interrupt(self) -> NoReturn:
        assert self.stop_request.signum is not None
        raise Interrupted(self.files.newest or Path("nowhere"), self.stop_request.signum)


def _effort(phase: Phase) -> float:
    """Cost of one row of a phase, relative to a forward and backward pass of an image; for the remaining time."""
    return 0.02 if phase.features is not None else 1.0


def _resumed_at(saved: Mapping[str, Any]) -> tuple[int, int]:
    """Epoch of the Trainer and step in the epoch at which a checkpoint resumes."""
    loops = saved["loops"]["fit_loop"]
    epochs, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]["current"]
    mid_epoch = epochs["ready"] != epochs["processed"]
    return epochs["processed"], batches["completed"] if mid_epoch else 0
