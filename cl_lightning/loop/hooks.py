"""Hooks of the task loop inside Lightning's fit and test."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from cl_lightning import distributed
from cl_lightning.batch import Batch
from cl_lightning.data import FeatureLoader, PlannedLoader
from cl_lightning.loop import checkpoint as checkpoints
from cl_lightning.loop import process_state, results
from cl_lightning.loop.options import LoopOptions
from cl_lightning.loop.run import Position, flops_per_image
from cl_lightning.loop.run_files import RunFiles
from cl_lightning.loop.stopping import StopRequest
from cl_lightning.measures import CostMeter
from cl_lightning.strategy import ContinualStrategy, Phase
from cl_lightning.stream import Task


class HookedLoop(Protocol):
    """What the hooks use of the task loop; see :class:`cl_lightning.loop.TaskLoop`."""

    strategy: ContinualStrategy
    options: LoopOptions
    meter: CostMeter
    position: Position
    started: bool
    stop_request: StopRequest
    files: RunFiles
    _phases: list[Phase]

    def stop(self) -> NoReturn: ...

    def state(self) -> dict[str, Any]: ...

    def _seed(self, *place: int) -> None: ...

    def _call(self, hook: str, task: Task) -> None: ...


class LoopHooks(Callback):
    """Saves, stops, measures costs and calls the hooks of a task inside Lightning's fit and test.

    It is the first callback: a checkpoint that it writes in a hook holds the state before that hook of all others.
    """

    def __init__(self, loop: HookedLoop) -> None:
        self.loop = loop
        self.closing: Task | None = None
        self.restored = False  # whether Lightning has read the checkpoint of a fit that is resumed
        self._mid_epoch = False
        self._since_save = 0
        self._step = 0
        self._share = 1.0
        self._stop_before: Callable[[int], bool] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.restored = True
        self._step = trainer.global_step
        loader = trainer.train_dataloader
        # Share of the images that come from the stream: a loader may add samples of a memory, or serve features.
        self._share = 0.0 if isinstance(loader, FeatureLoader) else 1.0
        if isinstance(loader, PlannedLoader) and len(loader.plan.indices) > 0:
            self._share = float((loader.plan.indices < loader.num_data).double().mean())
        self.loop.meter.enter("training")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch > self.loop.position.origin:
            self._mid_epoch = False
            self._check(self.loop.files.save_is_due())

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
        draw, passed = batch.draw, self.loop.strategy.terms.samples
        whole = draw.total / max(draw.stop - draw.start, 1)  # samples of all processes per sample of this process
        step, self._step = self._step, trainer.global_step
        self.loop.meter.add(
            images=draw.total * self._share,
            samples=draw.total if passed is None else passed * whole,
            steps=trainer.global_step - step,
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        distributed.average_batch_statistics(pl_module)
        for name, value in self.loop.strategy.terms.epoch_means(pl_module.device).items():
            # For callbacks and schedules that monitor it; loggers get means over log_every_n_steps.
            pl_module.log(name, torch.tensor(value, dtype=torch.float32), logger=False)
        self.loop.meter.end_epoch(self.loop.strategy.phase.name)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = self.loop.meter.enter("evaluation")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loop.strategy.evaluation.begin(confusion=False)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        evaluation = self.loop.strategy.evaluation
        evaluation.finish()
        metrics = {"val/accuracy": evaluation.accuracy(), "val/loss": evaluation.loss}
        for name, value in metrics.items():  # for callbacks that monitor it; loggers get it below, with the right step
            pl_module.log(name, torch.tensor(value, dtype=torch.float32), logger=False)
        for logger in [] if trainer.sanity_checking else trainer.loggers:  # type: ignore[attr-defined]
            logger.log_metrics(metrics, step=trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loop.meter.enter(self._before)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop, position = self.loop, self.loop.position
        loop.meter.enter("statistics")
        # After the last step the state of the generators depends on the numbers that this process has drawn.
        loop._seed(position.task, position.phase, 1)
        loop.strategy.end_phase(loop.strategy.phase)
        loop.position = Position(position.task, position.phase + 1, origin=trainer.current_epoch)
        self._mid_epoch = False
        loop.meter.enter(None)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop, task = self.loop, self.closing
        if task is not None:
            if not loop.position.learnt:
                loop.started = True
                loop.meter.enter("statistics")
                loop._seed(task.index, len(loop._phases), 2)
                loop._call("on_task_learnt", task)
                loop.strategy.end_task(task)
                loop._call("on_task_end", task)
                loop.position = replace(loop.position, learnt=True)
            loop._seed(task.index, len(loop._phases), 3)
        loop.meter.enter("evaluation")

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._stop_before is not None and self._stop_before(batch_idx):
            self.loop.stop()

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = int(sum(trainer.num_test_batches))
        self._stop_before = self.loop.stop_request.watch(batches) if self.closing is not None else None
        self.loop.strategy.evaluation.begin(confusion=True)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loop.strategy.evaluation.finish()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loop.meter.enter(None)
        if self.closing is not None:
            self.closing = None
            strategy = self.loop.strategy
            shape = strategy.image_shape
            flops = flops_per_image(strategy, shape) if shape is not None else None  # on all processes at the same time
            kept = results.bytes_kept(trainer, strategy)
            self.loop.meter.close_task(strategy, strategy.network, kept, flops)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        position = self.loop.position
        checkpoints.settle_progress(checkpoint["loops"]["fit_loop"], mid_epoch=self._mid_epoch and position.running)
        if not position.running:  # the next fit creates a new optimizer
            checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []
        checkpoint["cl_lightning"] = self.loop.state()
        process_state.share(checkpoint, trainer.strategy.root_device)

    def _check(self, due: bool) -> None:
        if self.loop.stop_request.made():
            self.loop.stop()
        if due:
            self.loop.files.save(needed=False)
