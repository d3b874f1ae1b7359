"""EASE, Expandable Subspace Ensemble (Zhou et al., CVPR 2024, arXiv:2403.12030).

A frozen pretrained backbone gets a new adapter A_t in each task t, numbered from 0; earlier adapters do not change. A_t
and a temporary cosine classifier with a learnt scale s are trained on the classes of the task:

    L = CE(s cos(phi_t(x), w), y over the classes of the task),   phi_j(x): features with adapter A_j alone

When the task ends, the classes of the task get their means in all subspaces j <= t. An old class c, of task i < j, has
no images in subspace j, so its mean there is synthesised from the classes K_j that have one (tasks j to t):

    p[c, j] = sum_{k in K_j} S_ck p[k, j],   S_ck = softmax over K_j of cos(p[c, i], p[k, i])

    score_c(x) = cos(phi_i(x), p[c, i]) + alpha / t sum_{j != i} cos(phi_j(x), p[c, j]) + beta cos(phi(x), p[c])

i: task of class c, t: newest task; there is no second term after task 0. alpha -> other_weight, beta ->
pretrained_weight. phi(x), the features without an adapter, are used only if beta > 0. A prediction takes one forward
pass for each adapter. The softmax over cosines is nearly uniform: two of its weights differ by a factor of at most e^2.

With ``refresh``, as in the code, the synthesised means of all subspaces are computed again after each task; without it,
only those of the newest subspace are, from the classes of the newest task.
If a class recurs, p[c, j] is its mean over all its images since A_j exists, i is the last task that contains it, and
its row of the temporary classifier continues from its earlier value. Departs from the code, which infers the task of a
class from its column, for equally many classes in each task.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import ImageShape
from cl_lightning.checks import at_least
from cl_lightning.losses import full_precision
from cl_lightning.memory import GrowingBuffers, Prototypes, class_statistics, restore_shapes
from cl_lightning.models import Adapter, CosineHead, Network, PeftFactory, PeftSets, SideBySide
from cl_lightning.strategy import Batch, ContinualStrategy, HeadFactory, Output, Task, Traits


def synthesised(means: Tensor, known: Tensor, space: int) -> Tensor:
    """Means in one subspace; the means of classes without images there are weighted means of the other classes.

        p[c, j] = sum_k softmax_k(cos(p[c, i], p[k, i])) p[k, j]     over the classes k that are known in subspace j

    Args:
        means: p, ``(C, T, d)``; used where ``known``.
        known: Whether p[c, j] is a mean of images, bool ``(C, T)``. A class is known in the subspaces 0 to i, where i
            is its own, or in none.
        space: j.

    Returns:
        ``(C, d)``; 0 for classes that are known in no subspace.
    """
    filled = torch.zeros_like(means[:, space])
    donors = known[:, space].nonzero().squeeze(1)
    filled[donors] = means[donors, space]
    missing = (known.any(dim=1) & ~known[:, space]).nonzero().squeeze(1)
    own = known[missing].sum(dim=1) - 1  # i
    mine = F.normalize(means[missing, own], dim=1)  # (m, d)
    theirs = F.normalize(means[donors][:, own], dim=2)  # (k, m, d)
    weights = torch.einsum("md,kmd->mk", mine, theirs).softmax(dim=1)
    filled[missing] = weights @ means[donors, space]
    return filled


class SubspacePrototypes(GrowingBuffers):
    """Mean of each class in several feature spaces; the row of a class without images in a space is synthesised.

    Args:
        num_features: Size of a feature vector of one space, d.

    Attributes:
        means: ``(C, T, d)``; 0 for classes without images.
        counts: Number of images in each mean, int64 ``(C, T)``; 0 for a synthesised mean.
    """

    kept_as: ClassVar[str] = "prototypes"
    means: Tensor
    counts: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(0, 0, num_features))
        self.register_buffer("counts", torch.zeros(0, 0, dtype=torch.int64))

    @property
    def known(self) -> Tensor:
        """Whether the mean of a class in a space is a mean of images, bool ``(C, T)``."""
        return self.counts > 0

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor, num_classes: int, *, refresh: bool = True) -> None:
        """Pool features with the means of their classes, and synthesise means.

        Sums are reduced over processes. Each process must call this.

        Args:
            features: This process's share, ``(n, T, d)``, in all spaces so far.
            labels: Columns, int64 ``(n,)``; -1 for unlabelled samples.
            num_classes: C, number of classes seen so far.
            refresh: Whether the synthesised means of all spaces are computed again, or only those of the last space.
        """
        spaces, width = features.shape[1:]
        rows, columns = num_classes - len(self.counts), spaces - self.counts.shape[1]
        before = F.pad(self.means, (0, 0, 0, columns, 0, rows)).double()
        n = F.pad(self.counts, (0, columns, 0, rows))
        fresh = class_statistics(features.flatten(1), labels, num_classes, covariance=False)
        m = fresh.counts[:, None]
        gap = fresh.means.view(num_classes, spaces, width) - before
        means = before + (m / (n + m).clamp(min=1))[..., None] * gap  # a synthesised mean has n = 0
        self.counts = n + m
        for space in range(spaces):
            if refresh or space == spaces - 1:
                means[:, space] = synthesised(means, self.known, space)
            else:
                means[:, space] = torch.where(self.known[:, space, None], means[:, space], before[:, space])
        self.means = means.to(self.means.dtype)

    def scores(self, features: Tensor, num_classes: int, other_weight: float) -> Tensor:
        """Cosine in the space of the class, plus the mean cosine in the other spaces times a weight.

        Computed in float32 or float64.

        Args:
            features: Features in each space, ``(T, B, d)``.
            num_classes: Number of columns of the result.
            other_weight: alpha.

        Returns:
            ``(B, num_classes)``, minus infinity for classes without images.
        """
        features = full_precision(features)
        classes, spaces = self.counts.shape
        own = self.known.sum(dim=1) - 1  # i; -1 for a class without images
        weights = features.new_full((classes, spaces), other_weight / max(spaces - 1, 1))
        weights.scatter_(1, own.clamp(min=0)[:, None], 1.0)
        with torch.autocast(features.device.type, enabled=False):
            means = F.normalize(self.means.to(features.dtype), dim=2)
            cosines = torch.einsum("tbd,ctd->bct", F.normalize(features, dim=2), means)
        scores = features.new_full((features.shape[1], num_classes), -torch.inf)
        scores[:, :classes] = (weights * cosines).sum(dim=2).masked_fill(own < 0, -torch.inf)
        return scores

    def num_bytes(self) -> int:
        """Size of the buffers in bytes."""
        return self.means.nbytes + self.counts.nbytes

    def restore_buffers(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        restore_shapes(self, state_dict, prefix, ("means", "counts"), keep_dtype=True)


class EASE(ContinualStrategy):
    """An adapter per task in a frozen backbone, and class means in the feature spaces of all adapters.

    Args:
        peft: Builds the module of a task for the backbone; None for ``Adapter``.
        other_weight: alpha, weight of the mean cosine in the spaces of the other tasks, at least 0.
        pretrained_weight: beta, weight of the cosine of features without an adapter, at least 0.
        refresh: Whether synthesised means are computed again in all spaces after each task.
        head: Builds the temporary classifier; None for ``CosineHead`` with a learnt scale that begins each task at 1.
        kwargs: Options of the base class.
    """

    traits = Traits(family="pretrained", paper="Zhou et al., CVPR 2024, arXiv:2403.12030", needs_pretrained=True)

    def __init__(
        self,
        *,
        peft: PeftFactory | None = None,
        other_weight: float = 0.1,
        pretrained_weight: float = 0.0,
        refresh: bool = True,
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        cosine = functools.partial(CosineHead, scale=1.0, learn_scale=True)
        super().__init__(head=head or cosine, loss_classes="current", freeze_backbone=False, **kwargs)
        at_least(self, 0, other_weight=other_weight, pretrained_weight=pretrained_weight)
        self.other_weight, self.pretrained_weight, self.refresh = other_weight, pretrained_weight, refresh
        self.build_backbone = functools.partial(PeftSets, backbone=self.build_backbone, peft=peft or Adapter)
        self.subspaces: SubspacePrototypes
        self.unadapted: Prototypes  # class means of phi(x); without rows if beta is 0

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.subspaces = SubspacePrototypes(self._sets.num_features)
        self.unadapted = Prototypes(self._sets.num_features)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self._sets.add()
        self.network.head.reset_shared(self.build_head)

    def frozen(self) -> Iterable[nn.Module]:
        return [self._sets.base, *self._sets.sets[:-1]]

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}  # over the classes of the task

    def end_task(self, task: Task) -> None:
        count, width = len(self._sets.sets), self._sets.num_features
        spaces = [*range(count), *([None] if self.pretrained_weight else [])]
        features, labels = self.passes.features(Network(SideBySide(self._sets, spaces), self.network.head))
        adapted = features[:, : count * width].reshape(len(features), count, width)
        self.subspaces.update(adapted, labels, task.num_seen, refresh=self.refresh)
        if self.pretrained_weight:
            self.unadapted.update(features[:, count * width :], labels, num_classes=task.num_seen)

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        num_classes, count = self.network.head.num_columns, self.subspaces.counts.shape[1]
        if not count:  # the first task is being trained
            return self.network.classify(images)
        scores = self.subspaces.scores(self._sets.features(images, range(count)), num_classes, self.other_weight)
        if self.pretrained_weight:
            plain = self._sets.features(images, [None])[0]
            scores = scores + self.pretrained_weight * self.unadapted.scores(plain, num_classes, "cosine")
        return scores

    def predict_within_task(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        return self.network.classify(images)

    @property
    def _sets(self) -> PeftSets:
        return cast(PeftSets, self.network.backbone)
