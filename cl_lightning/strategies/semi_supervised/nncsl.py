"""NNCSL, soft nearest neighbours for continual semi-supervised learning (Kang, Fini, Nabi, Ricci, Alahari, ICCV 2023,
arXiv:2212.05102).

A projection g of features h = f(x) gives z = g(h). The soft nearest neighbour of x among support samples s_j, labelled
samples of the task and of a class-balanced memory, with smoothed one-hot labels L_j, is

    p(x) = sum_j softmax_j( <z, z_j> / (t ||z|| ||z_j||) ) L_j,      L_jc = (1 - e) [c = y_j] + e / C

In a step each unlabelled sample has two large views and some small ones, and each class seen has S supports in two
views. With S_T(p) = p^(1/T) / sum_c p_c^(1/T), supports and classes of the current task alone for p, supports and
classes of past tasks alone for q, q_old from the network before the task, and linear logits l(h) over all classes

    L = L_snn + L_me + w_l L_lin + w_d ( a L_feat + (1 - a) L_nnd )

    L_snn  = mean over views of CE(target, p)
    L_me   = sum_c m_c log m_c,  m = mean over all views of S_T(p)
    L_lin  = mean over the supports of CE(l(h), y)
    L_nnd  = mean over the large views of CE(q_old, q)       L_feat = mean of (r(h) - h_old)^2, r linear, same views

The target of a large view is S_T(p) of the other one, of a small view the mean over both large ones. Targets have no
gradient, and entries below 1e-4 are set to 0. There is no L_nnd and no L_feat in the first task.
t -> temperature, T -> sharpening, e -> smoothing, S -> supports_per_class, w_l -> linear_weight, w_d ->
distill_weight, a -> feature_share. Predictions are by l.
Departs from the paper: any optimizer in place of LARS; a small view is resized to the size of the images, since
backbones here take images of one size. All samples of the task are in the unlabelled batches, also the labelled ones,
without their labels. Not in our source, and chosen here: that L_nnd is over large views, the sizes of the views, and
normalisation before the projection's two hidden activations only.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import ImageShape, join
from cl_lightning.checks import above, at_least, within
from cl_lightning.data import Compose, Context, LabelledRows, RandomResizedCrop, Transform, apart
from cl_lightning.losses import cross_entropy, full_precision, rows_of_all
from cl_lightning.memory import ClassBalanced, Memory, Teacher
from cl_lightning.models import frozen_copy
from cl_lightning.strategies.base import MemoryReplay, sum_of_zeros
from cl_lightning.strategy import Batch, Output, Phase, Task, Traits

_VIEW = 0x5A1
_SMALL = (0.3, 0.75)  # share of the area of the image
_LEAST = 1e-4


def soft_neighbours(
    queries: Tensor, supports: Tensor, labels: Tensor, temperature: float, inside: Tensor | None = None
) -> Tensor:
    """p of each query, ``(n, C)``; rows sum to 1 if the rows of the labels do.

    Args:
        queries: z, ``(n, d)``.
        supports: z of the support samples, ``(m, d)``.
        labels: L, ``(m, C)``.
        temperature: t, above 0.
        inside: Support samples that count, bool ``(m,)``; None for all. Selecting their rows would wait for the device.
    """
    queries, supports = (F.normalize(full_precision(rows), dim=1) for rows in (queries, supports))
    with torch.autocast(queries.device.type, enabled=False):
        scores = queries @ supports.T / temperature
        scores = scores if inside is None else scores.masked_fill(~inside, -torch.inf)
        p: Tensor = scores.softmax(dim=1) @ labels.to(queries.dtype)
    return p


def smoothed(labels: Tensor, columns: Tensor, smoothing: float) -> Tensor:
    """L over some classes, float32 ``(m, columns)``.

    Args:
        labels: Columns, int64 ``(m,)``, each among ``columns``.
        columns: Classes, int64 ``(C,)``.
        smoothing: e, in [0, 1).
    """
    own = (labels[:, None] == columns).float()
    return (1 - smoothing) * own + smoothing / max(len(columns), 1)


def sharp(probabilities: Tensor, sharpening: float) -> Tensor:
    """S_T(p), ``(n, C)``."""
    powers: Tensor = full_precision(probabilities) ** (1 / sharpening)
    return powers / powers.sum(dim=1, keepdim=True)


def view_targets(first: Tensor, second: Tensor, small: int, sharpening: float) -> Tensor:
    """Targets of the first and the second large views and of all small views, in this order, without gradient.

    Args:
        first, second: p of the large views, ``(n, C)``.
        small: Number of small views of each sample.
        sharpening: T, above 0.
    """
    one, two = (sharp(p.detach(), sharpening) for p in (first, second))
    targets = torch.cat([two, one, *([(one + two) / 2] * small)])
    return torch.where(targets < _LEAST, 0.0, targets)


def soft_cross_entropy(targets: Tensor, probabilities: Tensor) -> Tensor:
    """CE(target, p), the mean over rows of ``- sum_c target_c log p_c``, in nats; 0 without rows."""
    logs = probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()
    return -(targets * logs).sum() / max(len(targets), 1)


def negative_entropy_of_mean(probabilities: Tensor, sharpening: float) -> Tensor:
    """L_me, in [-log C, 0]; 0 without rows."""
    mean = sharp(probabilities, sharpening).sum(dim=0) / max(len(probabilities), 1)
    return (mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()


class Projections(nn.Module):
    """g, its copy from before the task, and r.

    Args:
        features: Size of h.
        hidden: Width of the two hidden layers of g.
        width: Size of z.
    """

    kept_as: ClassVar[str] = "projections"

    def __init__(self, features: int, hidden: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size in (features, hidden):
            layers += [nn.Linear(size, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
        self.width = width
        self.now = nn.Sequential(*layers, nn.Linear(hidden, width))
        self.before = frozen_copy(self.now)
        self.regression = nn.Linear(features, features)

    def num_bytes(self) -> int:
        """Size in bytes."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def forward(self, features: Tensor, *, before: bool = False) -> Tensor:
        """z of all rows; 0 for a single row of a process, of which batch normalisation has no statistics."""
        projection = self.before if before else self.now
        if len(features) < 2 and self.training:
            nothing = sum_of_zeros([features, *projection.parameters()])
            return features.new_zeros(len(features), self.width) + nothing
        projected: Tensor = projection(features)
        return projected


class NNCSL(MemoryReplay):
    """Soft nearest neighbours among labelled samples, consistent over views, and distilled from the task before.

    Args:
        memory_size: Number of samples in the memory, over all processes, at least 1; it has the supports of past
            classes.
        supports_per_class: S, at least 1.
        small_views: Number of small views, at least 0.
        temperature: t, above 0.
        sharpening: T, above 0.
        smoothing: e, in [0, 1).
        linear_weight: w_l, at least 0.
        distill_weight: w_d, at least 0.
        feature_share: a, in [0, 1].
        hidden: Width of the two hidden layers of the projection, at least 1.
        width: Width of its output, at least 1.
        transforms: Augmentation of a small view; None for a crop of 0.3 to 0.75 of the area.
        kwargs: Options of ``MemoryReplay``, apart from ``policy`` and ``replay_size``.
    """

    traits = Traits(
        family="semi-supervised",
        paper="Kang et al., ICCV 2023, arXiv:2212.05102",
        keeps_exemplars=True,
        needs_empty_batches=True,
        uses_unlabelled=True,
        inputs=("image",),
        scenarios=("class-incremental",),
        remedy="past classes are distilled from the network before the task; use tasks of new classes in epochs",
    )

    def __init__(
        self,
        *,
        memory_size: int = 500,
        supports_per_class: int = 5,
        small_views: int = 2,
        temperature: float = 0.1,
        sharpening: float = 0.25,
        smoothing: float = 0.1,
        linear_weight: float = 0.005,
        distill_weight: float = 0.2,
        feature_share: float = 0.0,
        hidden: int = 512,
        width: int = 128,
        transforms: list[Transform] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("policy") is not None or kwargs.get("replay_size") is not None:
            raise ValueError(
                "NNCSL: policy and replay_size are given, but the memory is class-balanced and supports are drawn from "
                "it by class; leave them out"
            )
        kwargs.pop("policy", None)
        super().__init__(memory_size=memory_size, policy=ClassBalanced(), **kwargs)
        if self.loss_classes != "all":
            raise ValueError(
                f"NNCSL: loss_classes is {self.loss_classes!r}, but supports are of all classes; use 'all'"
            )
        at_least(self, 1, memory_size=memory_size)
        at_least(self, 1, supports_per_class=supports_per_class, hidden=hidden, width=width)
        at_least(self, 0, small_views=small_views, linear_weight=linear_weight, distill_weight=distill_weight)
        above(self, 0, temperature=temperature, sharpening=sharpening)
        within(self, "[0, 1)", smoothing=smoothing)
        within(self, "[0, 1]", feature_share=feature_share)
        self.rows = LabelledRows(per_class=supports_per_class, unlabelled="all")
        self.small_views, self.temperature, self.sharpening = small_views, temperature, sharpening
        self.smoothing, self.linear_weight, self.distill_weight = smoothing, linear_weight, distill_weight
        self.feature_share, self.hidden, self.width = feature_share, hidden, width
        self.small = None if transforms is None else Compose(transforms)
        self.teacher = Teacher(reference=True)

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.projections = Projections(self.network.head.num_features, self.hidden, self.width)

    def phases(self, task: Task) -> list[Phase]:
        return [Phase(labelled=self.rows)]

    def frozen(self) -> Any:
        yield from super().frozen()
        yield self.projections.before

    def trainable(self) -> Any:
        yield from super().trainable()
        yield from self.projections.now.parameters()
        if self.feature_share > 0 and self.teacher:
            yield from self.projections.regression.parameters()

    def replay_memory(self) -> Memory | None:
        return self.memory

    # ------------------------------------------------------------------ a step

    def prepare_batch(self, batch: Batch) -> Batch:
        unlabelled, supports = apart(batch)
        parts = {"large 0": unlabelled, "large 1": self._view(unlabelled, 1)}
        parts |= {f"small {k}": self._small_view(unlabelled, k) for k in range(self.small_views)}
        return join({**parts, "support 0": supports, "support 1": self._view(supports, 1)})

    def _view(self, part: Batch, number: int) -> Batch:
        return self.data.augment(part.replace(draw=part.draw.fork(_VIEW, number)))

    def _small_view(self, part: Batch, number: int) -> Batch:
        draw = part.draw.fork(_VIEW, 2 + number)
        crop = self.small or RandomResizedCrop((part.raw.shape[-2], part.raw.shape[-1]), scale=_SMALL)
        context = Context(indices=part.indices, epoch=self.epoch, seed=self.seed)
        return self.data.augment(part.replace(raw=crop(part.raw, draw, context), draw=draw)).replace(raw=part.raw)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        rows_of, factor = rows_of_all(batch)
        views = [name for name in batch.parts if not name.startswith("support")]
        supports = [name for name in batch.parts if name.startswith("support")]
        labels = torch.cat([rows_of(batch.parts[name][1].labels) for name in supports])
        slices = {name: rows for name, (rows, _) in batch.parts.items()}
        logits = torch.cat([rows_of(output.logits[slices[name]]) for name in supports])
        terms = {"linear": self.linear_weight * factor * cross_entropy(logits, labels)}

        z = self.projections(output.features)
        z_of = {name: rows_of(z[slices[name]]) for name in batch.parts}
        queries, held = torch.cat([z_of[name] for name in views]), torch.cat([z_of[name] for name in supports])
        new, old = self._columns()
        p = self._neighbours(queries, held, labels, new)
        first, second = p[: len(z_of["large 0"])], p[len(z_of["large 0"]) : 2 * len(z_of["large 0"])]
        targets = view_targets(first, second, self.small_views, self.sharpening)
        terms["snn"] = factor * soft_cross_entropy(targets, p)
        terms["entropy"] = factor * negative_entropy_of_mean(p, self.sharpening)
        if not self.teacher:
            return terms

        large = ("large 0", "large 1")
        before = self.teacher(batch.images).features
        z_before = self.projections(before, before=True)
        held_before = torch.cat([rows_of(z_before[slices[name]]) for name in supports])
        queries_before = torch.cat([rows_of(z_before[slices[name]]) for name in large])
        queries = torch.cat([z_of[name] for name in large])
        q_before = self._neighbours(queries_before, held_before, labels, old).detach()
        q = self._neighbours(queries, held, labels, old)
        distilled = (1 - self.feature_share) * factor * soft_cross_entropy(q_before, q)
        if self.feature_share > 0:
            errors = (
                (full_precision(self.projections.regression(output.features)) - full_precision(before))
                .square()
                .mean(dim=1)
            )
            of_large = torch.cat([rows_of(errors[slices[name]]) for name in large])
            distilled = distilled + self.feature_share * factor * of_large.sum() / max(len(of_large), 1)
        terms["distill"] = self.distill_weight * distilled
        return terms

    def _columns(self) -> tuple[Tensor, Tensor]:
        """Classes of the current task, and all earlier ones, int64."""
        every = torch.arange(self.task.num_seen, device=self.device)
        return every[self.task.num_seen - self.task.num_new :], every[: self.task.num_seen - self.task.num_new]

    def _neighbours(self, queries: Tensor, supports: Tensor, labels: Tensor, columns: Tensor) -> Tensor:
        """p among the supports of some classes."""
        inside = (labels[:, None] == columns).any(dim=1)
        given = smoothed(labels, columns, self.smoothing)
        return soft_neighbours(queries, supports, given, self.temperature, inside)

    # ------------------------------------------------------------------ the end of a task

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.teacher.learn_from(self.network)
        self.projections.before.load_state_dict(self.projections.now.state_dict())
        for batch in self.passes.batches():
            self.offer(batch)
