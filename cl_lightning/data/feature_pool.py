"""Features instead of images: the training data of a phase that trains the head alone."""

from torch import Tensor

from cl_lightning.batch import Draw
from cl_lightning.memory import GaussianPrototypes

_NOISE = 0x6A55  # salt


class FeaturePool:
    """Features of samples, computed once; subclasses can derive further rows or draw them at random.

    Args:
        features: ``(n, d)``, on the device, the same on every process.
        labels: Columns, int64 ``(n,)``.
    """

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        """Number of rows in an epoch."""
        return len(self.labels)

    def take(self, rows: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Features ``(B, d)`` and columns ``(B,)`` of the given rows.

        Args:
            rows: int64 ``(B,)``, on the CPU.
            draw: Random numbers of these rows.
        """
        rows = rows.to(self.labels.device)
        return self.features[rows], self.labels[rows]


class GaussianFeatures(FeaturePool):
    """Features drawn from the normal distribution of each class, with new samples at each draw and balanced classes.

        f ~ N(s_c mu_c, Sigma_c)

    Args:
        gaussians: The distributions; classes without samples are left out.
        count: Samples per class in an epoch, at least 1.
        scales: s of all classes, ``(C,)``, on the device; None for 1.
    """

    def __init__(self, gaussians: GaussianPrototypes, count: int, scales: Tensor | None = None) -> None:
        known = gaussians.known.nonzero().squeeze(1)
        super().__init__(gaussians.means[known], known)
        self.gaussians, self.scales = gaussians, scales
        self.columns = known.cpu().repeat_interleave(count)  # on the CPU, to avoid synchronisation with the device

    def __len__(self) -> int:
        return len(self.columns)

    def take(self, rows: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        columns = self.columns[rows]
        noise = draw.fork(_NOISE).randn(self.gaussians.num_features, device=self.labels.device)
        features, labels = self.gaussians.sample(columns, noise), columns.to(self.labels.device)
        if self.scales is not None:
            features = features + (self.scales[labels] - 1)[:, None] * self.gaussians.means[labels]
        return features, labels
