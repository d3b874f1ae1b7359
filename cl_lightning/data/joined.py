"""Several sources of samples as one."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from cl_lightning.batch import ImageShape
from cl_lightning.data.arrays import SampleSource


class JoinedSource:
    """The samples of a source, followed by samples of another one that all get one further class.

    Args:
        first: The first samples; names of classes are theirs.
        second: The further samples; their labels are not used.
        name: Name of the class of the further samples.

    Raises:
        ValueError: If the images of the two sources have different shapes.
    """

    def __init__(self, first: SampleSource, second: SampleSource, name: str) -> None:
        if first.image_shape != second.image_shape:
            raise ValueError(
                f"images of class {name!r} have shape {second.image_shape}, the others {first.image_shape}; give both "
                "one shape"
            )
        self.first, self.second, self.kind = first, second, first.kind
        self.class_names = (*first.class_names, name)
        further = np.full(len(second.labels), len(first.class_names), first.labels.dtype)
        self.labels = np.concatenate([first.labels, further])
        self.domains: np.ndarray | None = None
        self.domain_names: tuple[str, ...] = ()
        self.in_memory = first.in_memory and second.in_memory

    @property
    def image_shape(self) -> ImageShape:
        return self.first.image_shape

    def take(self, indices: Tensor) -> Tensor:
        count = len(self.first.labels)
        is_first = indices < count
        parts = self.first.take(indices[is_first]), self.second.take(indices[~is_first] - count)
        result = torch.empty(len(indices), *self.image_shape, dtype=parts[0].dtype)
        result[is_first], result[~is_first] = parts
        return result

    def digest(self, indices: np.ndarray) -> bytes:
        count = len(self.first.labels)
        parts = self.first.digest(indices[indices < count]), self.second.digest(indices[indices >= count] - count)
        return hashlib.blake2b(b"".join(parts), digest_size=16).digest()
