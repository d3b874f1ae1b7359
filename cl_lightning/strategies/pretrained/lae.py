"""LAE: Learning, Accumulation, Ensemble (Gao et al., ICCV 2023, arXiv:2303.10070).

A frozen pretrained backbone has two copies of a parameter-efficient module, online and offline:

    learning       CE(W f(x; online), y over the classes of the task) trains online and the head; from the second task
                   on, a phase ``head``, which trains the head alone, comes first
    accumulation   after each optimizer step   offline <- momentum offline + (1 - momentum) online,   from the second
                   task on, which begins with offline = online
    ensemble       score_c(x) = max( softmax(W f(x; online))_c, softmax(W f(x; offline))_c )

over all classes seen so far. Both copies share the head W. The default module is an adapter parallel to the attention
of the first five blocks; the paper also has LoRA on keys and values (rank 5, ``learn_scale``, ``parts: kv``) and
prefixes (length 10, drawn from U(0, 0.01), ``compensate``, ``learn_scale``). Scores are returned as logarithms. During
the first task only online predicts. After n steps the weight of online in offline is 1 - momentum^n: with the momentum
of the paper, 0.9999, and 1,000 steps per task it is 10 % per task. If a task has fewer steps, choose a smaller
momentum.
Departs from the code, where the head alone is trained in the first epochs of a task, and the same optimizer trains the
remaining epochs: here these epochs are a phase of ``freeze_epochs`` with its own optimizer, followed by ``max_epochs``
of the Trainer. 3 of 5 epochs are ``freeze_epochs=3``, ``trainer.max_epochs=2`` and ``loop.first_task_epochs=5``. For a
stream in which each image is seen once, set ``freeze_epochs=0``.
"""

import functools
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from cl_lightning.checks import at_least, within
from cl_lightning.models import Adapter, LinearHead, PeftFactory, PeftPair
from cl_lightning.strategy import Batch, ContinualStrategy, HeadFactory, Output, Phase, PhaseOptions, Task, Traits


class LAE(ContinualStrategy):
    """An online module in a frozen backbone, its exponential moving average (offline), and the ensemble of both.

    Args:
        peft: Builds the module for the backbone; None for an adapter parallel to the attention of blocks 0 to 4, with
            5 units and a learnt scale.
        momentum: Momentum of the moving average, in [0, 1].
        freeze_epochs: Epochs of the phase ``head``; 0 to leave it out.
        head: Builds the head; None for ``LinearHead`` with initial rows of standard deviation 0.001.
        kwargs: Options of the base class.
    """

    traits = Traits(family="pretrained", paper="Gao et al., ICCV 2023, arXiv:2303.10070", needs_pretrained=True)

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
        super().__init__(head=head or rows, loss_classes="current", freeze_backbone=False, **kwargs)
        within(self, "[0, 1]", momentum=momentum)
        at_least(self, 0, freeze_epochs=freeze_epochs)
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

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if task.index == 1:
            self._pair.copy_online()

    def phases(self, task: Task) -> list[Phase]:
        if task.is_first or not self.freeze_epochs:
            return [Phase()]
        options = PhaseOptions(epochs=self.freeze_epochs)
        return [Phase("head", options, freezes=lambda: [*self.frozen(), self._pair.online]), Phase()]

    def frozen(self) -> Iterable[nn.Module]:
        return [self._pair.base, self._pair.offline]

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}

    def on_train_start(self) -> None:
        self._step = self.trainer.global_step

    def after_step(self, batch: Batch) -> None:
        if not self.task.is_first and self.trainer.global_step > self._step:  # otherwise gradients are accumulated
            self._step = self.trainer.global_step
            self._pair.ema_update(self.momentum)

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
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
