"""Domains in a hyperdimensional space: detection of out-of-distribution samples, and routing to a domain.

A sample has features phi_l of several layers of a network. Random projections P_l map them to bipolar vectors of D
components (hyperdimensional computing: Kanerva, Cognitive Computation 2009), which are bundled:

    h(x) = sign( sum_l sign(P_l phi_l) ),   sign(0) = 1,   P_l ~ N(0, 1), (D, d_l)
    v_t = sum over the samples of domain t of h(x),   s_t(x) = cos(h(x), v_t)

For one layer, the expected cosine of h(x) and h(y) is 1 - 2 theta / pi, theta the angle between their features. v_t is
a vector of integers, which does not depend on the order of the samples or on the number of processes. With t the domain
with the largest score, a sample is out of distribution if s_t(x) < q_t, a low quantile of the scores of the domain's
own samples.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from cl_lightning.batch import mix
from cl_lightning.checks import at_least, within
from cl_lightning.distributed import all_gather_rows, all_sum
from cl_lightning.losses import full_precision
from cl_lightning.memory.growing import GrowingBuffers, restore_shapes

_PROJECTIONS = 0x4D0  # salt


def bipolar(values: Tensor) -> Tensor:
    """1 where a value is at least 0, else -1; int8, in the shape of ``values``."""
    return (values >= 0).to(torch.int8) * 2 - 1


class HyperDomains(GrowingBuffers):
    """Vectors v_t and thresholds q_t of domains, and counts over the samples of a task that may be a new domain.

    Args:
        widths: Number of features of each layer, d_l; at least one layer.
        dimensions: D, at least 1.
        quantile: Share of the samples of a domain that are below its threshold, in [0, 1].
        key: Key of the random projections, which are not in the state dict.

    Attributes:
        vectors: v, int64 ``(T, D)``.
        thresholds: q, float64 ``(T,)``.
        pending: Sum of h(x) over the samples since :meth:`begin`, int64 ``(D,)``.
        samples, outliers: Number of these samples, and of those that are out of distribution, int64 scalars.
        votes: Number of these samples by the domain with the largest score, int64 ``(T,)``.
    """

    kept_as: ClassVar[str] = "statistics"
    vectors: Tensor
    thresholds: Tensor
    pending: Tensor
    samples: Tensor
    outliers: Tensor
    votes: Tensor
    projections: Tensor

    def __init__(
        self, widths: Sequence[int], *, dimensions: int = 10_000, quantile: float = 0.05, key: int = 0
    ) -> None:
        super().__init__()
        at_least(self, 1, dimensions=dimensions, layers=len(widths))
        within(self, "[0, 1]", quantile=quantile)
        self.widths, self.quantile = tuple(widths), quantile
        generator = torch.Generator().manual_seed(mix(key, _PROJECTIONS))
        drawn = torch.randn(sum(widths), dimensions, generator=generator)
        self.register_buffer("projections", drawn, persistent=False)
        self.register_buffer("vectors", torch.zeros(0, dimensions, dtype=torch.int64))
        self.register_buffer("thresholds", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("pending", torch.zeros(dimensions, dtype=torch.int64))
        for name in ("samples", "outliers"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("votes", torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        """Number of domains."""
        return len(self.thresholds)

    def __bool__(self) -> bool:
        return True  # also without domains

    @torch.no_grad()
    def encode(self, features: Sequence[Tensor]) -> Tensor:
        """h(x), int8 ``(B, D)``, of the features of each layer, ``(B, d_l)``."""
        parts = torch.split(self.projections, list(self.widths))
        total = torch.zeros(len(features[0]), self.projections.shape[1], device=self.projections.device)
        with torch.autocast(total.device.type, enabled=False):
            for layer, part in zip(features, parts, strict=True):
                layer = full_precision(layer)
                total += bipolar(layer @ part.to(layer.dtype))
        return bipolar(total)

    @torch.no_grad()
    def scores(self, codes: Tensor) -> Tensor:
        """s, float64 ``(B, T)``, of h(x) ``(B, D)``; 0 for a vector of zeros."""
        vectors = self.vectors.double()
        with torch.autocast(vectors.device.type, enabled=False):
            products = codes.double() @ vectors.T
        found: Tensor = products / (vectors.norm(dim=1) * codes.shape[1] ** 0.5).clamp(min=1)
        return found

    def is_outlier(self, scores: Tensor) -> Tensor:
        """Whether samples with these scores ``(B, T)`` are out of distribution, bool ``(B,)``; True without domains."""
        if not len(self):
            return torch.ones(len(scores), dtype=torch.bool, device=scores.device)
        best, domains = scores.max(dim=1)
        return best < self.thresholds[domains]

    def begin(self) -> None:
        """Forget the samples that were counted."""
        for counts in (self.pending, self.samples, self.outliers):
            counts.zero_()
        self.votes = self.votes.new_zeros(len(self))

    @torch.no_grad()
    def observe(self, features: Sequence[Tensor]) -> None:
        """Count samples. Every process must call this.

        Args:
            features: Features of each layer of this process's samples, ``(n, d_l)``; n may be 0.
        """
        codes = self.encode(features)
        scores = self.scores(codes)
        nearest = scores.argmax(dim=1) if len(self) else self.votes.new_zeros(0)
        votes = (nearest[:, None] == torch.arange(len(self), device=nearest.device)).sum(dim=0)
        outliers = self.is_outlier(scores).sum()[None]
        number = torch.full_like(outliers, len(codes))
        found = all_sum(torch.cat([codes.long().sum(dim=0), number, outliers, votes]))
        dimensions = len(self.pending)
        self.pending += found[:dimensions]
        self.samples += found[dimensions]
        self.outliers += found[dimensions + 1]
        self.votes += found[dimensions + 2 :]

    def add(self) -> None:
        """Add a domain of the samples that were counted, without a threshold: no sample is out of distribution."""
        self.vectors = torch.cat([self.vectors, self.pending[None]])
        self.thresholds = torch.cat([self.thresholds, self.thresholds.new_full((1,), -torch.inf)])

    def set_threshold(self, scores: Tensor) -> None:
        """Set q of the newest domain. Every process must call this.

        Args:
            scores: Scores of this process's samples of the domain for the domain, ``(n,)``.
        """
        scores = all_gather_rows(scores.double())
        if len(scores):
            self.thresholds[-1] = torch.quantile(scores, self.quantile)

    def num_bytes(self) -> int:
        """Size of the vectors and thresholds; the projections are drawn again from their key."""
        return self.vectors.nbytes + self.thresholds.nbytes

    def restore_buffers(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        restore_shapes(self, state_dict, prefix, ("vectors", "thresholds", "votes"), keep_dtype=True)
