"""IEL: Incremental Ensemble Learning (Porrello et al., "A Second-Order Perspective on Model Compositionality and
Incremental Learning", ICLR 2025, arXiv:2405.16350).

As in ``ITA``, each task t has a LoRA with the matrices tau_t = s B_t A_t, and the mean of all of them predicts. In ITA
each tau_t is trained alone; IEL trains the newest one, tau_T, as a part of the composition:

    L = CE(theta_0 + 1/T sum_{t <= T} tau_t)   over the classes of the task
    g = beta F * [(1 - 1/T) tau_T - 1/T sum_{t < T} tau_t],   p <- p - (lr / lr_0) g

F is the mean over the samples of all tasks up to T, of T too, which ITA leaves out: the composition has to be good for
all of them. g keeps tau_T near the others in the metric of F. It is T times the gradient with respect to tau_T of the
spread

    V = 1/2 ( 1/T sum_t tau_t^T F tau_t - tau^T F tau ),   tau = 1/T sum_t tau_t

by which the composition is better than the mean of its parts for a quadratic loss with the Hessian F. beta ->
pull_weight, 0.02 as for ITA, which is our choice. The phases, the chain rule for A and B, ``pull_limit`` and
:meth:`compose` are as in ITA. The first task is the first task of ITA, since tau_T is the whole composition there.
The gradient of CE with respect to tau_T has the factor 1/T, which Adam takes out. Validation during a task measures
the composition.
Departs from the paper: the variants of full fine-tuning and of (IA)^3 are not offered. The released code adds 1e-5 to F
and has 1/2 in place of 1 - 1/T in the first task; here F has no constant, and g is 0 there.
"""

import functools
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from cl_lightning.memory import shifted, write_weights
from cl_lightning.memory.weight_space import average
from cl_lightning.models import LoRA, PeftFactory
from cl_lightning.strategies.pretrained.ita import ITA
from cl_lightning.strategy import Task

_LAYERS = ("*.attn.qkv", "*.attn.proj", "*.mlp.fc1", "*.mlp.fc2")


class IEL(ITA):
    """Low-rank modules of all tasks in one network, their mean, of which each task trains its own module.

    Args:
        peft: Builds the ``LoRA`` of each task for the backbone; None for rank 16 in all linear layers of the blocks.
        kwargs: Options of ``ITA``.

    Attributes:
        share: Factor of the newest tau in the network: 1 / T while task T is trained, else 1.
    """

    share: Tensor

    def __init__(self, *, peft: PeftFactory | None = None, **kwargs: Any) -> None:
        super().__init__(peft=peft or functools.partial(LoRA, rank=16, targets=_LAYERS), **kwargs)
        self.register_buffer("share", torch.ones(()))

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self._weigh(1)

    def on_train_start(self) -> None:
        super().on_train_start()  # F at theta_0
        if self.phase.name == "train":
            tasks, start = self.task.index + 1, self.weights["start"]
            if tasks > 1:
                earlier = average([self.task_change(index) for index in range(tasks - 1)])
                present = {name: start[name] for name in earlier}
                write_weights(self.network, shifted(present, earlier, (tasks - 1) / tasks))
            self._weigh(tasks)

    def _matrix_pull(self, changes: Mapping[str, Tensor], omegas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        start, present = self.weights["start"], dict(self.network.named_parameters())
        current, past_share = self.weights["fisher"], self.counts[0] / self.counts.sum()
        own, found = 1 - 1 / (self.task.index + 1), {}
        for name, change in changes.items():
            fisher = torch.lerp(current[name], omegas[name], past_share)
            others = present[name].detach() - start[name]  # 1/T sum_{t < T} tau_t
            found[name] = self.pull_weight * fisher * (own * change - others)
        return found

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self._weigh(1)

    def _weigh(self, tasks: int) -> None:
        self.share.fill_(1 / tasks)
        cast(LoRA, self.lora).weigh(float(self.share))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if (share := state_dict.get(f"{prefix}share")) is not None and self.lora is not None:
            self.lora.weigh(float(share))
