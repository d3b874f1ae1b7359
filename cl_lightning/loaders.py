"""Batches of a stream: which samples each step holds on each process, and the loaders that fetch them.

The batch size is that of all processes together, and each takes its share of every batch: so a run on two devices takes
the same steps as a run on one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cl_lightning.batch import Batch, Draw, mix, mixed_rows
from cl_lightning.feature_cache import KEYS, STORED, FeatureStore
from cl_lightning.features import FeaturePool
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
        skip_empty: Whether a process without a sample of a batch (smaller than the number of processes) skips it; else
            it gets an empty one, so that it takes part in what the processes do together. An only batch is not skipped:
            Lightning leaves out the whole pass of a process that has none, and the others wait for it.
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
        skip_empty: bool = False,
    ) -> None:
        if skip_empty:
            batch_size = max(batch_size, world)  # so that only the last batch can be too small for all processes
        self.indices, self.tasks, self.batch_size, self.key = indices, tasks, batch_size, key
        self.rank, self.world, self.shuffle, self.passes = rank, world, shuffle, passes
        full, rest = divmod(len(indices), batch_size)
        if skip_empty and full > 0 and self._bounds(rest)[0] == self._bounds(rest)[1]:
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
            place = slice(begin + low, begin + high)
            rows = order[place] if order is not None else place
            yield Rows(self.indices[rows], self.tasks[rows], Draw(mix(self.key, epoch, step), low, high, total), weight)


class _Images(Dataset[Tensor]):
    """Raw images of a step, changed as the domains of their tasks ask for; what worker processes run."""

    def __init__(self, source: Source, shift: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        self.source, self.shift = source, shift

    def __getitem__(self, rows: Rows) -> Tensor:
        raw = self.source.take(rows.indices)
        return raw if self.shift is None else self.shift(raw, rows.tasks)


class _Steps:
    """Sampler of a :class:`DataLoader` that lives as long as the stream, whose plan changes from task to task."""

    def __init__(self) -> None:
        self.rows: Callable[[], Iterator[Rows]] = lambda: iter(())

    def __iter__(self) -> Iterator[Rows]:
        return self.rows()


class StreamLoader:
    """Takes the samples of a plan from a source.

    Images in memory are taken by one index operation per batch, in this process. Files are decoded by workers that are
    started once and kept over the stream. They get indices, send back images and draw nothing at random, so that their
    number changes no result.

    Args:
        source: Where images come from.
        columns: Column of each raw label, int64; -1 for classes that never come, as for labels beyond its end.
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
        raw = torch.as_tensor(source.labels)
        labels = torch.where(raw < len(columns), columns[raw.clamp(max=len(columns) - 1)], -1)
        self.labels = labels if hidden is None else labels.masked_fill(hidden, -1)
        self.pin_memory, self.shifted = pin_memory, shift is not None
        self._images = _Images(source, shift)
        self._steps = _Steps()
        self._workers: DataLoader[Tensor] | None = None
        if workers > 0 and not source.in_memory:
            self._workers = DataLoader(
                self._images,
                batch_size=None,
                sampler=self._steps,  # type: ignore[arg-type]
                num_workers=workers,
                pin_memory=pin_memory,
                persistent_workers=True,
                generator=torch.Generator(),  # else each epoch would draw from the global one
            )

    def over(
        self,
        plan: Plan,
        *,
        place: Callable[[], tuple[int, int]] = lambda: (0, 0),
        memory: Memory | None = None,
        stored: "Stored | None" = None,
    ) -> "PlannedLoader":
        """The batches of ``plan``.

        Args:
            plan: Which samples come when.
            place: Tells, when an iteration begins, the epoch and the step to start at.
            memory: Source of the rows whose index lies beyond the data set. It must not change during an epoch.
            stored: Where features may be found that take the place of images.
        """
        return PlannedLoader(self, plan, place, memory, stored)

    def fetch(self, rows: Rows) -> Tensor:
        """Raw images of one step, while the workers may be at others."""
        return self._images[rows]

    def images(
        self, rows: Callable[[], Iterator[Rows]], split: Callable[[Rows], Rows]
    ) -> Iterator[tuple[Rows, Tensor]]:
        """The given steps, in their order, with raw images of the part of each that ``split`` gives."""
        if self._workers is None:
            return ((item, self._images[split(item)]) for item in rows())
        self._steps.rows = lambda: map(split, rows())
        return zip(rows(), self._workers, strict=True)

    def close(self) -> None:
        """End the workers; they start again when they are needed.

        Workers that the garbage collector finds take five seconds each to end, since it takes their queues away first.
        """
        if self._workers is not None and (running := self._workers._iterator) is not None:
            running._shutdown_workers()  # type: ignore[attr-defined]
            self._workers._iterator = None


@dataclass(frozen=True)
class Stored:
    """Features that may take the place of images.

    Attributes:
        store: Where they are.
        keys: Identity of each image of the data set, int64 ``(N,)``.
        views: Number of augmented views of an image, of which epoch e takes view ``e % views``; 0 for plain images.
        kind: Of the views: how they are made.
    """

    store: FeatureStore
    keys: Tensor
    views: int = 0
    kind: int = 0

    def keys_in(self, epoch: int) -> Tensor:
        """Identities of what an epoch takes, int64 ``(N,)``."""
        return mixed_rows(self.keys, self.kind, epoch % self.views) if self.views else self.keys


class PlannedLoader:
    """What Lightning iterates: one epoch of a plan at a time.

    Where features are stored, batches hold them instead of images, which are not fetched; where some of a batch are
    missing, it holds the identities of its images, by which their features can be stored.
    """

    def __init__(
        self,
        loader: StreamLoader,
        plan: Plan,
        place: Callable[[], tuple[int, int]],
        memory: Memory | None,
        stored: Stored | None = None,
    ) -> None:
        self.loader, self.plan, self.place, self.memory, self.stored = loader, plan, place, memory, stored
        self.num_data = len(loader.labels)

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        return self._batches(*self.place())

    def at(self, epoch: int, step: int) -> Batch:
        """The batch of one step, fetched by this process itself."""
        rows = next(self.plan.epoch(epoch, step))
        return self._batch(rows, self.loader.fetch(self._split()(rows)), self._stored())

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        if self.stored is not None:
            return self._with_features(self.stored, epoch, first)
        return self._with_images(epoch, first)

    def _with_features(self, stored: Stored, epoch: int, first: int) -> Iterator[Batch]:
        table, plan, identities = stored.store.table(), self.plan, stored.keys_in(epoch)
        has = table.has(identities)

        def missing() -> Iterator[Rows]:
            return (rows for rows in plan.epoch(epoch, first) if not has[rows.indices].all())

        images = self.loader.images(missing, _all)
        for rows in plan.epoch(epoch, first):
            keys = identities[rows.indices]
            if has[rows.indices].all():
                features, labels = table.take(keys), self.loader.labels[rows.indices]
                extra = {STORED: features}
                yield Batch(
                    features, labels, rows.tasks, rows.indices, features, rows.draw, extra=extra, weight=rows.weight
                )
            else:
                yield self._batch(rows, next(images)[1], None).replace(extra={KEYS: keys})

    def _with_images(self, epoch: int, first: int) -> Iterator[Batch]:
        # Workers hold no memory: they fetch the rows of the data set, and the rows of the memory are put between here.
        plan, split = self.plan, self._split()  # not self: the loader would hold itself, and its workers would not end
        images = self.loader.images(lambda: plan.epoch(epoch, first), split)
        stored = self._stored()
        for rows, raw in images:
            yield self._batch(rows, raw, stored)

    def _batch(self, rows: Rows, raw: Tensor, stored: tuple[Tensor, Tensor, Tensor] | None) -> Batch:
        if stored is None:
            labels, indices, tasks = self.loader.labels[rows.indices], rows.indices, rows.tasks
        else:
            raw, labels, tasks = self._mixed(rows, raw, *stored)
            indices = torch.where(rows.indices >= self.num_data, -1, rows.indices)
        batch = Batch(raw, labels, tasks, indices, raw, rows.draw, weight=rows.weight)
        return batch.pin_memory() if self.loader.pin_memory else batch

    def _split(self) -> Callable[[Rows], Rows]:
        """What takes the rows of the data set out of those of a step."""
        return partial(_below, len(self.loader.labels)) if self.memory is not None else _all

    def _stored(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Images, labels and tasks of the whole memory on the CPU: fetched once per epoch, not once per step."""
        if self.memory is None:
            return None
        return self.memory.images.cpu(), self.memory.labels.cpu(), self.memory.tasks.cpu()

    def _mixed(
        self, rows: Rows, raw: Tensor, images: Tensor, labels: Tensor, tasks: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and tasks of all rows in the order of the plan, of the data as well as of the memory."""
        replayed = rows.indices >= self.num_data
        data, places = rows.indices[~replayed], rows.indices[replayed] - self.num_data
        # Where each row stands in a list of the rows of the data and then those of the memory.
        order = torch.where(replayed, replayed.cumsum(0) + len(data), (~replayed).cumsum(0)) - 1
        pairs = (
            (raw, images.index_select(0, places)),
            (self.loader.labels[data], labels[places]),
            (rows.tasks[~replayed], tasks[places]),
        )
        joint_images, joint_labels, joint_tasks = (torch.cat(pair).index_select(0, order) for pair in pairs)
        return joint_images, joint_labels, joint_tasks


def _all(rows: Rows) -> Rows:
    return rows


def _below(bound: int, rows: Rows) -> Rows:
    below = rows.indices < bound
    return Rows(rows.indices[below], rows.tasks[below], rows.draw, rows.weight)


class FeatureLoader:
    """Batches of features, where a phase trains a head alone: one epoch of a plan at a time.

    Args:
        pool: Where the rows come from.
        plan: Which rows come when.
        place: As in :meth:`StreamLoader.over`.
        owners: Task of each column, int64.
    """

    def __init__(self, pool: FeaturePool, plan: Plan, place: Callable[[], tuple[int, int]], owners: Tensor) -> None:
        self.pool, self.plan, self.place = pool, plan, place
        self.owners = owners.to(pool.labels.device)

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = self.place()
        self.pool.begin_epoch(epoch)
        for rows in self.plan.epoch(epoch, first):
            features, labels = self.pool.take(rows.indices, rows.draw)
            nowhere = torch.full_like(labels, -1)
            tasks = self.owners[labels]
            yield Batch(features, labels, tasks, nowhere, features, rows.draw, weight=rows.weight)
