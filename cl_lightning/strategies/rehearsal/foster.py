"""FOSTER: Feature Boosting and Compression for Class-Incremental Learning (Wang et al., ECCV 2022, arXiv:2204.04662).

The first task is ordinary training. A later task starts from a network of backbone f_o and head W_o, in two phases.

``boost``: f_o is frozen, in eval mode, and a second backbone f_n, initialised as a copy of f_o, is trained on the
residuals of f_o. With a head W on the features of both, initialised from W_o, and an auxiliary head W_n on the features
of f_n,

    L = CE(z / w, y) + CE(z_n, y) + lambda * CE(softmax(z_o / T), softmax(z_old / T))
    z = W [f_o(x), f_n(x)],   z_n = W_n f_n(x),   z_o = W_o f_o(x),   z_old = z for the classes of z_o
    w_c = (1 - beta) / (1 - beta^n_c), scaled to sum to C,   n_c samples of class c (task and exemplars)

The weights w are larger for classes with fewer samples. Dividing by them makes the loss demand larger logits of these
classes.

``compress``: the boosted network is distilled into f_o and W_o, with new rows for the new classes:

    L = CE(p, softmax(z_s / T)),   p_c = w_c softmax(z / T)_c, scaled to sum to 1

with z_s the logits of this student, and w computed with a separate beta. The student is the network from then on;
apart from it only the herded exemplars are kept. lambda -> distill_weight, T -> temperature,
beta -> boost_beta, compress_beta.

During the phase ``boost``, ``network`` is the boosted network.
Departs from the authors' code: exemplars are chosen by the features of the compressed network, not of the boosted
network; n_c are counted, not set to 500 for each new class of CIFAR-100; new rows have torch's default initialisation,
not Kaiming's bound; with weight alignment, which is off in their configurations, new rows are scaled by gamma alone.
Their configurations have beta 0.96 or 0.94 in the boosting phase, by the length of the stream, for 20 exemplars per
class; with hundreds of samples per class beta^n_c is about 0, and all classes have the same weight. They train the
second phase without weight decay: set ``compress_options.optimizer``.
"""

import copy
import functools
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.checks import above, at_least, within
from cl_lightning.losses import softmax_distillation
from cl_lightning.memory import Teacher
from cl_lightning.models import Head, align_head
from cl_lightning.strategies.base import ExpandingReplay
from cl_lightning.strategy import Batch, Output, Phase, PhaseOptions, Task, Traits


def class_weights(counts: Tensor, beta: float) -> Tensor:
    """Class weights by the effective number of samples (Cui et al., CVPR 2019, arXiv:1901.05555).

        w_c = (1 - beta) / (1 - beta^n_c), scaled to sum to C

    With beta 0 all weights are 1; in the limit of beta = 1 they are proportional to 1 / n_c.

    Args:
        counts: n_c, number of samples of each class, ``(C,)``; 0 is replaced by 1.
        beta: beta, in [0, 1).

    Returns:
        w, ``(C,)``, float64.
    """
    effective = (1 - beta ** counts.clamp(min=1).double()) / (1 - beta)
    return len(counts) / effective / (1 / effective).sum()


def rebalanced_distillation(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float = 2.0) -> Tensor:
    """Balanced distillation: cross-entropy to the weighted softmax of the teacher, the mean over the batch, in nats.

        CE(p, softmax(z_s / T)),   p_c = w_c q_c / sum_c w_c q_c,   q = softmax(z / T)

    It is equal to distillation from the logits ``z + T log w``.

    Args:
        student: z_s, logits of the student, ``(B, C)``.
        teacher: z, logits of the teacher, ``(B, C)``.
        weights: w, ``(C,)``, above 0.
        temperature: T, above 0.
    """
    return softmax_distillation(student, teacher + temperature * weights.log(), temperature)


class FOSTER(ExpandingReplay):
    """A second backbone is trained on the residuals of the first; then both are distilled into one.

    Args:
        memory_size: K, in samples, over all classes and processes.
        distill_weight: lambda, at least 0.
        temperature: T of both phases, above 0.
        boost_beta: beta of the weights that divide the logits, in [0, 1).
        compress_beta: beta of the weights of the distillation, in [0, 1).
        compress_options: Options of the second phase, at least 1 epoch; what is None is as in the first phase.
        sees_old_features: Whether rows of W of new classes use the features of f_o; False sets these weights to 0.
        align_boosted: Whether new rows of W are aligned before the second phase (``align_head``).
        align_compressed: Whether new rows of the student are aligned after the second phase.
        kwargs: Options of the base class, apart from ``freeze_backbone``; the head must be a ``LinearHead``.
    """

    traits = Traits(family="rehearsal", paper="Wang et al., ECCV 2022, arXiv:2204.04662", keeps_exemplars=True)

    def __init__(
        self,
        *,
        memory_size: int = 2000,
        distill_weight: float = 1.0,
        temperature: float = 2.0,
        boost_beta: float = 0.96,
        compress_beta: float = 0.97,
        compress_options: PhaseOptions = PhaseOptions(),
        sees_old_features: bool = True,
        align_boosted: bool = False,
        align_compressed: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(memory_size=memory_size, **kwargs)
        at_least(self, 0, distill_weight=distill_weight)
        above(self, 0, temperature=temperature)
        within(self, "[0, 1)", boost_beta=boost_beta, compress_beta=compress_beta)
        at_least(self, 1, **{"compress_options.epochs": compress_options.epochs}, optional=True)
        self.distill_weight, self.temperature = distill_weight, temperature
        self.boost_beta, self.compress_beta = boost_beta, compress_beta
        self.compress_options = compress_options
        self.sees_old_features = sees_old_features
        self.align_boosted, self.align_compressed = align_boosted, align_compressed
        self.teacher = Teacher()  # the boosted network, in the second phase
        self.old_head: Head  # W_o, in the first phase
        self.new_head: Head  # W_n, in the first phase
        self._weights = torch.zeros(0)

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.old_head, self.new_head = self.extractor_head(), self.extractor_head()

    def begin_task(self, task: Task) -> None:
        if task.is_first:
            super().begin_task(task)
            return
        self.old_head = self.network.head
        self.network.head = copy.deepcopy(self.old_head)
        super().begin_task(task)
        self.new_head.grow(task.num_seen)
        self._hide_old_features()

    def phases(self, task: Task) -> list[Phase]:
        if task.is_first:
            return [Phase()]
        return [
            Phase("boost", samples=functools.partial(self._weigh, beta=self.boost_beta)),
            Phase("compress", self.compress_options, samples=functools.partial(self._weigh, beta=self.compress_beta)),
        ]

    def trainable(self) -> Iterable[nn.Parameter]:
        yield from super().trainable()
        yield from self.new_head.parameters()

    def _weigh(self, labels: Tensor, replayed: Tensor, *, beta: float) -> None:
        """Compute the class weights of a phase when it begins or is resumed. Returns None: all samples are used."""
        counts = labels[labels >= 0].bincount(minlength=self.task.num_seen)
        self._weights = class_weights(counts, beta).float()

    def on_train_start(self) -> None:
        self._weights = self._weights.to(self.device)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.phase.name == "boost":
            return self._boosting_losses(batch, output)
        if self.phase.name == "compress":
            target = self.teacher(batch.images).logits
            return {"distill": rebalanced_distillation(output.logits, target, self._weights, self.temperature)}
        return {"ce": self.classification_loss(output, batch)}

    def _boosting_losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        old, new = self.backbone.split(output.features)
        target = self.old_head(old)  # z_o, (batch, classes before this task), without gradient: f_o and W_o are frozen
        old_logits = output.logits[:, : target.shape[1]]
        return {
            "ce": self.classification_loss(output._replace(logits=output.logits / self._weights), batch),
            "new_ce": self.classification_loss(Output(new, self.new_head(new)), batch),
            "distill": self.distill_weight * softmax_distillation(old_logits, target, self.temperature),
        }

    def after_step(self, batch: Batch) -> None:
        if self.phase.name == "boost":
            self._hide_old_features()

    def end_phase(self, phase: Phase) -> None:
        if phase.name != "boost":
            return
        if self.align_boosted and self.task.num_new:
            align_head(self.network.head)
        self.teacher.learn_from(self.network)
        self.backbone.keep(1)
        self.network.head = self.old_head
        self.network.head.grow(self.task.num_new)
        self.old_head, self.new_head = self.extractor_head(), self.extractor_head()

    def end_task(self, task: Task) -> None:
        if self.align_compressed and task.num_new:
            align_head(self.network.head)
        self.teacher.network = None
        super().end_task(task)

    @torch.no_grad()
    def _hide_old_features(self) -> None:
        if not self.sees_old_features and self.task.num_new:
            cast(Tensor, self.network.head.blocks[-1].weight)[:, : -self.backbone.width] = 0.0
