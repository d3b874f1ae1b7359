"""Steps with unlabelled and labelled samples, each with a batch size of its own, for semi-supervised methods."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from cl_lightning.batch import Batch, Draw, mix
from cl_lightning.checks import at_least, one_of
from cl_lightning.data.loaders import Plan, Rows
from cl_lightning.distributed import world_size

Unlabelled = Literal["hidden", "all"]
_LABELLED, _APART = 0x1AB, 0x1AC  # salts of the order of labelled samples, and of the draws of the two parts


@dataclass(frozen=True)
class LabelledRows:
    """Labelled samples of each step, in addition to the batch, which is then unlabelled.

    They are drawn from the labelled samples of the task and of the memory that the loader mixes in. An epoch is one
    pass over the unlabelled samples; labelled samples occur as often as the steps need them, in a new random order in
    each pass over them.

    Attributes:
        count: Number of labelled samples per step, over all processes, at least 1; None for the batch size. If the
            labelled samples have more steps than the unlabelled ones, an epoch is one pass over the labelled samples.
        per_class: Number of labelled samples of each class per step, at least 1, in place of ``count``.
        unlabelled: Samples of the unlabelled batch: those whose label is ``hidden``, or ``all`` samples of the task.
    """

    count: int | None = None
    per_class: int | None = None
    unlabelled: Unlabelled = "hidden"

    def __post_init__(self) -> None:
        at_least(self, 1, count=self.count, per_class=self.per_class, optional=True)
        one_of(self, get_args(Unlabelled), unlabelled=self.unlabelled)
        if self.count is not None and self.per_class is not None:
            raise ValueError("LabelledRows: give count or per_class, not both")


def interleaved(unlabelled: int, labelled: int) -> Tensor:
    """Which rows of a global batch are labelled, bool ``(unlabelled + labelled,)``, with both kinds spread evenly.

    A contiguous share of the rows then has its share of both kinds.
    """
    places = torch.cat([(torch.arange(count) + 0.5) / max(count, 1) for count in (unlabelled, labelled)])
    return places.argsort(stable=True) >= unlabelled


class LabelledPlan(Plan):
    """Order of the unlabelled and labelled samples of a pool over steps and processes.

    The rows of a step are in the order of :func:`interleaved`; the labels of the unlabelled rows are hidden.

    Args:
        indices, tasks, batch_size, key, rank, world, drop_last: As in :class:`Plan`; ``batch_size`` is the number of
            unlabelled samples.
        columns: Column of each sample, int64 ``(n,)``; -1 if its label is hidden.
        replayed: Samples that are from a memory, bool ``(n,)``; they are never among the unlabelled ones.
        labelled: Numbers of samples.
    """

    def __init__(
        self,
        indices: Tensor,
        tasks: Tensor,
        *,
        columns: Tensor,
        replayed: Tensor,
        labelled: LabelledRows,
        batch_size: int,
        key: int = 0,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ) -> None:
        known = columns >= 0
        kept = ~replayed & ~known if labelled.unlabelled == "hidden" else ~replayed
        self.unlabelled = kept.nonzero().flatten()
        super().__init__(
            indices[kept], tasks[kept], batch_size=batch_size, key=key, rank=rank, world=world, drop_last=drop_last
        )
        self.pool, self.owners, self.own_batches = indices, tasks, self.num_batches
        self.groups = [known.nonzero().flatten()]
        self.count = labelled.count or batch_size
        if labelled.per_class is not None:
            self.groups = [(columns == column).nonzero().flatten() for column in columns[known].unique().tolist()]  # type: ignore[no-untyped-call]
            self.count = labelled.per_class
        if labelled.per_class is None or not self.num_batches:
            rows = self.count * len(self.groups)
            self.num_batches = max(self.num_batches, -(-int(known.sum()) // max(rows, 1)))

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Rows]:
        generator = torch.Generator().manual_seed(mix(self.key, epoch))
        steps = self.num_batches
        count = len(self.unlabelled) if steps == self.own_batches else steps * self.batch_size
        anchors = self.unlabelled[_repeated(len(self.unlabelled), count, generator)]
        generator.manual_seed(mix(self.key, epoch, _LABELLED))
        drawn = [group[_repeated(len(group), steps * self.count, generator)] for group in self.groups]
        supports = torch.stack([rows.view(steps, -1) for rows in drawn], dim=1).flatten(1) if drawn else None
        for step in range(first, steps):
            own = anchors[step * self.batch_size : (step + 1) * self.batch_size]
            given = own[:0] if supports is None else supports[step]
            labelled = interleaved(len(own), len(given))
            rows = torch.empty(len(labelled), dtype=torch.int64)
            rows[~labelled], rows[labelled] = own, given
            low, high = self._bounds(len(rows))
            rows, hidden = rows[low:high], ~labelled[low:high]
            draw = Draw(mix(self.key, epoch, step), low, high, len(labelled))
            weight = (high - low) * self.world / len(labelled)
            groups = (len(own), len(given))
            yield Rows(self.pool[rows], self.owners[rows], draw, weight, hidden, groups)


def _repeated(size: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` of the numbers below ``size``: one random order of all of them after another, int64."""
    if size == 0:
        return torch.zeros(0, dtype=torch.int64)
    orders = [torch.randperm(size, generator=generator) for _ in range(-(-count // size))]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *orders])[:count]


def apart(batch: Batch) -> tuple[Batch, Batch]:
    """The unlabelled and the labelled rows of a step with :class:`LabelledRows`, each with a draw and a weight.

    Args:
        batch: Batch of the loader, on any device; nothing synchronises with it.
    """
    if batch.groups is None:
        raise ValueError("apart: the batch has no groups; give the phase `labelled=LabelledRows(...)`")
    labelled, draw, parts = interleaved(*batch.groups), batch.draw, []
    for number, rows in enumerate((~labelled, labelled)):
        mine = rows[draw.start : draw.stop].nonzero().flatten()
        start, total = int(rows[: draw.start].sum()), batch.groups[number]
        part = batch.select(mine.to(batch.labels.device, non_blocking=True))
        share = Draw(mix(draw.key, _APART, number), start, start + len(mine), total)
        weight = len(mine) * world_size() / total if total else 1.0
        parts.append(part.replace(draw=share, weight=weight, groups=None))
    return parts[0], parts[1]
