"""Class means (prototypes) and covariances in feature space, updated over the stream.

Statistics are computed in float64 for features of any dtype: a covariance is a small difference of large sums.
"""

from typing import ClassVar

import torch
from torch import Tensor

from cl_lightning.checks import at_least
from cl_lightning.losses import full_precision
from cl_lightning.memory.class_statistics import Metric, class_statistics, dense_columns, nearest_mean_scores, shrink
from cl_lightning.memory.growing import GrowingBuffers
from cl_lightning.models import LinearHead


class Prototypes(GrowingBuffers):
    """Class prototypes: mean, count and optionally covariance of the features of each class.

    Row c belongs to column c of the logits. The number of classes C is set by :meth:`grow`, or by the state dict
    that is loaded.

    Args:
        num_features: d, at least 1.
        covariance: Whether to keep covariances, ``d * d`` numbers per class.

    Attributes:
        means: ``(C, d)``, 0 for classes without samples.
        counts: Number of samples of each class, int64 ``(C,)``; 0 if the mean is not known yet.
        covariances: ``(C, d, d)``, only with ``covariance``.
    """

    kept_as: ClassVar[str] = "prototypes"
    means: Tensor
    counts: Tensor
    covariances: Tensor

    def __init__(self, num_features: int, *, covariance: bool = False) -> None:
        super().__init__()
        at_least(self, 1, num_features=num_features)
        self.num_features = num_features
        self.covariance = covariance
        self.register_buffer("means", torch.zeros(0, num_features))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))
        if covariance:
            self.register_buffer("covariances", torch.zeros(0, num_features, num_features))

    def __len__(self) -> int:
        """Number of classes, those without samples included."""
        return self.counts.shape[0]

    def __bool__(self) -> bool:
        return True  # also with 0 classes: only None means that there are no prototypes

    @property
    def known(self) -> Tensor:
        """Whether a class has samples, bool ``(C,)``."""
        return self.counts > 0

    def known_columns(self) -> Tensor:
        """Columns of the classes with samples, int64, on the CPU; synchronises with the device.

        On the CPU, so that a step that draws some of these classes does not synchronise.
        """
        return self.known.nonzero().squeeze(1).cpu()

    def grow(self, num_classes: int) -> None:
        """Append rows of zeros up to ``num_classes`` classes in all; the present rows are unchanged."""
        missing = num_classes - len(self)
        if missing <= 0:
            return
        for name, buffer in list(self.named_buffers(recurse=False)):
            self.register_buffer(name, torch.cat([buffer, buffer.new_zeros(missing, *buffer.shape[1:])]))

    @torch.no_grad()
    def update(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        num_classes: int | None = None,
        replace: bool = False,
        reduce: bool = True,
    ) -> None:
        """Pool features with the statistics of their classes: as if all features were given in one call.

        Sums are reduced over processes, so that the statistics are the same on all of them. Each process must call
        this.

        Args:
            features: This process's share, ``(n, d)``.
            labels: Columns, int64 ``(n,)``; rows with label -1 are left out.
            num_classes: Number of classes seen so far, the same on all processes; None for the present number.
            replace: Discard the earlier statistics of the classes in ``labels``, instead of pooling.
            reduce: Whether ``features`` is this process's share; False if each process gives all features.
        """
        self.grow(len(self) if num_classes is None else num_classes)
        columns, places = dense_columns(labels, len(self), reduce=reduce)
        fresh = class_statistics(features, places, len(columns), covariance=self.covariance, reduce=reduce)

        # Pooling of two samples (Chan, Golub & LeVeque 1979), with n of them old and m new.
        n = self.counts[columns].double() * (not replace)
        m = fresh.counts.double()
        gap = fresh.means - self.means[columns].double()
        self.counts[columns] = (n + m).long()
        if fresh.covariances is not None:
            scatter = (
                self._covariances_of(columns).double() * (n - 1).clamp(min=0)[:, None, None]
                + fresh.covariances * (m - 1)[:, None, None]
                + gap[:, :, None] * gap[:, None, :] * (n * m / (n + m))[:, None, None]
            )
            self._keep_covariances(columns, scatter / (n + m - 1).clamp(min=1)[:, None, None])
        # Computed from the new mean, so that it is exactly the new mean if n is 0.
        self.means[columns] = (fresh.means - gap * (n / (n + m))[:, None]).to(self.means.dtype)

    def scores(self, features: Tensor, num_classes: int, metric: Metric = "euclidean") -> Tensor:
        """Scores of the nearest class mean; the largest one is the prediction.

        They are computed in float32 or float64, since in half precision the scores of many classes would be equal.

        Args:
            features: ``(n, d)``.
            num_classes: Number of columns of the result.
            metric: As in :func:`nearest_mean_scores`.

        Returns:
            ``(n, num_classes)``, minus infinity for classes without samples.
        """
        features = full_precision(features)
        scores = features.new_full((len(features), num_classes), -torch.inf)
        columns = self.known.nonzero().squeeze(1)
        if len(columns):
            scores[:, columns] = nearest_mean_scores(features, self.means[columns].to(features.dtype), metric=metric)
        return scores

    def num_bytes(self) -> int:
        """Size of all buffers in bytes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def _covariances_of(self, columns: Tensor) -> Tensor:
        return self.covariances[columns]

    def _keep_covariances(self, columns: Tensor, covariances: Tensor) -> None:
        self.covariances[columns] = covariances.to(self.covariances.dtype)


class GaussianPrototypes(Prototypes):
    """Gaussian of the features of each class, to be sampled: mean and Cholesky factor of the covariance.

        f = mu_c + L_c eps,   L_c L_c^T = Sigma_c + a (V1 I + V2 (1 1^T - I)) + jitter I,   eps ~ N(0, I)

    with V1 and V2 the mean variance and the mean covariance, as in :func:`~cl_lightning.memory.shrink`.

    Args:
        num_features: d.
        jitter: Variance added in each direction, above 0, since a covariance of fewer samples than features is
            singular.
        shrinkage: a, at least 0.

    Attributes:
        factors: L, lower triangular, ``(C, d, d)``; 0 for classes without samples.
    """

    factors: Tensor

    def __init__(self, num_features: int, *, jitter: float = 1e-5, shrinkage: float = 0.0) -> None:
        super().__init__(num_features)
        at_least(self, 0, shrinkage=shrinkage)
        if not jitter > 0:
            raise ValueError(f"GaussianPrototypes: jitter is {jitter}; it must be above 0, such as 1e-5")
        self.covariance, self.jitter, self.shrinkage = True, jitter, shrinkage
        self.register_buffer("factors", torch.zeros(0, num_features, num_features))

    @torch.no_grad()
    def sample(self, columns: Tensor, noise: Tensor) -> Tensor:
        """Sample a feature vector of each of the given classes.

        Args:
            columns: Classes, int64 ``(n,)``, on the CPU.
            noise: eps, standard normal numbers ``(n, d)``, on the device of the buffers.

        Returns:
            Features ``(n, d)``, on the device of ``noise``.
        """
        counts = columns.bincount(minlength=len(self))
        order = columns.argsort(stable=True)
        places = torch.empty_like(columns)  # rank of each row among the rows of its class
        places[order] = torch.arange(len(columns)) - (counts.cumsum(0) - counts)[columns[order]]
        columns, places, most = columns.to(noise.device), places.to(noise.device), int(counts.max())
        # One product per class, with all of its rows: a copy of the (d, d) factor per row would take n d^2 numbers.
        by_class = noise.new_zeros(len(self), most, self.num_features)
        by_class[columns, places] = noise
        with torch.autocast(noise.device.type, enabled=False):
            drawn: Tensor = torch.bmm(by_class, self.factors.mT)[columns, places] + self.means[columns]
        return drawn

    def _covariances_of(self, columns: Tensor) -> Tensor:
        factors = self.factors[columns].double()
        identity = torch.eye(self.num_features, dtype=torch.float64, device=factors.device)
        shrunk = factors @ factors.mT - self.jitter * identity
        back = -self.shrinkage / (1 + self.shrinkage)  # V1 and V2 of a shrunk covariance are 1 + a times as large
        return shrink(shrunk, back, back) if self.shrinkage else shrunk

    def _keep_covariances(self, columns: Tensor, covariances: Tensor) -> None:
        identity = torch.eye(self.num_features, dtype=torch.float64, device=covariances.device)
        if self.shrinkage:
            covariances = shrink(covariances, self.shrinkage, self.shrinkage)
        # The rounding of large covariances makes eigenvalues of 0 negative by about this much.
        rounding = torch.finfo(torch.float64).eps * covariances.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        added = (self.jitter + rounding)[:, None, None] * identity
        self.factors[columns] = torch.linalg.cholesky(covariances + added).to(self.factors.dtype)


class PrototypeHead(LinearHead):
    """Nearest-class-mean (NCM) classifier at test time; a linear classifier during training.

    Losses see the linear logits. Predictions use the distance to the class means, which are computed from the
    un-augmented features of each class when its task ends (Rebuffi et al., iCaRL, CVPR 2017, sec. 3.1, with all images
    instead of exemplars). The means of earlier classes do not change while the backbone is trained;
    ``cl_lightning.callbacks.DriftCompensation`` corrects them. Classes without a mean are never predicted.

    Args:
        num_features: Size of a feature vector, d.
        metric: ``euclidean``: scores are minus squared distances; ``cosine``: scores are cosines.
        bias: Whether the linear classifier has biases.
    """

    needs_statistics = True

    def __init__(self, num_features: int, *, metric: Metric = "cosine", bias: bool = True) -> None:
        super().__init__(num_features, bias=bias)
        self.metric: Metric = metric
        self.prototypes = Prototypes(num_features)

    def classify(self, features: Tensor) -> Tensor:
        return self.prototypes.scores(features, self.num_columns, self.metric)

    def fit_features(self, features: Tensor, labels: Tensor) -> None:
        self.prototypes.update(features, labels, num_classes=self.num_columns)
