"""Experience Replay (Robins 1995; Chaudhry et al., "tiny episodic memories", 2019, arXiv:1902.10486).

A memory stores M raw samples. With B the batch of the stream and R samples drawn from the memory and augmented:

    L = mean of CE over B u R                ``reduction="joint"``
    L = CE(B) + CE(R), each a mean           ``reduction="sum"``; twice the gradient if both have the same size

With ``replay_by="step"``, R is drawn at each step, uniformly and without replacement. B is offered to the memory after
the step, without augmentation, so that no sample is replayed in its own first step. With several epochs, batches are
offered in the first epoch only: a reservoir then holds each sample of the stream with equal probability. With
accumulated gradients, a batch is offered after its own backward pass. With ``replay_by="loader"``, the memory is
shuffled among the data of the task, each sample once per epoch, and the data are offered to the memory when the task
ends.

``policy`` decides which samples the memory keeps, for example ``Reservoir`` (uniform over the stream) or
``ClassBalanced``.
"""

from typing import Any, Literal

from torch import Tensor

from cl_lightning.checks import one_of
from cl_lightning.data import TARGET_KINDS
from cl_lightning.memory import Memory
from cl_lightning.strategies.base import check_loss_classes
from cl_lightning.strategy import Batch, Output, Replay, Task, Traits


class ER(Replay):
    """Cross-entropy on the batch and on samples from a memory.

    Args:
        replay_by: ``step`` to draw from the memory at each step, ``loader`` to mix the memory with the task's data.
        reduction: ``joint`` for the mean over batch and replayed samples, ``sum`` for the sum of the two means.
        kwargs: Options of ``Replay``; with ``memory_size`` 0 the method is fine-tuning.
    """

    traits = Traits(
        family="rehearsal",
        paper="Chaudhry et al. 2019, arXiv:1902.10486",
        keeps_exemplars=True,
        task_free=True,
        targets=TARGET_KINDS,
    )

    def __init__(
        self,
        *,
        replay_by: Literal["step", "loader"] = "step",
        reduction: Literal["joint", "sum"] = "joint",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_loss_classes(self)
        one_of(self, ("step", "loader"), replay_by=replay_by)
        one_of(self, ("joint", "sum"), reduction=reduction)
        if replay_by == "loader" and (self.replay_size is not None or self.update_memory != "first"):
            raise ValueError(
                f"ER: replay_size={self.replay_size} and update_memory={self.update_memory!r} belong to replay_by="
                "'step'; leave them out, since the loader mixes in the whole memory, and the task's end feeds it"
            )
        self.replay_by, self.reduction = replay_by, reduction
        if replay_by == "loader" and reduction == "sum":  # separates the two by their labels
            self.traits = self.traits.but(targets=("class",))
        if replay_by == "loader":
            self.traits = self.traits.but(task_free=False)

    def prepare_batch(self, batch: Batch) -> Batch:
        return batch if self.replay_by == "loader" else super().prepare_batch(batch)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.reduction == "joint":
            return {"ce": self.classification_loss(output, batch)}
        if self.replay_by == "loader":
            replayed = batch.indices < 0
            labels = {"ce": batch.labels.masked_fill(replayed, -1), "replay": batch.labels.masked_fill(~replayed, -1)}
            return {name: self.classification_loss(output, batch.replace(labels=part)) for name, part in labels.items()}
        terms = {}
        for name, part in (("ce", "stream"), ("replay", "replay")):
            if part in batch.parts:
                samples, of_part, share = batch.part(part, output)
                terms[name] = share * self.classification_loss(of_part, samples)
        return terms

    def after_step(self, batch: Batch) -> None:
        if self.replay_by == "step":
            super().after_step(batch)

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        if self.replay_by == "loader":
            for batch in self.passes.batches():
                self.offer(batch)

    def replay_memory(self) -> Memory | None:
        return self.memory if self.replay_by == "loader" else None
