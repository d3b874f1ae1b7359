"""FPF: a short fine-tuning of the modules that forget most, for evaluation."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from cl_lightning.batch import mix
from cl_lightning.callback import ContinualCallback
from cl_lightning.callbacks._memory import memory_of
from cl_lightning.callbacks._swap import Swap, live_tensors
from cl_lightning.checks import above, at_least, matching, within
from cl_lightning.models import frozen_copy
from cl_lightning.strategies.base import finetune_on_memory, module_of, norms_and_head, sensitivities
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy

_SEED = 0xF9F


class FPF(ContinualCallback):
    """Fine-tunes the modules that forget most on the memory of any strategy, and evaluates the result.

    Some modules change most when a new task begins: normalisation layers, the head, and for some networks the first
    convolution. With theta_l the parameters of module l, t a task and n an epoch, the sensitivity

        S_l(t, n) = || theta_l^(t,n) - theta_l^(t,n-1) ||_1 / |theta_l|

    is the mean change per parameter; at n = 1 the change since the end of the task before (Zhao et al., "Does Continual
    Learning Equally Forget All Parameters?", ICML 2023, arXiv:2304.04158). At the end of each task the chosen modules
    of a copy of the network are trained on the memory for some steps of SGD with a learning rate that falls along a
    half cosine, by cross-entropy (FPF-CE) and, with ``logit_weight``, by the squared error to stored logits (FPF-KD).
    Tests and predictions use the copy; training resumes from the network itself and is the same with and without this
    callback, to the bit. Classifiers that a strategy computes from features at the end of a task (class means) are not
    computed again.

    The rule of selection is not in the sources that were read: ``names`` is a list of patterns, ``share`` takes the
    modules of the largest mean S_l(t, 1), over the tasks t after the first one, up to a share of all parameters, and
    without both all normalisation layers and the head are trained. Before the second task ``share`` takes these too.
    Running statistics of normalisation layers that are trained change with them.

    Args:
        steps: Number of steps, at least 0; with 0 the network itself is evaluated.
        batch_size: Number of samples per step, at least 1.
        lr: Learning rate of the first step, above 0.
        logit_weight: Weight of the squared error to stored logits, at least 0; above 0 the strategy must store them.
        names: Patterns of the names of parameters, such as ``backbone.*.norm*``; None for ``share``.
        share: Share of the parameters to be trained, in (0, 1]; None for normalisation layers and the head.

    Attributes:
        tuned: Trained tensors by the names of the network's parameters and buffers.
        scores: Sum over tasks of S_l(t, 1) by module.
    """

    paper: str = "Zhao et al., ICML 2023, arXiv:2304.04158"

    def __init__(
        self,
        *,
        steps: int = 300,
        batch_size: int = 32,
        lr: float = 0.1,
        logit_weight: float = 0.0,
        names: Sequence[str] | None = None,
        share: float | None = None,
    ) -> None:
        at_least(self, 0, steps=steps, logit_weight=logit_weight)
        at_least(self, 1, batch_size=batch_size)
        above(self, 0, lr=lr)
        within(self, "(0, 1]", share=share, optional=True)
        if names is not None and share is not None:
            raise ValueError("FPF: names and share are both given; give names, or a share of the parameters")
        self.steps, self.batch_size, self.lr, self.logit_weight = steps, batch_size, lr, logit_weight
        self.names, self.share = names, share
        self.tuned: dict[str, Tensor] = {}
        self.scores: dict[str, float] = {}
        self._start: dict[str, Tensor] = {}  # parameters at the end of the task before
        self._swap = Swap()

    # ------------------------------------------------------------------ sensitivity

    def on_task_start(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        memory_of(self, strategy)
        self.tuned = {}
        if self.names is not None:
            matching(self, dict(strategy.network.named_parameters()), names=self.names)
        if self.share is not None and not task.is_first:
            self._start = {name: value.detach().cpu().clone() for name, value in strategy.network.named_parameters()}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._start:
            start, self._start = self._start, {}
            now = {name: value.detach().cpu() for name, value in pl_module.network.named_parameters()}  # type: ignore[union-attr]
            for module, score in sensitivities(start, now).items():
                self.scores[module] = self.scores.get(module, 0.0) + score

    def chosen(self, strategy: Any) -> list[str]:
        """Names of the parameters of the network that are trained."""
        parameters = dict(strategy.network.named_parameters())
        if self.names is not None:
            return matching(self, parameters, names=self.names)
        if self.share is None or not self.scores:
            return norms_and_head(strategy.network)
        sizes: dict[str, int] = {}
        for name, value in parameters.items():
            sizes[module_of(name)] = sizes.get(module_of(name), 0) + value.numel()
        room, modules = self.share * sum(sizes.values()), set[str]()
        for module in sorted(sizes, key=lambda each: -self.scores.get(each, 0.0)):
            if sizes[module] <= room:
                modules.add(module)
                room -= sizes[module]
        return [name for name in parameters if module_of(name) in modules]

    # ------------------------------------------------------------------ fine-tuning and evaluation

    def on_task_end(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        memory = memory_of(self, strategy)
        if self.logit_weight and "logits" not in memory.fields:
            raise ValueError(
                f"FPF: logit_weight is {self.logit_weight}, but {type(strategy).__name__} stores no logits; use 0, or "
                "a strategy that stores them, such as DERpp"
            )
        copied = frozen_copy(strategy.network)
        finetune_on_memory(
            strategy,
            copied,
            memory,
            self.chosen(strategy),
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            key=mix(strategy.seed, _SEED, task.index),
            logit_weight=self.logit_weight,
        )
        live = live_tensors(strategy)
        states = {**dict(copied.named_parameters()), **dict(copied.named_buffers())}
        self.tuned = {name: value.detach() for name, value in states.items() if not torch.equal(value, live[name])}

    # The callback of the task loop is called first, so the end of a task, which is part of a test, is over.
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap.into(live_tensors(pl_module), self.tuned)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap.into(live_tensors(pl_module), self.tuned)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap.back(live_tensors(pl_module))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap.back(live_tensors(pl_module))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._swap.back(live_tensors(pl_module))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._swap.back(live_tensors(pl_module))

    # ------------------------------------------------------------------ state

    def bytes_kept(self) -> dict[str, int]:
        return {"tuned weights": sum(value.nbytes for value in self.tuned.values())}

    def state_dict(self) -> dict[str, Any]:
        return {"tuned": dict(self.tuned), "scores": dict(self.scores), "start": dict(self._start)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.tuned = {name: value.clone() for name, value in state_dict["tuned"].items()}
        self.scores = dict(state_dict["scores"])
        self._start = {name: value.cpu().clone() for name, value in state_dict["start"].items()}
