"""CAFA, class-aware feature alignment (Jung et al., ICCV 2023, arXiv:2206.00205).

Scales and shifts of the normalisation layers are trained so that the features of a test batch lie near the source
features of their predicted class, and far from other classes. With means mu_c and the common covariance Sigma
of the classes of the source, h_i the features of x_i, and y^_i its predicted class,

    D_c(h) = (h - mu_c)^T Sigma^-1 (h - mu_c),     L = mean_i log( D_{y^_i}(h_i) / sum_c D_c(h_i) )

No gradient passes through y^. Sigma is regularised by ``jitter`` times its mean variance, and D is at least 10^-6.
Public sources state the two distances; their combination, the covariance shared by all classes, and that the sum
includes y^ (``inter="all"``) are our reading. Means need labels of source images: in a stream whose source images are
clean test images (``source_part="test"``) these are labels of test images, and results are not to be compared with
methods that use none. Source features are measured with the statistics of batch normalisation
that the stream uses.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from cl_lightning.checks import above, at_least, one_of
from cl_lightning.losses import full_precision
from cl_lightning.memory import class_statistics
from cl_lightning.strategies.test_time.base import TestTimeAdaptation
from cl_lightning.strategies.test_time.parts.losses import TestTimeLoss
from cl_lightning.strategies.test_time.parts.part import Adapting, source_features
from cl_lightning.strategies.test_time.tent import Tent
from cl_lightning.strategy import Batch, Output

_LEAST = 1e-6


def alignment_ratio(distances: Tensor, labels: Tensor, *, inter: Literal["all", "others"] = "all") -> Tensor:
    """``log(D_y / sum_c D_c)`` of each row, ``(B,)``; negative, and 0 for a single class.

    Args:
        distances: D, ``(B, C)``, positive.
        labels: y, int64 ``(B,)``.
        inter: Whether the sum is over ``all`` classes or over the ``others``.
    """
    own = distances.gather(1, labels[:, None])[:, 0]
    total = distances.sum(dim=1)
    return own.log() - (total if inter == "all" else (total - own).clamp(min=_LEAST)).log()


class ClassAwareAlignment(TestTimeLoss):
    """Mahalanobis distance to the source features of the predicted class, relative to the distances to all classes.

    Args:
        samples: Number of source images for means and covariance, at least 2.
        inter: Whether the sum of distances is over ``all`` classes or over the ``others``.
        jitter: Share of the mean variance that is added to the covariance, above 0.
    """

    means: Tensor
    whitening: Tensor

    def __init__(self, samples: int = 2000, *, inter: Literal["all", "others"] = "all", jitter: float = 1e-3) -> None:
        super().__init__()
        at_least(self, 2, samples=samples)
        one_of(self, ("all", "others"), inter=inter)
        above(self, 0, jitter=jitter)
        self.samples, self.inter, self.jitter = samples, inter, jitter
        self.register_buffer("means", torch.zeros(0, 0))  # whitened mu, (C, d)
        self.register_buffer("whitening", torch.zeros(0, 0))  # W, (d, d), with W W^T = Sigma^-1

    @torch.no_grad()
    def learn_source(self, strategy: Adapting) -> None:
        statistics = class_statistics(*source_features(strategy, self.samples), strategy.num_source)
        assert statistics.covariances is not None
        spread = (statistics.counts - 1).clamp(min=0).double()
        covariance = torch.einsum("c,cij->ij", spread, statistics.covariances) / spread.sum().clamp(min=1)
        covariance.diagonal().add_(self.jitter * covariance.diagonal().mean().clamp(min=_LEAST))
        factor = torch.linalg.cholesky(torch.linalg.inv(covariance))
        self.whitening = factor.float()
        self.means = (statistics.means.double() @ factor).float()

    def forward(self, strategy: Adapting, batch: Batch, output: Output) -> Tensor:
        with torch.autocast(output.features.device.type, enabled=False):
            h = full_precision(output.features).float() @ self.whitening
            distances = (h[:, None] - self.means).square().sum(dim=2).clamp(min=_LEAST)
            return alignment_ratio(distances, output.logits.argmax(dim=1), inter=self.inter)


class CAFA(Tent):
    """Features of the test batch are drawn to the source features of their predicted class.

    Args:
        samples: Number of source images for means and covariance, at least 2.
        inter: Whether the sum of distances is over ``all`` classes or over the ``others``.
        jitter: Share of the mean variance that is added to the covariance, above 0.
        kwargs: Options of ``Tent`` without ``loss``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time", paper="Jung et al., ICCV 2023, arXiv:2206.00205", transductive=True
    )

    def __init__(
        self,
        *,
        samples: int = 2000,
        inter: Literal["all", "others"] = "all",
        jitter: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss=ClassAwareAlignment(samples, inter=inter, jitter=jitter), **kwargs)
