"""CLPU-DER++: Continual Learning and Private Unlearning (Liu et al., CoLLAs 2022, arXiv:2203.12817).

A main network m learns the tasks that are remembered permanently, and each task k that is held has a network f_k of its
own, so that it can be forgotten. Each task s keeps a reservoir D_s of samples x with the logits z' of the time at which
they were stored; it is filled during the training of the task, with each batch of each epoch. With the n tasks that m
remembers already, and losses over the classes of the task of each sample,

    learn     L = CE(m(x), y) + 1/n sum_s [ alpha * mean_c (m_c(x_s) - z'_c)^2 + beta * CE(m(x_s), y_s) ]
    hold      L = CE(f_k(x), y),    f_k new, or a copy of m
    keep k    L = beta * CE(m(x_k), y_k) + alpha * mean_c (m_c(x_k) - z'_c)^2 + 1/n sum_s [...],    x_k from D_k;
              f_k is dropped
    forget k  f_k and D_k are dropped, and no step is taken

x_s are ``replay_size // n`` samples of D_s, and x_k ``replay_size`` of D_k. Forgetting is exact, since m never learns
from a task that is held. A task is predicted by f_k while it is held, and by m otherwise. alpha -> logit_weight,
beta -> label_weight; ``copy_main`` is the authors' option use_pretrain.

Our choices: f_k is new by default. The squared error is a mean over the classes of the task. A request to keep takes as
many steps as its tasks take to be learnt; its loader only counts them. Rows of the head for a task that is kept or
forgotten start again at their initial values, which are drawn by seed and task. A request to keep several tasks takes
the mean over them. Images from a reservoir are augmented anew, as in ``DERpp``.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import join
from cl_lightning.checks import at_least
from cl_lightning.losses import cross_entropy, full_precision, masked_logits, mean_over_rows
from cl_lightning.memory import TaskMemories
from cl_lightning.models import MAIN
from cl_lightning.strategies.base import BY_TASK, routed
from cl_lightning.strategies.unlearning.separate import SeparateNetworks
from cl_lightning.strategy import Batch, Output, Phase, Task, Traits

_REPLAY = 0xC1B0  # salt of the draws from the reservoirs
_MASKED = -1e11  # score of the classes of other tasks, as in the paper


class CLPUDERpp(SeparateNetworks):
    """DER++ on the tasks that are remembered, and a separate network for each task that may be forgotten.

    Args:
        memory_size: Size of the reservoir of each task, in samples, at least 0.
        logit_weight: alpha, at least 0.
        label_weight: beta, at least 0.
        replay_size: Samples drawn per step from all reservoirs together, at least 1.
        copy_main: Whether the network of a held task starts as a copy of the main network.
        kwargs: Options of the base class; the head is a ``TaskHead``.
    """

    traits = Traits(
        family="unlearning",
        paper="Liu et al., CoLLAs 2022, arXiv:2203.12817",
        task_ids="needed",
        keeps_exemplars=True,
        scenarios=BY_TASK,
    )
    forgets = "tasks"
    forgets_held = True
    is_exact = True

    def __init__(
        self,
        *,
        memory_size: int = 200,
        logit_weight: float = 0.5,
        label_weight: float = 1.0,
        replay_size: int = 32,
        copy_main: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        at_least(self, 0, memory_size=memory_size, logit_weight=logit_weight, label_weight=label_weight)
        at_least(self, 1, replay_size=replay_size)
        self.logit_weight, self.label_weight = logit_weight, label_weight
        self.replay_size, self.copy_main = replay_size, copy_main
        self.memories = TaskMemories(memory_size)
        self._logits: Tensor | None = None

    # ------------------------------------------------------------------ requests

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if task.learns:
            self.memories.add(task.index)
        if task.request == "hold":
            self.add_backbone(task.index)
            if self.copy_main:
                self.nets.nets[str(task.index)].load_state_dict(self.nets.nets[MAIN].state_dict())
        for asked in self._asked(task):
            self.nets.remove(str(asked))
            self.reset_rows(asked)
            if task.request == "forget":
                self.memories.drop(asked)

    def _asked(self, task: Task) -> list[int]:
        """Held tasks that a request asks to keep or to forget."""
        stream = self.data.stream
        if task.learns:
            return []
        held = [earlier.index for earlier in stream.tasks[: task.index] if earlier.request == "hold"]
        return [index for index in held if np.isin(stream.train[index], stream.train[task.index]).any()]

    def _remembered(self) -> list[int]:
        """Earlier tasks that the main network has learnt, without those that the current request asks for."""
        if not (self.logit_weight or self.label_weight):
            return []
        others = {self.task.index, *self._asked(self.task)}
        return [t for t in self.memories.tasks() if self.nets.name_of(t) == MAIN and t not in others]

    def phases(self, task: Task) -> list[Phase]:
        if task.request == "keep" and self.memories.size == 0:
            raise ValueError(
                f"CLPUDERpp: memory_size is 0, and task {task.index} ({task.name}) is learnt from the memory; give at "
                "least 1"
            )
        return [] if task.request == "forget" else [Phase()]

    def trainable(self) -> Iterable[nn.Parameter]:
        yield from self.nets.nets[self.nets.name_of(self.task.index)].parameters()
        learning = [self.task.index] if self.task.learns else self._asked(self.task)
        for index in learning + ([] if self.task.request == "hold" else self._remembered()):
            yield from self.rows.blocks[self.block_of(index)].parameters()

    # ------------------------------------------------------------------ a step

    def prepare_batch(self, batch: Batch) -> Batch:
        self._logits = None
        if self.task.request == "hold":
            return join({"stream": batch})
        past, asked = self._remembered(), self._asked(self.task)
        parts: dict[str, Batch | None] = {"stream": batch if self.task.learns else None}
        for tasks, count in ((asked, self.replay_size), (past, max(self.replay_size // max(len(past), 1), 1))):
            for index in tasks:
                drawn = self.memories[index].sample(count, batch.draw.fork(_REPLAY, index))
                parts[str(index)] = self._widened(self.data.augment(drawn))
        return join(parts)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        if "stream" in batch.parts:
            samples, of_part, share = batch.part("stream", output)
            terms["ce"] = share * self.classification_loss(of_part, samples)
            self._logits = of_part.logits.detach().float() * self.task_columns[self.task.index]
        asked = [index for index in self._asked(self.task) if str(index) in batch.parts]
        past = [int(name) for name in batch.parts if name != "stream" and int(name) not in asked]
        for group in (asked, past):
            for index in group:
                for name, value in self._replayed(index, batch, output).items():
                    terms[name] = terms.get(name, torch.zeros_like(value)) + value / len(group)
        return terms

    def _widened(self, batch: Batch) -> Batch:
        """The batch with stored logits of all columns; those of later classes are 0, as of other tasks."""
        stored = batch.extra["logits"]
        wide = F.pad(stored, (0, self.network.head.num_columns - stored.shape[1]))
        return batch.replace(extra={**batch.extra, "logits": wide})

    def _replayed(self, task: int, batch: Batch, output: Output) -> dict[str, Tensor]:
        """The two terms of samples of the reservoir of a task."""
        samples, of_part, share = batch.part(str(task), output)
        own = self.task_columns[task]  # (C,)
        with routed(self.rows, task):
            logits = self.rows(of_part.features)  # (B, C)
        errors = ((full_precision(logits) - samples.extra["logits"]).square() * own).sum(dim=1) / own.sum()
        return {
            "replay": self.label_weight * share * cross_entropy(masked_logits(logits, own), samples.labels),
            "dark": self.logit_weight * share * mean_over_rows(errors),
        }

    def predict_task(self, images: Tensor, task: int) -> Tensor:
        return super().predict_task(images, task).float().masked_fill(~self.task_columns[task], _MASKED)

    def after_step(self, batch: Batch) -> None:
        if not self.task.learns:
            return
        logits = self._logits
        if logits is None:  # this process has no rows in this step, but takes part in the exchange of rows
            logits = torch.zeros(0, self.network.head.num_columns, device=self.device)
        memory = self.memories[self.task.index]
        memory.add(batch.raw, batch.labels, batch.tasks, batch.draw, gathered=False, logits=logits)
