"""A fixed classifier whose rows are the corners of a regular simplex."""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.checks import at_least
from cl_lightning.models.heads import FixedBlock, Head


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


class SimplexHead(Head):
    """Fixed classifier: inner products with the corners of a simplex whose size is chosen before the first task.

        z_c = w_c . P f(x),   w the rows of a regular simplex in K - 1 dimensions, frozen

    P is a trained linear map without bias, or the identity if the features have K - 1 dimensions. New classes take the
    next corners, so that the space of later classes is reserved from the start: features of all tasks stay comparable
    (``CL2R``, ``HOC``). A head for any method that does not need a head of its own; logits
    are of the classes seen so far, and :meth:`all_logits` has one for each corner.

    Args:
        num_features: Size of a feature vector, d.
        size: K, number of corners, at least 2 and at least the number of classes of the stream.

    Raises:
        ValueError: If the size is too small.
    """

    corners: Tensor

    def __init__(self, num_features: int, *, size: int = 100) -> None:
        super().__init__(num_features)
        at_least(self, 2, size=size)
        self.size = size
        self.projection = nn.Identity() if num_features == size - 1 else nn.Linear(num_features, size - 1, bias=False)
        self.register_buffer("corners", simplex(size).float(), persistent=False)

    def new_block(self, num_new: int) -> nn.Module:
        return FixedBlock(self.size - 1, num_new)

    def check_room(self, num_classes: int) -> None:
        at_least(self, num_classes, size=self.size)

    def grow(self, num_new: int) -> None:
        start = self.num_columns
        self.check_room(start + num_new)
        super().grow(num_new)
        if num_new:
            cast(FixedBlock, self.blocks[-1]).weight.copy_(self.corners[start : start + num_new])

    def embed(self, features: Tensor) -> Tensor:
        embedded: Tensor = self.projection(features)
        return embedded

    def forward(self, features: Tensor) -> Tensor:
        if not self.blocks:
            return features.new_zeros(len(features), 0)
        return F.linear(self.embed(features), self.weight())

    def all_logits(self, embedded: Tensor) -> Tensor:
        """Logits of all corners ``(B, K)``, the classes seen so far first, of embedded features ``(B, K - 1)``."""
        return F.linear(embedded, self.corners)
