"""Base classes of methods that replay stored samples, from a memory of the stream or from herded exemplar sets."""

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Batch, join
from cl_lightning.checks import at_least, one_of
from cl_lightning.data import TARGETS
from cl_lightning.data.balance import left_out
from cl_lightning.data.labels import training_labels
from cl_lightning.memory import (
    ClassBalanced,
    HerdingPolicy,
    Memory,
    Policy,
    Prototypes,
    SharedBudget,
    class_means,
    group_ids,
    herding_per_class,
    rank_in_group,
)
from cl_lightning.models import Output
from cl_lightning.strategies.base.strategy import ContinualStrategy
from cl_lightning.stream import Task

UpdateMemory = Literal["first", "last", "every"]


def check_loss_classes(strategy: ContinualStrategy) -> None:
    """Check that the classification loss of a method that replays earlier tasks covers the earlier classes.

    Raises:
        ValueError: If ``loss_classes`` is "current".
    """
    if strategy.loss_classes == "current":
        raise ValueError(
            f"{type(strategy).__name__}: loss_classes is 'current', but samples of earlier tasks are replayed; use "
            "'all' or 'task'"
        )


class MemoryReplay(ContinualStrategy):
    """Cross-entropy on the batch and on samples from a memory; its subclasses define how the memory is filled.

    In each step ``prepare_batch`` joins the batch, as part ``stream``, with samples drawn from the memory and
    augmented, as part ``replay``.

    Args:
        memory_size: M, in samples, over all processes, at least 0; 0 is no memory.
        policy: Policy that decides which samples a full memory keeps; None for a reservoir.
        replay_size: Number of samples drawn per step, over all processes, at least 1; None for the size of the batch.
        kwargs: Options of the base class.
    """

    def __init__(
        self,
        *,
        memory_size: int = 500,
        policy: Policy | None = None,
        replay_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        at_least(self, 1, replay_size=replay_size, optional=True)
        self.memory = Memory(memory_size, policy)
        self.replay_size = replay_size

    def draw(self, batch: Batch, *salt: int, tasks: Iterable[int] | None = None) -> Batch | None:
        """Draw samples from the memory, uniformly without replacement, without augmentation.

        Args:
            batch: Batch of the stream as it arrived for the step.
            salt: Distinguishes several draws of one step.
            tasks: Task indices to draw from; None for all.

        Returns:
            Batch of samples; None if the memory has none.
        """
        if len(self.memory) == 0:
            return None
        count = self.replay_size or batch.draw.total
        drawn = self.memory.sample(count, batch.draw.fork(*salt) if salt else batch.draw, tasks=tasks)
        return drawn if drawn.draw.total else None

    def replay(self, batch: Batch, *salt: int) -> Batch | None:
        """Draw samples from the memory as :meth:`draw`, and augment them."""
        drawn = self.draw(batch, *salt)
        return None if drawn is None else self.data.augment(drawn)

    def prepare_batch(self, batch: Batch) -> Batch:
        return join({"stream": batch, "replay": self.replay(batch)})

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}

    def offer(self, batch: Batch, **extra: Tensor) -> None:
        """Offer the raw samples of a batch to the memory; its policy decides which ones it keeps.

        Args:
            batch: Batch of the stream, as it arrived.
            extra: Additional tensors with one row per sample, stored with the samples.
        """
        if TARGETS in batch.extra:
            extra = {**extra, TARGETS: batch.extra[TARGETS]}
        self.memory.add(batch.raw, batch.labels, batch.tasks, batch.draw, gathered=False, **extra)


class Replay(MemoryReplay):
    """Cross-entropy on the batch and on samples from a memory; the base of methods that replay a memory of the stream.

    The memory is empty at the first step. After each step the batch of the stream is offered to the memory, without
    augmentation. In each step ``prepare_batch`` joins the batch, as part ``stream``, with samples drawn from the memory
    and augmented, as part ``replay``.

    Args:
        update_memory: Pass over the data of a phase in which batches are offered to the memory. A reservoir that is
            updated in the ``first`` or in the ``last`` pass holds each sample of the stream with equal probability. If
            it is updated in ``every`` pass, each copy of a sample counts as a separate sample.
        kwargs: Options of ``MemoryReplay``: ``memory_size``, ``policy``, ``replay_size``.
    """

    def __init__(self, *, update_memory: UpdateMemory = "first", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        one_of(self, get_args(UpdateMemory), update_memory=update_memory)
        self.update_memory: UpdateMemory = update_memory
        by_task = self.loss_classes == "task" or getattr(self.memory.policy, "by", "class") != "class"
        self.traits = self.traits.but(task_free=self.traits.task_free and not by_task)

    def after_step(self, batch: Batch) -> None:
        if {"first": batch.first_pass, "last": batch.last_pass, "every": True}[self.update_memory]:
            self.offer(batch)


class TaskEndReplay(MemoryReplay):
    """Replay of samples that are stored when their task ends, with their logits; the base of FDR and X-DER.

    The memory has equal numbers of samples of each task so far, chosen at random, and their raw images. The logits are
    computed on the un-augmented images, in eval mode.

    Args:
        policy: Policy that decides which samples a full memory keeps; None for equal numbers of each task.
        kwargs: Options of ``MemoryReplay``: ``memory_size``, ``replay_size``.
    """

    def __init__(self, *, policy: Policy | None = None, **kwargs: Any) -> None:
        super().__init__(policy=policy or ClassBalanced(by="task"), **kwargs)

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        super().end_task(task)
        for batch in self.passes.batches():
            self.offer(batch, logits=self.targets(batch))

    def targets(self, batch: Batch) -> Tensor:
        """Logits to be stored for the samples of a batch, ``(B, columns)``; without samples ``(0, columns)``."""
        if not len(batch):
            return torch.zeros(0, self.network.head.num_columns, device=self.device)
        with self.trainer.precision_plugin.forward_context():
            logits: Tensor = self.network(batch.images).logits.float()
        return logits


class ExemplarReplay(ContinualStrategy):
    """Training on the task together with herded exemplars of earlier classes; the base of iCaRL, BiC, WA and FOSTER.

    The loader shuffles the exemplars among the samples of the task. A memory of K samples holds
    ``K // number of lists`` exemplars in the list of each class: 20 exemplars of each of 100 classes with K = 2000.
    When a task ends, the lists of earlier classes are shortened, and the exemplars of the new classes are chosen by
    herding (Rebuffi et al., iCaRL, CVPR 2017, arXiv:1611.07725, alg. 4 and 5). A class that occurs in several tasks has
    one list per task.

    Args:
        memory_size: K, in samples, over all classes and processes, at least 0.
        exemplars_per_class: Largest number of exemplars in a list, at least 1; None for no limit but K. Many papers
            have 20 of each class from the first task on: with 100 classes that is ``memory_size=2000`` and 20 here.
        budget: Schedule by which exemplars and new data share a storage (RMM); None for K exemplars and all new data.
        kwargs: Options of the base class.
    """

    def __init__(
        self,
        *,
        memory_size: int = 2000,
        exemplars_per_class: int | None = None,
        budget: SharedBudget | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_loss_classes(self)
        at_least(self, 1, exemplars_per_class=exemplars_per_class, optional=True)
        self.memory = Memory(memory_size, HerdingPolicy(by="both"))
        self.exemplars_per_class, self.budget, self._least_size = exemplars_per_class, budget, memory_size
        if budget is not None:
            self.traits = self.traits.but(left_out=(0.0, *budget.memory_rates))

    def replay_memory(self) -> Memory | None:
        return self.memory

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.choose_exemplars()

    @torch.no_grad()
    def choose_exemplars(self) -> None:
        """Shorten the present lists, and choose exemplars of the classes of the task by herding.

        Herding uses features of un-augmented images, from the network in eval mode, each divided by its norm. The
        features are gathered from all processes in the order of the data set, so that every process chooses the same
        samples. Only the images of the chosen samples are loaded again. A memory that is too small for one sample per
        list keeps the samples of the earliest lists.
        """
        if self.budget is not None:
            self.memory.resize(self._least_size + self._left_out_next())
        if self.memory.size == 0:
            return
        features, labels, indices = self.passes.all_indexed_features()
        held = group_ids(self.memory.labels, self.memory.tasks, "both").to(labels.device)
        new = group_ids(labels, torch.full_like(labels, self.task.index), "both")
        lists = torch.cat([held, new]).unique()  # type: ignore[no-untyped-call]
        quota = max(self.memory.size // max(len(lists), 1), 1)
        quota = min(quota, self.exemplars_per_class or quota)
        self.memory.reduce_per_class(quota, by="both")
        if self.budget is None:
            chosen = indices[herding_per_class(features, labels, quota)]
        else:
            chosen = indices[self._herded_by_loss(self.budget, features, labels, quota)]
        # Each batch is split into contiguous shares, which are gathered in order: lists keep the order of choice.
        for batch in self.passes.batches(indices=chosen.cpu()):
            self.memory.add(batch.raw, batch.labels, batch.tasks, batch.draw)

    def _left_out_next(self) -> int:
        """Number of samples that the next task of the stream leaves out, so that its memory is larger by as many."""
        module, task = self.data.module, self.task.index + 1
        if task == len(module.stream.train):
            return 0
        labels = torch.as_tensor(training_labels(module))[torch.as_tensor(module.stream.train[task].copy())]
        share: float = self.traits.data_options(task)["left_out"]
        return int(left_out(labels, share, 0).sum())

    def _herded_by_loss(self, budget: SharedBudget, features: Tensor, labels: Tensor, mean: int) -> Tensor:
        """Rows of herded samples of each class of the task, more of the classes of smaller loss."""
        classes, places = labels.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        each = F.cross_entropy(self.network.head.classify(features).double(), labels, reduction="none")
        losses = class_means(each[:, None], places, len(classes), reduce=False)[:, 0]
        quotas = budget.quotas(losses, mean, self.task.index)
        rows = herding_per_class(features, labels, int(quotas.max()))
        level, _ = rank_in_group(-torch.arange(len(rows), device=rows.device), places[rows])
        return rows[level < quotas.to(rows.device)[places[rows]]]

    def measure_exemplar_means(self, means: Prototypes) -> None:
        """Compute the mean of the normalised features of each class's exemplars (iCaRL, alg. 1).

        Args:
            means: Prototypes whose means are replaced. The means are not normalised; scores by cosine normalise them.
        """
        features, labels = self.passes.features(memory=self.memory)
        means.update(F.normalize(features, dim=1), labels, num_classes=self.network.head.num_columns, replace=True)
