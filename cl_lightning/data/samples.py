"""Samples of any fixed shape in memory: rows of a table, sequences, maps of measurements, windows of tokens."""

import hashlib
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from cl_lightning.batch import ImageShape
from cl_lightning.checks import one_of
from cl_lightning.data.labels import check_labels
from cl_lightning.data.targets import Targets, check_targets

Kind = Literal["image", "vector", "sequence", "tokens"]
"""What a sample is: ``image`` (C, H, W), ``vector`` (D,), ``sequence`` (C, T), or ``tokens``, integers (T,)."""
KINDS: tuple[str, ...] = get_args(Kind)
SHAPES = {"image": "(C, H, W)", "vector": "(D,)", "sequence": "(C, T)", "tokens": "(T,)"}
"""Shape of one sample of each kind."""
_DIMENSIONS = {"image": 3, "vector": 1, "sequence": 2, "tokens": 1}


class ArraySource:
    """Samples of any fixed shape in memory: float32, or int64 for tokens.

    Args:
        samples: ``(N, *shape)`` with the shape of ``kind`` (`SHAPES`); an image may lack its channels, ``(N, H, W)``,
            and a sequence of one channel too, ``(N, T)``. Numbers are finite; tokens are integers of at least 0.
        labels: Raw labels, integers ``(N,)`` from 0.
        kind: What a sample is.
        class_names: One per class; None for ``"0"``, ``"1"``, ...
        domains: Domain of each sample, integers ``(N,)``.
        domain_names: One per domain.
        targets: Targets of the samples, where they are not one class each; ``labels`` are then ``targets.labels()``.
        name: Name of the data in error messages.

    Attributes:
        largest: Largest token; None for other samples.

    Raises:
        ValueError: If samples or labels have another dtype, shape or range.
    """

    in_memory = True

    def __init__(
        self,
        samples: Tensor | np.ndarray,
        labels: Tensor | np.ndarray | Sequence[int],
        *,
        kind: Kind,
        class_names: Sequence[str] | None = None,
        domains: np.ndarray | None = None,
        domain_names: Sequence[str] = (),
        targets: Targets | None = None,
        name: str = "data",
    ) -> None:
        one_of(self, KINDS, kind=kind)
        self.kind: str = kind
        self.samples = as_samples(samples, kind, name)
        self.largest = int(self.samples.max()) if kind == "tokens" and self.samples.numel() else None
        self.labels = check_labels(labels, len(self.samples), class_names, name)
        count = int(self.labels.max(initial=-1)) + 1
        self.class_names = tuple(class_names) if class_names is not None else tuple(map(str, range(count)))
        self.domains = None if domains is None else np.asarray(domains, dtype=np.int64)
        self.domain_names = tuple(domain_names)
        self.targets = check_targets(targets, self.labels, self.image_shape, name)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def image_shape(self) -> ImageShape:
        return tuple(self.samples.shape[1:])

    def take(self, indices: Tensor) -> Tensor:
        return self.samples.index_select(0, indices)

    def digest(self, indices: np.ndarray) -> bytes:
        rows = self.take(torch.tensor(indices, dtype=torch.int64))
        return hashlib.blake2b(rows.numpy().tobytes(), digest_size=16).digest()


def as_samples(values: Tensor | np.ndarray, kind: Kind, name: str) -> Tensor:
    """Samples ``(N, *shape)`` of a kind as float32, or as int64 for tokens.

    Args:
        values: Numbers; see :class:`ArraySource`.
        kind: What a sample is.
        name: Name of the data in errors.

    Raises:
        ValueError: If the shape is not a shape of the kind, numbers are not finite, or tokens are not integers from 0.
    """
    try:
        array = np.require(values, requirements=["C", "W"]) if isinstance(values, np.ndarray) else values
        tensor = torch.as_tensor(array)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: samples are no numbers ({error}); give numbers") from error
    shape = tuple(tensor.shape)
    if kind in ("image", "sequence") and tensor.dim() == _DIMENSIONS[kind]:
        tensor = tensor.unsqueeze(1)
    if tensor.dim() != _DIMENSIONS[kind] + 1 or 0 in tensor.shape[1:]:
        raise ValueError(f"{name}: samples have shape {shape}; {kind} needs (N, {SHAPES[kind][1:]}")
    if kind == "tokens":
        if tensor.is_floating_point() or tensor.is_complex() or (tensor.numel() and int(tensor.min()) < 0):
            what = f"{tensor.dtype}".removeprefix("torch.")
            raise ValueError(f"{name}: tokens are {what} with negative or broken numbers; give integers from 0")
        return tensor.long().contiguous()
    if tensor.is_complex():
        raise ValueError(f"{name}: samples are complex; give their real and imaginary parts as channels")
    tensor = tensor.float().contiguous()
    if not tensor.isfinite().all():
        rows = (~tensor.isfinite().flatten(1).all(1)).nonzero().flatten()
        raise ValueError(
            f"{name}: samples have nan or infinite numbers, first in row {int(rows[0])}, in {len(rows)} of "
            f"{len(tensor)} rows; fill them or leave the rows out"
        )
    return tensor


def kind_of(values: Tensor | np.ndarray) -> Kind | None:
    """Kind of samples ``(N, *shape)`` where their type and shape leave one reading; None where they do not.

    Floating-point numbers ``(N, D)`` are vectors. All other samples that are no pixels have several readings: integers
    ``(N, T)`` may be tokens or numbers, floating-point numbers ``(N, A, B)`` a map or a sequence.
    """
    floating = values.is_floating_point() if isinstance(values, Tensor) else values.dtype.kind == "f"
    return "vector" if floating and values.ndim == 2 else None
