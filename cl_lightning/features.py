"""Features in place of images: what a phase that trains a head alone goes through."""

from torch import Tensor

from cl_lightning.batch import Draw


class FeaturePool:
    """Features of samples, taken once; a subclass makes further rows out of them, or draws them, when they are taken.

    Args:
        features: ``(n, d)``, on the device, the same on every process.
        labels: Their columns, int64 ``(n,)``.
    """

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        """Number of rows that an epoch goes through."""
        return len(self.labels)

    def begin_epoch(self, epoch: int) -> None:
        """Called on every process before the rows of an epoch are taken, also where an epoch is gone on with."""

    def take(self, rows: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Features ``(B, d)`` and columns ``(B,)`` of some rows.

        Args:
            rows: int64 ``(B,)``, on the CPU.
            draw: Random numbers of these rows.
        """
        rows = rows.to(self.labels.device)
        return self.features[rows], self.labels[rows]
