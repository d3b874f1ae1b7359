"""DRC: Dynamic Residual Classifier with model adaptation and fusion (Chen & Chang, ICCV 2023, arXiv:2308.13305).

The feature map h(x) of one backbone passes through two light branches, which are batch normalisation layers N and O,
and one linear head W serves both,

    z_N = W pool(N(h(x))) + b,   z_O = W pool(O(h(x))) + b,   prediction by z = z_N + z_O,  in the first task by z_N

The first task minimises CE(z_N, y). When a later task begins, the branches are merged: scale and shift of O become
the values of N in the second task, and in later tasks the mean of the values of O and N. The size of the network is
therefore constant. In a task, scale and shift of O are fixed, and its running statistics follow the data.

``adapt``, on the data of the task without exemplars, over the new classes alone:   L = CE(z_new, y). The result is the
teacher N. ``fuse``, on the data of the task and exemplars, from the weights of the teacher N, with new running
statistics of the branches:

    L = alpha L_ice + (1 - alpha) CE(s, y) + beta_O KD(s_old, z of teacher O) + beta_N KD(s_new, z_new of teacher N)
    L_ice = [ sum_{i old} CE(z_O,i, y_i) + sum_i CE(z_N,i, y_i) ] / (number of terms)
    s = z + log(pi^tau + 1e-12),   pi_c the frequency of class c in the data of the phase
    KD(z, z') = CE(softmax(z' / T), softmax(z / T))

Teacher O is the network before the task. The adjustment by pi makes the loss demand larger logits of rare classes;
predictions are not adjusted. alpha -> independent_weight, beta_O -> old_weight, beta_N -> new_weight,
tau -> prior_power, T -> temperature.

Of a backbone that is no ``ResNet``, h(x) are the features, normalised by BatchNorm1d.
Departs from the released code: teacher O of the second task is z_N, with which the first task predicts; the logarithm
in L_ice has no constant; exemplars are chosen by the features of the branches, not of h(x). Left out is the spatial
distillation (POD), which the code adds where the first task is large.
"""

import functools
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import ImageShape
from cl_lightning.checks import above, at_least, within
from cl_lightning.losses import cross_entropy, full_precision, row_factor, softmax_distillation
from cl_lightning.memory import Teacher
from cl_lightning.models import ExpandableBackbone, LinearHead, ResNet, feature_map, head_as, positions
from cl_lightning.strategy import Batch, ExemplarReplay, HeadFactory, Output, Phase, PhaseOptions, Task, Traits


class _Map(nn.Module):
    """The feature map of a backbone, see ``feature_map``."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return feature_map(self.backbone, images)


class Branch(nn.Module):
    """Batch normalisation of a feature map ``(B, d, h, w)``, or of features ``(B, d)``, and global average pooling."""

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, maps: Tensor) -> Tensor:
        return positions(self.norm(maps)).mean(dim=1)


class BranchedBackbone(ExpandableBackbone):
    """A backbone whose feature map passes through one or two branches: features ``[f_N, f_O]``, ``(B, n d)``.

    Args:
        image_shape: Channels, height, width.
        extractor: Builds the backbone for an image shape; None for ``MLP``.
    """

    def __init__(self, image_shape: ImageShape, **options: Any) -> None:
        super().__init__(image_shape, **options)
        (net,) = self.extractors
        norm = nn.BatchNorm2d if isinstance(net, ResNet) else nn.BatchNorm1d
        self.stem, self.extractors = _Map(net), nn.ModuleList([Branch(norm(self.width))])

    @property
    def norms(self) -> list[nn.BatchNorm1d | nn.BatchNorm2d]:
        """N, and O from the second task on."""
        return [cast(Branch, branch).norm for branch in self.extractors]

    @torch.no_grad()
    def merge(self) -> None:
        """Set scale and shift of O to the values of N, if there is no O yet, or to the mean of both."""
        if len(self.extractors) == 1:
            self.expand()
            self.norms[1].reset_running_stats()
            return
        new, old = self.norms
        old.weight.lerp_(new.weight, 0.5)
        old.bias.lerp_(new.bias, 0.5)


class BranchHead(LinearHead):
    """One linear classifier of all branches: the sum of their logits, ``sum_k (W f_k + b)``, of ``(B, n d)``.

    Args:
        num_features: Number of features of a branch, d.
        options: Options of ``LinearHead``.
    """

    def forward(self, features: Tensor) -> Tensor:
        branches = torch.split(features, self.num_features, dim=1)  # (B, d) each
        return torch.stack([super(BranchHead, self).forward(branch) for branch in branches]).sum(dim=0)


class DRC(ExemplarReplay):
    """A classifier with a residual branch for old classes, trained by adaptation to the new data and by fusion.

    Args:
        memory_size: K, in samples, over all classes and processes.
        independent_weight: alpha, in [0, 1].
        old_weight: beta_O, at least 0.
        new_weight: beta_N, at least 0.
        prior_power: tau, at least 0.
        temperature: T, above 0.
        adapt_options: Options of the phase ``adapt``, at least 1 epoch.
        fuse_options: Options of the phase ``fuse``, at least 1 epoch.
        head: Builds a ``BranchHead``; None for ``BranchHead``.
        kwargs: Options of the base class, apart from ``freeze_backbone`` and ``loss_classes``.
    """

    traits = Traits(
        family="rehearsal",
        paper="Chen & Chang, ICCV 2023, arXiv:2308.13305",
        keeps_exemplars=True,
        scenarios=("class-incremental", "online"),
        inputs=("image",),
    )

    def __init__(
        self,
        *,
        memory_size: int = 2000,
        independent_weight: float = 0.2,
        old_weight: float = 4.0,
        new_weight: float = 1.0,
        prior_power: float = 1.2,
        temperature: float = 2.0,
        adapt_options: PhaseOptions = PhaseOptions(),
        fuse_options: PhaseOptions = PhaseOptions(),
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(memory_size=memory_size, head=head or BranchHead, **kwargs)
        within(self, "[0, 1]", independent_weight=independent_weight)
        at_least(self, 0, old_weight=old_weight, new_weight=new_weight, prior_power=prior_power)
        above(self, 0, temperature=temperature)
        for name, options in (("adapt_options", adapt_options), ("fuse_options", fuse_options)):
            at_least(self, 1, **{f"{name}.epochs": options.epochs}, optional=True)
        if self.freeze_backbone:
            raise ValueError("DRC: freeze_backbone is True, but each task trains the backbone; use False")
        if self.loss_classes != "all":
            raise ValueError(f"DRC: loss_classes is {self.loss_classes!r}, but each phase has its own; use 'all'")
        self.independent_weight, self.old_weight, self.new_weight = independent_weight, old_weight, new_weight
        self.prior_power, self.temperature = prior_power, temperature
        self.adapt_options, self.fuse_options = adapt_options, fuse_options
        self.build_backbone = functools.partial(BranchedBackbone, extractor=self.build_backbone)
        self.old_teacher, self.new_teacher = Teacher(), Teacher()
        self._log_prior = torch.zeros(0)

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        head_as(self.network, BranchHead, self, "which serves both branches")

    @property
    def backbone(self) -> BranchedBackbone:
        """The backbone of the network."""
        return cast(BranchedBackbone, self.network.backbone)

    def begin_task(self, task: Task) -> None:
        if not task.is_first:
            self.old_teacher.learn_from(self.network)
            self.backbone.merge()
        super().begin_task(task)

    def phases(self, task: Task) -> list[Phase]:
        if task.is_first:
            return [Phase()]
        adapt = Phase("adapt", self.adapt_options, samples=lambda labels, replayed: ~replayed)
        fuse = Phase("fuse", self.fuse_options, samples=self._count)
        return [adapt, fuse] if task.num_new else [fuse]

    def trainable(self) -> Iterable[nn.Parameter]:
        backbone = self.backbone
        for module in (backbone.stem, backbone.extractors[0], self.network.head):
            yield from module.parameters()

    def _count(self, labels: Tensor, replayed: Tensor) -> None:
        """Compute log(pi^tau + 1e-12) when the phase begins or is resumed. Returns None: all samples are used."""
        counts = labels[labels >= 0].bincount(minlength=self.task.num_seen).double()
        self._log_prior = ((counts / counts.sum()) ** self.prior_power + 1e-12).log().float()

    def on_train_start(self) -> None:
        self._log_prior = self._log_prior.to(self.device)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.phase.name == "fuse":
            return self._fusion_losses(batch, output)
        if self.phase.name == "adapt":
            known = self.task.num_seen - self.task.num_new
            labels = (batch.labels - known).clamp(min=-1)
            weights = self.data.weights_of(batch)
            return {"ce": cross_entropy(output.logits[:, known:], labels, weights=weights)}
        return {"ce": self.classification_loss(output, batch)}

    def _fusion_losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        known, head, temperature = self.task.num_seen - self.task.num_new, self.network.head, self.temperature
        of_new, of_old = (full_precision(head(features)) for features in output.features.chunk(2, dim=1))  # z_N, z_O
        adjusted = output.logits + self._log_prior  # s
        counted, old = batch.labels >= 0, (batch.labels >= 0) & (batch.labels < known)
        every, only_old = (
            F.cross_entropy(logits, batch.labels, ignore_index=-1, reduction="none") for logits in (of_new, of_old)
        )
        independent = (every + only_old * old).sum() * row_factor(counted.sum() + old.sum(), batch)
        terms = {
            "independent": self.independent_weight * independent,
            "ce": (1 - self.independent_weight) * self.classification_loss(output._replace(logits=adjusted), batch),
        }
        target = self.old_teacher(batch.images).logits  # (batch, classes before this task)
        terms["old"] = self.old_weight * softmax_distillation(adjusted[:, : target.shape[1]], target, temperature)
        if self.new_teacher:
            target = self.new_teacher(batch.images).logits[:, known:]
            terms["new"] = self.new_weight * softmax_distillation(adjusted[:, known:], target, temperature)
        return terms

    def end_phase(self, phase: Phase) -> None:
        if phase.name == "adapt":
            self.new_teacher.learn_from(self.network)
            for norm in self.backbone.norms:
                norm.reset_running_stats()

    def end_task(self, task: Task) -> None:
        self.old_teacher.network = self.new_teacher.network = None
        super().end_task(task)
