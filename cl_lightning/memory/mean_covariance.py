"""Mean of the covariances of classes."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from cl_lightning.memory.class_statistics import class_statistics, dense_columns


class MeanCovariance(nn.Module):
    """Mean of the covariances of all classes so far, each with the same weight, updated class by class.

        Sigma <- k / (k + 1) Sigma + 1 / (k + 1) Sigma_c   for each class c of an update

    It takes ``d * d`` numbers for any number of classes. A class that recurs counts once for each update in which it
    occurs, with the covariance of its samples in that update.

    Args:
        num_features: d.
        unbiased: Whether the covariance of n samples is divided by n - 1 (0 for a single sample), or by n.

    Attributes:
        mean: Sigma, float64 ``(d, d)``; 0 before the first update.
        merged: k, number of covariances in the mean, int64.
    """

    kept_as: ClassVar[str] = "statistics"
    mean: Tensor
    merged: Tensor

    def __init__(self, num_features: int, *, unbiased: bool = True) -> None:
        super().__init__()
        self.unbiased = unbiased
        self.register_buffer("mean", torch.zeros(num_features, num_features, dtype=torch.float64))
        self.register_buffer("merged", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor, num_classes: int) -> None:
        """Merge the covariances of the classes in ``labels``. Each process must call this.

        Args:
            features: This process's share, ``(n, d)``.
            labels: Columns, int64 ``(n,)``; rows with label -1 are left out.
            num_classes: Number of classes so far, the same on all processes.
        """
        columns, places = dense_columns(labels, num_classes)
        fresh = class_statistics(features, places, len(columns))
        assert fresh.covariances is not None
        counts = fresh.counts.double()
        scale = 1.0 if self.unbiased else ((counts - 1) / counts)[:, None, None]
        merged = self.merged + len(columns)
        self.mean.copy_((self.merged * self.mean + (scale * fresh.covariances).sum(dim=0)) / merged.clamp(min=1))
        self.merged.copy_(merged)

    def num_bytes(self) -> int:
        """Size of all buffers in bytes."""
        return sum(buffer.nbytes for buffer in self.buffers())
