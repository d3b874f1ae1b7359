"""FeCAM: Feature Covariance-Aware Metric (Goswami et al., NeurIPS 2023, arXiv:2309.14062).

The backbone f is trained on the first task and then frozen (``adapt=False``: a pretrained backbone, frozen from the
start). Classes are Gaussian, each with a covariance of its own. With features f >= 0 and Tukey's transformation
g = f^p, at the end of a task, for each of its classes c:

    mu_c = mean of f,   Sigma_c = covariance of g (divided by n_c - 1)
    Sigma_c <- Sigma_c + a1 V1 I + a2 V2 (1 1^T - I)    twice; V1: mean variance, V2: mean of the other entries, not 0
    N_c = Sigma_c,ij / (s_i s_j)   with s_i^2 = Sigma_c,ii

    score_c(x) = -(u(x) - u_c)^T N_c^-1 (u(x) - u_c),   u(x) = f(x)^p / ||f(x)^p||,   u_c = mu_c^p / ||mu_c^p||

p -> power, a1 and a2 -> shrinkage, twice -> shrinks. N_c has no unit: only for this reason may the distance be between
unit vectors, and the covariance of vectors that are not. ``covariance="common"``: one Sigma for all classes, the mean
of the covariances of the classes so far, with d^2 numbers in place of C d^2. ``unit_norm=True``: f is divided by its
norm first, also for the statistics, and u_c is mu_c^p without a further division, as in the published script for
pretrained transformers, with p = 1, a2 = 0 and one shrink; p = 1 takes features of any sign.
Departs from the code: the first task is classified by the same distance, and not by its classifier; ``common`` is of
covariances within classes, and is shrunk and divided like the covariance of a class, whereas the code takes the
covariance of all features of a task, which is never divided by variances. A class with a single sample has N_c = I.
Features of a class that recurs are pooled with its earlier features; with ``common`` its covariance counts once for
each task in which it occurs.
"""

import functools
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import ImageShape
from cl_lightning.checks import above, at_least, one_of
from cl_lightning.losses import full_precision
from cl_lightning.memory import MeanCovariance, Prototypes, shrink, squared_distances
from cl_lightning.models import Head, frozen_copy, solve_positive
from cl_lightning.strategies.pretrained.first_session import FirstSessionAdaptation

_CHUNK = 2048  # features whose distances are computed at a time


def correlation(covariance: Tensor) -> Tensor:
    """``Sigma_ij / sqrt(Sigma_ii Sigma_jj)``, ``(d, d)``; rows and columns without variance are of the identity."""
    variance = covariance.diagonal()
    scale = torch.where(variance > 0, variance, 1.0).rsqrt()
    scaled = covariance * scale[:, None] * scale
    return scaled + torch.diag((variance <= 0).to(covariance.dtype))


class FeCAMHead(Head):
    """Classification by the smallest Mahalanobis distance, with a covariance per class; see the module's docstring.

    Args:
        num_features: Size of a feature vector, d.
        power: p, above 0; 1 for no transformation.
        shrinkage: a1 and a2, at least 0.
        shrinks: How often covariances are shrunk, at least 0.
        unit_norm: Whether features are divided by their norms before everything else.
        covariance: ``class``, or ``common`` for one covariance of all classes.

    Attributes:
        prototypes: Class means mu of the features, before Tukey's transformation.
        spread: Statistics of g: covariances of the classes, float32, with ``class``.
        common: Mean of the covariances, with ``common``.

    Raises:
        ValueError: If an option is out of range.
    """

    needs_statistics = True

    def __init__(
        self,
        num_features: int,
        *,
        power: float = 0.5,
        shrinkage: tuple[float, float] = (1.0, 1.0),
        shrinks: int = 2,
        unit_norm: bool = False,
        covariance: Literal["class", "common"] = "class",
    ) -> None:
        super().__init__(num_features)
        above(self, 0, power=power)
        at_least(self, 0, shrinks=shrinks)
        at_least(self, 0, optional=False, **{f"shrinkage[{i}]": value for i, value in enumerate(shrinkage)})
        one_of(self, ("class", "common"), covariance=covariance)
        self.power, self.shrinkage, self.shrinks, self.unit_norm = power, tuple(shrinkage), shrinks, unit_norm
        self.prototypes = Prototypes(num_features)
        self.spread = Prototypes(num_features, covariance=True) if covariance == "class" else None
        self.common = MeanCovariance(num_features) if covariance == "common" else None
        self._metrics: dict[int, Tensor] = {}  # N^-1 by column; computed from the covariances when it is needed

    def grow(self, num_new: int) -> None:
        for statistics in (self.prototypes, self.spread):
            if statistics is not None:
                statistics.grow(len(statistics) + num_new)

    def block_sizes(self) -> list[int]:
        return [len(self.prototypes)] if len(self.prototypes) else []

    def weight(self) -> Tensor:
        return self.prototypes.means

    def tukey(self, features: Tensor) -> Tensor:
        """g, ``(n, d)``, of features ``(n, d)``."""
        return features if self.power == 1 else features**self.power

    def fit_features(self, features: Tensor, labels: Tensor) -> None:
        if self.unit_norm:
            features = F.normalize(features, dim=1)
        before = self.prototypes.counts.clone()
        self.prototypes.update(features, labels)
        transformed = self.tukey(features.double())
        if self.spread is not None:
            self.spread.update(transformed, labels)
            for column in (self.prototypes.counts != before).nonzero().squeeze(1).tolist():
                self._metrics.pop(column, None)
        if self.common is not None:
            self.common.update(transformed, labels, self.num_columns)
            self._metrics.clear()

    def metric(self, column: int) -> Tensor:
        """N^-1 of a class, ``(d, d)``, in the dtype of the covariances; of all classes with ``common``."""
        if self.spread is not None:
            key, covariance = column, self.spread.covariances[column]
        else:
            assert self.common is not None
            key, covariance = 0, self.common.mean
        found = self._metrics.get(key)
        if found is None or found.device != covariance.device:
            shrunk = covariance.double()
            for _ in range(self.shrinks):
                shrunk = shrink(shrunk, *self.shrinkage, skip_zeros=True)
            identity = torch.eye(len(shrunk), dtype=shrunk.dtype, device=shrunk.device)
            found = self._metrics[key] = solve_positive(correlation(shrunk), identity).to(covariance.dtype)
        return found

    def forward(self, features: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            points = F.normalize(self.tukey(full_precision(features)), dim=1)
            scores = points.new_full((len(points), self.num_columns), -torch.inf)
            means = self.tukey(self.prototypes.means.to(points.dtype))
            means = means if self.unit_norm else F.normalize(means, dim=1)
            known = self.prototypes.known.nonzero().squeeze(1).tolist()
            if self.spread is None and known:
                distances = squared_distances(points.double(), means[known].double(), self.metric(0))
                scores[:, known] = -distances.to(scores.dtype)
            elif known:
                for rows in torch.split(torch.arange(len(points), device=points.device), _CHUNK):
                    for column in known:  # one product of (n, d) and (d, d) per class
                        gap = points[rows] - means[column]
                        scores[rows, column] = -((gap @ self.metric(column).to(gap.dtype)) * gap).sum(dim=1)
        return scores

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._metrics.clear()


class FeCAM(FirstSessionAdaptation):
    """Mahalanobis distances with a normalised covariance per class, on a backbone that is frozen after the first task.

    Args:
        power: p of Tukey's transformation, above 0; 1 for none, required if features can be negative.
        shrinkage: a1 and a2, at least 0.
        shrinks: How often covariances are shrunk, at least 0.
        unit_norm: Whether features are divided by their norms before everything else.
        covariance: ``class``, or ``common`` for one covariance of all classes.
        kwargs: Options of ``FirstSessionAdaptation``.

    Raises:
        ValueError: If an option is out of range, or ``power`` is not 1 and the features of the backbone are negative.
    """

    traits = FirstSessionAdaptation.traits.but(
        family="exemplar-free", paper="Goswami et al., NeurIPS 2023, arXiv:2309.14062", needs_pretrained=False
    )

    def __init__(
        self,
        *,
        power: float = 0.5,
        shrinkage: tuple[float, float] = (1.0, 1.0),
        shrinks: int = 2,
        unit_norm: bool = False,
        covariance: Literal["class", "common"] = "class",
        **kwargs: Any,
    ) -> None:
        head = functools.partial(
            FeCAMHead, power=power, shrinkage=shrinkage, shrinks=shrinks, unit_norm=unit_norm, covariance=covariance
        )
        head(1)  # so that an option out of range raises here, not when the network is built
        super().__init__(head=head, **kwargs)
        self.power = power

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        if self.power == 1:
            return
        images = torch.randn(4, *image_shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            features = frozen_copy(self.network.backbone)(images)
        if (features < 0).any():
            raise ValueError(
                f"FeCAM: power is {self.power}, but features of the backbone are negative; use power 1, or a backbone "
                "that ends in a ReLU"
            )
