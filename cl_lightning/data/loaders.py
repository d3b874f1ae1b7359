"""Batches of a stream: the samples of each step on each process, and the loaders that fetch them.

The batch size counts the samples of all processes, and each process takes its share of every batch: a run on two
devices takes the same steps as a run on one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cl_lightning.batch import Batch, Draw, mix, mixed_rows
from cl_lightning.data.balance import balanced_order
from cl_lightning.data.feature_cache import KEYS, STORED, FeatureStore
from cl_lightning.data.feature_pool import FeaturePool
from cl_lightning.data.sources import SampleSource
from cl_lightning.data.targets import TARGETS
from cl_lightning.hashing import IntArray
from cl_lightning.memory import Memory

MEMORY_ROWS = "memory_rows"
"""Key in ``Batch.extra`` of the row of each sample in the memory that a loader mixes in, int64 ``(B,)``; -1 for samples
of the data set. It is absent without such a memory."""


@dataclass(frozen=True)
class Rows:
    """Samples of one step on one process, before they are fetched.

    Attributes:
        indices: Indices in the data set, int64 ``(B,)``.
        tasks: Task of each sample, int64 ``(B,)``.
        draw: Random numbers of the step.
        weight: See :class:`~cl_lightning.batch.Batch`.
        hidden: Samples whose label is hidden in this step, bool ``(B,)``; None for no others than in all steps.
        groups: See :class:`~cl_lightning.batch.Batch`.
    """

    indices: Tensor
    tasks: Tensor
    draw: Draw
    weight: float = 1.0
    hidden: Tensor | None = None
    groups: tuple[int, int] | None = None


class Plan:
    """Order of a pool of samples over steps and processes; each batch is split evenly over the processes.

    Args:
        indices: Indices in the data set, int64 ``(n,)``. Indices beyond the data set refer to rows of a memory.
        tasks: Task of each sample, int64 ``(n,)``.
        batch_size: Samples per step, over all processes.
        key: Seed of the order, together with the epoch.
        rank: Rank of this process.
        world: Number of processes.
        shuffle: Whether each epoch has its own random order; else the order of the pool.
        drop_last: Whether to omit an incomplete last batch, unless it is the only batch.
        passes: Number of consecutive steps on each batch.
        columns: Column of each sample, int64 ``(n,)``, to have all classes equally often in each epoch
            (:func:`~cl_lightning.data.balance.balanced_order`); None to have each sample once.
        skip_empty: Whether a process without a sample of the last batch (smaller than the number of processes) skips
            it; else it receives an empty batch, so that it takes part in collective operations. A single batch is not
            skipped: Lightning omits the whole pass on a process without batches, and the other processes would wait for
            it.
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
        columns: Tensor | None = None,
        skip_empty: bool = False,
    ) -> None:
        if skip_empty:
            batch_size = max(batch_size, world)  # only the last batch can have fewer samples than processes
        self.indices, self.tasks, self.batch_size, self.key = indices, tasks, batch_size, key
        self.rank, self.world, self.shuffle, self.passes, self.columns = rank, world, shuffle, passes, columns
        full, rest = divmod(len(indices), batch_size)
        if skip_empty and full > 0 and self._bounds(rest)[0] == self._bounds(rest)[1]:
            rest = 0
        self.num_batches = full + (rest > 0 and not (drop_last and full > 0))

    def __len__(self) -> int:
        return self.num_batches * self.passes

    def _bounds(self, total: int) -> tuple[int, int]:
        return total * self.rank // self.world, total * (self.rank + 1) // self.world

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Rows]:
        """Steps of an epoch, from step ``first`` on."""
        order: Tensor | None = None
        if self.shuffle:
            generator = torch.Generator().manual_seed(mix(self.key, epoch))
            if self.columns is None:
                order = torch.randperm(len(self.indices), generator=generator)
            else:
                order = balanced_order(self.columns, generator)
        for step in range(first, len(self)):
            begin = step // self.passes * self.batch_size
            total = min(self.batch_size, len(self.indices) - begin)
            low, high = self._bounds(total)
            weight = (high - low) * self.world / total
            place = slice(begin + low, begin + high)
            rows = order[place] if order is not None else place
            yield Rows(self.indices[rows], self.tasks[rows], Draw(mix(self.key, epoch, step), low, high, total), weight)


class _Images(Dataset[Tensor]):
    """Raw images of a step, after the domain shift of their tasks; runs in worker processes."""

    def __init__(self, source: SampleSource, shift: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        self.source, self.shift = source, shift

    def __getitem__(self, rows: Rows) -> Tensor:
        raw = self.source.take(rows.indices)
        return raw if self.shift is None else self.shift(raw, rows.tasks)


class _Steps:
    """Sampler of a :class:`DataLoader` that persists over the stream while the plan changes from task to task."""

    def __init__(self) -> None:
        self.rows: Callable[[], Iterator[Rows]] = lambda: iter(())

    def __iter__(self) -> Iterator[Rows]:
        return self.rows()


class StreamLoader:
    """Fetches the samples of a plan from a source.

    Images in memory are taken by one index operation per batch, in this process. Files are decoded by worker processes
    that are started once and persist over the stream. Workers receive indices, return images and draw no random
    numbers, so their number does not affect results.

    Args:
        source: Source of the images.
        columns: Column of each raw label, int64; -1 for classes that never occur in the stream. Labels beyond its end
            have column -1 as well.
        labels: Raw labels that batches have, int64 ``(N,)``; None for the labels of the source.
        hidden: Samples whose label is hidden (-1), bool ``(N,)``, or None.
        shift: Domain shift of raw images, ``(images, tasks) -> images``, or None.
        targets: Targets of samples, ``(indices, tasks) -> targets``; None where the target is the class.
        workers: Number of worker processes for files.
        pin_memory: Whether batches are in page-locked memory.
    """

    def __init__(
        self,
        source: SampleSource,
        columns: Tensor,
        *,
        labels: IntArray | None = None,
        hidden: Tensor | None = None,
        shift: Callable[[Tensor, Tensor], Tensor] | None = None,
        targets: Callable[[Tensor, Tensor], Tensor] | None = None,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        raw = torch.as_tensor(source.labels if labels is None else labels)
        known = torch.where(raw < len(columns), columns[raw.clamp(max=len(columns) - 1)], -1)
        self.labels = known if hidden is None else known.masked_fill(hidden, -1)
        self.pin_memory, self.shifted, self.targets = pin_memory, shift is not None, targets
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
                generator=torch.Generator(),  # else each epoch would draw from the global generator
            )

    def over(
        self,
        plan: Plan,
        *,
        place: Callable[[], tuple[int, int]] = lambda: (0, 0),
        memory: Memory | None = None,
        stored: "Stored | None" = None,
    ) -> "PlannedLoader":
        """Loader of the batches of ``plan``.

        Args:
            plan: Order of the samples.
            place: Returns the epoch and the step to start at; called when an iteration begins.
            memory: Memory whose rows have the indices beyond the data set. It must not change during an epoch.
            stored: Stored features that replace images.
        """
        return PlannedLoader(self, plan, place, memory, stored)

    def fetch(self, rows: Rows) -> Tensor:
        """Raw images of one step, fetched by this process, independently of the workers."""
        return self._images[rows]

    def images(
        self, rows: Callable[[], Iterator[Rows]], split: Callable[[Rows], Rows]
    ) -> Iterator[tuple[Rows, Tensor]]:
        """The given steps in order, with raw images of the part of each step that ``split`` returns."""
        if self._workers is None:
            return ((item, self._images[split(item)]) for item in rows())
        self._steps.rows = lambda: map(split, rows())
        return zip(rows(), self._workers, strict=True)

    def close(self) -> None:
        """Stop the workers; they are restarted when needed.

        If the garbage collector stops them instead, each takes 5 seconds, since their queues are destroyed first.
        """
        if self._workers is not None and (running := self._workers._iterator) is not None:
            running._shutdown_workers()  # type: ignore[attr-defined]
            self._workers._iterator = None


@dataclass(frozen=True)
class Stored:
    """Stored features that can replace images.

    Attributes:
        store: The store.
        keys: Identity of each image of the data set, int64 ``(N,)``.
        views: Number of augmented views per image; epoch e uses view ``e % views``. 0 for un-augmented images.
        kind: Hash of the seed and the augmentation that make the views.
    """

    store: FeatureStore
    keys: Tensor
    views: int = 0
    kind: int = 0

    def keys_in(self, epoch: int) -> Tensor:
        """Identities of the images or views of an epoch, int64 ``(N,)``."""
        return mixed_rows(self.keys, self.kind, epoch % self.views) if self.views else self.keys


class PlannedLoader:
    """Iterable of batches for Lightning: one epoch of a plan per iteration.

    Where all features of a batch are stored, the batch holds features instead of images, and no image is fetched.
    Otherwise it holds the images and their identities, under which their features can be stored.
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
        """Batch of a single step, fetched by this process."""
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
        # Workers have no replay memory: they fetch rows of the data set, and rows of the memory are inserted here.
        plan, split = self.plan, self._split()  # self would be a reference cycle that keeps the workers running
        images = self.loader.images(lambda: plan.epoch(epoch, first), split)
        stored = self._stored()
        for rows, raw in images:
            yield self._batch(rows, raw, stored)

    def _batch(self, rows: Rows, raw: Tensor, stored: tuple[Tensor, ...] | None) -> Batch:
        extra = {}
        if stored is None:
            labels, indices, tasks = self.loader.labels[rows.indices], rows.indices, rows.tasks
            if self.loader.targets is not None:
                extra[TARGETS] = self.loader.targets(indices, tasks)
        else:
            raw, labels, tasks, *targets = self._mixed(rows, raw, *stored)
            extra |= {TARGETS: targets[0]} if targets else {}
            indices = torch.where(rows.indices >= self.num_data, -1, rows.indices)
            extra[MEMORY_ROWS] = (rows.indices - self.num_data).clamp(min=-1)
        if rows.hidden is not None:
            labels = labels.masked_fill(rows.hidden, -1)
        batch = Batch(raw, labels, tasks, indices, raw, rows.draw, extra=extra, weight=rows.weight, groups=rows.groups)
        return batch.pin_memory() if self.loader.pin_memory else batch

    def _split(self) -> Callable[[Rows], Rows]:
        """Function that selects the rows of the data set from the rows of a step."""
        return partial(_below, len(self.loader.labels)) if self.memory is not None else _all

    def _stored(self) -> tuple[Tensor, ...] | None:
        """Images, labels, tasks, and targets if there are any, of the whole memory on the CPU.

        They are copied once per epoch, not once per step.
        """
        if self.memory is None:
            return None
        stored = [self.memory.images, self.memory.labels, self.memory.tasks]
        if self.loader.targets is not None:
            stored.append(self.memory.fields[TARGETS])
        return tuple(part.cpu() for part in stored)

    def _mixed(self, rows: Rows, raw: Tensor, *stored: Tensor) -> tuple[Tensor, ...]:
        """Rows of the data set and of the memory, in the order of the plan: images, labels, tasks, any targets."""
        replayed = rows.indices >= self.num_data
        data, places = rows.indices[~replayed], rows.indices[replayed] - self.num_data
        # Position of each row in the concatenation of the rows of the data set and the rows of the memory.
        order = torch.where(replayed, replayed.cumsum(0) + len(data), (~replayed).cumsum(0)) - 1
        own = [raw, self.loader.labels[data], rows.tasks[~replayed]]
        if self.loader.targets is not None:
            own.append(self.loader.targets(data, own[2]))
        pairs = zip(own, stored, strict=True)
        return tuple(torch.cat([new, old.index_select(0, places)]).index_select(0, order) for new, old in pairs)


def _all(rows: Rows) -> Rows:
    return rows


def _below(bound: int, rows: Rows) -> Rows:
    below = rows.indices < bound
    return Rows(rows.indices[below], rows.tasks[below], rows.draw, rows.weight)


class FeatureLoader:
    """Batches of features for a phase that trains the head alone: one epoch of a plan per iteration.

    Args:
        pool: Source of the features.
        plan: Order of the rows.
        place: As in :meth:`StreamLoader.over`.
        owners: Task of each column, int64 ``(C,)``.
    """

    def __init__(self, pool: FeaturePool, plan: Plan, place: Callable[[], tuple[int, int]], owners: Tensor) -> None:
        self.pool, self.plan, self.place = pool, plan, place
        self.owners = owners.to(pool.labels.device)

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        epoch, first = self.place()
        for rows in self.plan.epoch(epoch, first):
            features, labels = self.pool.take(rows.indices, rows.draw)
            nowhere = torch.full_like(labels, -1)
            tasks = self.owners[labels]
            yield Batch(features, labels, tasks, nowhere, features, rows.draw, weight=rows.weight)
