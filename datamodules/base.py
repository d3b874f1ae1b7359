"""Base class of data modules: the loaders of a stream of tasks."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cl_lightning import distributed
from cl_lightning.batch import Batch, mix
from cl_lightning.checks import one_of
from cl_lightning.data import (
    FeatureLoader,
    FeaturePool,
    FeatureStore,
    LabelledPlan,
    LabelledRows,
    Plan,
    PlannedLoader,
    StreamLoader,
)
from cl_lightning.data.balance import ClassWeights, check_class_weights, class_weight_table, left_out
from cl_lightning.data.labels import training_labels
from cl_lightning.data.loaders import Stored
from cl_lightning.data.shifts import Shifts
from cl_lightning.data.transforms import described
from cl_lightning.datamodules.stream import StreamDataModule, default_scenario
from cl_lightning.memory import Memory
from cl_lightning.stream import Stream, Task

__all__ = ["ContinualDataModule", "default_scenario"]


class ContinualDataModule(StreamDataModule):
    """Data module for a stream of tasks over one data set.

    It serves training loaders of the current task, evaluation loaders of all tasks seen so far, and un-augmented
    loaders. Test data is never part of a fit. :class:`StreamDataModule` makes the stream; a subclass implements its
    ``source(train=...)`` and, if it downloads, ``prepare_data``.

    Args:
        sampler: Order of the training samples in an epoch: ``shuffled``, each sample once; or ``balanced``, as many
            samples in which all classes are equally frequent, so that samples of small classes occur several times and
            samples of large classes more rarely. Samples of a memory that the loader mixes in count too. Streams with
            an order of their own, and phases that train on features or on labelled and unlabelled samples, keep it.
        class_weights: Weights of the classification loss that the methods share: ``balanced`` for the inverse of the
            number of labelled training samples of a class in its task, with mean 1 over the samples of the task; a list
            of one number per class, in the order of the class names; a dict by the names of classes, 1 for others; None
            for no weights. Weighted losses are summed and divided by the number of samples.
        drop_last: Leave out the last training batch of an epoch if it is not full.
        kwargs: Options of :class:`StreamDataModule`.

    Raises:
        ValueError: If an option is outside its range, and before training if the data do not meet the requirements.
    """

    def __init__(
        self,
        *,
        sampler: Literal["shuffled", "balanced"] = "shuffled",
        class_weights: ClassWeights | None = None,
        drop_last: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        one_of(self, ("shuffled", "balanced"), sampler=sampler)
        check_class_weights(type(self).__name__, class_weights)
        self.sampler, self.class_weights = sampler, class_weights
        self.drop_last, self.pin_memory = drop_last, False
        self._left_out = 0.0
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.task: Task
        self.memory: Memory | None = None
        self.cumulative = False
        self.with_unlabelled = False
        self.whole_batches = False  # whether every process runs each evaluation batch, also with no rows of it
        self.phase_index = 0
        self.phase_samples: Callable[[Tensor, Tensor], Tensor | None] | None = None
        self._resume: tuple[int, int] | None = None
        self._features: Callable[[], FeaturePool] | None = None
        self._phase_batch_size: int | None = None
        self._labelled: LabelledRows | None = None
        self._augments = True
        self._loaders: dict[str, StreamLoader] = {}

    def make_stream(self, seed: int, earlier: Stream | None = None) -> Stream:
        self.close()
        self._loaders = {}
        stream = super().make_stream(seed, earlier)
        if self.class_weights is not None:  # raises errors before training
            names, owner = self.samples(train=True).class_names, type(self).__name__
            class_weight_table(owner, self.class_weights, stream, training_labels(self), names)
        return stream

    def shuffles(self, task: int) -> bool:
        """Whether the training samples of a task are shuffled in each epoch; False for the order of the data."""
        return True

    def begin(
        self, task: Task, *, cumulative: bool = False, with_unlabelled: bool = False, left_out: float = 0.0
    ) -> None:
        """Set the current task, which the training and statistics loaders serve.

        Args:
            task: Task of the stream.
            cumulative: Whether the training loader serves all tasks so far, without the samples that are forgotten.
            with_unlabelled: Whether it also serves samples whose label is hidden; their label is -1.
            left_out: Share of the training samples of each class that the training and statistics loaders leave out, in
                [0, 1), drawn by seed and task. The samples of earlier tasks of ``cumulative`` are all served.
        """
        self._left_out = left_out
        self.task, self.cumulative, self.with_unlabelled = task, cumulative, with_unlabelled

    def begin_phase(
        self,
        index: int,
        memory: Memory | None,
        origin: int,
        resume: tuple[int, int] | None = None,
        *,
        samples: Callable[[Tensor, Tensor], Tensor | None] | None = None,
        features: Callable[[], FeaturePool] | None = None,
        batch_size: int | None = None,
        labelled: LabelledRows | None = None,
        augments: bool = True,
    ) -> None:
        """Prepare the training loader for a phase.

        Args:
            index: Index of the phase in its task, from 0.
            memory: Memory whose samples are mixed with the samples of the task; None for none.
            origin: Epoch of the Trainer at which the phase begins.
            resume: Epoch of the Trainer and step at which an interrupted fit resumes; None at the start of a fit.
            samples: Chooses the samples on which the phase trains (``Phase.samples``); None for all.
            features: Builds the features on which the phase trains; None to train on images.
            batch_size: Rows per step of a phase on features; None for ``batch_size`` of the data module.
            labelled: Numbers of labelled samples of each step, in addition to the unlabelled ones; None for none.
            augments: Whether batches are augmented.
        """
        self.phase_index, self.memory, self._resume, self._augments = index, memory, resume, augments
        self._origin, self.phase_samples = origin, samples
        self._features, self._phase_batch_size, self._labelled = features, batch_size, labelled

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> PlannedLoader | FeatureLoader:
        """Training batches: the current task, with the samples of a mixed memory if there is one, or features."""
        stream, index = self.stream, self.task.index
        if self._features is not None:
            return self._feature_loader(self._features())
        chosen_tasks = [t for t in range(index + 1) if stream.tasks[t].learns] if self.cumulative else [index]
        pools = [self._train_pool(task) for task in chosen_tasks]
        indices = torch.cat(pools)
        tasks = torch.cat([torch.full_like(pool, task) for pool, task in zip(pools, chosen_tasks, strict=True)])
        if self.cumulative and self.target_kind in ("labels", "pixels"):  # a sample may be in several tasks
            indices = indices.unique()  # type: ignore[no-untyped-call]
            tasks = torch.full_like(indices, index)
        if not self.with_unlabelled and (hidden := self._hidden()) is not None:
            labelled = ~hidden[indices]
            indices, tasks = indices[labelled], tasks[labelled]
        memory = self.memory if self.memory is not None and len(self.memory) > 0 else None
        if memory is not None:
            extra = self._rows_of(memory)
            indices, tasks = torch.cat([indices, extra]), torch.cat([tasks, torch.full_like(extra, -1)])
        chosen = None if self.phase_samples is None else self.phase_samples(*self._candidates(indices, memory))
        if chosen is not None:
            indices, tasks = indices[chosen], tasks[chosen]
        if self._labelled is not None:
            columns, replayed = self._candidates(indices, memory)
            labelled_plan = LabelledPlan(
                indices,
                tasks,
                columns=columns,
                replayed=replayed,
                labelled=self._labelled,
                batch_size=self.batch_size,
                key=mix(self.seed or 0, index, self.phase_index),
                rank=distributed.rank(),
                world=distributed.world_size(),
                drop_last=self.drop_last,
            )
            return self._loader("train").over(labelled_plan, place=self._place, memory=memory)
        plan = self._plan(
            indices,
            tasks,
            batch_size=stream.batch_size or self.batch_size,
            key=mix(self.seed or 0, index, self.phase_index),
            drop_last=self.drop_last,
            passes=stream.passes,
            shuffle=self.shuffles(index),
            columns=self._candidates(indices, memory)[0] if self.sampler == "balanced" else None,
        )
        stored, augmented = None, self._augments and bool(self.augmentation.transforms)
        if memory is None and (self.feature_views or not augmented):
            stored = self._stored("train", training=True)
        if stored is not None and augmented:
            kind = hashlib.blake2b(f"{self.seed} {described(self.augmentation)}".encode(), digest_size=8).digest()
            stored = replace(stored, views=self.feature_views, kind=int.from_bytes(kind, "little"))
        return self._loader("train").over(plan, place=self._place, memory=memory, stored=stored)

    def val_dataloader(self) -> PlannedLoader | list[Any]:
        """Validation samples of all tasks seen so far, in one pass; an empty list if ``val_fraction`` is 0."""
        indices, tasks = self._pool(self.stream.val, range(self.task.index + 1))
        if not len(indices):
            return []
        plan = self._evaluation_plan(indices, tasks)
        return self._loader("val").over(plan, stored=self._stored("val", evaluation=True))

    def test_dataloader(self) -> PlannedLoader:
        """Test samples of all tasks seen so far, in one pass."""
        indices, tasks = self._pool(self.stream.test, range(self.task.index + 1))
        plan = self._evaluation_plan(indices, tasks)
        return self._loader("test").over(plan, stored=self._stored("test", evaluation=True))

    def evaluation_loader(
        self,
        part: Literal["val", "test"],
        tasks: Iterable[int],
        *,
        samples: int | None = None,
        key: int = 0,
        store: FeatureStore | None = None,
    ) -> PlannedLoader:
        """Held-out samples of the given tasks, for evaluations during training.

        Args:
            part: Validation or test samples.
            tasks: Indices of the tasks.
            samples: Maximum number of samples of each task, drawn without replacement; None for all.
            key: Seed of the draw, together with the index of the task.
            store: Stored features, which are served instead of images where it has them; None for none.
        """
        parts = self.stream.val if part == "val" else self.stream.test
        chosen: dict[int, Tensor] = {}
        for task in tasks:
            pool = torch.as_tensor(parts[task].copy())
            if samples is not None and samples < len(pool):
                order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(mix(key, task)))
                pool = pool[order[:samples].sort().values]
            chosen[task] = pool
        indices = torch.cat([torch.zeros(0, dtype=torch.int64), *chosen.values()])
        owners = torch.cat([torch.full((len(pool),), task) for task, pool in chosen.items()] or [indices])
        stored = None if store is None else self._identified(part, store)
        return self._loader(part).over(self._evaluation_plan(indices, owners), stored=stored)

    def statistics_dataloader(
        self,
        *,
        memory: Memory | None = None,
        indices: Tensor | None = None,
        samples: int | None = None,
        where: Callable[[Tensor, Tensor], Tensor | None] | None = None,
        batch_size: int | None = None,
        store: FeatureStore | None = None,
    ) -> PlannedLoader:
        """Training samples of the current task, un-augmented, once and in order; each process takes its share.

        Args:
            memory: Serve the samples of this memory instead, in its order.
            indices: Serve only these samples of the task, in this order.
            samples: Serve this number of samples of the task, drawn by seed and task; None for all.
            where: Choose among the samples of the task, followed by the samples of ``memory``, as ``Phase.samples``.
            batch_size: Samples per batch, over all processes; None for ``eval_batch_size``.
            store: Stored features, which are served instead of images where it has them; None for none.
        """
        if memory is not None and where is None:
            indices = self._rows_of(memory)
        elif indices is None:
            indices = self._train_pool(self.task.index)
            if (hidden := self._hidden()) is not None:
                indices = indices[~hidden[indices]]
            if samples is not None and samples < len(indices):
                generator = torch.Generator().manual_seed(mix(self.seed or 0, 0x5A3, self.task.index))
                indices = indices[torch.randperm(len(indices), generator=generator)[:samples].sort().values]
        if where is not None:
            memory = memory if memory is not None and len(memory) > 0 else None
            indices = indices if memory is None else torch.cat([indices, self._rows_of(memory)])
            chosen = where(*self._candidates(indices, memory))
            indices = indices if chosen is None else indices[chosen]
        tasks = torch.full_like(indices, self.task.index)
        key = mix(self.seed or 0, 0x57A, self.task.index)  # a memory that is filled in a pass draws in each task again
        plan = self._plan(indices, tasks, batch_size=batch_size or self.eval_batch_size, shuffle=False, key=key)
        stored = None if store is None else self._identified("statistics", store)
        return self._loader("statistics").over(plan, memory=memory, stored=stored)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        # By default Lightning copies asynchronously for plain tensors only.
        return batch.to(device, non_blocking=device.type == "cuda")

    def batch_before(self) -> Batch | None:
        """The batch of the step before the one at which a fit resumes; None if the fit starts from its beginning."""
        if self._resume is None or self.trainer is None:
            return None
        epoch, step = self._resume[0] - self._origin, self._resume[1]
        if step == 0:  # the last batch of the previous epoch
            epoch, step = epoch - 1, int(self.trainer.num_training_batches)
        loader = self.trainer.train_dataloader
        if epoch < 0 or not isinstance(loader, PlannedLoader):
            return None
        batch = loader.at(epoch, step - 1).to(self.trainer.strategy.root_device)
        return self.finish(batch, augment=self._augments, epoch=epoch)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if self._features is not None and self.trainer is not None and self.trainer.training:
            return batch
        return self.finish(batch, augment=self._augments and self.trainer is not None and bool(self.trainer.training))

    def close(self) -> None:
        """Stop the worker processes; loaders start them again when needed."""
        for loader in self._loaders.values():
            loader.close()

    # ------------------------------------------------------------------ inside

    def _place(self) -> tuple[int, int]:
        epoch = self.trainer.current_epoch if self.trainer is not None else self._origin
        first = self._resume[1] if self._resume is not None and self._resume[0] == epoch else 0
        return epoch - self._origin, first

    def _feature_loader(self, pool: FeaturePool) -> FeatureLoader:
        index, rows = self.task.index, torch.arange(len(pool))
        owners = torch.zeros(self.task.num_seen, dtype=torch.int64)
        for task in self.stream.tasks[: index + 1]:
            owners[list(task.columns)] = task.index
        plan = self._plan(
            rows,
            rows,
            batch_size=self._phase_batch_size or self.stream.batch_size or self.batch_size,
            key=mix(self.seed or 0, index, self.phase_index),
        )
        return FeatureLoader(pool, plan, self._place, owners)

    def _pool(self, parts: Sequence[np.ndarray], chosen: range) -> tuple[Tensor, Tensor]:
        arrays = [torch.tensor(parts[task]) for task in chosen]
        tasks = [torch.full((len(array),), task) for task, array in zip(chosen, arrays, strict=True)]
        return torch.cat(arrays), torch.cat(tasks)

    def _stored(self, kind: str, **purpose: bool) -> Stored | None:
        """Stored features of the samples of a loader; None if the strategy stores none."""
        strategy: Any = self.trainer.lightning_module if self.trainer is not None else None
        store = strategy.passes.store(**purpose) if strategy is not None else None
        return None if store is None else self._identified(kind, store)

    def _identified(self, kind: str, store: FeatureStore) -> Stored | None:
        if self._loader(kind).shifted:  # pixels depend on the task
            return None
        return Stored(store, store.identities(self.samples(train=kind != "test")))

    def _rows_of(self, memory: Memory) -> Tensor:
        """Indices past the end of the data set, which stand for the rows of a memory."""
        return torch.arange(len(memory)) + len(self.samples(train=True).labels)

    def _candidates(self, indices: Tensor, memory: Memory | None) -> tuple[Tensor, Tensor]:
        """Columns of samples of the data set, then of samples of a memory, and whether the memory holds each."""
        count = len(self.samples(train=True).labels)
        replayed = indices >= count
        labels = [self._loader("train").labels[indices[~replayed]]]
        labels += [] if memory is None else [memory.labels.cpu()[indices[replayed] - count]]
        return torch.cat(labels), replayed

    def _plan(self, indices: Tensor, tasks: Tensor, **options: Any) -> Plan:
        return Plan(indices, tasks, rank=distributed.rank(), world=distributed.world_size(), **options)

    def _evaluation_plan(self, indices: Tensor, tasks: Tensor) -> Plan:
        skip = not self.whole_batches
        return self._plan(indices, tasks, batch_size=self.eval_batch_size, shuffle=False, skip_empty=skip)

    def _hidden(self) -> Tensor | None:
        unlabelled = [part for part in self.stream.unlabelled if len(part)]
        if not unlabelled:
            return None
        hidden = torch.zeros(len(self.samples(train=True).labels), dtype=torch.bool)
        hidden[torch.as_tensor(np.concatenate(unlabelled))] = True
        return hidden

    def _train_pool(self, task: int) -> Tensor:
        """Training samples of a task that are neither left out nor forgotten; all samples of a request."""
        pool = torch.as_tensor(self.stream.train[task].copy())
        if self.stream.tasks[task].learns and len(forgotten := self.stream.forgotten(self.task.index)):
            pool = pool[~torch.isin(pool, torch.from_numpy(forgotten))]
        if task != self.task.index or self._left_out == 0:
            return pool
        labels = torch.as_tensor(training_labels(self))[pool]
        return pool[~left_out(labels, self._left_out, mix(self.seed or 0, 0x1E0, task))]

    def _loader(self, kind: str) -> StreamLoader:
        if kind not in self._loaders:
            source = self.samples(train=kind != "test")
            columns = torch.as_tensor(self.stream.column_table.copy())
            shifted = any(task.domain is not None for task in self.stream.tasks)
            self._loaders[kind] = StreamLoader(
                source,
                columns,
                labels=training_labels(self) if kind in ("train", "statistics") else None,
                hidden=self._hidden() if kind in ("train", "statistics") else None,
                shift=Shifts(self.stream) if shifted else None,
                targets=self._target_table(test=kind == "test"),
                workers=self.workers,
                pin_memory=self.pin_memory,
            )
        return self._loaders[kind]
