"""The base of all sources of data: deals a data set out over tasks, and serves the current one to Lightning."""

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
from cl_lightning.backbones import ImageShape
from cl_lightning.batch import Batch, RowDraw, mix
from cl_lightning.feature_cache import KEYS, STORED, FeatureStore
from cl_lightning.features import FeaturePool
from cl_lightning.loaders import FeatureLoader, Plan, PlannedLoader, Stored, StreamLoader
from cl_lightning.memory import Memory
from cl_lightning.pixels import permute_pixels, rotate_images
from cl_lightning.sources import FileSource, Source, checked, decoded
from cl_lightning.stream import Catalogue, ClassIncremental, Part, Scenario, Stream, Task
from cl_lightning.transforms import Compose, Context, Normalize, Transform, described

_EVAL_VALUES = 512 * 3 * 32 * 32


class ContinualDataModule(LightningDataModule):
    """Serves a stream of tasks; a subclass says where the samples come from.

    A subclass writes ``source(train=...)`` and, where it downloads, ``prepare_data``. What else it may say of its data
    set are ``mean`` and ``std`` (of pixels in [0, 1], per channel), ``default_transforms`` and ``default_scenario``.
    The base deals the samples out by a scenario, keeps a share of each task for validation, and serves the loaders of
    the current task, of all tasks seen so far, and un-augmented ones. Test data is never part of a fit.

    Args:
        scenario: How the data are dealt out over tasks; None for five tasks of equally many classes (fewer if the
            number of classes asks for it).
        batch_size: Samples per training step, of all devices together; each device takes its share.
        eval_batch_size: The same where no gradient is taken; None for 512 of small images and fewer of larger ones.
        val_fraction: Share of each class's training samples kept for validation, in [0, 1).
        transforms: Augmentation of training batches, in order, on the device; None for that of the data set.
        mean: Of the pixels in [0, 1], per channel, subtracted; None for that of the data set. Where none is known it is
            measured on images of the first task, at most 10,000 in memory or 1,000 files, evenly spaced: what comes
            later has no influence.
        std: Divisor, per channel; None as for ``mean``.
        resize: Height and width that images are scaled to on the device, after augmentation, such as the size that a
            pretrained backbone wants; a memory keeps them as they are. None to leave them.
        center_crop: Side of what is cut out of the middle of images after ``resize``, of those alone which transforms
            have not brought to that size (``RandomResizedCrop``); None for all of them.
        interpolation: Of ``resize``.
        seed: Of class order, order of samples, validation share and augmentation; None for ``seed_everything``.
        drop_last: Leave out a last training batch that is not full.
        workers: Worker processes that decode files for each loader; their number changes no result.
        in_memory: Decode files once and keep them as uint8 tensors; None to do so if they take at most 1 GiB.

    Raises:
        ValueError: If an option is outside its range, and before training if the data are not as they must be.
    """

    mean: ClassVar[Sequence[float] | None] = None
    std: ClassVar[Sequence[float] | None] = None

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
            raise ValueError(f"{type(self).__name__}: val_fraction is {val_fraction}; it must lie in [0, 1)")
        self.scenario = scenario
        self.batch_size, self.val_fraction, self._eval_batch_size = batch_size, val_fraction, eval_batch_size
        self.channels_last, self.feature_views, self.pin_memory = False, 0, False
        if center_crop is not None and not 1 <= center_crop <= (resize or 0):
            raise ValueError(
                f"{type(self).__name__}: center_crop is {center_crop}, resize {resize}; it must be at least 1 and at "
                "most resize"
            )
        if interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"{type(self).__name__}: interpolation is {interpolation!r}; use bilinear or bicubic")
        if interpolation != "bilinear" and resize is None:
            name = type(self).__name__
            raise ValueError(f"{name}: interpolation is {interpolation!r}, but nothing is scaled; give resize")
        self.resize, self.center_crop, self.interpolation = resize, center_crop, interpolation
        self._given = (mean, std)
        self._measured: tuple[list[float], list[float]] | None = None
        self._normalize: Normalize | None = None
        if None not in self.statistics():
            _ = self.normalize  # so that a mistake is told now
        self.augmentation = Compose(self.default_transforms() if transforms is None else transforms)
        self.seed, self.drop_last, self.workers, self.in_memory = seed, drop_last, workers, in_memory
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.stream: Stream
        self.task: Task
        self.memory: Memory | None = None
        self.cumulative = False
        self.with_unlabelled = False
        self.whole_batches = False  # whether all processes have to come by every batch of an evaluation
        self.phase_index = 0
        self.select: Callable[[Tensor, Tensor], Tensor | None] | None = None
        self._origin = 0
        self._resume: tuple[int, int] | None = None
        self._features: Callable[[], FeaturePool] | None = None
        self._phase_batch_size: int | None = None
        self._augments = True
        self._sources: dict[bool, Source] = {}
        self._loaders: dict[str, StreamLoader] = {}

    # ------------------------------------------------------------------ what a subclass writes

    def source(self, *, train: bool) -> Source:
        """The training or the test samples; called once each, after ``prepare_data``."""
        raise NotImplementedError

    def default_transforms(self) -> list[Transform]:
        """Augmentation that is usual for the data set."""
        return []

    def default_scenario(self, catalogue: Catalogue) -> Scenario:
        """How the data are dealt out where the configuration does not say it."""
        return default_scenario(catalogue.num_classes)

    def shuffles(self, task: int) -> bool:
        """Whether the training samples of a task are shuffled anew in each epoch, or in the data's order."""
        return True

    def statistics(self) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        """Mean and standard deviation of the pixels in [0, 1], per channel; None for what is to be measured."""
        mean, std = self._given
        return mean or self.mean, std or self.std

    # ------------------------------------------------------------------ the stream

    def samples(self, *, train: bool) -> Source:
        """Training or test samples, in memory where that is wanted."""
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
        """Shape that the network sees."""
        channels, height, width = self.samples(train=True).image_shape
        side = self.center_crop or self.resize
        return (channels, height, width) if side is None else (channels, side, side)

    @property
    def eval_batch_size(self) -> int:
        """Samples of a batch, of all devices together, where no gradient is taken."""
        return self.eval_batch_size_for(self.image_shape)

    def eval_batch_size_for(self, image_shape: ImageShape) -> int:
        """The same for another shape of image, for which no data have to be there."""
        if self._eval_batch_size is not None:
            return self._eval_batch_size
        # Activations of a batch that leave the cache, and are mapped anew for each layer, cost a CPU most of its time.
        return min(512, max(32, _EVAL_VALUES // math.prod(image_shape)))

    @property
    def normalize(self) -> Normalize:
        """``(x - mean) / std``; measures what is not given."""
        if self._normalize is None:
            mean, std = self.statistics()
            if mean is None or std is None:
                self._measured = self._measured or self._measure()
                mean, std = mean or self._measured[0], std or self._measured[1]
            self._normalize = Normalize(mean, std)
        return self._normalize

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: how images are normalised, where that was measured."""
        return {} if self._measured is None else {"mean": self._measured[0], "std": self._measured[1]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._measured, self._normalize = (state_dict["mean"], state_dict["std"]), None

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
        train, test = (self.samples(train=part).image_shape for part in (True, False))
        if train != test:
            raise ValueError(f"{type(self).__name__}: training images have shape {train}, test images {test}")
        scenario = self.scenario or self.default_scenario(catalogue)
        if earlier is None:
            self.stream = scenario(catalogue, seed=self.seed, val_fraction=self.val_fraction)
        else:
            self.stream = self._continued(scenario, catalogue, Part(1, self.seed, self.val_fraction), earlier)
        self.close()
        self._loaders = {}
        if not len(self.stream.test[0]):
            raise ValueError(
                f"{type(self).__name__}: of the classes of the first task ({self.stream.tasks[0].name}) there are no "
                "test samples; add some, since each task ends with a look at them, or begin with other classes"
            )
        if (numbers := len(self.normalize.mean)) not in (1, train[0]):
            raise ValueError(
                f"{type(self).__name__}: mean has {numbers} numbers, images have {train[0]} channels; give one per "
                "channel, or one for all"
            )
        return self.stream

    def _continued(self, scenario: Scenario, catalogue: Catalogue, part: Part, earlier: Stream) -> Stream:
        """The earlier stream as the data give it today, and a further part if they have gained classes or domains."""
        try:
            fresh = scenario(catalogue, seed=part.seed, val_fraction=part.val_fraction)
        except ValueError:  # three classes in tasks of two can only come as an extension
            fresh = None
        if fresh == earlier:
            return earlier
        longer = scenario.stream(catalogue, part, earlier)
        if len(longer) > len(earlier):
            return scenario.extend(earlier, catalogue, seed=part.seed, val_fraction=part.val_fraction)
        last = earlier.parts[-1]
        if (scenario.describe(), part.seed, part.val_fraction) != (earlier.scenario, last.seed, last.val_fraction):
            raise ValueError(
                f"{type(self).__name__}: the stream learnt so far is another one: made by {earlier.scenario} with seed "
                f"{last.seed} and val_fraction {last.val_fraction}, while the configuration says "
                f"{scenario.describe()}, {part.seed} and {part.val_fraction}"
            )
        return longer

    def fingerprint(self, task: int) -> str:
        """Hash of a task's classes, by name, and of its training, validation and test samples and their classes."""
        stream, digest = self.stream, hashlib.blake2b(digest_size=16)
        digest.update("\0".join(stream.names_of(stream.tasks[task])).encode("utf-8", "surrogatepass"))
        for train, indices in ((True, stream.train[task]), (True, stream.val[task]), (False, stream.test[task])):
            source = self.samples(train=train)
            digest.update(source.digest(indices))
            digest.update(stream.columns_of(source.labels[indices]).astype("<i8").tobytes())
        return digest.hexdigest()

    def begin(self, task: Task, *, cumulative: bool = False, with_unlabelled: bool = False) -> None:
        """Make ``task`` the current one."""
        self.task, self.cumulative, self.with_unlabelled = task, cumulative, with_unlabelled

    def begin_phase(
        self,
        index: int,
        memory: Memory | None,
        origin: int,
        resume: tuple[int, int] | None = None,
        *,
        select: Callable[[Tensor, Tensor], Tensor | None] | None = None,
        features: Callable[[], FeaturePool] | None = None,
        batch_size: int | None = None,
        augments: bool = True,
    ) -> None:
        """Prepare the training loader for a phase.

        Args:
            index: Place of the phase in its task.
            memory: Memory whose samples are mixed with the task's.
            origin: Epoch of the Trainer at which the phase begins.
            resume: Epoch of the Trainer and step to start at, when a fit goes on half-way.
            select: Tells of the samples at hand, by their labels and whether the memory holds them, which ones the
                phase trains on, see ``ContinualStrategy.select``; None for all.
            features: Makes what the phase trains on instead of images; None for images.
            batch_size: Rows per step of a phase on features; None for the usual size.
            augments: Whether batches are augmented.
        """
        self.phase_index, self.memory, self._resume, self._augments = index, memory, resume, augments
        self._origin, self.select = origin, select
        self._features, self._phase_batch_size = features, batch_size

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> PlannedLoader | FeatureLoader:
        """Shuffled batches of the current task, of the memory where the strategy wants them mixed, or of features."""
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
        if self.select is not None and (chosen := self.select(*self._at_hand(indices, memory))) is not None:
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
        """Validation samples of all tasks seen so far, in one pass; nothing without ``val_fraction``."""
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
        """Held-out samples of the given tasks, to be looked at while training goes on.

        Args:
            part: Validation or test samples.
            tasks: Indices of the tasks.
            samples: At most so many of each task, drawn without replacement; None for all.
            key: Decides, with the index of the task and nothing else, which ones are drawn.
            store: Where features may be found that take the place of images.
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
        batch_size: int | None = None,
        store: FeatureStore | None = None,
    ) -> PlannedLoader:
        """The current task's training samples once, in order; each process takes its share.

        Args:
            memory: Serve its samples instead, in the order in which it holds them.
            indices: Serve these samples of the task only, in this order.
            samples: Of those of the task, serve so many, drawn by seed and task; None for all.
            batch_size: Samples at a time, over all processes; None for ``eval_batch_size``.
            store: Where features may be found that take the place of images.
        """
        if memory is not None:
            indices = self._rows_of(memory)
        elif indices is None:
            indices, _ = self._pool(self.stream.train, range(self.task.index, self.task.index + 1))
            if (hidden := self._hidden()) is not None:
                indices = indices[~hidden[indices]]
            if samples is not None and samples < len(indices):
                generator = torch.Generator().manual_seed(mix(self.seed or 0, 0x5A3, self.task.index))
                indices = indices[torch.randperm(len(indices), generator=generator)[:samples].sort().values]
        tasks = torch.full_like(indices, self.task.index)
        plan = self._plan(indices, tasks, batch_size=batch_size or self.eval_batch_size, shuffle=False)
        stored = None if store is None else self._identified("statistics", store)
        return self._loader("statistics").over(plan, memory=memory, stored=stored)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        # Lightning would wait for the copy of anything that is not a plain tensor.
        return batch.to(device, non_blocking=device.type == "cuda")

    def batch_before(self) -> Batch | None:
        """The batch of the step before the one at which a fit goes on half-way, as it was; None where a fit begins."""
        if self._resume is None or self.trainer is None:
            return None
        epoch, step = self._resume[0] - self._origin, self._resume[1]
        if step == 0:  # the last one of the epoch before
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
        """Augment, if asked to, scale and normalise the raw images of a batch, where they are.

        Args:
            batch: On any device.
            augment: Whether to augment.
            epoch: Epoch of the phase to augment as in; None for the current one.
        """
        if STORED in batch.extra:
            return batch
        images, ready = batch.raw, False
        if augment and self.augmentation.transforms:
            if epoch is None:
                epoch = self.trainer.current_epoch - self._origin if self.trainer is not None else 0
            draw = batch.draw
            if KEYS in batch.extra:  # a view that stays: its draw is its own
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
        """End the worker processes; they start again when they are needed."""
        for loader in self._loaders.values():
            loader.close()

    # ------------------------------------------------------------------ inside

    def _keep(self, source: Source) -> bool:
        if self.in_memory is not None:
            return self.in_memory
        channels, height, width = source.image_shape
        return len(source.labels) * channels * height * width <= 2**30

    def _measure(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over images of the first task, to 4 digits."""
        if not hasattr(self, "stream"):
            raise ValueError(
                f"{type(self).__name__}: neither the configuration nor the checkpoint tells how images are normalised; "
                "give data.mean and data.std"
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
        std = (squares / count - mean.square()).clamp(min=1).sqrt()  # at least a grey level, where all are the same
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
        """Features that the strategy keeps of the samples of a loader, where it does."""
        strategy: Any = self.trainer.lightning_module if self.trainer is not None else None
        store = strategy.feature_store(**purpose) if strategy is not None else None
        return None if store is None else self._identified(kind, store)

    def _identified(self, kind: str, store: FeatureStore) -> Stored | None:
        if self._loader(kind).shifted:  # pixels depend on the task
            return None
        return Stored(store, store.identities(self.samples(train=kind != "test")))

    @property
    def scaling(self) -> str:
        """What is done to images that are not augmented, in words."""
        size = f"{self.resize}"
        if self.center_crop is not None or self.interpolation != "bilinear":
            size += f" {self.interpolation}, of which {self.center_crop}"
        return f"size {size}, mean {self.normalize.mean}, std {self.normalize.std}"

    def _resized(self, images: Tensor, side: int) -> Tensor:
        """Scaled to a square, and cut out of the middle of that where it is wanted; floating point where it changed."""
        if images.shape[-2:] != (side, side):
            images = images if images.is_floating_point() else images.float().div_(255)
            images = F.interpolate(images, (side, side), mode=self.interpolation, antialias=True)
            if self.interpolation == "bicubic":
                images = images.clamp_(0, 1)  # it overshoots at edges
        if self.center_crop is not None:
            first = round((side - self.center_crop) / 2)
            rows = slice(first, first + self.center_crop)
            images = images[..., rows, rows]
        return images

    def _rows_of(self, memory: Memory) -> Tensor:
        """Places beyond the data set, which mean the rows of a memory."""
        return torch.arange(len(memory)) + len(self.samples(train=True).labels)

    def _at_hand(self, indices: Tensor, memory: Memory | None) -> tuple[Tensor, Tensor]:
        """Labels of samples of the data set, followed by those of a memory, and which ones the memory holds."""
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
                hidden=self._hidden() if kind == "train" else None,  # only the strategy must not see them
                shift=Shifts(self.stream) if shifted else None,
                workers=self.workers,
                pin_memory=self.pin_memory,
            )
        return self._loaders[kind]


class Shifts:
    """Applies to raw images what the domain of their task does to them: a fixed permutation or rotation."""

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
        if task not in self._orders:  # drawn once, not for every batch
            places = torch.arange(images.shape[-2] * images.shape[-1]).view(images.shape[-2:])
            self._orders[task] = permute_pixels(places, int(shift.value)).flatten()
        return images.flatten(-2).index_select(-1, self._orders[task]).view(images.shape)


def default_scenario(num_classes: int) -> Scenario:
    """Five tasks, or the largest number of equal tasks below that."""
    tasks = next(count for count in (5, 4, 3, 2, 1) if num_classes % count == 0)
    if tasks == 1 and num_classes > 1:
        warnings.warn(f"{num_classes} classes do not split evenly: they make one task; give a scenario", stacklevel=2)
    return ClassIncremental(tasks=tasks)
