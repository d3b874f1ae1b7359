"""The base of all sources of data: deals a data set out over tasks, and serves the current one to Lightning."""

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from cl_lightning import distributed
from cl_lightning.backbones import ImageShape
from cl_lightning.batch import Batch, mix
from cl_lightning.loaders import Plan, PlannedLoader, StreamLoader
from cl_lightning.memory import Memory
from cl_lightning.sources import FileSource, Source, TensorSource
from cl_lightning.stream import Catalogue, ClassIncremental, Scenario, Stream, Task
from cl_lightning.transforms import Compose, Context, Normalize, Transform, permute_pixels, rotate_images


class ContinualDataModule(LightningDataModule):
    """Serves a stream of tasks; a subclass says where the samples come from.

    A subclass writes ``source(train=...)`` and, where it downloads, ``prepare_data``; facts of its data set (``mean``,
    ``std``, default augmentation) are class attributes. The base deals the samples out by a scenario, keeps a share of
    each task for validation, and serves the loaders of the current task, of all tasks seen so far, and un-augmented
    ones. Test data is never part of a fit.

    Args:
        scenario: How the data are dealt out over tasks; None for five tasks of equally many classes (fewer if the
            number of classes asks for it).
        batch_size: Samples per training step, of all devices together; each device takes its share.
        eval_batch_size: The same where no gradient is taken.
        val_fraction: Share of each class's training samples kept for validation, in [0, 1).
        transforms: Augmentation of training batches, in order, on the device; None for that of the data set.
        mean: Of the pixels in [0, 1], per channel, subtracted; None for that of the data set.
        std: Divisor, per channel; None for that of the data set.
        seed: Of class order, order of samples, validation share and augmentation; None for ``seed_everything``.
        drop_last: Leave out a last training batch that is not full.
        workers: Worker processes that decode files.
        in_memory: Decode files once and keep them as uint8 tensors; None to do so if they take at most 1 GiB.
    """

    mean: Sequence[float] = (0.5,)
    std: Sequence[float] = (0.5,)

    def __init__(
        self,
        *,
        scenario: Scenario | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        val_fraction: float = 0.0,
        transforms: list[Transform] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        seed: int | None = None,
        drop_last: bool = False,
        workers: int = 0,
        in_memory: bool | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ValueError(f"{type(self).__name__}: {name} is {value}; it must be at least 1")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"{type(self).__name__}: val_fraction is {val_fraction}; it must lie in [0, 1)")
        if workers < 0:
            raise ValueError(f"{type(self).__name__}: workers is {workers}; it must be at least 0")
        self.scenario = scenario
        self.batch_size, self.eval_batch_size, self.val_fraction = batch_size, eval_batch_size, val_fraction
        self.normalize = Normalize(mean or self.mean, std or self.std)
        self.augmentation = Compose(self.default_transforms() if transforms is None else transforms)
        self.seed, self.drop_last, self.workers, self.in_memory = seed, drop_last, workers, in_memory
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.stream: Stream
        self.task: Task
        self.memory: Memory | None = None
        self.cumulative = False
        self.with_unlabelled = False
        self.phase_index = 0
        self._origin = (0, 0)
        self._resume: tuple[int, int] | None = None
        self._sources: dict[bool, Source] = {}
        self._loaders: dict[str, StreamLoader] = {}

    # ------------------------------------------------------------------ what a subclass writes

    def source(self, *, train: bool) -> Source:
        """The training or the test samples; called once each, after ``prepare_data``."""
        raise NotImplementedError

    def default_transforms(self) -> list[Transform]:
        """Augmentation that is usual for the data set."""
        return []

    # ------------------------------------------------------------------ the stream

    def samples(self, *, train: bool) -> Source:
        """Training or test samples, in memory where that is wanted."""
        if train not in self._sources:
            source = self.source(train=train)
            if isinstance(source, FileSource) and self._keep(source):
                source = in_memory(source)
            self._sources[train] = source
        return self._sources[train]

    @property
    def image_shape(self) -> ImageShape:
        return self.samples(train=True).image_shape

    def catalogue(self) -> Catalogue:
        """What a scenario needs to know of the data."""
        train, test = self.samples(train=True), self.samples(train=False)
        return Catalogue(
            train_labels=train.labels,
            test_labels=test.labels,
            class_names=train.class_names,
            train_domains=train.domains,
            test_domains=test.domains,
            domain_names=train.domain_names,
        )

    def make_stream(self, seed: int, earlier: Stream | None = None) -> Stream:
        """Deal the data out over tasks.

        Args:
            seed: Used unless the data module has a seed of its own.
            earlier: A stream that was learnt already; its tasks come first, by the names of their classes, and classes
                or domains that the data have gained since make further tasks.
        """
        self.seed = seed if self.seed is None else self.seed
        catalogue = self.catalogue()
        scenario = self.scenario or default_scenario(len(catalogue.class_names))
        if earlier is None:
            self.stream = scenario(catalogue, seed=self.seed, val_fraction=self.val_fraction)
        else:
            self.stream = scenario.extend(earlier, catalogue, seed=self.seed, val_fraction=self.val_fraction)
        self._loaders = {}
        if len(self.normalize.mean) not in (1, self.image_shape[0]):
            raise ValueError(
                f"{type(self).__name__}: mean has {len(self.normalize.mean)} numbers, images have {self.image_shape[0]} "
                "channels; give one per channel, or one for all"
            )
        return self.stream

    def fingerprint(self, task: int) -> str:
        """Hash of a task's classes, by name, and of the content of its training, validation and test samples."""
        stream, digest = self.stream, hashlib.blake2b(digest_size=16)
        digest.update("\0".join(stream.class_names[column] for column in stream.tasks[task].columns).encode())
        for train, indices in ((True, stream.train[task]), (True, stream.val[task]), (False, stream.test[task])):
            digest.update(self.samples(train=train).digest(indices))
        return digest.hexdigest()

    def begin(self, task: Task, *, cumulative: bool = False, with_unlabelled: bool = False) -> None:
        """Make ``task`` the current one."""
        self.task, self.cumulative, self.with_unlabelled = task, cumulative, with_unlabelled

    def begin_phase(self, index: int, memory: Memory | None, origin: int, resume: tuple[int, int] | None = None) -> None:
        """Prepare the training loader for a phase.

        Args:
            index: Place of the phase in its task.
            memory: Memory whose samples are mixed with the task's.
            origin: Epoch of the Trainer at which the phase begins.
            resume: Epoch of the Trainer and step to start at, when a fit goes on half-way.
        """
        self.phase_index, self.memory, self._resume = index, memory, resume
        self._origin = (origin, index)

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> PlannedLoader:
        """Shuffled batches of the current task, of the memory where the strategy wants them mixed."""
        stream, index = self.stream, self.task.index
        indices, tasks = self._pool(stream.train, range(index + 1) if self.cumulative else range(index, index + 1))
        if not self.with_unlabelled and (hidden := self._hidden()) is not None:
            labelled = ~hidden[indices]
            indices, tasks = indices[labelled], tasks[labelled]
        if self.memory is not None and len(self.memory) > 0:
            extra = torch.arange(len(self.memory)) + len(self.samples(train=True).labels)
            indices, tasks = torch.cat([indices, extra]), torch.cat([tasks, torch.full_like(extra, -1)])
        plan = self._plan(
            indices,
            tasks,
            batch_size=stream.batch_size or self.batch_size,
            key=mix(self.seed or 0, index, self.phase_index),
            drop_last=self.drop_last,
            passes=stream.passes,
        )
        return self._loader("train").over(plan, place=self._place, memory=self.memory)

    def val_dataloader(self) -> PlannedLoader | list[Any]:
        """Validation samples of all tasks seen so far, in one pass; nothing without ``val_fraction``."""
        indices, tasks = self._pool(self.stream.val, range(self.task.index + 1))
        return self._loader("val").over(self._evaluation_plan(indices, tasks)) if len(indices) else []

    def test_dataloader(self) -> PlannedLoader:
        """Test samples of all tasks seen so far, in one pass."""
        indices, tasks = self._pool(self.stream.test, range(self.task.index + 1))
        return self._loader("test").over(self._evaluation_plan(indices, tasks))

    def statistics_dataloader(self) -> PlannedLoader:
        """The current task's training samples once, in order; each process takes its share."""
        indices, tasks = self._pool(self.stream.train, range(self.task.index, self.task.index + 1))
        if (hidden := self._hidden()) is not None:
            indices, tasks = indices[~hidden[indices]], tasks[~hidden[indices]]
        plan = self._plan(indices, tasks, batch_size=self.eval_batch_size, shuffle=False, shortage="empty")
        return self._loader("statistics").over(plan)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return self.finish(batch, augment=self.trainer is not None and bool(self.trainer.training))

    def finish(self, batch: Batch, *, augment: bool) -> Batch:
        """Augment, if asked to, and normalise the raw images of a batch, where they are."""
        images = batch.raw
        if augment and self.augmentation.transforms:
            epoch = self.trainer.current_epoch - self._origin[0] if self.trainer is not None else 0
            images = self.augmentation(images, batch.draw, Context(indices=batch.indices, epoch=epoch, seed=self.seed or 0))
        return batch.replace(images=self.normalize(images, batch.draw))

    # ------------------------------------------------------------------ inside

    def _keep(self, source: FileSource) -> bool:
        if self.in_memory is not None:
            return self.in_memory
        channels, height, width = source.image_shape
        return len(source) * channels * height * width <= 2**30

    def _place(self) -> tuple[int, int]:
        epoch = self.trainer.current_epoch if self.trainer is not None else self._origin[0]
        first = self._resume[1] if self._resume is not None and self._resume[0] == epoch else 0
        return epoch - self._origin[0], first

    def _pool(self, parts: Sequence[np.ndarray], chosen: range) -> tuple[Tensor, Tensor]:
        arrays = [torch.as_tensor(np.asarray(parts[task], dtype=np.int64)) for task in chosen]
        tasks = [torch.full((len(array),), task) for task, array in zip(chosen, arrays, strict=True)]
        return torch.cat(arrays), torch.cat(tasks)

    def _plan(self, indices: Tensor, tasks: Tensor, **options: Any) -> Plan:
        return Plan(indices, tasks, rank=distributed.rank(), world=distributed.world_size(), **options)

    def _evaluation_plan(self, indices: Tensor, tasks: Tensor) -> Plan:
        return self._plan(indices, tasks, batch_size=self.eval_batch_size, shuffle=False, shortage="skip")

    def _hidden(self) -> Tensor | None:
        unlabelled = [part for part in self.stream.unlabelled if len(part)]
        if not unlabelled:
            return None
        hidden = torch.zeros(len(self.samples(train=True).labels), dtype=torch.bool)
        hidden[torch.as_tensor(np.concatenate(unlabelled))] = True
        return hidden

    def _loader(self, kind: str) -> StreamLoader:
        if kind not in self._loaders:
            source = self.samples(train=kind != "test")
            columns = torch.as_tensor(self.stream.column_table.copy())
            shifted = any(task.domain is not None for task in self.stream.tasks)
            self._loaders[kind] = StreamLoader(
                source,
                columns,
                hidden=self._hidden() if kind == "train" else None,  # only the strategy must not see them
                shift=Shifts(self.stream) if shifted else None,
                workers=self.workers,
                pin_memory=torch.cuda.is_available(),
            )
        return self._loaders[kind]


class Shifts:
    """Applies to raw images what the domain of their task does to them: a fixed permutation or rotation."""

    def __init__(self, stream: Stream) -> None:
        self.shifts = [task.domain for task in stream.tasks]

    def __call__(self, images: Tensor, tasks: Tensor) -> Tensor:
        result = images.clone()
        for task in tasks.unique().tolist():
            shift = self.shifts[task]
            rows = tasks == task
            if shift is None:
                continue
            if shift.kind == "permute":
                result[rows] = permute_pixels(images[rows], int(shift.value))
            else:
                result[rows] = rotate_images(images[rows], float(shift.value))
        return result


def in_memory(source: FileSource) -> TensorSource:
    """The same samples, decoded once."""
    images = torch.empty(len(source), *source.image_shape, dtype=torch.uint8)
    for index, path in enumerate(source.paths):
        images[index] = source.decode(path)
    kept = TensorSource(
        images,
        source.labels,
        class_names=source.class_names,
        channels_last=False,
        domains=source.domains,
        domain_names=source.domain_names,
    )
    kept.digest = source.digest  # type: ignore[method-assign]  # by name and size, as when files are read each time
    return kept


def default_scenario(num_classes: int) -> Scenario:
    """Five tasks, or the largest number of equal tasks below that."""
    tasks = next(count for count in (5, 4, 3, 2, 1) if num_classes % count == 0)
    if tasks == 1 and num_classes > 1:
        warnings.warn(f"{num_classes} classes do not split evenly: they make one task; give a scenario", stacklevel=2)
    return ClassIncremental(tasks=tasks)
