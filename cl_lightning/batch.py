"""What travels from a loader to a strategy, and the random numbers that belong to it.

Randomness here is counter-based: what a step draws is a function of (seed, task, phase, epoch, batch), never of how
often a generator was called before. So a resumed run draws what the uninterrupted one draws, with no generator state to
save, and two processes that share a global batch draw what one process draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from cl_lightning.stream import draws

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

    Every method draws for all rows and returns this process's share, so that the ranks of a distributed run together
    draw exactly what a single process draws.
    """

    key: int
    start: int
    stop: int
    total: int

    @classmethod
    def of(cls, rows: int, *numbers: int) -> "Draw":
        """Draw of ``rows`` rows, all held by this process, keyed by ``numbers``."""
        return cls(mix(*numbers), 0, rows, rows)

    def fork(self, *salt: int) -> "Draw":
        """An independent draw for the same rows."""
        return replace(self, key=mix(self.key, *salt))

    def share(self, total: int, *salt: int) -> "Draw":
        """An independent draw for ``total`` other rows, shared out over the processes as evenly as this one is."""
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
    """Random numbers that belong to each row, wherever it stands: a function of the draw's key and the row's own.

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
        bits = draws.mix(self.key, rows, places) >> np.uint64(64 - count)
        return torch.from_numpy(bits.astype(np.int64)).view(len(self.rows), *shape)


def mixed_rows(rows: Tensor, *numbers: int) -> Tensor:
    """A key for each row of the numbers and its own key, int64, on the CPU."""
    return torch.from_numpy(draws.mix(*numbers, rows.cpu().numpy()).view(np.int64))


@dataclass
class Batch:
    """Samples of one step.

    Attributes:
        images: What the network sees: augmented and normalised, float ``(B, C, H, W)``. Before the batch is on its
            device this is the same tensor as ``raw``.
        labels: Column of the class in the logits, int64 ``(B,)``; -1 where the label is hidden from the strategy.
        tasks: Index of the task that the sample belongs to, int64 ``(B,)``.
        indices: Place of the sample in its data set, int64 ``(B,)``; -1 for samples from a memory.
        raw: The same images neither augmented nor normalised, uint8 ``(B, C, H, W)``. What a memory keeps.
        draw: Random numbers of this step; ``draw.total`` is the size of the batch over all processes.
        extra: Further tensors with B rows that a memory or a strategy adds, by name (stored logits, views, ...).
        weight: Share of this process in the mean over the global batch, times the number of processes: 1 unless the
            processes hold unequal numbers of samples (the last batch of an epoch), 0 where this one holds none.
    """

    images: Tensor
    labels: Tensor
    tasks: Tensor
    indices: Tensor
    raw: Tensor
    draw: Draw
    extra: dict[str, Tensor] = field(default_factory=dict)
    weight: float = 1.0

    def __len__(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy with every tensor on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy in page-locked memory, for faster transfer to a GPU."""
        return self._map(Tensor.pin_memory)

    def select(self, rows: Tensor | slice) -> Self:
        """The given rows, with the same draw and weight."""
        return self._map(lambda tensor: tensor[rows])

    def replace(self, **changes: Any) -> Self:
        """Copy with some fields changed."""
        return replace(self, **changes)

    def _map(self, function: Any) -> Self:
        changes: dict[str, Any] = {
            name: function(getattr(self, name)) for name in ("labels", "tasks", "indices", "images")
        }
        changes["raw"] = changes["images"] if self.raw is self.images else function(self.raw)
        changes["extra"] = {name: function(value) for name, value in self.extra.items()}
        return replace(self, **changes)


def cat(batches: Sequence[Batch], world_size: int = 1) -> Batch:
    """Join batches row by row; the draw is the first one's, ``extra`` keeps the names that all of them have.

    The weight is such that the mean over the joint rows is again this process's part of the mean over the global rows.

    Args:
        batches: At least one.
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
    return first.replace(**joined, extra=extra, weight=weight)
