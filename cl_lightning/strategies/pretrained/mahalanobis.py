"""Mahalanobis classifier, or Gaussian discriminant analysis (Lee et al., NeurIPS 2018, arXiv:1807.03888).

Gaussian classes with a shared covariance on the features h of a trained network, and classes that are added without
training:

    mu_c = 1/n_c sum_{y = c} h,   Sigma = 1/n sum_c sum_{y = c} (h - mu_c)(h - mu_c)^T + ridge I
    score_c(x) = mu_c^T Sigma^-1 h - 1/2 mu_c^T Sigma^-1 mu_c,   the largest where (h - mu_c)^T Sigma^-1 (h - mu_c) is
    smallest;   confidence M(x) = max_c -(h - mu_c)^T Sigma^-1 (h - mu_c)

``weighting="sample"`` is this Sigma, exact for any split of the stream. ``class``: each class has the same weight, and
a new class is merged as in the paper, Sigma <- C / (C + 1) Sigma + 1 / (C + 1) Sigma_{C+1}; with classes of equal size
both are the same. The confidence separates samples of the classes from all others (``Mahalanobis.confidence``),
optionally after a step on the image that increases it, x + magnitude sign(grad_x M(x)).
With ``adapt=True`` the network is trained on the first task under a linear classifier, and then frozen.
Departs from the paper: features of the last layer only, without the ensemble over layers; a ridge, since a task may
have fewer samples than features. The code divides the sign of the gradient by the standard deviation of each channel;
here ``magnitude`` is in the unit of the finished images.
"""

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from cl_lightning.checks import at_least, one_of
from cl_lightning.memory import MeanCovariance, squared_distances
from cl_lightning.models import LDAHead, LinearHead, solve_positive
from cl_lightning.strategies.pretrained.first_session import FirstSessionAdaptation, FirstSessionHead
from cl_lightning.strategy import HeadFactory


class MahalanobisHead(LDAHead):
    """Linear discriminant with the maximum-likelihood covariance within classes; see the module's docstring.

    Args:
        num_features: Size of a feature vector, d.
        ridge: Added to the variances, at least 0, in the squared unit of the features. With 0 a singular covariance is
            replaced by its pseudo-inverse.
        weighting: ``sample``, or ``class`` for the mean of the covariances of the classes.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self, num_features: int, *, ridge: float = 1e-4, weighting: Literal["sample", "class"] = "sample"
    ) -> None:
        super().__init__(num_features, covariance="within", ridge=ridge)
        one_of(self, ("sample", "class"), weighting=weighting)
        self.of_classes = MeanCovariance(num_features, unbiased=False) if weighting == "class" else None

    def add(self, features: Tensor, labels: Tensor) -> None:
        super().add(features, labels)
        if self.of_classes is not None:
            self.of_classes.update(features, labels, len(self.counts))

    def shared_covariance(self) -> Tensor:
        if self.of_classes is not None:
            spread = self.of_classes.mean
        else:
            spread = self.scatter() / self.counts.sum().clamp(min=1)
        return spread + self.ridge * torch.eye(len(spread), dtype=spread.dtype, device=spread.device)

    def distances(self, features: Tensor) -> Tensor:
        """``(h - mu_c)^T Sigma^-1 (h - mu_c)``, float64 ``(n, C)``; infinite for classes without samples."""
        covariance = self.shared_covariance()
        inverse = solve_positive(covariance, torch.eye(len(covariance), dtype=covariance.dtype, device=features.device))
        centre = self.sums.sum(dim=0) / self.counts.sum().clamp(min=1)  # near the points, where products round less
        found = squared_distances(features.double() - centre, self.means() - centre, inverse)
        return found.masked_fill(self.counts == 0, torch.inf)

    def num_bytes(self) -> int:
        return super().num_bytes() - (
            self.of_classes.num_bytes() if self.of_classes is not None else 0
        )  # counts itself


class Mahalanobis(FirstSessionAdaptation):
    """Gaussian classes with a shared covariance on the features of a frozen network.

    Args:
        ridge: Added to the variances, at least 0, in the squared unit of the features.
        weighting: ``sample``, or ``class`` for the same weight of each class in the covariance.
        session_head: Builds the classifier of the first task, with ``adapt``; None for ``LinearHead``.
        adapt: Whether to train the backbone on the first task.
        kwargs: Options of ``FirstSessionAdaptation``.
    """

    traits = FirstSessionAdaptation.traits.but(paper="Lee et al., NeurIPS 2018, arXiv:1807.03888")

    def __init__(
        self,
        *,
        ridge: float = 1e-4,
        weighting: Literal["sample", "class"] = "sample",
        session_head: HeadFactory | None = None,
        adapt: bool = False,
        **kwargs: Any,
    ) -> None:
        head = functools.partial(MahalanobisHead, ridge=ridge, weighting=weighting)
        head(1)  # so that an option out of range raises here, not when the network is built
        super().__init__(head=head, session_head=session_head or LinearHead, adapt=adapt, **kwargs)

    def confidence(self, images: Tensor, *, magnitude: float = 0.0) -> Tensor:
        """M(x): minus the squared distance to the nearest class, low for images of no class.

        Args:
            images: Finished images, ``(B, C, H, W)``.
            magnitude: Length of a step along the sign of the gradient of M, at least 0, in the unit of the images.

        Returns:
            Float64 ``(B,)``, at most 0.
        """
        at_least(self, 0, magnitude=magnitude)
        head = self.network.head.final if isinstance(self.network.head, FirstSessionHead) else self.network.head
        assert isinstance(head, MahalanobisHead)
        if magnitude > 0:
            with torch.enable_grad():
                images = images.detach().requires_grad_()
                nearest = head.distances(self.network.backbone(images)).amin(dim=1)
                (slope,) = torch.autograd.grad(-nearest.sum(), images)
            images = images.detach() + magnitude * slope.sign()
        with torch.no_grad():
            return -head.distances(self.network.backbone(images)).amin(dim=1)
