"""RAPF: adaptive representation adjustment and parameter fusion (Huang et al., ECCV 2024, arXiv:2407.14143).

A linear map W from the features f(x) of a frozen image tower to the space of fixed text embeddings e_c of the class
names is trained on all tasks; text and images of CLIP are in one space before it:

    z_c(x) = s cos(W f(x), e_c)

Features of old classes are drawn from N(mu_c, Sigma_c), with mean and covariance of f(x), neither adapted by W nor
normalised. Each step draws R features of each of N old classes chosen at random, and K features of the old class o of
each hard pair, an old class o and a class n of the task whose embeddings are close:

    L = CE over the batch and the R N features
        + mean over the hard pairs of relu( cos(W f, e_n) - cos(W f, e_o) + m ),   f ~ N(mu_o, Sigma_o)
    hard pairs: || e_o - e_n || < threshold

When a task ends, from the second one on, W and its value W_old at the start of the task are fused in the basis of the
left singular vectors U of W_old:

    W_old = U S V^T,   P = U^T W,   Q = U^T W_old,   D = | P - Q |,   M = min(D / max D + b, 1)
    W <- U (M o P + (1 - M) o Q)      for || W_fused - W || <= (1 - b) || W - W_old ||

N -> replay_classes, R -> replay_samples (10 beta in the paper), K -> pair_samples (20 beta), threshold ->
pair_threshold, m -> margin, b -> fusion_bias. Sigma_c is the covariance + jitter I; with ``shrinkage`` it is shrunk
first, as for data sets with few images of each class. s is the scale of the ``TextHead``.
W begins at random, so that the zero-shot classifier is lost; ``initial="identity"``, which is ours, keeps it. Features
may have another size than the embeddings: U is square, in the space of the embeddings.
The embedding of a class is the mean over the templates of the file, where the paper has one template. The N classes
are drawn in each step; the released code goes through all old classes in a random order of each epoch. If a class
recurs, its features are pooled with its earlier ones, and it is an old class too.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import ImageShape
from cl_lightning.checks import at_least, one_of, within
from cl_lightning.distributed import world_size
from cl_lightning.losses import cross_entropy, full_precision, row_factor
from cl_lightning.memory import GaussianPrototypes
from cl_lightning.strategies.base import AddsLosses
from cl_lightning.strategies.pretrained.text import TextTower
from cl_lightning.strategy import Batch, Output, Phase, Task, Traits

Initial = Literal["random", "identity"]
_CLASSES, _REPLAY, _PAIRS = 0x4A9F1, 0x4A9F2, 0x4A9F3  # salts


@torch.no_grad()
def fused(old: Tensor, new: Tensor, bias: float = 0.6) -> Tensor:
    """``U (M o P + (1 - M) o Q)``: the entries of the new map that changed most, in the singular basis of the old one.

    Args:
        old, new: W_old and W, ``(e, d)``.
        bias: b, at least 0; the new map is returned for 1 and more, and for equal maps.

    Returns:
        ``(e, d)``; computed in float64.
    """
    basis = torch.linalg.svd(old.double()).U  # (e, e)
    before, after = basis.T @ old.double(), basis.T @ new.double()  # Q, P
    gap = (after - before).abs()
    largest = gap.max()
    share = (gap / largest + bias).clamp(max=1)  # M
    mixed = basis @ torch.lerp(before, after, share)
    return torch.where(largest > 0, mixed, new.double()).to(new.dtype)


def pair_hinge(projected: Tensor, old: Tensor, new: Tensor, margin: float = 0.1) -> Tensor:
    """``relu( cos(v, e_n) - cos(v, e_o) + m )`` of each row.

    Args:
        projected: v, projected features of old classes, ``(n, e)``.
        old, new: Embeddings e_o of their classes, and e_n of the classes that they are separated from, ``(n, e)``.
        margin: m.

    Returns:
        ``(n,)``, float32 or float64.
    """
    with torch.autocast(projected.device.type, enabled=False):
        directions = full_precision(projected)
        near, far = (F.cosine_similarity(directions, rows.to(directions.dtype), dim=1) for rows in (old, new))
    return F.relu(far - near + margin)


class RAPF(TextTower):
    """Features of old classes from Gaussians, separation of similar class names, and fusion of a linear map per task.

    Args:
        replay_classes: N, at least 0: number of old classes of which features are drawn in a step.
        replay_samples: R, at least 1.
        pair_samples: K, at least 0; 0 for no separation of hard pairs.
        pair_threshold: Largest distance of the embeddings of a hard pair, in [0, 2]; 0 for no pair.
        margin: m, at least 0.
        fusion_bias: b, at least 0: the smallest weight of the new map; 1 for no fusion.
        shrinkage: Weight of the mean variance and the mean covariance that are added to Sigma_c, at least 0.
        jitter: Variance that is added in each direction, above 0.
        initial: W at the start: ``random``, or the ``identity``, for features of the size of the embeddings.
        kwargs: Options of ``TextTower``.

    Attributes:
        gaussians: Distributions of the features of all classes.
        before: W_old, ``(e, d)``.
    """

    traits = Traits(
        family="pretrained",
        paper="Huang et al., ECCV 2024, arXiv:2407.14143",
        needs_pretrained=True,
        losses_use_images=False,
    )
    gaussians: GaussianPrototypes
    before: Tensor

    def __init__(
        self,
        *,
        replay_classes: int = 2,
        replay_samples: int = 20,
        pair_samples: int = 40,
        pair_threshold: float = 0.55,
        margin: float = 0.1,
        fusion_bias: float = 0.6,
        shrinkage: float = 0.0,
        jitter: float = 1e-4,
        initial: Initial = "random",
        **kwargs: Any,
    ) -> None:
        super().__init__(loss_classes="all", **kwargs)
        at_least(self, 0, replay_classes=replay_classes, pair_samples=pair_samples)
        at_least(self, 1, replay_samples=replay_samples)
        at_least(self, 0, margin=margin, fusion_bias=fusion_bias)
        within(self, "[0, 2]", pair_threshold=pair_threshold)
        one_of(self, get_args(Initial), initial=initial)
        GaussianPrototypes(1, jitter=jitter, shrinkage=shrinkage)  # so that values out of range raise here
        self.replay_classes, self.replay_samples = replay_classes, replay_samples
        self.pair_samples, self.pair_threshold, self.margin = pair_samples, pair_threshold, margin
        self.fusion_bias, self.initial = fusion_bias, initial
        self.shrinkage, self.jitter = shrinkage, jitter
        self._old = torch.zeros(0, dtype=torch.int64)  # columns of old classes, on the CPU
        self._pairs = torch.zeros(0, 2, dtype=torch.int64)  # columns o and n of each hard pair, on the CPU

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        head = self.text_head
        weight = head.project(identity=self.initial == "identity").weight
        self.gaussians = GaussianPrototypes(head.num_features, jitter=self.jitter, shrinkage=self.shrinkage)
        self.register_buffer("before", torch.zeros_like(weight))

    @property
    def _map(self) -> Tensor:
        """W, ``(e, d)``."""
        weight: Tensor = self.text_head.projection.weight  # type: ignore[assignment]
        return weight

    @torch.no_grad()
    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.before.copy_(self._map)

    def begin_phase(self, phase: Phase, origin: int, sources: Sequence[AddsLosses] = ()) -> None:
        super().begin_phase(phase, origin, sources)
        self._old = self.gaussians.known_columns()
        self._pairs = self._hard_pairs()

    def _hard_pairs(self) -> Tensor:
        rows, new = self.text_head.weight().cpu(), torch.tensor(self.task.columns)
        gaps = torch.cdist(rows[self._old], rows[new])
        pairs = torch.stack([self._old.repeat_interleave(len(new)), new.repeat(len(self._old))], dim=1)
        return pairs[(gaps.flatten() < self.pair_threshold) & (pairs[:, 0] != pairs[:, 1])]

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        logits, labels, weights = output.logits, batch.labels, self.data.weights_of(batch)
        chosen = self._old[torch.randperm(len(self._old), generator=batch.draw.fork(_CLASSES).generator())]
        replayed = chosen[: self.replay_classes].repeat_interleave(self.replay_samples)
        if len(replayed):
            features, own = self._draw(batch, replayed, _REPLAY)
            logits = torch.cat([logits, self.text_head(features)])
            labels = torch.cat([labels, replayed[own].to(labels.device)])
            weights = None if weights is None else torch.cat([weights, weights.new_ones(len(features))])
        count = (labels >= 0).sum()
        mean = cross_entropy(logits, labels, weights=weights)
        terms = {"ce": mean * count * row_factor(count, batch)}
        if self.pair_samples and len(self._pairs):
            terms["pairs"] = self._pair_loss(batch)
        return terms

    def _pair_loss(self, batch: Batch) -> Tensor:
        pairs = self._pairs.repeat_interleave(self.pair_samples, dim=0)
        features, own = self._draw(batch, pairs[:, 0], _PAIRS)
        old, new = self.text_head.weight()[pairs[own].to(self.device)].unbind(1)
        hinges = pair_hinge(self.text_head.embed(features), old, new, self.margin)
        return hinges.sum() * (world_size() / (len(pairs) * batch.weight))

    def _draw(self, batch: Batch, columns: Tensor, salt: int) -> tuple[Tensor, slice]:
        """A feature of each of the given classes, on the CPU, that are this process's share, and their places."""
        share = batch.draw.share(len(columns), salt)
        own = slice(share.start, share.stop)
        return self.gaussians.sample(columns[own], share.randn(self.gaussians.num_features, device=self.device)), own

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        super().end_task(task)
        if not task.is_first:
            self._map.copy_(fused(self.before, self._map, self.fusion_bias))
        features, labels = self.passes.features()
        self.gaussians.update(features, labels, num_classes=task.num_seen)

    def bytes_kept(self) -> dict[str, int]:
        return {**super().bytes_kept(), "projection": self.before.nbytes}
