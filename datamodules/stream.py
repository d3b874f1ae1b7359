"""From a data set to a stream of tasks: sources, scenario, normalisation and the finishing of samples."""

import hashlib
import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule

from cl_lightning.batch import Batch, ImageShape, RowDraw
from cl_lightning.checks import at_least
from cl_lightning.data import TARGETS, Compose, Context, FileSource, Normalize, SampleSource, Transform, targets_of
from cl_lightning.data.feature_cache import KEYS, STORED
from cl_lightning.data.labels import training_labels
from cl_lightning.data.levels import TwoLevelSource
from cl_lightning.data.scaling import InputSize, measured
from cl_lightning.data.shared import once_of
from cl_lightning.data.sources import checked, decoded
from cl_lightning.data.standardize import Standardize, Unchanged
from cl_lightning.data.targets import TargetTable, with_masks
from cl_lightning.recorded import options_of
from cl_lightning.stream import ClassIncremental, DatasetInfo, Scenario, Segment, Stream

_EVAL_VALUES = 512 * 3 * 32 * 32


class StreamDataModule(LightningDataModule):
    """From a data set to a stream of tasks, and from raw samples to the input of a network.

    A subclass implements ``source(train=...)`` and, if it downloads, ``prepare_data``. It may also set ``mean`` and
    ``std`` (of pixels in [0, 1], per channel) and override ``default_transforms`` and ``default_scenario``. This class
    deals the samples out over tasks by a scenario, holds out a share of each task for validation, and augments, scales
    and normalises images on the device. Samples may have any fixed shape: ``cl_lightning.data.samples`` lists their
    kinds. Images of 8 bits are pixels in [0, 1]; floating-point samples are standardised by ``mean`` and ``std`` per
    feature of a vector or per channel; tokens stay integers.
    :class:`~cl_lightning.datamodules.base.ContinualDataModule` adds the loaders.

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
            spaced. Later tasks have no influence. For floating-point samples likewise, in the unit of the data.
        std: Standard deviation of the pixels, per channel, by which they are divided; None as for ``mean``.
        resize: Height and width in pixels to which images are scaled on the device after augmentation, such as the
            input size of a pretrained backbone. A memory keeps images of the original size. None to keep the size.
        center_crop: Side in pixels of the square cut from the centre of an image after ``resize``, at most ``resize``.
            Images that transforms have brought to this size already (``RandomResizedCrop``) are not resized and
            cropped. None for no crop.
        interpolation: Interpolation of ``resize``.
        seed: Seed of class order, order of samples, validation share and augmentation; None for ``seed_everything``.
        workers: Number of worker processes per loader that decode files; it does not change results.
        in_memory: Decode files once and keep them as uint8 tensors; None to do so if they take at most 1 GiB.
        superclasses: Names of the classes of each superclass, by the name of the superclass, such as ``{animal: [cat,
            dog], vehicle: [car]}``. Each sample is then there twice, with the label of its class and with its
            superclass, for the scenario ``LabelExpansion``. None for labels of one level.

    Raises:
        ValueError: If an option is outside its range, and before training if the data do not meet the requirements.
    """

    mean: ClassVar[Sequence[float] | None] = None
    std: ClassVar[Sequence[float] | None] = None

    _any_kind: ClassVar[bool] = False
    """Whether the data decide what a sample is, so that mean and std are checked only when the data are read."""

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
        workers: int = 0,
        in_memory: bool | None = None,
        superclasses: dict[str, list[str]] | None = None,
    ) -> None:
        super().__init__()
        self._recorded = options_of(self)
        at_least(self, 1, batch_size=batch_size)
        at_least(self, 1, optional=True, eval_batch_size=eval_batch_size)
        at_least(self, 0, workers=workers)
        if not 0 <= val_fraction < 1:
            raise ValueError(f"{type(self).__name__}: val_fraction is {val_fraction}; it must be in [0, 1)")
        self.scenario, self._superclasses = scenario, superclasses
        self.batch_size, self.val_fraction, self._eval_batch_size = batch_size, val_fraction, eval_batch_size
        self.channels_last, self.feature_views = False, 0
        self.input_size = InputSize(self, resize, center_crop, interpolation)
        self._given = (mean, std)
        self._measured: tuple[list[float], list[float]] | None = None
        self._normalize: Normalize | Standardize | Unchanged | None = None
        if None not in self.statistics() and not self._any_kind:
            _ = self.normalize  # raises errors in the constructor
        self.augmentation = Compose(self.default_transforms() if transforms is None else transforms)
        self.seed, self.workers, self.in_memory = seed, workers, in_memory
        self.stream: Stream
        self._origin = 0
        self._sources: dict[bool, SampleSource] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "stream":
            raise AttributeError(
                f"{type(self).__name__} has no stream yet: make_stream(seed) makes it, and "
                "cl_lightning.fit(strategy, data) or TaskLoop learns it, in place of Trainer.fit and Trainer.test"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

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
                source = once_of(source, partial(decoded, source, self.workers))
            elif isinstance(source, FileSource):
                source = checked(source, self.workers)
            if self._superclasses is not None:
                source = TwoLevelSource(source, self._superclasses, type(self).__name__)
            self._sources[train] = source
        return self._sources[train]

    @property
    def input_kind(self) -> str:
        """What a sample is, of ``cl_lightning.data.samples.KINDS``; a strategy whose traits lack it is refused."""
        return self.samples(train=True).kind

    @property
    def target_kind(self) -> str:
        """What the target of a sample is, of ``cl_lightning.data.TARGET_KINDS``; a strategy whose traits lack it is
        refused."""
        targets = targets_of(self.samples(train=True))
        return "class" if targets is None else targets.kind

    @property
    def image_shape(self) -> ImageShape:
        """Shape of a sample as the network receives it: ``(channels, height, width)`` of images."""
        shape, side = self.samples(train=True).image_shape, self.input_size.side
        return shape if side is None else (shape[0], side, side)

    @property
    def eval_batch_size(self) -> int:
        """Samples per batch without gradient, over all devices."""
        return self.eval_batch_size_for(self.image_shape)

    def eval_batch_size_for(self, image_shape: ImageShape) -> int:
        """Samples per batch without gradient for samples of a given shape; the data need not be present."""
        if self._eval_batch_size is not None:
            return self._eval_batch_size
        # On a CPU, activations larger than the cache, mapped again for each layer, take most of the time.
        return min(512, max(32, _EVAL_VALUES // math.prod(image_shape)))

    @property
    def normalize(self) -> Normalize | Standardize | Unchanged:
        """``(x - mean) / std``; measures mean and std on the first task if they are not known."""
        if self._normalize is None:
            dtype = _dtype(self.samples(train=True)) if self._any_kind else torch.uint8
            self._normalize = self._normalization(dtype)
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
        numbers = tuple(map(str, range(len(test.class_names))))  # a source without names
        if test.class_names not in (numbers, train.class_names[: len(test.class_names)]):
            raise ValueError(
                f"{type(self).__name__}: raw labels of test samples count the classes {list(test.class_names[:5])} "
                f"..., those of training samples {list(train.class_names[:5])} ...; give both sources the same classes"
            )
        return DatasetInfo(
            train_labels=train.labels,
            test_labels=test.labels,
            class_names=train.class_names,
            train_domains=train.domains,
            test_domains=test.domains,
            domain_names=train.domain_names,
            parents=getattr(train, "parents", ()),
            train_sets=None if (targets := targets_of(train)) is None else targets.sets,
            test_sets=None if (targets := targets_of(test)) is None else targets.sets,
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
            what = "images" if self.input_kind == "image" else "samples"
            raise ValueError(
                f"{type(self).__name__}: test {what} have shape {test}, training {what} {train}; give both one shape"
            )
        scenario = self.scenario or self.default_scenario(info)
        if earlier is None:
            self.stream = scenario(info, seed=self.seed, val_fraction=self.val_fraction)
        else:
            self.stream = continued(self, scenario, info, earlier)
        if not len(self.stream.test[0]):
            raise ValueError(
                f"{type(self).__name__}: the first task ({self.stream.tasks[0].name}) has no test samples; add some, "
                "since each task ends with an evaluation, or begin with other classes"
            )
        self._check_processing()
        if (numbers := len(self.normalize.mean)) not in (1, train[0]):
            what = "images" if self.input_kind == "image" else "samples"
            parts = ("features", "feature") if self.input_kind == "vector" else ("channels", "channel")
            raise ValueError(
                f"{type(self).__name__}: mean has {numbers} numbers, {what} have {train[0]} {parts[0]}; give one per "
                f"{parts[1]}, or one for all"
            )
        return self.stream

    def fingerprint(self, task: int) -> str:
        """Hash of a task: names of its classes, and its training, validation and test samples with their labels."""
        stream, digest = self.stream, hashlib.blake2b(digest_size=16)
        digest.update("\0".join(stream.names_of(stream.tasks[task])).encode("utf-8", "surrogatepass"))
        train, test = self.samples(train=True), self.samples(train=False)
        for source, labels, indices in (
            (train, training_labels(self), stream.train[task]),
            (train, train.labels, stream.val[task]),
            (test, test.labels, stream.test[task]),
        ):
            digest.update(source.digest(indices))
            if (targets := targets_of(source)) is not None:
                digest.update(targets.digest(indices))
            digest.update(stream.columns_of(labels[indices]).astype("<i8").tobytes())
        return digest.hexdigest()

    def finish(self, batch: Batch, *, augment: bool, epoch: int | None = None) -> Batch:
        """Augment (optionally), scale and normalise the raw samples of a batch, on their device.

        Args:
            batch: Batch on any device, with raw samples in ``raw``, such as uint8 images ``(B, C, H, W)``.
            augment: Whether to augment.
            epoch: Epoch of the phase that determines the augmentation; None for the current one.

        Returns:
            The batch with ``images`` as the network receives them, ``(B, *image_shape)``: floating point, int64 for
            tokens.
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
            context = Context(indices=batch.indices, epoch=epoch, seed=self.seed or 0)
            masks = batch.extra.get(TARGETS)
            if masks is not None and masks.dim() > 2:
                images, masks = with_masks(self.augmentation, images, masks, draw, context)
                batch = batch.replace(extra={**batch.extra, TARGETS: masks})
            else:
                images = self.augmentation(images, draw, context)
            ready = self.input_size.center_crop is not None and images.shape[-2:] == (
                self.input_size.side,
                self.input_size.side,
            )
        if not ready:
            images = self.input_size(images)
        if self._normalize is None:  # predictions, for which the data of the run need not be there
            self._normalize = self._normalization(batch.raw.dtype)
        images = self._normalize(images, batch.draw)
        if self.channels_last and images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        return batch.replace(images=images)

    @property
    def scaling(self) -> str:
        """Description of the processing of un-augmented images, for comparison with a stored one."""
        return f"size {self.input_size}, mean {self.normalize.mean}, std {self.normalize.std}"

    # ------------------------------------------------------------------ inside

    def _normalization(self, dtype: torch.dtype) -> Normalize | Standardize | Unchanged:
        """Normalisation of raw samples of a dtype."""
        if dtype == torch.int64:
            return Unchanged()
        mean, std = self.statistics()
        if mean is None or std is None:
            self._measured = self._measured or self._measure()
            mean, std = mean or self._measured[0], std or self._measured[1]
        return Normalize(mean, std) if dtype == torch.uint8 else Standardize(mean, std)

    def _keep(self, source: SampleSource) -> bool:
        if self.in_memory is not None:
            return self.in_memory
        return len(source.labels) * math.prod(source.image_shape) * _dtype(source).itemsize <= 2**30

    def _check_processing(self) -> None:
        """Check that augmentation and scaling are made for the samples.

        Raises:
            ValueError: If they are made for images, or for pixels of 8 bits, and the samples are others.
        """
        name, kind, dtype = type(self).__name__, self.input_kind, _dtype(self.samples(train=True))
        if kind != "image" and self.input_size.side is not None:
            raise ValueError(f"{name}: resize is for images, and a sample is a {kind}; remove resize")
        for transform in self.augmentation.transforms:
            if transform.takes_images and kind != "image":
                what = f"images, and a sample is of the kind {kind}"
            elif transform.needs_pixels and dtype != torch.uint8:
                what = "pixels of 8 bits, and images are floating point"
            else:
                continue
            raise ValueError(f"{name}: {type(transform).__name__} is for {what}; remove it from data.transforms")
        if self.target_kind == "pixels":
            self._check_masks()

    def _check_masks(self) -> None:
        name = type(self).__name__
        if self.input_size.side is not None:
            raise ValueError(f"{name}: resize does not resize masks; remove it, and store images and masks of one size")
        for transform in self.augmentation.transforms:
            if not transform.moves_pixels:
                raise ValueError(
                    f"{name}: {type(transform).__name__} does more than move pixels, which masks cannot follow; use "
                    "RandomCrop (mode zeros), RandomHorizontalFlip and RandomVerticalFlip"
                )
        if _dtype(self.samples(train=True)) != torch.uint8 and self.augmentation.transforms:
            raise ValueError(f"{name}: masks follow the augmentation of images of 8 bits alone; give transforms []")
        if self.stream.order[0] != 0:
            raise ValueError(
                f"{name}: class 0 of the pixels, {self.stream.class_names[0]!r}, is not the first column; class 0 is "
                "the background: name it as background of the scenario LabelSets"
            )

    cumulative: bool = False
    """Whether the training loader serves all tasks so far, with the classes of all of them."""

    def _target_table(self, *, test: bool) -> TargetTable | None:
        """Targets of the samples as a strategy sees them; None where the target is the class."""
        if (targets := targets_of(self.samples(train=not test))) is None:
            return None
        scale = (0.0, 1.0)
        if targets.kind == "number":
            of_all = targets_of(self.samples(train=True))
            assert of_all is not None
            numbers = of_all.values[torch.as_tensor(self.stream.train[0].copy())].double()
            scale = (float(numbers.mean()), float(numbers.std(correction=0)) or 1.0)
        columns = torch.zeros(len(self.stream), len(self.stream.order), dtype=torch.bool)
        for task in self.stream.tasks:
            columns[task.index, list(range(task.num_seen) if self.cumulative else task.columns)] = True
        return TargetTable(targets, self.stream.order, None if test else columns, scale)

    def _measure(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over images of the first task."""
        if not hasattr(self, "stream"):
            raise ValueError(
                f"{type(self).__name__}: give data.mean and data.std; neither the configuration nor the checkpoint has "
                "the normalisation of the images"
            )
        return measured(self.samples(train=True), torch.as_tensor(self.stream.train[0].copy()))


def _dtype(source: SampleSource) -> torch.dtype:
    return source.take(torch.zeros(0, dtype=torch.int64)).dtype


def continued(data: StreamDataModule, scenario: Scenario, info: DatasetInfo, earlier: Stream) -> Stream:
    """The earlier stream over the present data, extended if classes or domains were added.

    Raises:
        ValueError: If the scenario, the seed or the validation fraction differ from the earlier stream.
    """
    part = Segment(1, data.seed or 0, data.val_fraction)
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
            f"{type(data).__name__}: the stream learnt so far is another one: {earlier.scenario} with seed "
            f"{last.seed} and val_fraction {last.val_fraction}; the configuration has {scenario.describe()} with "
            f"seed {part.seed} and val_fraction {part.val_fraction}"
        )
    return longer


def default_scenario(num_classes: int) -> Scenario:
    """Class-incremental: five tasks, or the largest number of equal tasks below five."""
    tasks = next(count for count in (5, 4, 3, 2, 1) if num_classes % count == 0)
    if tasks == 1 and num_classes > 1:
        warnings.warn(f"give a scenario: {num_classes} classes make one task, 2 to 5 do not divide them", stacklevel=2)
    return ClassIncremental(tasks=tasks)
