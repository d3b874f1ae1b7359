"""Batches of samples from a loader to a strategy, and counter-based random numbers for their rows.

The random numbers of a step are a function of (seed, task, phase, epoch, batch), not of the number of earlier calls of
a generator. A resumed run therefore draws the same numbers as an uninterrupted run, without generator state in
checkpoints, and two processes that split a global batch draw the same numbers as one process.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from cl_lightning.distributed import world_size
from cl_lightning.hashing import hash64

_MASK = (1 << 64) - 1


def mix(*numbers: int) -> int:
    """Hash integers to 64 bits, the same on every platform and in every process (splitmix64, Steele et al. 2014).

    Args:
        numbers: Any integers; their order matters.
    """
    state = 0
    for number in numbers:
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


@dataclass(frozen=True)
class Draw:
    """Random numbers for a global batch of ``total`` rows, of which this process holds rows ``start:stop``.

    Every method draws numbers for all rows and returns the rows of this process. All processes of a distributed run
    together therefore have exactly the numbers of a single process.

    Attributes:
        key: Seed of the numbers.
        start, stop: First row of this process, and the row after its last one.
        total: Number of rows of the global batch.
    """

    key: int
    start: int
    stop: int
    total: int

    @classmethod
    def of(cls, rows: int, *numbers: int) -> "Draw":
        """Draw of ``rows`` rows, all held by this process, whose key is a hash of ``numbers``."""
        return cls(mix(*numbers), 0, rows, rows)

    def fork(self, *salt: int) -> "Draw":
        """An independent draw for the same rows."""
        return replace(self, key=mix(self.key, *salt))

    def share(self, total: int, *salt: int) -> "Draw":
        """An independent draw for ``total`` other rows, split over the processes in the same proportions."""
        scale = total / max(self.total, 1)
        return Draw(mix(self.key, *salt), round(self.start * scale), round(self.stop * scale), total)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        generator = torch.Generator(device)
        generator.manual_seed(self.key)
        return generator

    def rand(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Uniform numbers in [0, 1), ``(stop - start, *shape)``."""
        return torch.rand(self.total, *shape, generator=self.generator(device), device=device)[self.start : self.stop]

    def randn(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Standard normal numbers, ``(stop - start, *shape)``."""
        return torch.randn(self.total, *shape, generator=self.generator(device), device=device)[self.start : self.stop]

    def randint(self, high: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        """Integers in ``0 .. high - 1``, ``(stop - start, *shape)``, int64."""
        size = (self.total, *shape)
        return torch.randint(high, size, generator=self.generator(device), device=device)[self.start : self.stop]


@dataclass(frozen=True)
class RowDraw(Draw):
    """Random numbers of a row as a function of the key of the draw and the key of the row, not of the row's position.

    Attributes:
        rows: Key of each row, int64 ``(total,)``, on the CPU.
    """

    rows: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @classmethod
    def of_rows(cls, rows: Tensor, *numbers: int) -> "RowDraw":
        """Draw of rows with the given keys, all held by this process."""
        rows = rows.cpu()
        return cls(mix(*numbers), 0, len(rows), len(rows), rows)

    def rand(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        return (self._bits(*shape, count=24).double() * 2.0**-24).float().to(device)

    def randn(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        first, second = self._bits(2, *shape, count=53).double().mul_(2.0**-53).unbind(1)
        return ((-2 * (1 - first).log()).sqrt() * (2 * math.pi * second).cos()).float().to(device)  # Box & Muller 1958

    def randint(self, high: int, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        return (self._bits(*shape, count=53).double() * 2.0**-53 * high).long().clamp_(max=high - 1).to(device)

    def _bits(self, *shape: int, count: int) -> Tensor:
        """Integers in ``0 .. 2**count - 1`` for each row, int64 ``(rows, *shape)``."""
        size = math.prod(shape)
        rows, places = np.repeat(self.rows.numpy(), size), np.tile(np.arange(size), len(self.rows))
        bits = hash64(self.key, rows, places) >> np.uint64(64 - count)
        return torch.from_numpy(bits.astype(np.int64)).view(len(self.rows), *shape)


def mixed_rows(rows: Tensor, *numbers: int) -> Tensor:
    """Hash of ``numbers`` and the key of each row, int64, on the CPU."""
    return torch.from_numpy(hash64(*numbers, rows.cpu().numpy()).view(np.int64))


Output_ = TypeVar("Output_")  # output of a network: a named tuple of tensors with one row per sample


@dataclass
class Batch:
    """Samples of one step.

    Attributes:
        images: Input of the network: augmented and normalised, float ``(B, C, H, W)``; for other inputs than images
            ``(B, *shape)``, int64 for tokens. Before the batch is on its device this is the same tensor as ``raw``.
        labels: Column of the class in the logits, int64 ``(B,)``; -1 if the label is hidden from the strategy.
        tasks: Index of the task of the sample, int64 ``(B,)``.
        indices: Index of the sample in its data set, int64 ``(B,)``; -1 for samples from a memory.
        raw: The same samples, neither augmented nor normalised: images uint8 ``(B, C, H, W)``, other inputs float32 or
            int64 ``(B, *shape)``; a memory stores these.
        draw: Random numbers of this step; ``draw.total`` is the size of the batch over all processes.
        extra: Further tensors with B rows that a memory or a strategy adds, by name (stored logits, views, ...).
        weight: Weight of the mean over the samples of this process: its share of the global batch times the number of
            processes. 1 if all processes hold equal numbers of samples, 0 if this process holds none.
        first_pass, last_pass: Whether the samples of this step are seen for the first or the last time in the phase:
            in the first or last epoch and, for an online stream with several steps on each batch, in the first or last
            of these steps.
        parts: Rows and original batch of each part of a joint batch, by name (see ``join``).
        passes: Rows of each forward pass of the network, in order, which together are all rows; empty for one pass.
            Batch normalisation takes its statistics over the rows of a pass.
        groups: Numbers of unlabelled and labelled rows of the global batch in a phase with ``Phase.labelled``, which
            :func:`cl_lightning.data.apart` separates; None in others.
    """

    images: Tensor
    labels: Tensor
    tasks: Tensor
    indices: Tensor
    raw: Tensor
    draw: Draw
    extra: dict[str, Tensor] = field(default_factory=dict)
    weight: float = 1.0
    first_pass: bool = True
    last_pass: bool = True
    parts: dict[str, tuple[slice, "Batch"]] = field(default_factory=dict)
    passes: tuple[slice, ...] = ()
    groups: tuple[int, int] | None = None

    def __len__(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy with every tensor on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy in page-locked memory, for faster transfer to a GPU."""
        return self._map(Tensor.pin_memory)

    def select(self, rows: Tensor | slice) -> Self:
        """Batch of the given rows, with the same draw and weight."""
        return self._map(lambda tensor: tensor[rows])

    def replace(self, **changes: Any) -> Self:
        """Copy with some fields changed."""
        return replace(self, **changes)

    def part(self, name: str, output: Output_) -> "Part[Output_]":
        """A part of a joint batch: its samples, its rows of the output, and its share of the mean.

        Multiply a mean over the part by ``share`` and add it to the loss of the joint batch: weighted and averaged over
        any number of processes, this gives the mean over the part of the global batch.

        Args:
            name: Name of the part, as given to ``join``.
            output: Output of the network for the joint batch: a named tuple of tensors with one row per sample, or of
                tuples of such tensors.

        Raises:
            ValueError: If the batch has no part of this name.
        """
        if name not in self.parts:
            raise ValueError(f"Batch: no part {name!r}; there are {', '.join(self.parts) or 'none'}")
        rows, batch = self.parts[name]
        named: Any = output
        pieces: Output_ = named._replace(**{key: _rows(value, rows) for key, value in named._asdict().items()})
        return Part(batch, pieces, batch.weight / self.weight if self.weight else 0.0)

    def _map(self, function: Any) -> Self:
        changes: dict[str, Any] = {
            name: function(getattr(self, name)) for name in ("labels", "tasks", "indices", "images")
        }
        changes["raw"] = changes["images"] if self.raw is self.images else function(self.raw)
        changes["extra"] = {name: function(value) for name, value in self.extra.items()}
        changes["parts"], changes["passes"] = {}, ()  # their rows are no longer valid
        return replace(self, **changes)


def _rows(value: Any, rows: slice) -> Any:
    return tuple(tensor[rows] for tensor in value) if isinstance(value, tuple) else value[rows]


class Part(NamedTuple, Generic[Output_]):
    """A part of a joint batch.

    Attributes:
        batch: Its samples.
        output: Its rows of the output of the network.
        share: Factor for a mean over the part in the loss of the joint batch.
    """

    batch: Batch
    output: Output_
    share: float


def join(parts: Mapping[str, Batch | None]) -> Batch:
    """Concatenate several parts to one batch for one forward pass; ``batch.part(name, output)`` returns each part.

    With the batch B of the stream and samples R of a memory, ``join({"stream": B, "replay": R})`` has their rows in
    this order. The first part gives ``draw``, ``first_pass`` and ``last_pass``.

    Args:
        parts: Batches by name; at least one is not None. None is left out, for example for an empty memory.
    """
    present = {name: batch for name, batch in parts.items() if batch is not None}
    joint = cat(list(present.values()), world_size())
    ends = list(accumulate(len(batch) for batch in present.values()))
    rows = {name: slice(end - len(batch), end) for (name, batch), end in zip(present.items(), ends, strict=True)}
    return joint.replace(parts={name: (rows[name], batch) for name, batch in present.items()})


def cat(batches: Sequence[Batch], world_size: int = 1) -> Batch:
    """Concatenate batches; the first batch gives the draw, and ``extra`` keeps the names that all batches have.

    The weight is the share of this process in the concatenated global batch, times the number of processes.

    Args:
        batches: At least one batch.
        world_size: Number of processes.
    """
    first, *rest = batches
    joined = {
        name: torch.cat([getattr(batch, name) for batch in batches])
        for name in ("images", "labels", "tasks", "indices", "raw")
    }
    names = sorted(set(first.extra).intersection(*(batch.extra for batch in rest)))
    extra = {name: torch.cat([batch.extra[name] for batch in batches]) for name in names}
    total = sum(batch.draw.total for batch in batches)
    weight = world_size * len(joined["labels"]) / total if total else 1.0
    return first.replace(**joined, extra=extra, weight=weight, parts={}, passes=())


ImageShape = tuple[int, ...]
"""Shape of one sample: (C, H, W) of an image, (D,) of a vector, (C, T) of a sequence, (T,) of tokens."""
