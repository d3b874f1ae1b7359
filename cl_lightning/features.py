"""Features in place of images: what a phase that trains a head alone goes through."""

from torch import Tensor

from cl_lightning.batch import Draw
from cl_lightning.prototypes import GaussianPrototypes

_NOISE = 0x6A55  # salt


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


class GaussianFeatures(FeaturePool):
    """Equally many draws of each class from its normal distribution, anew each time that they are taken.

        f ~ N(s_c mu_c, Sigma_c)

    Args:
        gaussians: The distributions; classes without samples are left out.
        count: Draws of each class in an epoch, at least 1.
        scales: s of all classes, ``(C,)``, on the device; None for 1.
    """

    def __init__(self, gaussians: GaussianPrototypes, count: int, scales: Tensor | None = None) -> None:
        known = gaussians.known.nonzero().squeeze(1)
        super().__init__(gaussians.means[known], known)
        self.gaussians, self.scales = gaussians, scales
        self.columns = known.cpu().repeat_interleave(count)  # on the CPU, so that nothing waits for the device

    def __len__(self) -> int:
        return len(self.columns)

    def take(self, rows: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        columns = self.columns[rows]
        noise = draw.fork(_NOISE).randn(self.gaussians.num_features, device=self.labels.device)
        features, labels = self.gaussians.sample(columns, noise), columns.to(self.labels.device)
        if self.scales is not None:
            features = features + (self.scales[labels] - 1)[:, None] * self.gaussians.means[labels]
        return features, labels
