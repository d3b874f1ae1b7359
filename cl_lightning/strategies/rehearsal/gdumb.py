"""GDumb: "A Simple Approach that Questions Our Progress in Continual Learning" (Prabhu, Torr & Dokania, ECCV 2020).

Nothing is learnt from the stream itself: a memory of M samples is filled greedily, and for each evaluation a new
network is trained from scratch on the memory alone. What other methods gain over it, they gain from the stream.

    greedy balancing (alg. 1): a sample of class y is stored if y is new or has fewer than M // (number of classes)
    samples in memory; a full memory first drops a random sample of its largest class

The training is cross-entropy with CutMix (``cutmix``), whose probability p is ``mix_probability`` and whose alpha is
``mix_alpha``, by SGD with momentum and a learning rate with warm restarts (``WarmRestarts``). A class that is not in
the memory is never predicted.
The samples of a task arrive in a random order, drawn by seed and task. The memory that a task leaves follows from the
labels alone, so it is known when the training begins: one phase, ``memory``, trains on it. The other image of a mixture
is the previous one of the shuffled batch. The authors' code gives each class M // (number of classes of all tasks)
samples, and trains once. The network is in the checkpoint until the next task replaces its weights.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl_lightning.batch import Batch, mix
from cl_lightning.checks import above, at_least, within
from cl_lightning.data import cutmix, mixed_loss
from cl_lightning.memory import HerdingPolicy, Memory
from cl_lightning.strategies.base import check_loss_classes
from cl_lightning.strategies.base.schedules import WarmRestarts
from cl_lightning.strategy import ContinualStrategy, Output, Phase, PhaseOptions, Task, Traits

_OPTIONS = PhaseOptions(epochs=256)
_ORDER = 0x6D1


def greedy_balanced(held: Tensor, arriving: Tensor, size: int, key: int) -> tuple[Tensor, Tensor]:
    """Greedy balancing of a memory: the samples that it holds after a sequence of samples has arrived.

    Args:
        held: Labels of the samples in the memory, int64 ``(h,)``, h at most ``size``.
        arriving: Labels of the arriving samples in their order, int64 ``(n,)``.
        size: M, at least 1.
        key: Key of the random numbers that choose the dropped samples.

    Returns:
        Masks of the samples that the memory holds in the end, bool ``(h,)`` and ``(n,)``, on the CPU.
    """
    random = np.random.default_rng(key)
    members: dict[int, list[int]] = {}  # places of the samples of each class, the held ones first
    for place, label in enumerate(held.tolist()):
        members.setdefault(label, []).append(place)
    total = len(held)
    for place, label in enumerate(arriving.tolist(), start=len(held)):
        own = members.setdefault(label, [])
        if own and len(own) >= size // len(members):
            continue
        if total == size:
            largest = max(members.values(), key=len)
            largest.pop(int(random.integers(len(largest))))
            total -= 1
        own.append(place)
        total += 1
    kept = torch.zeros(len(held) + len(arriving), dtype=torch.bool)
    kept[[place for places in members.values() for place in places]] = True
    return kept[: len(held)], kept[len(held) :]


class GDumb(ContinualStrategy):
    """A greedily balanced memory, and a new network for each task that is trained on the memory alone.

    Args:
        memory_size: M, in samples, over all processes, at least 1.
        mix_probability: p, probability of CutMix in a step, in [0, 1].
        mix_alpha: alpha, above 0.
        memory_options: Options of the training on the memory, 256 epochs in the paper; None for their optimizer is SGD
            with learning rate 0.05, momentum 0.9 and weight decay 1e-6, with ``WarmRestarts``.
        kwargs: Options of the base class.
    """

    traits = Traits(family="rehearsal", paper="Prabhu et al., ECCV 2020", keeps_exemplars=True)

    def __init__(
        self,
        *,
        memory_size: int = 500,
        mix_probability: float = 0.5,
        mix_alpha: float = 1.0,
        memory_options: PhaseOptions = _OPTIONS,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_loss_classes(self)
        at_least(self, 1, memory_size=memory_size)
        within(self, "[0, 1]", mix_probability=mix_probability)
        above(self, 0, mix_alpha=mix_alpha)
        at_least(self, 1, **{"memory_options.epochs": memory_options.epochs}, optional=True)
        self.mix_probability, self.mix_alpha = mix_probability, mix_alpha
        sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-6)
        self.memory_options = memory_options.filled(sgd, WarmRestarts)
        self.memory = Memory(memory_size, HerdingPolicy(by="both"))

    def replay_memory(self) -> Memory | None:
        return self.memory

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self._draw_weights()

    @torch.no_grad()
    def _draw_weights(self) -> None:
        """Replace all weights and statistics of the network by new initial ones; parameters stay the same objects."""
        assert self.image_shape is not None
        network = self.network
        fresh = self.build_head(network.head.num_features)
        for size in network.head.block_sizes():
            fresh.grow(size)
        for module, other in ((network.backbone, self.build_backbone(self.image_shape)), (network.head, fresh)):
            module.load_state_dict(other.state_dict())

    def phases(self, task: Task) -> list[Phase]:
        return [Phase("memory", self.memory_options, samples=self._samples, on_memory=True)]

    def _samples(self, labels: Tensor, replayed: Tensor) -> Tensor:
        held, new = self._balance(labels[~replayed])
        return torch.cat([new, held])

    def _balance(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Masks of the samples of the memory, and of the task, that the memory holds when the task is over."""
        key = mix(self.seed, _ORDER, self.task.index)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(key))
        held, arrived = greedy_balanced(self.memory.labels, labels[order], self.memory.size, key)
        return held, torch.empty_like(arrived).index_copy_(0, order, arrived)

    def prepare_batch(self, batch: Batch) -> Batch:
        return cutmix(batch, self.mix_probability, self.mix_alpha)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": mixed_loss(partial(self.classification_loss, output), batch)}

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        super().end_task(task)
        held: list[Tensor] = []

        def where(labels: Tensor, replayed: Tensor) -> Tensor:
            kept, new = self._balance(labels[~replayed])
            held.append(kept)
            return new

        chosen = [(batch.raw, batch.labels, batch.tasks, batch.draw) for batch in self.passes.batches(where=where)]
        self.memory.keep(held[0].nonzero().flatten().to(self.memory.labels.device))
        for part in chosen:
            self.memory.add(*part)

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        scores = self.network.classify(images)
        stored = self.memory.counts(scores.shape[1]) > 0
        over = self.memory.tasks.max() == len(self.task_columns) - 1 if len(self.memory) else torch.tensor(False)
        # While a task is trained, its classes are not in the memory yet.
        return scores.masked_fill(~stored & over.to(stored.device), -torch.inf)
