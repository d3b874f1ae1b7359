"""Alternate Experience Replay with Asymmetric Balanced Sampling, AER and ABS ("May the Forgetting Be with You:
Alternate Replay for Learning with Noisy Labels", 2024, arXiv:2408.14284), for streams with noisy labels.

With the loss of ER-ACE (see ``ERACE``), the epochs of a task alternate:

    forgetting epoch (0, 2, ...)        no replay; samples of the stream may enter the memory
    learning epoch (1, 3, ..., last)    replay, and nothing enters the memory; begins with the weights at the end of
                                        the previous learning epoch

Without replay the network forgets the wrong labels of the memory faster than the correct ones, so that the losses tell
them apart. Of a batch, the share 1 - alpha of the lowest loss is offered to a reservoir. If a full memory accepts a
sample, it evicts one, of the current task or of the earlier tasks in proportion to their numbers, and with l_i the loss
of a stored sample

    p(i | current task) = l_i / sum_j l_j                       correct labels stay
    p(i | earlier tasks) = (m - l_i) / sum_j (m - l_j),   m = max_j l_j      samples that are hard to learn stay

alpha -> drop_share; ``alternate=False`` has replay in all epochs. With equal losses a group is evicted uniformly. In
each step of either kind of epoch samples are drawn from the memory, and the losses that are stored with them are
replaced by their present losses. All losses are of the un-augmented image; for a batch they are over the
classes in the batch, of a stored sample over all classes.

The weights include the statistics of batch normalisation; the momentum of the optimizer is reset with them. The first
learning epoch of the run has no previous one, and continues the forgetting epoch before it. A phase of a single epoch
cannot alternate: it has replay and insertion together.
Departs from the authors' code: losses are computed in eval mode after the step, there in training mode before it, which
counts the drawn samples in the statistics of batch normalisation; an odd last epoch has replay, there none; l of the
current task is not shifted by its minimum; and a step draws all samples to be evicted at once, without replacement. The
training on the memory by MixMatch at the end of a task, an option of the authors, is not part of it.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Batch, Draw
from cl_lightning.checks import within
from cl_lightning.distributed import all_gather_together
from cl_lightning.losses import full_precision, masked_logits
from cl_lightning.memory import Teacher
from cl_lightning.models import in_eval_mode
from cl_lightning.strategies.base.replay import UpdateMemory
from cl_lightning.strategies.online.er_ace import ERACE
from cl_lightning.strategy import Phase, Traits

_ACCEPTED, _EVICTED = 0xAB5, 0xAB6  # salts of the draws of a step


def eviction_probabilities(losses: Tensor, current: Tensor) -> Tensor:
    """Probability of each stored sample to be the next one that is evicted.

    Args:
        losses: l, at least 0, ``(n,)``.
        current: Whether the sample is of the current task, bool ``(n,)``.

    Returns:
        float64 ``(n,)``; they sum to 1.
    """
    losses = losses.double()
    highest = losses.masked_fill(current, -math.inf).amax()
    weights = torch.where(current, losses, highest - losses)
    total = torch.where(current, torch.where(current, weights, 0.0).sum(), torch.where(current, 0.0, weights).sum())
    size = torch.where(current, current.sum(), (~current).sum())
    within_group = torch.where(total > 0, weights / total, 1.0 / size)
    return within_group * size / len(losses)


def remaining(probabilities: Tensor, count: int, draw: Draw) -> Tensor:
    """Rows that remain when ``count`` rows are drawn one after the other without replacement, int64, ascending.

    The smallest of exponential variables with rates p_i is i with probability p_i, and so on among the others.

    Args:
        probabilities: p, ``(n,)``.
        count: At most n.
        draw: Random numbers; only its key is used.
    """
    uniform = Draw.of(len(probabilities), draw.key, _EVICTED).rand().to(probabilities)
    times = (-torch.log1p(-uniform) / probabilities).nan_to_num(nan=math.inf, posinf=math.inf)
    return times.argsort(stable=True)[count:].sort().values


def accepted(count: int, seen: int, size: int, draw: Draw) -> Tensor:
    """Which of ``count`` arriving samples a full reservoir accepts, int64, ascending: the n-th one with size / n.

    Args:
        count: Number of arriving samples.
        seen: Number of samples before them.
        size: Size of the reservoir; not more than as many are accepted.
        draw: Random numbers; only its key is used.
    """
    number = seen + 1 + torch.arange(count)
    chance = Draw.of(count, draw.key, _ACCEPTED).rand()
    return (chance * number < size).nonzero().flatten()[:size]


class AERABS(ERACE):
    """Epochs with and without replay in turn, and a memory of samples of low loss, which are likely labelled correctly.

    Args:
        drop_share: alpha, share of the samples of a batch that are never offered to the memory, in [0, 1); at least one
            is offered.
        alternate: Whether epochs alternate; False for replay and insertion in all epochs.
        update_memory: Pass over the data in which samples are offered to the memory, as in ``Replay``: with
            ``alternate``, ``every`` forgetting epoch, or the ``first`` one.
        kwargs: Options of ``ERACE``, apart from ``policy``.
    """

    traits = Traits(family="rehearsal", paper="2024, arXiv:2408.14284", keeps_exemplars=True)

    def __init__(
        self,
        *,
        drop_share: float = 0.75,
        alternate: bool = True,
        update_memory: UpdateMemory = "every",
        **kwargs: Any,
    ) -> None:
        if kwargs.get("policy") is not None:
            raise ValueError("AERABS: policy is given, but the memory is chosen by losses; leave it out")
        super().__init__(update_memory=update_memory, **kwargs)
        within(self, "[0, 1)", drop_share=drop_share)
        if alternate and update_memory == "last":
            raise ValueError(
                "AERABS: update_memory is 'last', but nothing enters the memory in the last epoch; use 'first' or "
                "'every', or alternate=False"
            )
        self.drop_share, self.alternate = drop_share, alternate
        self.kept = Teacher(reference=True)  # the network after a learning epoch; empty except in forgetting epochs
        self._drawn: tuple[Tensor, Batch] | None = None

    @property
    def _alternates(self) -> bool:
        return self.alternate and self.phase.options.epochs != 1

    @property
    def _forgets(self) -> bool:
        """Whether this is a forgetting epoch."""
        last = self.epoch + 1 == self.phase.options.epochs
        return self._alternates and self.epoch % 2 == 0 and not last

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if batch_idx == 0:
            if not self._forgets:
                self._restore()
            elif self.epoch > 0 or not self.task.is_first:
                self.kept.learn_from(self.network)

    def end_phase(self, phase: Phase) -> None:
        super().end_phase(phase)
        self._restore()  # a callback may stop a phase in a forgetting epoch

    def _restore(self) -> None:
        if self.kept.network is not None:
            self.network.load_state_dict(self.kept.network.state_dict())
            self.kept.network = None
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()

    def draw(self, batch: Batch, *salt: int, tasks: Iterable[int] | None = None) -> Batch | None:
        self._drawn = None
        if len(self.memory) == 0:
            return None
        draw = batch.draw.fork(*salt) if salt else batch.draw
        rows, share = self.memory.pick(self.replay_size or batch.draw.total, draw, tasks=tasks)
        drawn = self.memory.at(rows, share)
        self._drawn = rows, drawn
        return drawn if share.total else None

    def replay(self, batch: Batch, *salt: int) -> Batch | None:
        if not self._forgets:
            return super().replay(batch, *salt)
        self.draw(batch, *salt)  # for new losses
        return None

    def after_step(self, batch: Batch) -> None:
        if self._drawn is not None:
            rows, drawn = self._drawn
            rows, losses = all_gather_together([rows, self.losses_of(drawn).to(rows.device)])
            self.memory.fields["losses"][rows] = losses
        if self._forgets or not self._alternates:
            super().after_step(batch)

    def losses_of(self, batch: Batch, present: Tensor | None = None) -> Tensor:
        """Cross-entropy of un-augmented samples in eval mode, float32 ``(B,)``, in nats.

        Args:
            batch: Samples with raw images.
            present: Classes of the softmax, bool ``(C,)``; None for all.
        """
        if not len(batch):
            return torch.zeros(0, device=self.device)
        with in_eval_mode(self.network), self.trainer.precision_plugin.forward_context():
            logits = self.network(self.data.finish(batch).images).logits
        logits = full_precision(logits)
        if present is not None:
            logits = masked_logits(logits, present)
        return F.cross_entropy(logits, batch.labels, reduction="none").float()

    def offer(self, batch: Batch, **extra: Tensor) -> None:
        if self.memory.size == 0:
            return
        losses = self.losses_of(batch, self._present)
        names = ("images", "labels", "tasks", "losses", *extra)
        own = (batch.raw, batch.labels, batch.tasks, losses, *extra.values())
        rows = dict(zip(names, all_gather_together(value.to(self.device) for value in own), strict=True))
        count = len(rows["losses"])
        offered = min(max(round((1 - self.drop_share) * count), 1), count)
        lowest = rows["losses"].argsort(stable=True)[:offered].sort().values
        free = min(self.memory.size - len(self.memory), offered)
        self._add(rows, lowest[:free], batch.draw)
        arrived = accepted(offered - free, int(self.memory.num_seen), self.memory.size, batch.draw)
        if len(arrived):
            current = self.memory.tasks == self.task.index
            probabilities = eviction_probabilities(self.memory.fields["losses"], current)
            self.memory.keep(remaining(probabilities, len(arrived), batch.draw))
            self._add(rows, lowest[free:][arrived.to(lowest.device)], batch.draw.fork(_ACCEPTED))
        self.memory.num_seen += offered - free - len(arrived)  # the rejected ones

    def _add(self, rows: dict[str, Tensor], chosen: Tensor, draw: Draw) -> None:
        if len(chosen):
            self.memory.add(**{name: value[chosen] for name, value in rows.items()}, draw=draw, gathered=True)
