"""Pseudo-labels and flexible memory sampling, PL-FMS (Lee et al., ICCV 2023, arXiv:2308.14374).

Online learning of labels of two levels, superclasses and their classes. A sample trains the classes of the level of its
label alone, as with a head for each level on one backbone:

    L = mean_i CE(f(x_i) | level of y_i, y_i),     CutMix within each level

Flexible memory sampling: a sample of class c, the n-th of the stream, is trained on with probability

    p = min(1, (n - first_c) / (N / C)),           first_c: n of the first sample of class c

and otherwise a sample of the memory takes its place, so that new classes are learnt from the memory first. N is the
length of the stream, which must be known, and C the number of classes that have arrived. A step has ``replay_size``
samples, further ones from the memory. The memory keeps the samples whose training lowers its loss most, at a learning
rate that alternates, as in CLIB, with a loss over both levels:

    l_i = CE(f(x_i) | level of y_i, y_i) + CE(f(x_i) | other level, y^_i),     y^_i = argmax of f(x_i) | other level

Our choices: the paper has pseudo-labels for the level without a label, and the authors' code generates none; here they
are predicted at each update of the importances, without knowledge of the superclasses of classes, and both levels have
equal weights. The code counts n up to the end of a batch, and takes the first batch as a whole. With
``released=True`` the loss has the true label alone, and importances are updated as in the code of CLIB. The same box of
CutMix is used for both levels. As in ``CLIB``, the head has the classes of a task from its start, the samples of a
batch are stored before its steps, and k steps per sample are ``Online`` with ``passes``. On a stream of one level the
method is CLIB with flexible memory sampling.
"""

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Batch, Draw, join, mix
from cl_lightning.checks import one_of
from cl_lightning.data import cutmix, mixed_loss
from cl_lightning.distributed import all_gather_rows, rank, world_size
from cl_lightning.losses import cross_entropy
from cl_lightning.memory import GrowingBuffers
from cl_lightning.strategies.online.clib import CLIB
from cl_lightning.strategy import Output, Task, Traits

_ACCEPT, _REPLACE, _REST = 0xF35, 0xF36, 0xF37  # salts of draws
_NEVER = torch.iinfo(torch.int64).max


class FirstArrivals(GrowingBuffers):
    """Number of samples of the stream before the first sample of each class.

    Attributes:
        first: int64 ``(classes,)``; the largest integer for a class without samples so far.
    """

    kept_as: ClassVar[str] = "statistics"
    first: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("first", torch.zeros(0, dtype=torch.int64))

    def grow(self, num_new: int) -> None:
        self.first = torch.cat([self.first, self.first.new_full((num_new,), _NEVER)])

    def num_bytes(self) -> int:
        return self.first.nbytes

    def note(self, labels: Tensor, before: int) -> None:
        """Note the samples that arrive, of all processes.

        Args:
            labels: Columns, int64 ``(n,)``, in order of arrival.
            before: Number of samples of the stream before them.
        """
        numbers = torch.arange(before, before + len(labels), device=labels.device)
        self.first.scatter_reduce_(0, labels, numbers, "amin")

    def probability(self, labels: Tensor, numbers: Tensor, length: int) -> Tensor:
        """Probability with which samples are trained on, float64 ``(n,)``: ``min(1, (n - first_c) / (N / C))``.

        Args:
            labels: Columns of classes that have arrived, int64 ``(n,)``.
            numbers: Number of samples of the stream before each sample, int64 ``(n,)``.
            length: N, number of samples of the stream.
        """
        arrived = (self.first < _NEVER).sum()
        return ((numbers - self.first[labels]).double() / length * arrived).clamp(0, 1)


def both_levels(logits: Tensor, labels: Tensor, levels: Tensor) -> Tensor:
    """Cross-entropy of the label in its level, plus the one of the class predicted in the other, ``(B,)``, in nats.

    Args:
        logits: ``(B, C)``.
        labels: Columns, int64 ``(B,)``.
        levels: Level of each column, 0 or 1, int64 ``(C,)``. A level without columns has no loss.
    """
    own = levels[labels][:, None] == levels
    loss = F.cross_entropy(logits.masked_fill(~own, -torch.inf), labels, reduction="none")
    other = logits.masked_fill(own, -torch.inf)
    pseudo = other.logsumexp(dim=1) - other.amax(dim=1)  # the label is the class of the largest logit
    return loss + torch.where(own.all(dim=1), 0.0, pseudo)


class PLFMS(CLIB):
    """Online learning of superclasses and classes: new classes are first sampled from a memory, then from the stream.

    Args:
        kwargs: Options of ``CLIB``; ``replay_size`` is the number of samples of a step, from the stream and the memory.
            ``released`` also leaves the pseudo-labels out. The loss is over all classes of the level of a label, so
            ``loss_classes`` is ``all``.
    """

    traits = Traits(
        family="online", paper="Lee et al., ICCV 2023, arXiv:2308.14374", keeps_exemplars=True, task_free=True
    )

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        one_of(self, ("all",), loss_classes=self.loss_classes)
        self.arrivals = FirstArrivals()

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.arrivals.grow(task.num_new)

    def prepare_batch(self, batch: Batch) -> Batch:
        if batch.first_pass:
            self.arrivals.note(all_gather_rows(batch.labels), int(self.memory.num_seen))
            self.offer(batch)
        joint = self.sample(batch)
        levels = self.data.levels()
        groups = None if levels is None else levels[joint.labels]
        return cutmix(joint, self.mix_probability, self.mix_alpha, groups=groups)

    def sample(self, batch: Batch) -> Batch:
        """The samples of a step, augmented: part ``stream``, some of which are replaced, and part ``replay``."""
        draw, device = batch.draw, batch.labels.device
        rows, _ = self.memory.pick(self.replay_size or 1, Draw(mix(draw.key, _REPLACE), 0, 1, 1))  # of all processes
        rows = rows.to(device)
        before = int(self.memory.num_seen) - draw.total
        numbers = torch.arange(before + draw.start, before + draw.stop, device=device)
        chance = self.arrivals.probability(batch.labels, numbers, self.length())
        accepted = draw.fork(_ACCEPT).rand(device=device) < chance
        places = rows[torch.arange(draw.total, device=device) % len(rows)]
        instead = self.memory.at(places[draw.start : draw.stop], draw)
        stream = {
            name: torch.where(accepted.view(-1, *[1] * (value.dim() - 1)), value, getattr(instead, name))
            for name in ("raw", "labels", "tasks", "indices")
            for value in (getattr(batch, name),)
        }
        parts = {"stream": batch.replace(**stream, images=stream["raw"], extra={})}
        rest = rows[draw.total :]
        share = Draw(mix(draw.key, _REST), rank(), rank() + 1, world_size()).share(len(rest))
        if len(rest):
            parts["replay"] = self.memory.at(rest[share.start : share.stop], share)
        replaced = ~all_gather_rows(accepted)
        self.memory.use(torch.cat([places, rest]), torch.cat([replaced, torch.ones_like(rest, dtype=torch.bool)]))
        return join({name: self.data.augment(part) for name, part in parts.items()})

    def length(self) -> int:
        """N: number of labelled samples of the stream."""
        stream = self.data.stream
        return sum(map(len, stream.train)) - sum(map(len, stream.unlabelled))

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": mixed_loss(partial(self.level_loss, output), batch)}

    def level_loss(self, output: Output, batch: Batch) -> Tensor:
        """Mean cross-entropy of each label among the classes of its level, a scalar, in nats."""
        logits = self.data.within_level(output.logits, batch.labels)
        return cross_entropy(logits, batch.labels, weights=self.data.weights_of(batch))

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        levels = self.data.levels()
        if levels is None:
            return super().loss_of(logits, labels)
        if self.memory.released:
            return super().loss_of(self.data.within_level(logits, labels), labels)
        return both_levels(logits, labels, levels[: logits.shape[1]])
