"""Forward compatible training, FACT (Zhou et al., CVPR 2022, arXiv:2203.06953).

In the base session, V virtual prototypes v, one for each class of the later sessions, reserve space in the cosine
classifier of the K base classes. They are fixed and orthogonal. With z = s [cos(f(x), w), cos(f(x), v)] over all K + V
classes, and z without y the logits with -inf in place of z_y,

    L  = CE(z of the base classes, y) + gamma (L2 + L3 + L4)
    L2 = CE(z without y, v^),             v^ the best of the virtual classes that y may have as its second class
    m  = b g(x_i) + (1 - b) g(x_j),       y_i != y_j, b ~ Beta(alpha, alpha) for the batch, f = h(g(x))
    L3 = CE(z(m), v^),                    v^ the best virtual class of m
    L4 = CE(z(m) without v^, k^),         k^ the best base class of m

Each virtual class may be the second one of ``tied`` random base classes; a class without any has no L2. Later sessions
use class means, as ``ProtoCosine``. With c the means of the classes seen so far, an image is scored by

    p = eta softmax_c( sum_v cos(f(x), v) cos(v, c) ) + (1 - eta) softmax_c( s cos(f(x), c) )

where the first sum has the ``nearest`` virtual classes of f(x). Scores are log p. s -> scale, gamma -> reserve_weight,
alpha -> mix_alpha, eta -> virtual_weight. With V = 0, a stream of one session, the method is ``ProtoCosine``.
Departs from the authors' code: there the virtual classes that y may not have get the logit 0, above negative logits of
others; here they are left out. There cos(v, c) has the norm of each feature over the classes in place of the norm of c.
g has all stages of the backbone but the last one (two of three in ResNet-20), and the last epoch is used, not the epoch
of the best test accuracy.
"""

import functools
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Batch, Draw, ImageShape, mix
from cl_lightning.checks import above, at_least, within
from cl_lightning.distributed import all_gather_together
from cl_lightning.losses import cross_entropy, full_precision
from cl_lightning.memory import GrowingBuffers, PrototypeHead
from cl_lightning.strategies.few_shot.proto_cosine import ProtoCosine
from cl_lightning.strategy import Output, Task

_RESERVE, _MIX = 0xFAC7, 0xFAC8  # salts of draws
_IMAGES, _CHOSEN = "fact.images", "fact.chosen"


class VirtualPrototypes(GrowingBuffers):
    """Fixed directions that are reserved for later classes.

    Args:
        num_features: d.
        tied: Number of base classes that may have a virtual class as their second one.

    Attributes:
        rows: Unit vectors, float32 ``(V, d)``; orthogonal if V <= d, else the columns are.
        owners: Columns of the base classes of each virtual class, int64 ``(V, tied)``.
    """

    kept_as: ClassVar[str] = "prototypes"
    rows: Tensor
    owners: Tensor

    def __init__(self, num_features: int, tied: int = 3) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(0, num_features))
        self.register_buffer("owners", torch.zeros(0, tied, dtype=torch.int64))

    def reserve(self, count: int, base: int, key: int) -> None:
        """Draw the virtual classes.

        Args:
            count: V.
            base: K, number of base classes, at least 1.
            key: Seed.
        """
        draw = Draw.of(count, key)
        normal = draw.randn(self.rows.shape[1]).double()
        wide = count <= normal.shape[1]
        orthogonal = torch.linalg.qr(normal.T if wide else normal).Q if count else normal
        rows = orthogonal.T if wide and count else orthogonal
        self.rows = F.normalize(rows, dim=1).float().to(self.rows.device)
        places = draw.fork(1).rand(base).argsort(dim=1)  # the first ones are drawn without replacement
        self.owners = places[:, torch.arange(self.owners.shape[1]) % base].to(self.owners.device)

    def allowed(self, labels: Tensor) -> Tensor:
        """Virtual classes that samples may have as their second class, bool ``(B, V)``, of columns ``(B,)``."""
        return (self.owners == labels[:, None, None]).any(dim=2)

    def cosines(self, vectors: Tensor) -> Tensor:
        """Cosines of vectors ``(B, d)`` with the virtual prototypes, ``(B, V)``, in float32 or float64."""
        vectors = full_precision(vectors)
        return F.normalize(vectors, dim=1) @ self.rows.to(vectors.dtype).T

    def num_bytes(self) -> int:
        return self.rows.nbytes + self.owners.nbytes


def second_class_loss(base: Tensor, virtual: Tensor, labels: Tensor, allowed: Tensor) -> Tensor:
    """L2, mean over all rows; a row without an allowed virtual class has the loss 0.

    Args:
        base: Logits of the base classes, ``(B, K)``.
        virtual: Logits of the virtual classes, ``(B, V)``.
        labels: Columns, int64 ``(B,)``.
        allowed: bool ``(B, V)``.
    """
    best = virtual.masked_fill(~allowed, -torch.inf).argmax(dim=1) + base.shape[1]
    others = torch.cat([base.scatter(1, labels[:, None], -torch.inf), virtual], dim=1)
    return cross_entropy(others, torch.where(allowed.any(dim=1), best, -1)) * allowed.any(dim=1).float().mean()


def mixture_losses(base: Tensor, virtual: Tensor) -> tuple[Tensor, Tensor]:
    """L3 and L4 of each mixture.

    Args:
        base: Logits of the base classes, ``(B, K)``.
        virtual: Logits of the virtual classes, ``(B, V)``.

    Returns:
        Two losses, ``(B,)`` each, in nats.
    """
    best, kind = virtual.argmax(dim=1), base.argmax(dim=1)
    joint = torch.cat([base, virtual], dim=1)
    third = F.cross_entropy(joint, best + base.shape[1], reduction="none")
    without = joint.scatter(1, best[:, None] + base.shape[1], -torch.inf)
    return third, F.cross_entropy(without, kind, reduction="none")


class VirtualPrototypeHead(PrototypeHead):
    """Cosines with class means, and cosines with class means by way of virtual prototypes.

    Args:
        num_features: d.
        scale: s, above 0.
        virtual_weight: eta, in [0, 1].
        nearest: Number of virtual classes that count for a sample, at least 1.
        tied: As for :class:`VirtualPrototypes`.
    """

    def __init__(
        self,
        num_features: int,
        *,
        scale: float = 16.0,
        virtual_weight: float = 0.1,
        nearest: int = 40,
        tied: int = 3,
    ) -> None:
        super().__init__(num_features, metric="cosine")
        self.scale, self.virtual_weight, self.nearest = scale, virtual_weight, nearest
        self.virtual = VirtualPrototypes(num_features, tied)

    def classify(self, features: Tensor) -> Tensor:
        """log p, ``(B, columns)``, of features ``(B, d)``; -inf for classes without a mean."""
        with torch.autocast(features.device.type, enabled=False):
            cosines = super().classify(features)
            if not len(self.virtual.rows) or not self.virtual_weight:
                return F.log_softmax(self.scale * cosines, dim=1)
            near = self.virtual.cosines(features)  # (B, V)
            top = near.topk(min(self.nearest, near.shape[1]), dim=1)
            near = torch.zeros_like(near).scatter(1, top.indices, top.values)
            means = self.prototypes.means[: cosines.shape[1]].to(near.dtype)
            by_way = (near @ self.virtual.cosines(means).to(near.dtype).T).masked_fill(cosines.isneginf(), -torch.inf)
            eta = self.virtual_weight
            return (eta * by_way.softmax(dim=1) + (1 - eta) * (self.scale * cosines).softmax(dim=1)).log()


class FACT(ProtoCosine):
    """Virtual prototypes reserve space for the classes of later sessions while the base session is trained.

    Args:
        scale: s, above 0.
        reserve_weight: gamma, at least 0; 0.001 in the authors' code for CIFAR-100, 0.01 for larger images.
        mix_alpha: alpha, above 0; 2.0 in the authors' code for CUB-200.
        virtual_weight: eta, in [0, 1].
        start_epoch: First epoch, counted from 0, with L2, L3 and L4; 150 in the authors' code for miniImageNet.
        nearest: Number of virtual classes that count for a test sample, at least 1.
        tied: Number of base classes that may have a virtual class as their second class, at least 1.
        kwargs: Options of ``ProtoCosine``.
    """

    traits = ProtoCosine.traits.but(paper="Zhou et al., CVPR 2022, arXiv:2203.06953")

    def __init__(
        self,
        *,
        scale: float = 16.0,
        reserve_weight: float = 0.001,
        mix_alpha: float = 0.5,
        virtual_weight: float = 0.1,
        start_epoch: int = 0,
        nearest: int = 40,
        tied: int = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(scale=scale, **kwargs)
        at_least(self, 0, reserve_weight=reserve_weight, start_epoch=start_epoch)
        at_least(self, 1, nearest=nearest, tied=tied)
        above(self, 0, mix_alpha=mix_alpha)
        within(self, "[0, 1]", virtual_weight=virtual_weight)
        self.build_head = functools.partial(
            VirtualPrototypeHead, scale=scale, virtual_weight=virtual_weight, nearest=nearest, tied=tied
        )
        self.scale, self.reserve_weight = scale, reserve_weight
        self.mix_alpha, self.start_epoch = mix_alpha, start_epoch

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        if self.adapt:
            self._adapted.base.divide()  # raises errors before training

    @property
    def virtual(self) -> VirtualPrototypes:
        """The virtual prototypes."""
        head = self._session_head.final if self.adapt else self.network.head
        assert isinstance(head, VirtualPrototypeHead)
        return head.virtual

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if task.is_first:
            later = len(self.data.stream.order) - task.num_new
            self.virtual.reserve(later, task.num_new, mix(self.seed, _RESERVE))

    def reserves(self) -> bool:
        """Whether the present step has L2, L3 and L4."""
        return bool(len(self.virtual.rows)) and self.reserve_weight > 0 and self.epoch >= self.start_epoch

    def prepare_batch(self, batch: Batch) -> Batch:
        if not self.reserves():
            return batch
        draw = batch.draw
        places = torch.arange(draw.start, draw.stop, device=batch.labels.device)
        images, labels, order = all_gather_together((batch.images, batch.labels, places))
        order = order.argsort()
        other = torch.randperm(draw.total, generator=draw.fork(_MIX).generator()).to(order.device)
        mine, partner = labels[order], labels[order[other]]
        chosen = (mine != partner).float()
        chosen = chosen * draw.total / chosen.sum().clamp(min=1)  # a mean over all rows is one over these pairs
        extra = {_IMAGES: images[order[other[places]]], _CHOSEN: chosen[places]}
        return batch.replace(extra={**batch.extra, **extra})

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms = super().losses(batch, output)
        if _IMAGES not in batch.extra:
            return terms
        virtual = self.scale * self.virtual.cosines(output.features)
        base = full_precision(output.logits)
        second = second_class_loss(base, virtual, batch.labels, self.virtual.allowed(batch.labels))
        mixed = self.mixed_features(batch)
        third, fourth = mixture_losses(
            full_precision(self.network.head(mixed)), self.scale * self.virtual.cosines(mixed)
        )
        chosen = batch.extra[_CHOSEN]
        parts = {"second": second, "virtual": (third * chosen).mean(), "known": (fourth * chosen).mean()}
        return {**terms, **{name: self.reserve_weight * part for name, part in parts.items()}}

    def mixed_features(self, batch: Batch) -> Tensor:
        """h(b g(x_i) + (1 - b) g(x_j)), ``(B, d)``."""
        b = np.random.default_rng(batch.draw.fork(_MIX + 1).key).beta(self.mix_alpha, self.mix_alpha)
        lower, upper = self._adapted.base.divide()
        features: Tensor = upper(torch.lerp(lower(batch.extra[_IMAGES]), lower(batch.images), float(b)))
        return features
