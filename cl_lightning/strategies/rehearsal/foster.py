"""FOSTER: Feature Boosting and Compression for Class-Incremental Learning (Wang et al., ECCV 2022, arXiv:2204.04662).

The first task is plain training. A later one begins with a network of backbone f_o and head W_o, and has two phases.

``boost``: f_o is frozen, in eval mode, and a second backbone f_n, which starts as its copy, learns what it lacks. With
a head W on the features of both, which starts from W_o, and a further head W_n on those of f_n,

    L = CE(z / w, y) + CE(z_n, y) + lambda * CE(softmax(z_o / T), softmax(z_old / T))
    z = W [f_o(x), f_n(x)],   z_n = W_n f_n(x),   z_o = W_o f_o(x),   z_old = z for the classes of z_o
    w_c = (1 - beta) / (1 - beta^n_c), scaled to sum to C,   n_c samples of class c at hand

The logits are divided by the weights w, which are larger for the classes of few samples: these have to grow.

``compress``: the boosted network teaches f_o and W_o, with fresh rows for the new classes, all that it knows:

    L = CE(p, softmax(z_s / T)),   p_c = w_c softmax(z / T)_c, scaled to sum to 1

with z_s the logits of this student and w made with a beta of its own. The student is the network from then on; nothing
else is kept but the herded exemplars. lambda -> distill_weight, T -> temperature, beta -> boost_beta, compress_beta.

While it is boosted, ``network`` is the large one. Exemplars are chosen by the features of the compressed network, where
the authors' code takes those of the boosted one, and n_c are counted, where it has 500 for each new class of CIFAR-100.
The authors' configs give beta 0.96 or 0.94 in the boosting phase, by the length of the stream, for 20 exemplars of a
class: beta^n is 0 for hundreds of them, and then all classes weigh the same. They train the second phase without weight
decay: give ``compress_optimizer``. New rows start from torch's default instead of Kaiming's bound. With
weight alignment, which their configs leave off, new rows are scaled by gamma alone.
"""

import copy
import functools
from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from cl_lightning.backbones import ImageShape
from cl_lightning.batch import Batch
from cl_lightning.exemplars import exemplar_memory, update_exemplars
from cl_lightning.expansion import ExpandableBackbone
from cl_lightning.heads import Head, LinearHead, align_head
from cl_lightning.losses import softmax_distillation
from cl_lightning.memory import Memory
from cl_lightning.network import Output
from cl_lightning.strategy import ContinualStrategy, Phase
from cl_lightning.stream import Task
from cl_lightning.teacher import Teacher


def class_weights(counts: Tensor, beta: float) -> Tensor:
    """``w_c = (1 - beta) / (1 - beta^n_c)``, scaled to sum to C: weights by effective number of samples (Cui et al.,
    CVPR 2019, arXiv:1901.05555).

    With beta 0 all are 1, with beta towards 1 they are as 1 / n_c.

    Args:
        counts: n_c, ``(C,)``; 0 counts as 1.
        beta: In [0, 1).

    Returns:
        ``(C,)``, float64.
    """
    effective = (1 - beta ** counts.clamp(min=1).double()) / (1 - beta)
    return len(counts) / effective / (1 / effective).sum()


def rebalanced_distillation(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float = 2.0) -> Tensor:
    """``CE(p, softmax(z / T))``, ``p_c = w_c q_c / sum w q``, ``q = softmax(z_teacher / T)``, mean over the batch.

    It is distillation from logits ``z_teacher + T log w``.

    Args:
        student: z, ``(B, C)``.
        teacher: The teacher's, ``(B, C)``.
        weights: w, ``(C,)``, positive.
        temperature: T, positive.
    """
    return softmax_distillation(student, teacher + temperature * weights.log(), temperature)


class FOSTER(ContinualStrategy):
    """A second backbone learns what the first one lacks, then both are distilled into one.

    Args:
        memory_size: K, in samples, over all classes and processes.
        distill_weight: lambda, at least 0.
        temperature: T of both phases, above 0.
        boost_beta: beta of the weights that divide the logits, in [0, 1).
        compress_beta: beta of the weights of the distillation, in [0, 1).
        compress_epochs: Epochs of the second phase; None for those of the Trainer, which the first phase takes.
        compress_optimizer: Of the second phase; None for ``optimizer``.
        compress_scheduler: Its schedule; None for ``scheduler``, unless ``compress_optimizer`` is given.
        sees_old_features: Whether rows of new classes of W see f_o; False holds these weights at 0.
        align_boosted: Align new rows of W before it teaches (``align_head``).
        align_compressed: Align new rows of the student when it has learnt.
        kwargs: Of the base; the head must be a ``LinearHead``.
    """

    family: ClassVar[str] = "rehearsal"
    paper: ClassVar[str] = "Wang et al., ECCV 2022, arXiv:2204.04662"
    keeps_exemplars: ClassVar[bool] = True

    def __init__(
        self,
        *,
        memory_size: int = 2000,
        distill_weight: float = 1.0,
        temperature: float = 2.0,
        boost_beta: float = 0.96,
        compress_beta: float = 0.97,
        compress_epochs: int | None = None,
        compress_optimizer: OptimizerCallable | None = None,
        compress_scheduler: LRSchedulerCallable | None = None,
        sees_old_features: bool = True,
        align_boosted: bool = False,
        align_compressed: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if distill_weight < 0 or temperature <= 0:
            raise ValueError(f"FOSTER: distill_weight={distill_weight}, temperature={temperature}; at least 0, above 0")
        if not (0 <= boost_beta < 1 and 0 <= compress_beta < 1):
            raise ValueError(f"FOSTER: boost_beta={boost_beta}, compress_beta={compress_beta}; allowed is [0, 1)")
        if compress_epochs is not None and compress_epochs < 1:
            raise ValueError(f"FOSTER: compress_epochs is {compress_epochs}; it must be at least 1, or null")
        if self.freeze_backbone:
            raise ValueError("FOSTER: freeze_backbone is True, but each task learns a backbone; leave it out")
        self.distill_weight, self.temperature = distill_weight, temperature
        self.betas = {"boost": boost_beta, "compress": compress_beta}
        self.compression = Phase("compress", compress_epochs, compress_optimizer, compress_scheduler)
        self.sees_old_features = sees_old_features
        self.align_boosted, self.align_compressed = align_boosted, align_compressed
        self.build_backbone = functools.partial(ExpandableBackbone, extractor=self.build_backbone)
        self.memory = exemplar_memory(memory_size, owner="FOSTER", visible=self.visible)
        self.teacher = Teacher()  # the boosted network, in the second phase
        self.old_head: Head  # W_o and W_n, in the first phase
        self.new_head: Head
        self._weights = torch.zeros(0)

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        head = self.network.head
        if not isinstance(head, LinearHead) or head.needs_statistics:
            raise ValueError(f"FOSTER: head is {type(head).__name__}; only a LinearHead can take more features")
        self.old_head, self.new_head = self._empty_head(), self._empty_head()

    @property
    def _backbone(self) -> ExpandableBackbone:
        return cast(ExpandableBackbone, self.network.backbone)

    def _empty_head(self) -> Head:
        return self.build_head(self._backbone.width)

    def begin_task(self, task: Task) -> None:
        if task.is_first:
            super().begin_task(task)
            return
        self.old_head = self.network.head
        head = cast(LinearHead, copy.deepcopy(self.old_head))
        self._backbone.expand()
        head.resize(self._backbone.num_features)
        self.network.head = head
        super().begin_task(task)
        self.new_head.grow(task.num_seen)
        self._hide_old_features()

    def phases(self, task: Task) -> list[Phase]:
        return [Phase()] if task.is_first else [Phase("boost"), self.compression]

    def frozen(self) -> Iterable[nn.Module]:
        yield from super().frozen()
        if self.phase.name == "boost":
            yield self._backbone.extractors[0]

    def trainable(self) -> Iterable[nn.Parameter]:
        yield from super().trainable()
        yield from self.new_head.parameters()

    def rehearsal(self) -> Memory | None:
        return self.memory

    def select(self, labels: Tensor, replayed: Tensor) -> Tensor | None:
        # Nothing is chosen: this is where a phase, also one that is gone on with, is told how many samples there are.
        if (beta := self.betas.get(self.phase.name)) is not None:
            counts = labels[labels >= 0].bincount(minlength=self.task.num_seen)
            self._weights = class_weights(counts, beta).float()
        return None

    def on_train_start(self) -> None:
        self._weights = self._weights.to(self.device)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.phase.name == "boost":
            return self._boosting_losses(batch, output)
        if self.phase.name == "compress":
            taught = self.teacher(batch.images).logits
            return {"distill": rebalanced_distillation(output.logits, taught, self._weights, self.temperature)}
        return {"ce": self.classification_loss(output, batch)}

    def _boosting_losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        old, new = self._backbone.split(output.features)
        taught = self.old_head(old)  # (batch, classes before this task); what leads to it is frozen
        own = output.logits[:, : taught.shape[1]]
        return {
            "ce": self.classification_loss(output._replace(logits=output.logits / self._weights), batch),
            "new_ce": self.classification_loss(Output(new, self.new_head(new)), batch),
            "distill": self.distill_weight * softmax_distillation(own, taught, self.temperature),
        }

    def observe(self, batch: Batch) -> None:
        if self.phase.name == "boost":
            self._hide_old_features()

    def end_phase(self, phase: Phase) -> None:
        if phase.name != "boost":
            return
        if self.align_boosted and self.task.num_new:
            align_head(self.network.head)
        self.teacher.learn_from(self.network)
        self._backbone.keep(1)
        self.network.head = self.old_head
        self.network.head.grow(self.task.num_new)
        self.old_head, self.new_head = self._empty_head(), self._empty_head()

    def end_task(self, task: Task) -> None:
        if self.align_compressed and task.num_new:
            align_head(self.network.head)
        self.teacher.network = None
        super().end_task(task)
        update_exemplars(self, self.memory)

    @torch.no_grad()
    def _hide_old_features(self) -> None:
        if not self.sees_old_features and self.task.num_new:
            cast(Tensor, self.network.head.blocks[-1].weight)[:, : -self._backbone.width] = 0.0
