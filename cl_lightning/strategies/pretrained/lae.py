"""LAE: Learning, Accumulation, Ensemble (Gao et al., ICCV 2023, arXiv:2303.10070).

A few parameters in a frozen pretrained backbone are there twice, online and offline:

    learning       CE(W f(x; online), y over the classes of the task) trains online and the head; in each task but the
                   first, a phase ``head`` that trains the head alone comes before
    accumulation   after each optimizer step   offline <- momentum offline + (1 - momentum) online,   from the second
                   task on, which begins with offline = online
    ensemble       score_c(x) = max( softmax(W f(x; online))_c, softmax(W f(x; offline))_c )

over all classes seen so far; the head is one. What is put in is, by default, an adapter beside the attention of the
first five blocks; LoRA on keys and values (rank 5, ``learn_scale``, ``parts: kv``) and prefixes (length 10,
``compensate``) are the others of the paper. Scores are given as logarithms. With one task there is one expert.
The share of online in offline is 1 - momentum^steps after so many steps: with the paper's momentum of 0.9999 and 1,000
steps a task, 10 % a task. Where a task has fewer steps, choose a smaller one.
Departs from the code, where the head alone is trained in the first of a task's epochs by an optimizer that goes on to
the rest: here that is a phase of ``freeze_epochs`` with an optimizer of its own, and those of the Trainer follow. So 3
of 5 epochs are ``freeze_epochs=3``, ``trainer.max_epochs=2`` and ``loop.first_task_epochs=5``. A stream in which each
image is seen once has no room for it: give 0.
"""

import functools
from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from cl_lightning.batch import Batch
from cl_lightning.heads import LinearHead
from cl_lightning.network import Output
from cl_lightning.peft import SSF, Adapter, PeftFactory, PeftPair
from cl_lightning.strategy import ContinualStrategy, HeadFactory, Phase
from cl_lightning.stream import Task


class LAE(ContinualStrategy):
    """Two sets of a few parameters in a frozen backbone, a fast and a slow one, that predict together.

    Args:
        peft: What is put into the backbone, built for it; None for an adapter beside the attention of blocks 0 to 4,
            with 5 units and a scale that is learnt.
        momentum: In [0, 1].
        freeze_epochs: Epochs of the phase ``head``; 0 to leave it out.
        head: Builds the head; None for ``LinearHead`` with rows that begin at a standard deviation of 0.001.
        kwargs: Of the base.
    """

    family: ClassVar[str] = "pretrained"
    paper: ClassVar[str] = "Gao et al., ICCV 2023, arXiv:2303.10070"
    needs_pretrained: ClassVar[bool] = True
    plain_first_task = False

    def __init__(
        self,
        *,
        peft: PeftFactory | None = None,
        momentum: float = 0.9999,
        freeze_epochs: int = 3,
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        rows = functools.partial(LinearHead, init_std=0.001)
        super().__init__(head=head or rows, visible="current", freeze_backbone=False, **kwargs)
        if not 0 <= momentum <= 1 or freeze_epochs < 0:
            raise ValueError(f"LAE: momentum={momentum}, freeze_epochs={freeze_epochs}; in [0, 1], at least 0")
        self.momentum, self.freeze_epochs = momentum, freeze_epochs
        adapter = functools.partial(
            Adapter,
            place="attention",
            bottleneck=5,
            scale=1.0,
            learn_scale=True,
            dropout=0.0,
            activation="gelu",
            blocks=[0, 1, 2, 3, 4],
        )
        self.build_backbone = functools.partial(PeftPair, backbone=self.build_backbone, peft=peft or adapter)
        self._step = 0  # optimizer steps at the last accumulation

    @classmethod
    def conformance_options(cls) -> dict[str, Any]:
        return {"peft": SSF, "freeze_epochs": 1, "momentum": 0.9}  # it goes into a net without blocks, too

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if task.index == 1:
            self._pair.catch_up()

    def phases(self, task: Task) -> list[Phase]:
        return [Phase()] if task.is_first or not self.freeze_epochs else [Phase("head", self.freeze_epochs), Phase()]

    def frozen(self) -> Iterable[nn.Module]:
        pair = self._pair
        return [pair.base, pair.offline, *([pair.online] if self.phase.name == "head" else [])]

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}

    def on_train_start(self) -> None:
        self._step = self.trainer.global_step

    def observe(self, batch: Batch) -> None:
        if not self.task.is_first and self.trainer.global_step > self._step:  # else gradients are accumulated
            self._step = self.trainer.global_step
            self._pair.follow(self.momentum)

    def predict(self, images: Tensor) -> Tensor:
        head = self.network.head
        online = head.classify(self._pair(images)).float().log_softmax(dim=1)
        if len(self.task_columns) < 2:
            return online
        offline = head.classify(self._pair.offline_features(images)).float().log_softmax(dim=1)
        return torch.maximum(online, offline)

    def bytes_kept(self) -> dict[str, int]:
        offline = sum(value.nbytes for value in self._pair.offline.state_dict().values())
        return {**super().bytes_kept(), "averages": offline}

    @property
    def _pair(self) -> PeftPair:
        return cast(PeftPair, self.network.backbone)
