"""Gradient-based Sample Selection, GSS (Aljundi et al., NeurIPS 2019, arXiv:1903.08671), the greedy variant, on
Experience Replay.

The memory keeps samples whose gradients point in different directions. With g_x the gradient of the loss of a sample,
g_B of the mean loss of the batch B, and g_k, k = 1..n, the gradients of the mean losses of n disjoint groups of samples
drawn from the memory, each stored sample i has a score, how redundant it was when it arrived,

    c_x = max_k cos(g_x, g_k)                                    c_x = initial_score while the memory is empty

As long as the memory has room, samples fill it. A full memory takes samples of a batch only if max_k cos(g_B, g_k) < 0.
Then it draws as many of its samples as the batch has, without replacement, with probabilities proportional to
c_i - min c, pairs them with the samples of the batch, and replaces i by x, and c_i by c_x, with probability

    (c_i + 1) / ((c_i + 1) + (c_x + 1))

Scores of stored samples are not computed again. n -> groups: n is at most ``groups``, and so small that the memory has
n groups of ``group_size`` samples, but at least 1. Gradients are of the classification loss, with respect to all
trained weights, of images without augmentation, in eval mode, after the step on the batch. The method needs no task
ids. The authors' code takes a step on the batch and then one on the samples of the memory; here both are one step, as
in ``ER``. Choices that the paper leaves open: the samples of the batch that exceed the last free room are dropped, and
so are samples that exceed the number of slots; with equal scores slots are drawn uniformly; the cosine with a gradient
of 0 is 0.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F

from cl_lightning.batch import Batch, Draw
from cl_lightning.checks import at_least, within
from cl_lightning.distributed import all_gather_rows, all_gather_together, all_sum
from cl_lightning.losses import full_precision
from cl_lightning.memory import SlotMemory
from cl_lightning.models import in_eval_mode
from cl_lightning.strategies.base import output_at, trained_weights
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.strategy import Traits

_GROUPS, _SLOTS, _ACCEPT = 0x651, 0x652, 0x653  # salts of the draws of groups, of slots and of their replacement
_NUMBERS = 2**28  # of per-sample gradients at a time, 1 GiB in float32


def candidate_slots(scores: Tensor, count: int, draw: Draw) -> Tensor:
    """Draw slots without replacement, with probabilities proportional to their scores above the smallest score.

        p_i ~ c_i - min c;   uniform if all scores are equal

    A slot of the smallest score is drawn only after all others. The draw takes the slots that finish first in a race of
    exponential times of rates p_i, which needs no synchronisation with a GPU.

    Args:
        scores: c, ``(M,)``.
        count: Number of slots, at most M.
        draw: Random numbers; only its key is used.

    Returns:
        Slots in the order of the draw, int64 ``(count,)``.
    """
    rates = (scores - scores.min()).double().clamp(min=1e-12)
    times = -torch.log1p(-Draw.of(len(scores), draw.key, _SLOTS).rand().to(scores.device).double())
    return (times / rates).argsort(stable=True)[:count]


def replacement_probability(held: Tensor, new: Tensor) -> Tensor:
    """Probability that a new sample replaces a held one, ``(c_i + 1) / ((c_i + 1) + (c_x + 1))``; 1/2 if both are -1.

    Args:
        held: c_i, scores of the held samples, in [-1, 1], ``(n,)``.
        new: c_x, scores of the new samples, in [-1, 1], ``(n,)``.
    """
    total = held + new + 2
    return torch.where(total > 0, (held + 1) / total, 0.5)


class GSS(ER):
    """Replay of a memory whose samples have gradients in different directions.

    Args:
        groups: Largest n, at least 1.
        group_size: Number of samples of each group, at least 1; None for the size of the batch.
        initial_score: c of the samples that arrive at an empty memory, in [-1, 1].
        kwargs: Options of ``ER``, apart from ``replay_by`` and ``policy``.
    """

    traits = Traits(
        family="online", paper="Aljundi et al., NeurIPS 2019, arXiv:1903.08671", keeps_exemplars=True, task_free=True
    )
    memory: SlotMemory

    def __init__(
        self,
        *,
        memory_size: int = 500,
        groups: int = 10,
        group_size: int | None = None,
        initial_score: float = 0.1,
        reduction: Literal["joint", "sum"] = "joint",
        **kwargs: Any,
    ) -> None:
        if kwargs.get("replay_by", "step") != "step":
            raise ValueError("GSS: replay_by is 'loader', but the memory is filled by steps; use 'step'")
        if (policy := kwargs.get("policy")) is not None:
            name = type(policy).__name__
            raise ValueError(f"GSS: policy is {name}, but gradients decide what the memory keeps; leave it out")
        super().__init__(memory_size=memory_size, reduction=reduction, **kwargs)
        at_least(self, 1, groups=groups)
        at_least(self, 1, group_size=group_size, optional=True)
        within(self, "[-1, 1]", initial_score=initial_score)
        self.memory = SlotMemory(memory_size)
        self.groups, self.group_size, self.initial_score = groups, group_size, initial_score

    def offer(self, batch: Batch, **extra: Tensor) -> None:
        if self.memory.size == 0:
            return
        held, room = len(self.memory), self.memory.size - len(self.memory)
        scores, opposed = torch.full((len(batch),), self.initial_score, device=self.device), None
        if held:
            with in_eval_mode(self.network):
                scores, largest = self.compare(batch, self.references(batch))
            opposed = largest < 0
        kept = slice(room or held)
        gathered = all_gather_together([batch.raw, batch.labels, batch.tasks, scores])
        images, labels, tasks, scores = (value[kept] for value in gathered)
        if room:
            self.memory.add(images, labels, tasks, batch.draw, gathered=True, score=scores)
            return
        assert opposed is not None
        slots = candidate_slots(self.memory.fields["score"], len(labels), batch.draw)
        chance = replacement_probability(self.memory.fields["score"][slots], scores)
        chosen = Draw.of(len(slots), batch.draw.key, _ACCEPT).rand().to(chance.device) < chance
        self.memory.exchange(slots, chosen & opposed, images, labels, tasks, batch.draw, score=scores)

    def references(self, batch: Batch) -> Tensor:
        """Directions of the gradients of groups of samples of the memory, ``(n, P)``, the same on every process."""
        size = min(self.group_size or batch.draw.total, len(self.memory))
        count = min(self.groups, len(self.memory) // size)
        order = torch.randperm(len(self.memory), generator=batch.draw.fork(_GROUPS).generator())
        share = batch.draw.share(count, _GROUPS)  # each process computes some of the groups
        rows = order[: count * size].view(count, size)[share.start : share.stop].to(self.device)
        samples = self.data.finish(self.memory.at(rows.flatten(), Draw.of(rows.numel(), share.key)))
        own = [F.normalize(part, dim=1) for part in self.gradients(samples, size)]
        return all_gather_rows(torch.cat([torch.zeros(0, self._num_weights(), device=self.device), *own]))

    def compare(self, batch: Batch, references: Tensor) -> tuple[Tensor, Tensor]:
        """Largest cosines of gradients with the references: of each sample, and of the mean over the batch.

        Args:
            batch: This process's rows of the batch.
            references: Unit vectors, ``(n, P)``, the same on every process.

        Returns:
            c of each sample, ``(B,)``, and a scalar that is the same on every process.
        """
        scores, total = [references.new_zeros(0)], references.new_zeros(references.shape[1])
        for gradients in self.gradients(self.data.finish(batch), 1):
            scores.append((F.normalize(gradients, dim=1) @ references.T).amax(dim=1))
            total += gradients.sum(dim=0)
        agreement = (references @ F.normalize(all_sum(total), dim=0)).amax()
        return torch.cat(scores).clamp(-1, 1), agreement

    def gradients(self, samples: Batch, size: int) -> Iterator[Tensor]:
        """Gradients of the mean losses of groups of ``size`` successive samples, in parts ``(g, P)``."""
        network = self.network
        weights = {name: value.detach() for name, value in trained_weights(network).items()}

        def loss(at: dict[str, Tensor], images: Tensor, labels: Tensor, tasks: Tensor) -> Tensor:
            group = samples.replace(images=images, labels=labels, tasks=tasks)
            return self.classification_loss(output_at(network, at, images), group)

        def of_group(images: Tensor, labels: Tensor, tasks: Tensor) -> Tensor:
            found = grad(loss)(weights, images, labels, tasks)
            return torch.cat([gradient.flatten() for gradient in found.values()])

        count, number = len(samples) // size, max(1, _NUMBERS // self._num_weights())
        rows = (samples.images, samples.labels, samples.tasks)
        grouped = [value.reshape(count, size, *value.shape[1:]) for value in rows]
        for start in range(0, count, number):
            yield full_precision(vmap(of_group)(*(value[start : start + number] for value in grouped)))

    def _num_weights(self) -> int:
        return sum(value.numel() for value in trained_weights(self.network).values())
