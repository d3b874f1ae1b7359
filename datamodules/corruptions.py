"""Streams of corrupted test images for test-time adaptation."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from cl_lightning.batch import ImageShape, mix
from cl_lightning.checks import above, at_least, one_of, reason
from cl_lightning.data import CORRUPTIONS, SEVERITIES, SampleSource, Transform, corrupt
from cl_lightning.data.corruptions import check
from cl_lightning.data.joined import JoinedSource
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.datamodules.orders import Order, Variant, arranged, interleaved, walk
from cl_lightning.files import require_regular
from cl_lightning.stream import DatasetInfo, DomainIncremental, IntArray, Scenario

SOURCE, UNKNOWN = "source", "unknown"
_MOST_BYTES = 2**30  # maximum size of the cache of corrupted images
_ORDER = 0xC0DE  # salt of the order of a domain


class CorruptedSource:
    """Clean images followed by corrupted images, which are computed on first access.

    Labels are raw.

    Args:
        clean: Images and labels of the first samples.
        images: Images to be corrupted, with their labels.
        rows: Index into ``clean`` of each clean sample, int64 ``(count,)``.
        variants: All combinations of corruptions with their severities.
        variant: Index into ``variants`` of each corrupted sample, int64 ``(m,)``.
        places: Index into ``images`` of each corrupted sample, int64 ``(m,)``.
        domains: Domain of each sample, int64 ``(count + m,)``.
        domain_names: Names of the domains.
        seed: Seed of the corruptions.
        folder: Folder of files with corrupted images; None to compute all.
    """

    kind = "image"
    in_memory = True

    def __init__(
        self,
        clean: SampleSource,
        images: SampleSource,
        *,
        rows: IntArray,
        variants: Sequence[Variant],
        variant: IntArray,
        places: IntArray,
        domains: IntArray,
        domain_names: Sequence[str],
        seed: int,
        folder: Path | None = None,
    ) -> None:
        self.clean, self.images, self.count, self.variants = clean, images, len(rows), list(variants)
        self.rows = torch.from_numpy(rows)
        self.variant, self.places = torch.from_numpy(variant), torch.from_numpy(places)
        self.labels = np.concatenate([clean.labels[rows], images.labels[places]])
        self.class_names = images.class_names
        self.domains: np.ndarray | None = domains
        self.domain_names = tuple(domain_names)
        self.seed, self.folder = seed, folder
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}  # by variant, the most recently used last

    @property
    def image_shape(self) -> ImageShape:
        return self.images.image_shape

    def take(self, indices: Tensor) -> Tensor:
        count = self.count
        result = torch.empty(len(indices), *self.image_shape, dtype=torch.uint8)
        first = indices < count
        if first.any():
            result[first] = self.clean.take(self.rows[indices[first]])
        variants = torch.where(first, -1, self.variant[(indices - count).clamp(min=0)] if len(self.variant) else -1)
        for number in sorted(set(variants[~first].tolist())):
            rows = variants == number
            places, images = self._block(number)
            result[rows] = images[torch.searchsorted(places, self.places[indices[rows] - count])]
        return result

    def digest(self, indices: np.ndarray) -> bytes:
        """Hash of the clean images and of the parameters of their corruption; computes no corruption."""
        count, digest = self.count, hashlib.blake2b(digest_size=16)
        digest.update(self.clean.digest(self.rows.numpy()[indices[indices < count]]))
        further = indices[indices >= count] - count
        digest.update(self.images.digest(self.places.numpy()[further]))
        digest.update(self.variant.numpy()[further].astype("<i8").tobytes())
        for variant in self.variants:
            for name, severity in variant:
                file = None if self.folder is None else self.folder / f"{name}.npy"
                made = f"seed {self.seed}" if file is None or not file.is_file() else f"{file.stat().st_size} bytes"
                digest.update(f"{name} {severity} {made};".encode())
            digest.update(b"+" * (len(variant) - 1))
        return digest.digest()

    def _block(self, number: int) -> tuple[Tensor, Tensor]:
        """The images of the stream that have one variant: their places, int64 ``(k,)`` ascending, and the corrupted
        images, uint8 ``(k, C, H, W)``; cached up to 1 GiB."""
        block = self._blocks.pop(number, None)
        if block is None:
            places = torch.unique(self.places[self.variant == number])
            block = places, self._make(self.variants[number], places)
            size = block[1].nbytes
            while self._blocks and sum(kept.nbytes for _, kept in self._blocks.values()) + size > _MOST_BYTES:
                del self._blocks[next(iter(self._blocks))]
        self._blocks[number] = block
        return block

    def _make(self, variant: Variant, places: Tensor) -> Tensor:
        *earlier, (name, severity) = variant
        if not earlier and self.folder is not None and (path := self.folder / f"{name}.npy").is_file():
            return _from_file(path, severity, len(self.images.labels), self.image_shape)[places]
        images = self._make(tuple(earlier), places) if earlier else self.images.take(places)
        return corrupt(images, name, severity, indices=places.tolist(), seed=self.seed)


def _load(path: Path) -> np.ndarray:
    try:
        require_regular(path)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"CorruptionStream: {path} is not a readable .npy file ({reason(error)})") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"CorruptionStream: {path} has several arrays; give .npy files of one array each")
    return array


def _images(path: Path, count: int, shape: ImageShape) -> np.ndarray:
    """The array of a file of corrupted images, not read yet; its layout is checked."""
    array = _load(path)
    channels, height, width = shape
    expected = (len(SEVERITIES) * count, height, width, channels)
    if array.dtype != np.uint8 or array.shape != expected:
        raise ValueError(
            f"CorruptionStream: {path} is {array.dtype} {array.shape}; it must be uint8 {expected}: all {count} test "
            "images at severity 1, then at severity 2, ..."
        )
    return array


def _from_file(path: Path, severity: int, count: int, shape: ImageShape) -> Tensor:
    rows = np.array(_images(path, count, shape)[(severity - 1) * count : severity * count])
    return torch.from_numpy(rows).permute(0, 3, 1, 2).contiguous()


class CorruptionStream(ContinualDataModule):
    """Stream for continual test-time adaptation: the source domain, then test images under changing corruptions.

    Task 0, ``source``, has clean images: training images, on which a network is trained or statistics are computed, and
    the clean test images as test samples. Each further task is a domain. Its "training samples" are corrupted *test*
    images in the order of the stream, which a method for test-time adaptation sees once and without labels. Corruptions
    are computed on first access (``cl_lightning.data.corruptions``; frost is synthetic), or read from files in the
    format of CIFAR-10-C.

    Args:
        base: Data module of the images; its scenario and batch sizes are not used.
        corruptions: Names of the corruptions in order; None for all 15 in the usual order.
        severity: Severity of the corruptions, 1 to 5.
        setting: ``continual``: one domain per corruption, at the given severity; ``gradual``: one domain per
            corruption, with the severities 1, 2, ..., severity, ..., 2, 1 in turn; ``mixed``: a single domain with all
            corruptions, shuffled together; ``walk``: one domain for each way from a corruption to the next one, two of
            them at a time (:func:`~cl_lightning.datamodules.orders.walk`).
        speed: Images of ``walk`` between two changes of a severity, at least 1; the test images repeat as needed.
        rounds: How often the corruptions come, one round after another, at least 1.
        order: Order of the images in each domain (and severity): ``given``, the order of the test set; ``shuffled``;
            ``sorted`` by class; or correlated in time, ``dirichlet`` or ``label_shift``
            (:func:`~cl_lightning.datamodules.orders.arranged`).
        delta: Concentration of ``dirichlet``, above 0.
        imbalance: Ratio of the frequent class of ``label_shift`` to another one, at least 1.
        samples: Use this number of test images, the first ones, clean and corrupted; None for all.
        unknown_classes: Raw labels of classes that the source domain lacks: their images come in the stream alone. They
            are never predicted correctly, so errors are counted on the other classes, and how well the confidence
            separates both is measured (``unknown_auroc``). None for no such classes.
        unknown: Data module whose test images are mixed evenly into the stream as images of unknown classes, such as
            those of another data set, corrupted likewise; None for none.
        source_part: Images of the source task: ``train``; or ``test``, if there are no training images and the network
            is not trained on the source. Statistics of the source are then computed on clean test images.
        evaluated: Test samples after each task: ``source``, the clean ones, which measures forgetting of the source
            domain; ``all``, also the test samples of each domain seen so far, which takes longer than the adaptation.
        folder: Folder of files ``NAME.npy`` and ``labels.npy`` in the format of CIFAR-10-C, with the test images of
            ``base`` in their order; corruptions without a file are computed. None to compute all.
        batch_size: Images per step; the papers use 200 for CIFAR-10-C.
        eval_batch_size: Images per batch of an evaluation; None for ``batch_size``, since statistics of a test batch
            depend on its size. With ``evaluated="all"`` it should divide the number of test images, since other batches
            mix images of two domains.
        kwargs: Options of :class:`ContinualDataModule`; mean, std and transforms default to those of ``base``.

    Raises:
        ValueError: If an option is outside its range, or a file does not have the expected content.
    """

    def __init__(
        self,
        base: ContinualDataModule,
        *,
        corruptions: list[str] | None = None,
        severity: int = 5,
        setting: Literal["continual", "gradual", "mixed", "walk"] = "continual",
        speed: int = 1000,
        rounds: int = 1,
        order: Order = "given",
        delta: float = 0.1,
        imbalance: float = 10.0,
        unknown_classes: list[int] | None = None,
        unknown: ContinualDataModule | None = None,
        samples: int | None = None,
        source_part: Literal["train", "test"] = "train",
        evaluated: Literal["source", "all"] = "source",
        folder: str | None = None,
        batch_size: int = 200,
        eval_batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.base = base
        at_a_time = batch_size if eval_batch_size is None else eval_batch_size
        super().__init__(batch_size=batch_size, eval_batch_size=at_a_time, **kwargs)
        one_of(self, ("continual", "gradual", "mixed", "walk"), setting=setting)
        one_of(self, get_args(Order), order=order)
        at_least(self, 1, speed=speed, rounds=rounds, imbalance=imbalance)
        one_of(self, ("train", "test"), source_part=source_part)
        one_of(self, ("source", "all"), evaluated=evaluated)
        names = list(CORRUPTIONS) if corruptions is None else corruptions
        if not names or len(set(names)) < len(names):
            raise ValueError(f"CorruptionStream: corruptions are {names}; give at least one, and each once")
        for name in names:
            try:
                check(name, severity)
            except ValueError as error:
                raise ValueError(f"CorruptionStream: {error}") from None
        above(self, 0, delta=delta)
        at_least(self, 1, samples=samples, optional=True)
        if setting == "walk" and len(names) * rounds < 2:
            raise ValueError(f"CorruptionStream: a walk needs two corruptions or rounds; there is {names[0]} alone")
        if folder is not None and unknown is not None:
            raise ValueError("CorruptionStream: leave folder out with unknown; its files have no images of it")
        if self.val_fraction:
            raise ValueError(
                f"CorruptionStream: val_fraction is {self.val_fraction}; it must be 0, a test stream has no validation"
            )
        self.corruptions, self.severity, self.setting = names, severity, setting
        self.order, self.delta, self.num_samples = order, delta, samples
        self.speed, self.rounds, self.imbalance = speed, rounds, imbalance
        self.unknown_classes, self.unknown = sorted(set(unknown_classes or ())), unknown
        self.source_part, self.evaluated = source_part, evaluated
        self.folder = None if folder is None else Path(folder).expanduser()
        self._streamed: tuple[list[Variant], IntArray, IntArray, IntArray] | None = None

    def prepare_data(self) -> None:
        self.base.prepare_data()
        if self.unknown is not None:
            self.unknown.prepare_data()

    def statistics(self) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        mean, std = super().statistics()
        base_mean, base_std = self.base.statistics()
        return mean or base_mean, std or base_std

    def default_transforms(self) -> list[Transform]:
        return list(self.base.augmentation.transforms)

    def default_scenario(self, info: DatasetInfo) -> Scenario:
        return DomainIncremental()

    def shuffles(self, task: int) -> bool:
        return self.stream.tasks[task].name == SOURCE

    def source(self, *, train: bool) -> CorruptedSource:
        images = self.base.samples(train=False)
        clean = self.base.samples(train=True) if train and self.source_part == "train" else images
        self._check_files(images)
        self._check_unknown(images)
        count = len(clean.labels) if train else len(images.labels[: self.num_samples])
        stream: SampleSource = images
        if self.unknown is not None:
            stream = JoinedSource(images, self.unknown.samples(train=False), UNKNOWN)
        variants, variant, places, domains = self._stream_of(stream)
        known = ~np.isin(clean.labels[:count], self.unknown_classes)
        if not train:
            last = np.array([len(parts) == 1 and parts[0][1] == self.severity for parts in variants])[variant]
            keep = last & self._is_known(stream.labels[places]) if self.evaluated == "all" else np.zeros_like(last)
            variant, places, domains = variant[keep], places[keep], domains[keep]
        return CorruptedSource(
            clean,
            stream,
            rows=np.flatnonzero(known),
            variants=variants,
            variant=variant,
            places=places,
            domains=np.concatenate([np.zeros(int(known.sum()), np.int64), domains + 1]),
            domain_names=[SOURCE, *self._domain_names()],
            seed=self.seed or 0,
            folder=self.folder,
        )

    def _is_known(self, labels: IntArray) -> np.ndarray:
        outside = [len(self.base.samples(train=False).class_names)] if self.unknown is not None else []
        return ~np.isin(labels, [*self.unknown_classes, *outside])

    def _ways(self) -> list[tuple[str, list[Variant]]]:
        """Name of each domain, and the variants that its images have in turn."""
        names = self.corruptions * self.rounds
        up = list(range(1, self.severity + 1)) if self.setting == "gradual" else [self.severity]
        if self.setting != "walk":
            return [(name, [((name, level),) for level in [*up, *up[-2::-1]]]) for name in names]
        ways = [(f"{a} to {b}", walk(a, b, self.severity)) for a, b in pairwise(names)]
        return ways[:1] + [(name, way[1:]) for name, way in ways[1:]]  # a walk begins where the one before ends

    def _domain_names(self) -> list[str]:
        if self.setting == "mixed":
            return ["mixed"]
        seen = Counter[str]()
        names = []
        for name, _ in self._ways():
            seen[name] += 1
            names.append(name if seen[name] == 1 else f"{name}, round {seen[name]}")
        return names

    def _stream_of(self, images: SampleSource) -> tuple[list[Variant], IntArray, IntArray, IntArray]:
        """Variants, then variant, image and domain of each sample, in the order of the stream."""
        if self._streamed is not None:
            return self._streamed
        sizes = [len(self.base.samples(train=False).labels[: self.num_samples])]
        start = len(self.base.samples(train=False).labels)
        further = min(len(images.labels) - start, self.num_samples or len(images.labels))
        every = interleaved(*sizes, further)
        every = np.where(every < sizes[0], every, every - sizes[0] + start)
        labels = images.labels[every]
        ways = self._ways()
        variants = list(dict.fromkeys(variant for _, way in ways for variant in way))
        stretches = [(domain, variants.index(variant)) for domain, (_, way) in enumerate(ways) for variant in way]
        numbers = np.array([number for _, number in stretches])
        domains = np.array([domain for domain, _ in stretches])
        if self.setting == "mixed":
            variant, places = np.repeat(numbers, len(every)), np.tile(every, len(stretches))
            order: Order = "shuffled" if self.order == "given" else self.order
            chosen = self._arranged(images.labels[places], 0, order)
            self._streamed = variants, variant[chosen], places[chosen], np.zeros(len(variant), np.int64)
        else:
            length = self.speed if self.setting == "walk" else len(every)
            passes = -(-length * len(stretches) // len(every))
            places = np.concatenate([every[self._arranged(labels, number)] for number in range(passes)])
            places = places[: length * len(stretches)]
            self._streamed = variants, np.repeat(numbers, length), places, np.repeat(domains, length)
        return self._streamed

    def _arranged(self, labels: IntArray, stretch: int, order: Order | None = None) -> IntArray:
        chance = self._chance(stretch)
        return arranged(labels, order or self.order, chance, delta=self.delta, imbalance=self.imbalance)

    def _chance(self, stretch: int) -> np.random.Generator:
        return np.random.default_rng(mix(self.seed or 0, _ORDER, stretch))

    def _check_unknown(self, images: SampleSource) -> None:
        if outside := [label for label in self.unknown_classes if not 0 <= label < len(images.class_names)]:
            raise ValueError(
                f"CorruptionStream: unknown_classes has {outside[0]}; give raw labels from 0 to "
                f"{len(images.class_names) - 1}"
            )
        if len(self.unknown_classes) >= len(np.unique(images.labels)):
            raise ValueError("CorruptionStream: unknown_classes has all classes; leave some for the source domain")

    def _check_files(self, images: SampleSource) -> None:
        if self.folder is None:
            return
        if not self.folder.is_dir():
            raise ValueError(f"CorruptionStream: no folder {self.folder}; give the folder of the .npy files")
        labels = _load(self.folder / "labels.npy")
        if not np.array_equal(labels, np.tile(images.labels, len(SEVERITIES))):
            raise ValueError(
                f"CorruptionStream: {self.folder / 'labels.npy'} does not have the labels of the test images, "
                "repeated five times; give files of these images, in their order"
            )
        for name in self.corruptions:
            if (path := self.folder / f"{name}.npy").is_file():
                _images(path, len(images.labels), images.image_shape)
