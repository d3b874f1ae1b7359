"""Base class of data modules: deals a data set out over tasks and serves the loaders of the current task."""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor

from cl_lightning import distributed
from cl_lightning.batch import Batch, ImageShape, RowDraw, mix
from cl_lightning.checks import one_of
from cl_lightning.data import (
    Compose,
    Context,
    FeatureLoader,
    FeaturePool,
    FeatureStore,
    FileSource,
    Normalize,
    Plan,
    PlannedLoader,
    SampleSource,
    StreamLoader,
    Transform,
    permute_pixels,
    rotate_images,
)
from cl_lightning.data.feature_cache import KEYS, STORED
from cl_lightning.data.loaders import Stored
from cl_lightning.data.sources import checked, decoded
from cl_lightning.data.transforms import described
from cl_lightning.memory import Memory
from cl_lightning.stream import ClassIncremental, DatasetInfo, Scenario, Segment, Stream, Task

_EVAL_VALUES = 512 * 3 * 32 * 32


class ContinualDataModule(LightningDataModule):
    """Data module for a stream of tasks over one data set.

    A subclass implements ``source(train=...)`` and, if it downloads, ``prepare_data``. It may also set ``mean`` and
    ``std`` (of pixels in [0, 1], per channel) and override ``default_transforms`` and ``default_scenario``. This class
    deals the samples out over tasks by a scenario, holds out a share of each task for validation, and serves training
    loaders of the current task, evaluation loaders of all tasks seen so far, and un-augmented loaders. Test data is
    never part of a fit.

    Labels of a source and of a scenario are raw: integers from 0 in the order of ``class_names``. The loaders map them
    to columns of the logits, numbered in the order in which classes arrive in the stream. ``labels`` of a ``Batch`` and
    all labels in strategies, memories and measures are columns. With the class order ``[7, 2, 5]``, raw label 7 is
    column 0.

    Args:
        scenario: How the data are dealt out over tasks; None for five tasks with equal numbers of classes, or for the
            largest number of such tasks below five.
        batch_size: Samples per training step, over all devices; each device takes its share. At least 1.
        eval_batch_size: Samples per batch without gradient, over all devices, at least 1; None for 512 images of
            up to 3 x 32 x 32 values and fewer larger ones, at least 32.
        val_fraction: Share of the training samples of each class that is held out for validation, in [0, 1).
        transforms: Augmentation of training batches, in this order, on the device; None for the default of the data
            set.
        mean: Mean of the pixels in [0, 1], per channel, which is subtracted; None for the mean of the data set. If that
            is unknown, it is measured on images of the first task, at most 10,000 in memory or 1,000 files, evenly
            spaced. Later tasks have no influence.
        std: Standard deviation of the pixels, per channel, by which they are divided; None as for ``mean``.
        resize: Height and width in pixels to which images are scaled on the device after augmentation, such as the
            input size of a pretrained backbone. A memory keeps images of the original size. None to keep the size.
        center_crop: Side in pixels of the square cut from the centre of an image after ``resize``, at most ``resize``.
            Images that transforms have brought to this size already (``RandomResizedCrop``) are not resized and
            cropped. None for no crop.
        interpolation: Interpolation of ``resize``.
        seed: Seed of class order, order of samples, validation share and augmentation; None for ``seed_everything``.
        drop_last: Leave out the last training batch of an epoch if it is not full.
        workers: Number of worker processes per loader that decode files; it does not change results.
        in_memory: Decode files once and keep them as uint8 tensors; None to do so if they take at most 1 GiB.

    Raises:
        ValueError: If an option is outside its range, and before training if the data do not meet the requirements.
    """

    mean: ClassVar[Sequence[float] | None] = None
    std: ClassVar[Sequence[float] | None] = None

    input_kind: ClassVar[str] = "image"
    """What a sample is; a strategy whose traits do not name it is refused."""
    target_kind: ClassVar[str] = "class"
    """What the target of a sample is, likewise."""

    def __init__(
        self,
        *,
        scenario: Scenario | None = None,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        val_fraction: float = 0.0,
        transforms: list[Transform] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        resize: int | None = None,
        center_crop: int | None = None,
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        seed: int | None = None,
        drop_last: bool = False,
        workers: int = 0,
        in_memory: bool | None = None,
    ) -> None:
        super().__init__()
        least = {"batch_size": 1, "eval_batch_size": 1, "workers": 0, "resize": 1}
        given = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "workers": workers, "resize": resize}
        for name, low in least.items():
            if (value := given[name]) is not None and value < low:
                raise ValueError(f"{type(self).__name__}: {name} is {value}; it must be at least {low}")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"{type(self).__name__}: val_fraction is {val_fraction}; it must be in [0, 1)")
        self.scenario = scenario
        self.batch_size, self.val_fraction, self._eval_batch_size = batch_size, val_fraction, eval_batch_size
        self.channels_last, self.feature_views, self.pin_memory = False, 0, False
        if center_crop is not None and not 1 <= center_crop <= (resize or 0):
            raise ValueError(
                f"{type(self).__name__}: center_crop is {center_crop}, resize is {resize}; center_crop must be at "
                "least 1 and at most resize"
            )
        one_of(self, ("bilinear", "bicubic"), interpolation=interpolation)
        if interpolation != "bilinear" and resize is None:
            name = type(self).__name__
            raise ValueError(f"{name}: give resize; interpolation is {interpolation!r}, but images are not scaled")
        self.resize, self.center_crop, self.interpolation = resize, center_crop, interpolation
        self._given = (mean, std)
        self._measured: tuple[list[float], list[float]] | None = None
        self._normalize: Normalize | None = None
        if None not in self.statistics():
            _ = self.normalize  # raises errors in the constructor
        self.augmentation = Compose(self.default_transforms() if transforms is None else transforms)
        self.seed, self.drop_last, self.workers, self.in_memory = seed, drop_last, workers, in_memory
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.stream: Stream
        self.task: Task
        self.memory: Memory | None = None
        self.cumulative = False
        self.with_unlabelled = False
        self.whole_batches = False  # whether every process runs each evaluation batch, also with no rows of it
        self.phase_index = 0
        self.phase_samples: Callable[[Tensor, Tensor], Tensor | None] | None = None
        self._origin = 0
        self._resume: tuple[int, int] | None = None
        self._features: Callable[[], FeaturePool] | None = None
        self._phase_batch_size: int | None = None
        self._augments = True
        self._sources: dict[bool, SampleSource] = {}
        self._loaders: dict[str, StreamLoader] = {}

    # ------------------------------------------------------------------ to be overridden

    def source(self, *, train: bool) -> SampleSource:
        """Training or test samples, with raw labels; called once for each, after ``prepare_data``."""
        raise NotImplementedError

    def default_transforms(self) -> list[Transform]:
        """Usual augmentation of the data set, used if ``transforms`` is None."""
        return []

    def default_scenario(self, info: DatasetInfo) -> Scenario:
        """Scenario of the data set, used if ``scenario`` is None."""
        return default_scenario(info.num_classes)

    def shuffles(self, task: int) -> bool:
        """Whether the training samples of a task are shuffled in each epoch; False for the order of the data."""
        return True

    def statistics(self) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        """Mean and standard deviation of the pixels in [0, 1], per channel; None for a value to be measured."""
        mean, std = self._given
        return mean or self.mean, std or self.std

    # ------------------------------------------------------------------ the stream

    def samples(self, *, train: bool) -> SampleSource:
        """Training or test samples, decoded into memory with ``in_memory``; labels are raw."""
        if train not in self._sources:
            source = self.source(train=train)
            if not source.in_memory and self._keep(source):
                source = decoded(source, self.workers)
            elif isinstance(source, FileSource):
                source = checked(source, self.workers)
            self._sources[train] = source
        return self._sources[train]

    @property
    def image_shape(self) -> ImageShape:
        """Shape ``(channels, height, width)`` of images as the network receives them."""
        channels, height, width = self.samples(train=True).image_shape
        side = self.center_crop or self.resize
        return (channels, height, width) if side is None else (channels, side, side)

    @property
    def eval_batch_size(self) -> int:
        """Samples per batch without gradient, over all devices."""
        return self.eval_batch_size_for(self.image_shape)

    def eval_batch_size_for(self, image_shape: ImageShape) -> int:
        """Samples per batch without gradient for images of a given shape; the data need not be present."""
        if self._eval_batch_size is not None:
            return self._eval_batch_size
        # On a CPU, activations larger than the cache, mapped again for each layer, take most of the time.
        return min(512, max(32, _EVAL_VALUES // math.prod(image_shape)))

    @property
    def normalize(self) -> Normalize:
        """``(x - mean) / std``; measures mean and std on the first task if they are not known."""
        if self._normalize is None:
            mean, std = self.statistics()
            if mean is None or std is None:
                self._measured = self._measured or self._measure()
                mean, std = mean or self._measured[0], std or self._measured[1]
            self._normalize = Normalize(mean, std)
        return self._normalize

    def state_dict(self) -> dict[str, Any]:
        """Measured mean and std, for the checkpoint; empty if they were not measured."""
        return {} if self._measured is None else {"mean": self._measured[0], "std": self._measured[1]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._measured, self._normalize = (state_dict["mean"], state_dict["std"]), None

    def dataset_info(self) -> DatasetInfo:
        """Raw labels, domains and names, which a scenario needs."""
        train, test = self.samples(train=True), self.samples(train=False)
        return DatasetInfo(
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
            seed: Seed of the run; the data module's own seed has precedence.
            earlier: A stream that was learnt already. Its tasks come first, by the names of their classes; classes or
                domains that were added to the data since then make further tasks.

        Raises:
            ValueError: If the data do not fit the scenario, ``earlier`` or ``mean``, or lack test samples.
        """
        self.seed = seed if self.seed is None else self.seed
        info = self.dataset_info()
        train, test = (self.samples(train=part).image_shape for part in (True, False))
        if train != test:
            raise ValueError(
                f"{type(self).__name__}: test images have shape {test}, training images {train}; give both one shape"
            )
        scenario = self.scenario or self.default_scenario(info)
        if earlier is None:
            self.stream = scenario(info, seed=self.seed, val_fraction=self.val_fraction)
        else:
            self.stream = self._continued(scenario, info, Segment(1, self.seed, self.val_fraction), earlier)
        self.close()
        self._loaders = {}
        if not len(self.stream.test[0]):
            raise ValueError(
                f"{type(self).__name__}: the first task ({self.stream.tasks[0].name}) has no test samples; add some, "
                "since each task ends with an evaluation, or begin with other classes"
            )
        if (numbers := len(self.normalize.mean)) not in (1, train[0]):
            raise ValueError(
                f"{type(self).__name__}: mean has {numbers} numbers, images have {train[0]} channels; give one per "
                "channel, or one for all"
            )
        return self.stream

    def _continued(self, scenario: Scenario, info: DatasetInfo, part: Segment, earlier: Stream) -> Stream:
        """The earlier stream over the present data, extended if classes or domains were added."""
        try:
            fresh = scenario(info, seed=part.seed, val_fraction=part.val_fraction)
        except ValueError:  # three classes in tasks of two are possible as an extension only
            fresh = None
        if fresh == earlier:
            return earlier
        longer = scenario.stream(info, part, earlier)
        if len(longer) > len(earlier):
            return scenario.extend(earlier, info, seed=part.seed, val_fraction=part.val_fraction)
        last = earlier.parts[-1]
        if (scenario.describe(), part.seed, part.val_fraction) != (earlier.scenario, last.seed, last.val_fraction):
            raise ValueError(
                f"{type(self).__name__}: the stream learnt so far is another one: {earlier.scenario} with seed "
                f"{last.seed} and val_fraction {last.val_fraction}; the configuration has {scenario.describe()} with "
                f"seed {part.seed} and val_fraction {part.val_fraction}"
            )
        return longer

    def fingerprint(self, task: int) -> str:
        """Hash of a task: names of its classes, and its training, validation and test samples with their classes."""
        stream, digest = self.stream, hashlib.blake2b(digest_size=16)
        digest.update("\0".join(stream.names_of(stream.tasks[task])).encode("utf-8", "surrogatepass"))
        for train, indices in ((True, stream.train[task]), (True, stream.val[task]), (False, stream.test[task])):
            source = self.samples(train=train)
            digest.update(source.digest(indices))
            digest.update(stream.columns_of(source.labels[indices]).astype("<i8").tobytes())
        return digest.hexdigest()

    def begin(self, task: Task, *, cumulative: bool = False, with_unlabelled: bool = False) -> None:
        """Set the current task, which the training and statistics loaders serve.

        Args:
            task: Task of the stream.
            cumulative: Whether the training loader serves all tasks so far.
            with_unlabelled: Whether it also serves samples whose label is hidden; their label is -1.
        """
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
            augments: Whether batches are augmented.
        """
        self.phase_index, self.memory, self._resume, self._augments = index, memory, resume, augments
        self._origin, self.phase_samples = origin, samples
        self._features, self._phase_batch_size = features, batch_size

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> PlannedLoader | FeatureLoader:
        """Training batches: the current task, with the samples of a mixed memory if there is one, or features."""
        stream, index = self.stream, self.task.index
        if self._features is not None:
            return self._feature_loader(self._features())
        indices, tasks = self._pool(stream.train, range(index + 1) if self.cumulative else range(index, index + 1))
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
        plan = self._plan(
            indices,
            tasks,
            batch_size=stream.batch_size or self.batch_size,
            key=mix(self.seed or 0, index, self.phase_index),
            drop_last=self.drop_last,
            passes=stream.passes,
            shuffle=self.shuffles(index),
        )
        stored, augmented = None, bool(self.augmentation.transforms)
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
            indices, _ = self._pool(self.stream.train, range(self.task.index, self.task.index + 1))
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
        plan = self._plan(indices, tasks, batch_size=batch_size or self.eval_batch_size, shuffle=False)
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

    def finish(self, batch: Batch, *, augment: bool, epoch: int | None = None) -> Batch:
        """Augment (optionally), scale and normalise the raw images of a batch, on their device.

        Args:
            batch: Batch on any device, with uint8 images ``(B, C, H, W)`` in ``raw``.
            augment: Whether to augment.
            epoch: Epoch of the phase that determines the augmentation; None for the current one.

        Returns:
            The batch with ``images`` as the network receives them, floating point ``(B, *image_shape)``.
        """
        if STORED in batch.extra:
            return batch
        images, ready = batch.raw, False
        if augment and self.augmentation.transforms:
            if epoch is None:
                epoch = self.trainer.current_epoch - self._origin if self.trainer is not None else 0
            draw = batch.draw
            if KEYS in batch.extra:  # a fixed view: its draw depends on the sample, not on the batch
                draw, epoch = RowDraw.of_rows(batch.extra[KEYS]), epoch % self.feature_views
            images = self.augmentation(images, draw, Context(indices=batch.indices, epoch=epoch, seed=self.seed or 0))
            ready = self.center_crop is not None and images.shape[-2:] == (self.center_crop, self.center_crop)
        if self.resize is not None and not ready:
            images = self._resized(images, self.resize)
        images = self.normalize(images, batch.draw)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return batch.replace(images=images)

    def close(self) -> None:
        """Stop the worker processes; loaders start them again when needed."""
        for loader in self._loaders.values():
            loader.close()

    # ------------------------------------------------------------------ inside

    def _keep(self, source: SampleSource) -> bool:
        if self.in_memory is not None:
            return self.in_memory
        channels, height, width = source.image_shape
        return len(source.labels) * channels * height * width <= 2**30

    def _measure(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over images of the first task, rounded to 4 decimals."""
        if not hasattr(self, "stream"):
            raise ValueError(
                f"{type(self).__name__}: give data.mean and data.std; neither the configuration nor the checkpoint has "
                "the normalisation of the images"
            )
        source, indices = self.samples(train=True), torch.as_tensor(self.stream.train[0].copy())
        most = 10_000 if source.in_memory else 1_000
        if len(indices) > most:
            indices = indices[torch.linspace(0, len(indices) - 1, most, dtype=torch.float64).long()]
        total = squares = torch.zeros((), dtype=torch.float64)
        count = 0
        for part in torch.split(indices, 256):
            values = source.take(part).transpose(0, 1).flatten(1).double()  # (C, pixels)
            total, squares = total + values.sum(1), squares + values.square().sum(1)
            count += values.shape[1]
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=1).sqrt()  # at least one grey level, for constant images
        return [round(value, 4) for value in (mean / 255).tolist()], [round(value, 4) for value in (std / 255).tolist()]

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

    @property
    def scaling(self) -> str:
        """Description of the processing of un-augmented images, for comparison with a stored one."""
        size = f"{self.resize}"
        if self.center_crop is not None or self.interpolation != "bilinear":
            size += f" {self.interpolation}, of which {self.center_crop}"
        return f"size {size}, mean {self.normalize.mean}, std {self.normalize.std}"

    def _resized(self, images: Tensor, side: int) -> Tensor:
        """Images scaled to a square and cropped at the centre with ``center_crop``; floating point if scaled."""
        if images.shape[-2:] != (side, side):
            images = images if images.is_floating_point() else images.float().div_(255)
            images = F.interpolate(images, (side, side), mode=self.interpolation, antialias=True)
            if self.interpolation == "bicubic":
                images = images.clamp_(0, 1)  # bicubic interpolation overshoots at edges
        if self.center_crop is not None:
            first = round((side - self.center_crop) / 2)
            rows = slice(first, first + self.center_crop)
            images = images[..., rows, rows]
        return images

    def _rows_of(self, memory: Memory) -> Tensor:
        """Indices past the end of the data set, which stand for the rows of a memory."""
        return torch.arange(len(memory)) + len(self.samples(train=True).labels)

    def _candidates(self, indices: Tensor, memory: Memory | None) -> tuple[Tensor, Tensor]:
        """Columns of samples of the data set, then of the samples of a memory, and whether the memory holds each."""
        replayed = indices >= len(self.samples(train=True).labels)
        labels = [self._loader("train").labels[indices[~replayed]]]
        labels += [] if memory is None else [memory.labels.cpu()]
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

    def _loader(self, kind: str) -> StreamLoader:
        if kind not in self._loaders:
            source = self.samples(train=kind != "test")
            columns = torch.as_tensor(self.stream.column_table.copy())
            shifted = any(task.domain is not None for task in self.stream.tasks)
            self._loaders[kind] = StreamLoader(
                source,
                columns,
                hidden=self._hidden() if kind == "train" else None,  # in training batches only
                shift=Shifts(self.stream) if shifted else None,
                workers=self.workers,
                pin_memory=self.pin_memory,
            )
        return self._loaders[kind]


class Shifts:
    """Domain shift of raw images by task: a fixed permutation of the pixels or a rotation."""

    def __init__(self, stream: Stream) -> None:
        self.shifts = stream.shifts
        self._orders: dict[int, Tensor] = {}

    def __call__(self, images: Tensor, tasks: Tensor) -> Tensor:
        result = images.clone()
        for task in sorted(set(tasks.tolist())):
            if self.shifts[task] is not None:
                rows = tasks == task
                result[rows] = self._shifted(images[rows], task)
        return result

    def _shifted(self, images: Tensor, task: int) -> Tensor:
        shift = self.shifts[task]
        assert shift is not None
        if shift.kind == "rotate":
            return rotate_images(images, float(shift.value))
        if task not in self._orders:  # drawn once instead of per batch
            places = torch.arange(images.shape[-2] * images.shape[-1]).view(images.shape[-2:])
            self._orders[task] = permute_pixels(places, int(shift.value)).flatten()
        return images.flatten(-2).index_select(-1, self._orders[task]).view(images.shape)


def default_scenario(num_classes: int) -> Scenario:
    """Class-incremental: five tasks, or the largest number of equal tasks below five."""
    tasks = next(count for count in (5, 4, 3, 2, 1) if num_classes % count == 0)
    if tasks == 1 and num_classes > 1:
        warnings.warn(f"give a scenario: {num_classes} classes make one task, 2 to 5 do not divide them", stacklevel=2)
    return ClassIncremental(tasks=tasks)
