"""Streams of corrupted test images for test-time adaptation."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cl_lightning.batch import ImageShape, mix
from cl_lightning.checks import above, at_least, one_of, reason
from cl_lightning.data import CORRUPTIONS, SEVERITIES, SampleSource, Transform, corrupt
from cl_lightning.data.corruptions import check
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.files import require_regular
from cl_lightning.stream import DatasetInfo, DomainIncremental, IntArray, Scenario

SOURCE = "source"
Order = Literal["given", "shuffled", "sorted", "dirichlet"]
Variant = tuple[str, int]  # a corruption and its severity
_MOST_BYTES = 2**30  # maximum size of the cache of corrupted images
_ORDER = 0xC0DE  # salt of the order of a domain


def arranged(labels: IntArray, order: Order, chance: np.random.Generator, *, delta: float = 0.1) -> IntArray:
    """Order of the samples of a domain in the stream.

    Args:
        labels: Raw labels of the samples, ``(n,)``.
        order: ``given``; ``shuffled``; ``sorted`` by class; or ``dirichlet``: the samples of each class are split over
            as many slots as there are classes, in shares drawn from Dirichlet(delta). The slots are shuffled within and
            then concatenated (as in NOTE, Gong et al., NeurIPS 2022, arXiv:2208.05117; the number of slots is our
            choice).
        chance: Random generator.
        delta: Concentration, positive. With a small delta each class is in few slots; with a large delta all slots have
            nearly the same classes.

    Returns:
        Indices of the samples in the order of the stream, ``(n,)``.
    """
    if order == "given":
        return np.arange(len(labels))
    if order == "shuffled":
        return chance.permutation(len(labels))
    if order == "sorted":
        return np.argsort(labels, kind="stable").astype(np.int64)
    classes = np.unique(labels)
    slots: list[list[IntArray]] = [[] for _ in classes]
    for label in classes:
        members = chance.permutation(np.flatnonzero(labels == label))
        shares = chance.dirichlet(np.full(len(classes), delta))
        cuts = np.round(shares.cumsum()[:-1] * len(members)).astype(np.int64)
        for slot, part in zip(slots, np.split(members, cuts), strict=True):
            slot.append(part)
    return np.concatenate([chance.permutation(np.concatenate(slot)) for slot in slots])


class CorruptedSource:
    """Clean images followed by corrupted images, which are computed on first access.

    Labels are raw.

    Args:
        clean: Images and labels of the first samples.
        images: Images to be corrupted, with their labels.
        count: Number of clean samples: the first ones of ``clean``.
        variants: All pairs of corruption and severity.
        variant: Index into ``variants`` of each corrupted sample, int64 ``(m,)``.
        places: Index into ``images`` of each corrupted sample, int64 ``(m,)``.
        domains: Domain of each sample, int64 ``(count + m,)``.
        domain_names: Names of the domains.
        seed: Seed of the corruptions.
        folder: Folder of files with corrupted images; None to compute all.
    """

    in_memory = True

    def __init__(
        self,
        clean: SampleSource,
        images: SampleSource,
        *,
        count: int,
        variants: Sequence[Variant],
        variant: IntArray,
        places: IntArray,
        domains: IntArray,
        domain_names: Sequence[str],
        seed: int,
        folder: Path | None = None,
    ) -> None:
        self.clean, self.images, self.count, self.variants = clean, images, count, list(variants)
        self.variant, self.places = torch.from_numpy(variant), torch.from_numpy(places)
        self.labels = np.concatenate([clean.labels[:count], images.labels[places]])
        self.class_names = images.class_names
        self.domains: np.ndarray | None = domains
        self.domain_names = tuple(domain_names)
        self.seed, self.folder = seed, folder
        self._blocks: dict[int, Tensor] = {}  # by variant, the most recently used last
        self._everything: Tensor | None = None

    @property
    def image_shape(self) -> ImageShape:
        return self.images.image_shape

    def take(self, indices: Tensor) -> Tensor:
        count = self.count
        result = torch.empty(len(indices), *self.image_shape, dtype=torch.uint8)
        first = indices < count
        if first.any():
            result[first] = self.clean.take(indices[first])
        variants = torch.where(first, -1, self.variant[(indices - count).clamp(min=0)] if len(self.variant) else -1)
        for number in sorted(set(variants[~first].tolist())):
            rows = variants == number
            result[rows] = self._block(number)[self.places[indices[rows] - count]]
        return result

    def digest(self, indices: np.ndarray) -> bytes:
        """Hash of the clean images and of the parameters of their corruption; computes no corruption."""
        count, digest = self.count, hashlib.blake2b(digest_size=16)
        digest.update(self.clean.digest(indices[indices < count]))
        further = indices[indices >= count] - count
        digest.update(self.images.digest(self.places.numpy()[further]))
        digest.update(self.variant.numpy()[further].astype("<i8").tobytes())
        for name, severity in self.variants:
            file = None if self.folder is None else self.folder / f"{name}.npy"
            made = f"seed {self.seed}" if file is None or not file.is_file() else f"{file.stat().st_size} bytes"
            digest.update(f"{name} {severity} {made};".encode())
        return digest.digest()

    def _block(self, number: int) -> Tensor:
        """All images of the stream in one variant, uint8 ``(n, C, H, W)``; cached up to 1 GiB."""
        block = self._blocks.pop(number, None)
        if block is None:
            block = self._make(*self.variants[number])
            while self._blocks and sum(kept.nbytes for kept in self._blocks.values()) + block.nbytes > _MOST_BYTES:
                del self._blocks[next(iter(self._blocks))]
        self._blocks[number] = block
        return block

    def _make(self, name: str, severity: int) -> Tensor:
        if self.folder is not None and (path := self.folder / f"{name}.npy").is_file():
            return _from_file(path, severity, len(self.images.labels), self.image_shape)
        if self._everything is None:
            self._everything = self.images.take(torch.arange(int(self.places.max()) + 1))
        return corrupt(self._everything, name, severity, seed=self.seed)


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
            corruptions, shuffled together.
        order: Order of the images in each domain (and severity): ``given``, the order of the test set; ``shuffled``;
            ``sorted`` by class; ``dirichlet``, correlated in time, see :func:`arranged`.
        delta: Concentration of ``dirichlet``, above 0.
        samples: Use this number of test images, the first ones, clean and corrupted; None for all.
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
        setting: Literal["continual", "gradual", "mixed"] = "continual",
        order: Order = "given",
        delta: float = 0.1,
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
        one_of(self, ("continual", "gradual", "mixed"), setting=setting)
        one_of(self, ("given", "shuffled", "sorted", "dirichlet"), order=order)
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
        if self.val_fraction:
            raise ValueError(
                f"CorruptionStream: val_fraction is {self.val_fraction}; it must be 0, a test stream has no validation"
            )
        self.corruptions, self.severity, self.setting = names, severity, setting
        self.order, self.delta, self.num_samples = order, delta, samples
        self.source_part, self.evaluated = source_part, evaluated
        self.folder = None if folder is None else Path(folder).expanduser()
        self._streamed: tuple[list[Variant], IntArray, IntArray, IntArray] | None = None

    def prepare_data(self) -> None:
        self.base.prepare_data()

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
        count = len(clean.labels) if train else len(images.labels[: self.num_samples])
        variants, variant, places, domains = self._stream_of(images)
        if not train:
            last = np.array([severity == self.severity for _, severity in variants])[variant]
            keep = last if self.evaluated == "all" else np.zeros_like(last)
            variant, places, domains = variant[keep], places[keep], domains[keep]
        names = ["mixed"] if self.setting == "mixed" else self.corruptions
        return CorruptedSource(
            clean,
            images,
            count=count,
            variants=variants,
            variant=variant,
            places=places,
            domains=np.concatenate([np.zeros(count, np.int64), domains + 1]),
            domain_names=[SOURCE, *names],
            seed=self.seed or 0,
            folder=self.folder,
        )

    def _stream_of(self, images: SampleSource) -> tuple[list[Variant], IntArray, IntArray, IntArray]:
        """Variants, then variant, image and domain of each sample, in the order of the stream."""
        if self._streamed is not None:
            return self._streamed
        labels = images.labels[: self.num_samples]
        up = list(range(1, self.severity + 1)) if self.setting == "gradual" else [self.severity]
        variants = [(name, severity) for name in self.corruptions for severity in up]
        stretches = [
            (domain, variants.index((name, severity)))
            for domain, name in enumerate(self.corruptions)
            for severity in [*up, *up[-2::-1]]
        ]
        every = np.arange(len(labels))
        if self.setting == "mixed":
            variant = np.repeat([number for _, number in stretches], len(labels))
            places, domains = np.tile(every, len(stretches)), np.zeros(len(variant), np.int64)
            order: Order = "shuffled" if self.order == "given" else self.order
            chosen = arranged(labels[places], order, self._chance(0), delta=self.delta)
            self._streamed = variants, variant[chosen], places[chosen], domains
        else:
            parts = [arranged(labels, self.order, self._chance(i), delta=self.delta) for i in range(len(stretches))]
            numbers = np.array([number for _, number in stretches])
            domains = np.array([domain for domain, _ in stretches])
            self._streamed = (
                variants,
                np.repeat(numbers, len(labels)),
                np.concatenate(parts),
                np.repeat(domains, len(labels)),
            )
        return self._streamed

    def _chance(self, stretch: int) -> np.random.Generator:
        return np.random.default_rng(mix(self.seed or 0, _ORDER, stretch))

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
