"""All samples of a source decoded once into memory, or all its files checked, by several threads."""

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from cl_lightning.data.arrays import SampleSource, TensorSource
from cl_lightning.data.datasets import of_other_shape
from cl_lightning.data.files import FileSource
from cl_lightning.data.images import looks_whole, open_image
from cl_lightning.data.samples import ArraySource


class DecodedSource(TensorSource):
    """Samples of another source, decoded into memory; the digest is the digest of the original source."""

    def __init__(self, images: Tensor, origin: SampleSource) -> None:
        super().__init__(
            images,
            origin.labels,
            class_names=origin.class_names,
            channels_last=False,
            domains=origin.domains,
            domain_names=origin.domain_names,
        )
        self.origin = origin

    def digest(self, indices: np.ndarray) -> bytes:
        return self.origin.digest(indices)


class DecodedSamples(ArraySource):
    """Samples of another source that are no pixels, read into memory; the digest is the digest of its source."""

    def __init__(self, samples: Tensor, origin: SampleSource) -> None:
        super().__init__(
            samples,
            origin.labels,
            kind=origin.kind,  # type: ignore[arg-type]
            class_names=origin.class_names,
            domains=origin.domains,
            domain_names=origin.domain_names,
        )
        self.origin = origin

    def digest(self, indices: np.ndarray) -> bytes:
        return self.origin.digest(indices)


def decoded(source: SampleSource, threads: int = 0) -> TensorSource | ArraySource:
    """Decode all samples of a source once and keep them in memory.

    Args:
        source: Unreadable files are left out with a warning if its ``skip_unreadable`` is set.
        threads: Number of decoding threads; 0 for one per processor, at most 8.

    Raises:
        ValueError: If a file cannot be read and ``skip_unreadable`` is not set (the first files are named), or images
            differ in shape.
    """
    files = source if isinstance(source, FileSource) else None
    dtype = source.take(torch.zeros(0, dtype=torch.int64)).dtype
    images = torch.empty(len(source.labels), *source.image_shape, dtype=dtype)
    problems: list[str | None] = [None] * len(images)

    def decode(index: int) -> None:
        try:
            image = files.decode(files.paths[index]) if files is not None else source.take(torch.tensor([index]))[0]
        except ValueError as error:
            if files is None:
                raise
            problems[index] = str(error)
            return
        if image.shape != images.shape[1:]:
            raise ValueError(of_other_shape(source, tuple(images.shape[1:]), index, tuple(image.shape)))
        images[index] = image

    _each(decode, len(images), threads if files is not None or getattr(source, "threads", False) else 1)
    if files is None:
        return DecodedSource(images, source) if dtype == torch.uint8 else DecodedSamples(images, source)
    kept = _without(files, problems)
    return DecodedSource(images if kept is files else images[torch.tensor([p is None for p in problems])], kept)


def checked(source: FileSource, threads: int = 0) -> FileSource:
    """Check all files of a source, and return the readable ones.

    With ``skip_unreadable``, every file is decoded once, and files that fail are left out. Without it, only the start
    and the end of each file are read: this detects files that are missing, empty, truncated or no images. Damage in the
    middle of a file is detected when it is decoded.

    Args:
        source: The files.
        threads: Number of threads; 0 for one per processor, at most 8.

    Raises:
        ValueError: If a file cannot be read and ``skip_unreadable`` is not set; the first files are named.
    """
    problems: list[str | None] = [None] * len(source)

    def look(index: int) -> None:
        path = source.paths[index]
        try:
            if source.skip_unreadable:
                source.decode(path)
            elif not looks_whole(path):
                open_image(path, source.mode)
        except ValueError as error:
            problems[index] = str(error)

    _each(look, len(source), threads)
    return _without(source, problems)


def _each(work: Callable[[int], None], count: int, threads: int) -> None:
    """Call ``work`` with ``0 .. count - 1``, in threads: decoding releases the GIL."""
    threads = threads or min(8, os.cpu_count() or 1)
    if threads == 1 or count < 2:
        for index in range(count):
            work(index)
        return

    def stretch(start: int) -> None:
        for index in range(start, min(start + 64, count)):
            work(index)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(stretch, range(0, count, 64)):
            pass


def _without(source: FileSource, problems: Sequence[str | None]) -> FileSource:
    """The source without the files that have a problem, or an error that names them."""
    found = [problem for problem in problems if problem is not None]
    if not found:
        return source
    shown = "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
    which = f"{source.name}: {len(found)} of {len(source)} files cannot be read: {shown}"
    if not source.skip_unreadable:
        raise ValueError(f"{which}. Repair or remove them, or set skip_unreadable to leave them out")
    if len(found) == len(source):
        raise ValueError(f"{which}. There is nothing left to learn from; repair at least one of them")
    warnings.warn(f"{which}. They are left out", stacklevel=4)
    return source.subset(np.array([row for row, problem in enumerate(problems) if problem is None], dtype=np.int64))
