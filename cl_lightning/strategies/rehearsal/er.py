"""Experience Replay (Robins 1995; Chaudhry et al., "tiny episodic memories", 2019, arXiv:1902.10486).

A memory of M raw samples is kept. With B the batch of the stream and R samples drawn from the memory, newly augmented:

    L = mean of CE over B u R                ``reduction="joint"``
    L = CE(B) + CE(R), each a mean           ``reduction="sum"``; twice the step where both are equally large

``mix="step"`` draws R anew, uniformly and without replacement, at every step, and offers B to the memory after the
step, un-augmented, so that no sample is replayed in its own first step. In training over several epochs only the first
one feeds the memory: a reservoir then holds each sample of the stream with equal probability (feeding it in every epoch
would favour late ones). Where gradients are accumulated a batch is offered after its own backward pass.
``mix="loader"`` shuffles the memory among the data of the task, each sample once per epoch, and offers the data to it
when the task is over.

``policy`` says which samples stay: ``Reservoir`` (uniform over the stream) or ``ClassBalanced`` among others.
"""

from typing import Any, ClassVar, Literal

from torch import Tensor

from cl_lightning.batch import Batch, cat
from cl_lightning.memory import Memory, Policy, check_replay
from cl_lightning.network import Output
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.stream import Task


class ER(ContinualStrategy):
    """Cross-entropy on the task and on samples from a memory.

    Args:
        memory_size: M, in samples, over all processes; 0 is fine-tuning.
        policy: Which samples a full memory keeps; None for a reservoir.
        mix: Draw from the memory per ``step``, or let the ``loader`` mix it with the data of the task.
        replay_size: Samples drawn per step, over all processes; None for as many as the batch has.
        reduction: ``joint`` mean over batch and replay, or the ``sum`` of the two means.
        kwargs: Of the base.
    """

    family: ClassVar[str] = "rehearsal"
    paper: ClassVar[str] = "Chaudhry et al. 2019, arXiv:1902.10486"
    keeps_exemplars: ClassVar[bool] = True

    def __init__(
        self,
        *,
        memory_size: int = 500,
        policy: Policy | None = None,
        mix: Literal["step", "loader"] = "step",
        replay_size: int | None = None,
        reduction: Literal["joint", "sum"] = "joint",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_replay("ER", self.visible, replay_size)
        if mix not in ("step", "loader") or reduction not in ("joint", "sum"):
            raise ValueError(f"ER: mix={mix!r}, reduction={reduction!r}; use step or loader, and joint or sum")
        self.memory = Memory(memory_size, policy)
        self.mix, self.replay_size, self.reduction = mix, replay_size, reduction
        self._part_weights = {"ce": 1.0, "replay": 1.0}
        self.plain_first_task = mix == "loader"  # else the memory is replayed from the second step on
        self.ranks_agree = mix == "step" or reduction == "joint"  # else each process takes means over its own rows

    def prepare(self, batch: Batch) -> Batch:
        self._part_weights = {"ce": 1.0, "replay": 1.0}
        if self.mix == "loader" or len(self.memory) == 0:
            return batch
        assert self.augment is not None
        replay = self.memory.sample(self.replay_size or batch.draw.total, batch.draw)
        joint = cat([batch, self.augment(replay)], self.trainer.world_size)
        if len(joint):  # the base weighs by this process's share of all rows; the two means have shares of their own
            self._part_weights = {"ce": batch.weight / joint.weight, "replay": replay.weight / joint.weight}
        return joint

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.reduction == "joint":
            return {"ce": self.classification_loss(output, batch)}
        replayed = batch.indices < 0
        parts = {"ce": batch.labels.masked_fill(replayed, -1), "replay": batch.labels.masked_fill(~replayed, -1)}
        return {
            name: weight * self.classification_loss(output, batch.replace(labels=parts[name]))
            for name, weight in self._part_weights.items()
        }

    def observe(self, batch: Batch) -> None:
        if self.mix == "step" and self.first_sight:
            self._offer(batch)

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        if self.mix == "loader":
            for batch in self.statistics_batches():
                self._offer(batch)

    def rehearsal(self) -> Memory | None:
        return self.memory if self.mix == "loader" else None

    def _offer(self, batch: Batch) -> None:
        self.memory.add(batch.raw, batch.labels, batch.tasks, batch.draw)
