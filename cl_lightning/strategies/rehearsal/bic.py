"""Bias Correction: "Large Scale Incremental Learning" (Wu et al., CVPR 2019, arXiv:1905.13260).

A small share of new data and exemplars, equally many of each class, is held out from each task but the first. Then

    stage 1, phase ``train``   L(x, y) = (1 - lambda) CE(q(x), y) + lambda CE(softmax(g(x) / T), softmax(q_old(x) / T))
    stage 2, phase ``bias``    CE(q(x), y) on the held-out share, over two numbers alpha, beta; the network is frozen

where q are the corrected logits of the network f and g those of its copy before the task:

    q_c(x) = alpha_k f_c(x) + beta_k    for the classes c of task k;  alpha, beta = 1, 0 for the newest until stage 2

lambda = C_old / C -> distill_share, T -> temperature. Pairs of earlier tasks stay applied and fixed. Exemplars are
chosen by herding among all data of the task, the held-out share included. Predictions are the largest q_c.
Departs from re-implementations in which stage 2 takes a softmax of a softmax, or decays alpha towards 0. How many are
held out is ``int(held_out * K / C_old)`` of each class (PyCIL), at least 1 and never all; the held-out samples are
augmented as others are. The paper does not give stage 2's optimizer: Adam with learning rate 0.01 for 100 epochs here,
since with 0.001 (mammoth, 250 epochs) a share of one batch would not get alpha anywhere. Where a class has a single
exemplar none can be held out, and stage 2 is left out with a warning: then take ``WA``.
"""

import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from cl_lightning.batch import Batch, Draw, mix
from cl_lightning.exemplars import check_distill_share, exemplar_memory, update_exemplars
from cl_lightning.losses import balanced_distillation
from cl_lightning.memory import Memory, standing
from cl_lightning.network import Output
from cl_lightning.strategy import ContinualStrategy, Phase
from cl_lightning.stream import Task
from cl_lightning.teacher import Teacher


def correct(logits: Tensor, pairs: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """``alpha_k z_c + beta_k`` for the classes c of task k.

    Args:
        logits: z, ``(B, C)`` with C the sum of the first sizes; pairs of classes that come later are not used.
        pairs: (alpha, beta) of each task, ``(2,)`` each.
        sizes: Number of classes of each task.
    """
    columns = torch.cat([pair.expand(size, 2) for pair, size in zip(pairs, sizes, strict=True)])[: logits.shape[1]]
    return logits * columns[:, 0] + columns[:, 1]


def held_out(labels: Tensor, count: int, key: int) -> Tensor:
    """Mark ``count`` random samples of each class, but never all of a class.

    Args:
        labels: Of the samples, int64 ``(n,)``, at least 0.
        count: Wanted of each class.
        key: Decides, with the labels, which ones.

    Returns:
        bool ``(n,)``.
    """
    level, _ = standing(Draw.of(len(labels), key).randint((1 << 63) - 1), labels)
    return level < (labels.bincount()[labels] - 1).clamp(max=count)


class Pairs(nn.Module):
    """(alpha, beta) of each task; as many as the state that is loaded has."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.ParameterList()

    def grow(self) -> None:
        """Append the pair of a new task, which changes nothing yet."""
        like = next(self.parameters(), torch.empty(0))
        self.values.append(nn.Parameter(torch.tensor([1.0, 0.0], device=like.device)))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        saved = sum(name.startswith(f"{prefix}values.") for name in state_dict)
        self.values = nn.ParameterList(list(self.values)[:saved])
        while len(self.values) < saved:
            self.grow()
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]


class BiC(ContinualStrategy):
    """Distillation on the task and on herded exemplars, then two numbers that undo the bias to the new classes.

    Args:
        memory_size: K, in samples, over all classes and processes.
        temperature: T, above 0.
        distill_share: lambda in [0, 1]; None for the share of old classes, which asks for new classes in every task.
        held_out: Share of the exemplars of each class held out for stage 2, in (0, 1).
        bias_epochs: Epochs of stage 2; None for those of stage 1.
        bias_optimizer: Of stage 2; None for Adam with learning rate 0.01. It should not decay weights.
        kwargs: Of the base.
    """

    family: ClassVar[str] = "rehearsal"
    paper: ClassVar[str] = "Wu et al., CVPR 2019, arXiv:1905.13260"
    keeps_exemplars: ClassVar[bool] = True

    def __init__(
        self,
        *,
        memory_size: int = 2000,
        temperature: float = 2.0,
        distill_share: float | None = None,
        held_out: float = 0.1,
        bias_epochs: int | None = 100,
        bias_optimizer: OptimizerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if temperature <= 0 or not 0 <= (distill_share or 0.0) <= 1:
            raise ValueError(
                f"BiC: temperature={temperature}, distill_share={distill_share}; above 0, and in [0, 1] or null"
            )
        if not 0 < held_out < 1 or (bias_epochs is not None and bias_epochs < 1):
            raise ValueError(f"BiC: held_out={held_out}, bias_epochs={bias_epochs}; in (0, 1), and at least 1 or null")
        self.temperature, self.distill_share = temperature, distill_share
        self.held_out, self.bias_epochs = held_out, bias_epochs
        self.bias_optimizer: OptimizerCallable = bias_optimizer or functools.partial(torch.optim.Adam, lr=0.01)
        self.memory = exemplar_memory(memory_size, owner="BiC", visible=self.visible)
        self.teacher = Teacher()
        self.pairs = Pairs()

    @classmethod
    def conformance_options(cls) -> dict[str, Any]:
        return {"bias_epochs": 2}

    def correct(self, logits: Tensor) -> Tensor:
        """Corrected logits; also those of the teacher, whose pairs have not changed since."""
        return correct(logits, list(self.pairs.values), self.network.head.block_sizes())

    def begin_task(self, task: Task) -> None:
        check_distill_share(self.distill_share, task, owner="BiC")
        super().begin_task(task)
        if task.num_new:
            self.pairs.grow()

    def phases(self, task: Task) -> list[Phase]:
        if self._count(task) > 0:
            return [Phase(), Phase("bias", self.bias_epochs, self.bias_optimizer)]
        if not task.is_first and task.num_new:
            warnings.warn(
                f"BiC: a class has less than two exemplars at task {task.index}, so that none can be held out, and the "
                "bias stays; give a larger memory_size",
                stacklevel=2,
            )
        return [Phase()]

    def phase_names(self, task: Task) -> list[str]:
        return ["train", "bias"] if task.num_new and not task.is_first else ["train"]

    def frozen(self) -> Iterable[nn.Module]:
        return [self.network] if self.phase.name == "bias" else super().frozen()

    def select(self, labels: Tensor, replayed: Tensor) -> Tensor | None:
        count = self._count(self.task)
        if count == 0:
            return None
        held = held_out(labels, count, mix(self.seed, 0xB1C, self.task.index))
        return held if self.phase.name == "bias" else ~held

    def trainable(self) -> Iterable[nn.Parameter]:
        return [self.pairs.values[-1]] if self.phase.name == "bias" else super().trainable()

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        output = output._replace(logits=self.correct(output.logits))
        ce = self.classification_loss(output, batch)
        if self.phase.name == "bias" or not self.teacher:
            return {"ce": ce}
        taught = self.correct(self.teacher(batch.images).logits)  # (batch, classes before this task)
        return balanced_distillation(ce, output.logits, taught, self.temperature, self.distill_share)

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        update_exemplars(self, self.memory)
        self.teacher.learn_from(self.network)

    def rehearsal(self) -> Memory | None:
        return self.memory

    def predict(self, images: Tensor) -> Tensor:
        output: Output = self.network(images)
        return self.correct(output.logits)

    def _count(self, task: Task) -> int:
        """Samples of each class to hold out; 0 where there is no stage 2."""
        if task.is_first or not task.num_new:
            return 0
        counts = self.memory.counts(task.num_seen - task.num_new)
        return max(int(self.held_out * self.memory.size / len(counts)), 1) if int(counts.min()) > 1 else 0
