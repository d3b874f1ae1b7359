"""Classifiers whose rows are unit vectors that are chosen before the first task, such as the corners of a simplex."""

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.checks import at_least
from cl_lightning.losses import full_precision
from cl_lightning.models.heads import FixedBlock, Head

NeckFactory = Callable[[int, int], nn.Module]
"""Builds the module between features and a fixed head, for the sizes of its input and its output."""


def simplex(size: int) -> Tensor:
    """Corners of a regular simplex: ``size`` unit vectors of sum 0, each two with the cosine ``-1 / (size - 1)``.

    The rows of the identity of d = size - 1 dimensions, and ``(1 - sqrt(size)) / d`` in all entries; their mean is
    subtracted and each row divided by its norm.

    Args:
        size: K, at least 2.

    Returns:
        float64 ``(K, K - 1)``.
    """
    d = size - 1
    last = torch.full((1, d), (1 - math.sqrt(size)) / d, dtype=torch.float64)
    corners = torch.cat([torch.eye(d, dtype=torch.float64), last])
    return F.normalize(corners - corners.mean(dim=0), dim=1)


def rotated_simplex(size: int, dimensions: int, *, key: int = 0) -> Tensor:
    """A regular simplex in a space of more dimensions than it needs, in a random position.

        E = sqrt(K / (K - 1)) (I - 1 1^T / K) U^T,   U (d, K) with orthonormal columns

    the simplex equiangular tight frame of neural collapse (Papyan, Han & Donoho, PNAS 2020), up to a rotation that the
    random position contains.

    Args:
        size: K, number of corners, at least 2.
        dimensions: d, at least K - 1.
        key: Seed of the position.

    Returns:
        Corners of :func:`simplex`, float64 ``(K, d)``.
    """
    generator = torch.Generator().manual_seed(key)
    q, r = torch.linalg.qr(torch.randn(dimensions, size - 1, generator=generator, dtype=torch.float64))
    corners: Tensor = simplex(size) @ (q * r.diagonal().sign()).T  # with these signs the decomposition is unique
    return corners


class ResidualNeck(nn.Module):
    """Perceptron with layer normalisation and a linear connection around it (NC-FSCIL: Yang et al., ICLR 2023).

        h = W_3 a(LN(W_2 a(LN(W_1 f)))) + S f,   a = LeakyReLU 0.1

    W_1 is (2d, d), W_2 (2d, 2d), W_3 (e, 2d) and S (e, d); W_3 and S have no bias.

    Args:
        num_features: d, size of a feature vector.
        size: e, size of the result.
    """

    def __init__(self, num_features: int, size: int) -> None:
        super().__init__()
        width = 2 * num_features
        self.layers = nn.Sequential(
            nn.Linear(num_features, width),
            nn.LayerNorm(width),
            nn.LeakyReLU(0.1),
            nn.Linear(width, width),
            nn.LayerNorm(width),
            nn.LeakyReLU(0.1),
            nn.Linear(width, size, bias=False),
        )
        self.skip = nn.Linear(num_features, size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Vectors ``(B, e)``, of features ``(B, d)``."""
        embedded: Tensor = self.layers(features) + self.skip(features)
        return embedded


class TargetHead(Head):
    """Fixed classifier: similarity of embedded features to unit vectors that are chosen before the first task.

        z_c = w_c . g(f(x)),   or with ``cosine``   z_c = w_c . g(f(x)) / ||g(f(x))||

    New classes take the next targets w. Logits are of the classes
    seen so far, and :meth:`all_logits` has one for each target.

    Args:
        num_features: Size of a feature vector, d.
        targets: w, one unit vector per row, ``(K, e)``.
        projection: g, from ``(B, d)`` to ``(B, e)``.
        cosine: Whether embedded features are divided by their norm.

    Attributes:
        targets: ``(K, e)``, float32.
    """

    targets: Tensor

    def __init__(self, num_features: int, *, targets: Tensor, projection: nn.Module, cosine: bool) -> None:
        super().__init__(num_features)
        self.size, self.cosine, self.projection = len(targets), cosine, projection
        self.register_buffer("targets", targets.float(), persistent=False)

    def new_block(self, num_new: int) -> nn.Module:
        return FixedBlock(self.targets.shape[1], num_new)

    def check_room(self, num_classes: int) -> None:
        at_least(self, num_classes, size=self.size)

    def grow(self, num_new: int) -> None:
        start = self.num_columns
        self.check_room(start + num_new)
        super().grow(num_new)
        if num_new:
            cast(FixedBlock, self.blocks[-1]).weight.copy_(self.targets[start : start + num_new])

    def embed(self, features: Tensor) -> Tensor:
        embedded: Tensor = self.projection(features)
        return embedded

    def forward(self, features: Tensor) -> Tensor:
        if not self.blocks:
            return features.new_zeros(len(features), 0)
        return self.similarity(self.embed(features))

    def similarity(self, embedded: Tensor) -> Tensor:
        """Logits of the classes seen so far ``(B, columns)``, of embedded features ``(B, e)``."""
        return self._compared(embedded, self.weight())

    def all_logits(self, embedded: Tensor) -> Tensor:
        """Logits of all targets ``(B, K)``, of embedded features ``(B, e)``; of the classes seen so far first."""
        return self._compared(embedded, self.targets)

    def _compared(self, embedded: Tensor, targets: Tensor) -> Tensor:
        if not self.cosine:
            return F.linear(embedded, targets)
        with torch.autocast(embedded.device.type, enabled=False):  # cosines near 1 differ by less than bf16 resolves
            direction = F.normalize(full_precision(embedded), dim=1)
            return F.linear(direction, targets.to(direction.dtype))


class SimplexHead(TargetHead):
    """Fixed classifier: inner products with the corners of a simplex whose size is chosen before the first task.

        z_c = w_c . P f(x),   w the rows of a regular simplex in K - 1 dimensions, frozen

    P is a trained linear map without bias, or the identity if the features have K - 1 dimensions. New classes take the
    next corners, so that the space of later classes is reserved from the start: features of all tasks stay comparable
    (``CL2R``, ``HOC``). A head for any method that does not need a head of its own; logits
    are of the classes seen so far, and :meth:`all_logits` has one for each corner.

    Args:
        num_features: Size of a feature vector, d.
        size: K, number of corners, at least 2 and at least the number of classes of the stream.
        dimensions: e, size of the space of the corners, at least K - 1; a larger space has them in a random position
            (:func:`rotated_simplex`). None for K - 1.
        neck: Builds a module in place of P, such as :class:`ResidualNeck`.
        cosine: Whether P f(x) is divided by its norm, so that a logit is a cosine.

    Raises:
        ValueError: If the size or the number of dimensions is too small.
    """

    def __init__(
        self,
        num_features: int,
        *,
        size: int = 100,
        dimensions: int | None = None,
        neck: NeckFactory | None = None,
        cosine: bool = False,
    ) -> None:
        at_least(self, 2, size=size)
        at_least(self, size - 1, dimensions=dimensions, optional=True)
        corners = simplex(size) if dimensions is None else rotated_simplex(size, dimensions)
        width = corners.shape[1]
        if neck is not None:
            projection = neck(num_features, width)
        elif num_features == width:
            projection = nn.Identity()
        else:
            projection = nn.Linear(num_features, width, bias=False)
        super().__init__(num_features, targets=corners, projection=projection, cosine=cosine)
