"""Pooled Outputs Distillation (Douillard, Cord, Ollion, Robert & Valle, ECCV 2020, arXiv:2004.13513).

The head has P proxies per class: s_c is their local similarity (eq. 5, ``CosineHead`` with ``proxies``) and eta its
learnt scale, which starts at 1. With a_m the map of stage m before its ReLU, f the features, b_m and g the maps and
features of the network before the task, and C classes so far,

    L = NCA + r lambda_c POD-spatial(a, b) + r lambda_f (1 - cos(f, g)),    r = sqrt(C / C_new)
    NCA = mean_i max(0, -eta (s_y - delta) + log sum_{c != y} exp(eta s_c))                       (eq. 6, 7)

on the data of the task and on herded exemplars. POD-spatial is the mean over the stages of the distance of sums of
squares over rows and columns (``pod_spatial``). lambda_c -> spatial_weight, lambda_f -> flat_weight, delta -> margin,
P -> proxies. Proxies of old classes are frozen; proxies of a new class start as the centres of k-means of its
normalised features, at the mean norm of the old proxies. A second phase trains the head alone by NCA on a
class-balanced set of exemplars. The prediction is the class of the nearest mean of exemplars, or of the largest s_c.
Use a backbone without a ReLU at the end (``last_relu: false``). The authors clamp each number of the gradient to
[-5, 5]: ``--trainer.gradient_clip_val 5 --trainer.gradient_clip_algorithm value``.
Departs from the authors' code, which with ``released=True`` is followed: there delta is subtracted from all scores and
then their maximum too, so that delta has no effect; the score of the own class is set to 0 in the sum, which so
contains exp(0) = 1; and there is no max(0, .). Their similarity is -||f - w||^2 = 2 cos - 2 of unit vectors, here cos,
as in eq. 4. Their learnt scale gets the weight decay of the optimizer, here too.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import ImageShape
from cl_lightning.checks import at_least
from cl_lightning.losses import cosine_feature_distillation, full_precision, mean_over_rows, pod_spatial
from cl_lightning.memory import Teacher
from cl_lightning.models import CosineHead
from cl_lightning.strategies.base import BALANCED, CosineExemplars
from cl_lightning.strategy import Batch, HeadFactory, Output, PhaseOptions, Task, Traits

_BALANCED_OPTIONS = PhaseOptions(epochs=20)


def nca_loss(logits: Tensor, labels: Tensor, threshold: Tensor | float) -> Tensor:
    """NCA loss with a margin and a hinge, mean over the batch, in nats.

        mean_i max(0, -z_y + threshold + log sum_{c != y} exp z_c),    z = eta s, threshold = eta delta

    Args:
        logits: z, ``(B, C)``.
        labels: Columns, int64 ``(B,)``, at least 0.
        threshold: eta delta.
    """
    logits = full_precision(logits)
    own = F.one_hot(labels, logits.shape[1]).bool()
    others = logits.masked_fill(own, -torch.inf).logsumexp(dim=1)  # -inf with a single class: the loss is 0
    return mean_over_rows(F.relu(others - logits[own] + threshold))


def released_nca_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """NCA loss of the authors' code, mean over the batch, in nats.

        mean_i [-z'_y + log(1 + sum_{c != y} exp z'_c)],    z' = z - max_c z_c

    Args:
        logits: z, ``(B, C)``.
        labels: Columns, int64 ``(B,)``, at least 0.
    """
    logits = full_precision(logits)
    logits = logits - logits.max(dim=1, keepdim=True).values
    own = F.one_hot(labels, logits.shape[1]).bool()
    return mean_over_rows(logits.masked_fill(own, 0.0).logsumexp(dim=1) - logits[own])


class PODNet(CosineExemplars):
    """Proxies of each class, and distillation of pooled maps of all stages.

    Args:
        memory_size: K of :class:`ExemplarReplay`, in samples.
        spatial_weight: lambda_c, at least 0: 3 for CIFAR-100 and 8 for ImageNet-100.
        flat_weight: lambda_f, at least 0: 1 for CIFAR-100 and 10 for ImageNet-100.
        margin: delta, at least 0; without effect with ``released``.
        proxies: P, at least 1.
        released: Whether the NCA loss follows the authors' code.
        balanced_options: Options of the second phase; None for their optimizer is SGD with learning rate 0.05 and
            momentum 0.9. 0 epochs leave it out.
        head: Builds a :class:`CosineHead`; None for P proxies and a learnt scale that starts at 1.
        kwargs: Options of the base class: ``imprint``, ``classifier``, ``exemplars_per_class``, .... The backbone must
            have maps of stages, such as ResNet32.
    """

    traits = Traits(
        family="rehearsal",
        paper="Douillard et al., ECCV 2020, arXiv:2004.13513",
        keeps_exemplars=True,
        scenarios=("class-incremental", "online"),
    )

    def __init__(
        self,
        *,
        memory_size: int = 2000,
        spatial_weight: float = 3.0,
        flat_weight: float = 1.0,
        margin: float = 0.6,
        proxies: int = 10,
        released: bool = False,
        balanced_options: PhaseOptions = _BALANCED_OPTIONS,
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        at_least(self, 1, proxies=proxies)
        super().__init__(
            memory_size=memory_size,
            balanced_options=balanced_options.filled(functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)),
            head=head or functools.partial(CosineHead, scale=1.0, learn_scale=True, proxies=proxies),
            **kwargs,
        )
        at_least(self, 0, spatial_weight=spatial_weight, flat_weight=flat_weight, margin=margin)
        self.spatial_weight, self.flat_weight = spatial_weight, flat_weight
        self.margin, self.released = margin, released
        self.teacher = Teacher()

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        backbone = self.network.backbone
        if not getattr(backbone, "has_maps", False):
            raise ValueError(
                f"PODNet: backbone is {type(backbone).__name__}, which has no maps of stages; use ResNet32 or another "
                "ResNet"
            )
        self.network.gives_maps = True

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.released:
            terms = {"nca": released_nca_loss(output.logits, batch.labels)}
        else:
            terms = {"nca": nca_loss(output.logits, batch.labels, self.margin * self.cosine_head.scale)}
        if not self.teacher or self.phase.name == BALANCED:  # there the features do not change
            return terms
        before = self.teacher(batch.images)
        r = math.sqrt(self.task.num_seen / self.task.num_new)
        terms["spatial"] = r * self.spatial_weight * pod_spatial(output.maps, before.maps)
        terms["flat"] = r * self.flat_weight * cosine_feature_distillation(output.features, before.features)
        return terms

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.teacher.learn_from(self.network)
