"""Batches of a stream: which samples each step holds on each process, and the loaders that fetch them.

The batch size is that of all processes together, and each takes its share of every batch: so a run on two devices takes
the same steps as a run on one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cl_lightning.batch import Batch, Draw, mix
from cl_lightning.memory import Memory
from cl_lightning.sources import Source


@dataclass(frozen=True)
class Rows:
    """The samples that one process takes for one step, before they are fetched.

    Attributes:
        indices: Places in the data set, int64 ``(B,)``.
        tasks: Task of each sample, int64 ``(B,)``.
        draw: Random numbers of the step.
        weight: See :class:`~cl_lightning.batch.Batch`.
    """

    indices: Tensor
    tasks: Tensor
    draw: Draw
    weight: float = 1.0


class Plan:
    """The order in which a pool of samples is dealt out over steps and processes, each batch shared out evenly.

    Args:
        indices: Places in the data set, int64 ``(n,)``. Places beyond the data set mean rows of a memory.
        tasks: Task of each sample, int64 ``(n,)``.
        batch_size: Samples per step, over all processes.
        key: Seeds the order, with the epoch.
        rank: This process.
        world: Number of processes.
        shuffle: Whether each epoch has an order of its own; else the pool is taken as it is.
        drop_last: Leave out a last batch that is not full, unless it is the only one.
        passes: Number of consecutive steps on each batch.
        shortage: What a process without a sample of a batch (smaller than the number of processes) takes. ``repeat``:
            one that does not count, so that it takes part in the reduction of gradients; ``empty``: an empty batch, so
            that it takes part in other reductions; ``skip``: nothing.
    """

    def __init__(
        self,
        indices: Tensor,
        tasks: Tensor,
        *,
        batch_size: int,
        key: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        drop_last: bool = False,
        passes: int = 1,
        shortage: Literal["repeat", "empty", "skip"] = "repeat",
    ) -> None:
        self.indices, self.tasks, self.batch_size, self.key = indices, tasks, batch_size, key
        self.rank, self.world, self.shuffle, self.passes, self.shortage = rank, world, shuffle, passes, shortage
        full, rest = divmod(len(indices), batch_size)
        if shortage == "skip" and self._bounds(rest)[0] == self._bounds(rest)[1]:
            rest = 0
        self.num_batches = full + (rest > 0 and not (drop_last and full > 0))

    def __len__(self) -> int:
        return self.num_batches * self.passes

    def _bounds(self, total: int) -> tuple[int, int]:
        return total * self.rank // self.world, total * (self.rank + 1) // self.world

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Rows]:
        """Steps ``first ..`` of an epoch."""
        order: Tensor | None = None
        if self.shuffle:
            order = torch.randperm(len(self.indices), generator=torch.Generator().manual_seed(mix(self.key, epoch)))
        for step in range(first, len(self)):
            begin = step // self.passes * self.batch_size
            total = min(self.batch_size, len(self.indices) - begin)
            low, high = self._bounds(total)
            weight = (high - low) * self.world / total
            if low == high and self.shortage == "repeat":
                low, high = min(low, total - 1), min(low, total - 1) + 1
            place = slice(begin + low, begin + high)
            rows = order[place] if order is not None else place
            yield Rows(self.indices[rows], self.tasks[rows], Draw(mix(self.key, epoch, step), low, high, total), weight)


class _Fetch(Dataset[Batch]):
    """Turns :class:`Rows` into a batch of raw images; what worker processes run."""

    def __init__(
        self, source: Source, columns: Tensor, hidden: Tensor | None, shift: Callable[[Tensor, Tensor], Tensor] | None
    ):
        self.source, self.columns, self.hidden, self.shift = source, columns, hidden, shift
        self.labels = torch.as_tensor(source.labels)

    def __getitem__(self, rows: Rows) -> Batch:
        raw = self.source.take(rows.indices)
        if self.shift is not None:
            raw = self.shift(raw, rows.tasks)
        labels = self.columns[self.labels[rows.indices]]
        if self.hidden is not None:
            labels = labels.masked_fill(self.hidden[rows.indices], -1)
        return Batch(raw, labels, rows.tasks, rows.indices, raw, rows.draw, weight=rows.weight)


class _Steps:
    """Sampler of a :class:`DataLoader` that lives as long as the stream, whose plan changes from task to task."""

    def __init__(self) -> None:
        self.rows: Callable[[], Iterator[Rows]] = lambda: iter(())

    def __iter__(self) -> Iterator[Rows]:
        return self.rows()


class StreamLoader:
    """Iterable over the batches of a plan.

    Images in memory are taken by one index operation per batch, in this process; files are decoded by workers that are
    started once and kept over the stream.

    Args:
        source: Where images come from.
        columns: Column of each raw label, int64; -1 for classes not seen yet.
        hidden: Which samples hide their label, bool, or None.
        shift: What the domains of a stream do to raw images ``(images, tasks) -> images``, or None.
        workers: Number of worker processes for files.
        pin_memory: Whether batches come in page-locked memory.
    """

    def __init__(
        self,
        source: Source,
        columns: Tensor,
        *,
        hidden: Tensor | None = None,
        shift: Callable[[Tensor, Tensor], Tensor] | None = None,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.fetch = _Fetch(source, columns, hidden, shift)
        self.pin_memory = pin_memory
        self._steps = _Steps()
        self._inner: DataLoader[Batch] | None = None
        if workers > 0 and not source.in_memory:
            self._inner = DataLoader(
                self.fetch,
                batch_size=None,
                sampler=self._steps,  # type: ignore[arg-type]
                num_workers=workers,
                pin_memory=pin_memory,
                persistent_workers=True,
            )

    def over(
        self,
        plan: Plan,
        *,
        place: Callable[[], tuple[int, int]] = lambda: (0, 0),
        memory: Memory | None = None,
    ) -> "PlannedLoader":
        """The batches of ``plan``.

        Args:
            plan: Which samples come when.
            place: Tells, when an iteration begins, the epoch and the step to start at.
            memory: Source of the rows whose index lies beyond the data set.
        """
        return PlannedLoader(self, plan, place, memory)

    def batches(self, rows: Callable[[], Iterator[Rows]]) -> Iterator[Batch]:
        if self._inner is not None:
            self._steps.rows = rows
            yield from self._inner
            return
        for item in rows():
            batch = self.fetch[item]
            yield batch.pin_memory() if self.pin_memory else batch


class PlannedLoader:
    """What Lightning iterates: one epoch of a plan at a time."""

    def __init__(
        self, loader: StreamLoader, plan: Plan, place: Callable[[], tuple[int, int]], memory: Memory | None
    ) -> None:
        self.loader, self.plan, self.place, self.memory = loader, plan, place, memory
        self.num_data = len(loader.fetch.labels)

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = self.place()
        if self.memory is None:
            return self.loader.batches(lambda: self.plan.epoch(epoch, first))
        return self._mixed(epoch, first)

    def _mixed(self, epoch: int, first: int) -> Iterator[Batch]:
        # Workers hold no memory: they fetch the rows of the data set, and the rows of the memory are put between here.
        assert self.memory is not None
        data = self.loader.batches(lambda: (self._data_rows(rows) for rows in self.plan.epoch(epoch, first)))
        for rows, batch in zip(self.plan.epoch(epoch, first), data, strict=True):
            replayed = rows.indices >= self.num_data
            images, labels, tasks = self.memory.gather(rows.indices[replayed] - self.num_data)
            raw = images.new_empty((len(rows.indices), *images.shape[1:]), device=batch.raw.device)
            kept: dict[str, Tensor] = {}
            for name, old, new in (("labels", batch.labels, labels), ("tasks", batch.tasks, tasks)):
                kept[name] = old.new_empty(len(rows.indices))
                kept[name][~replayed], kept[name][replayed] = old, new.to(old.device)
            raw[~replayed], raw[replayed] = batch.raw, images.to(raw.device)
            indices = torch.where(replayed, -1, rows.indices)
            yield batch.replace(raw=raw, images=raw, indices=indices, **kept)

    def _data_rows(self, rows: Rows) -> Rows:
        data = rows.indices < self.num_data
        return Rows(rows.indices[data], rows.tasks[data], rows.draw, rows.weight)

