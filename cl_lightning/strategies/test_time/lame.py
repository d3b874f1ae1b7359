"""LAME, Laplacian adjusted maximum-likelihood estimation (Boudiaf et al., CVPR 2022, arXiv:2201.05718).

The source network does not change. Its predictions q_i for a batch are corrected so that samples with similar features
get similar predictions. Starting from z = q, each step of

    z_i <- softmax(log q_i + sum_j w_ij z_j)

decreases, for a symmetric positive semi-definite W,

    F(Z) = sum_i KL(z_i || q_i) - 1/2 sum_ij w_ij <z_i, z_j>

because the step minimises F with its concave part replaced by the tangent. (The paper writes the second term without
1/2; that function need not decrease.) The correction has no state and no parameters. It increases the accuracy if
neighbours in the stream have the same class, and decreases it if classes are mixed. The effect grows with the number of
samples with w_ij > 0: at most k with ``knn``, the whole batch with ``rbf``, the setting of published tables of mixed
CIFAR-10-C batches. The features h are normalised; w_ij is

    knn     1 if h_j is among the k nearest of h_i, not itself, else 0
    rbf     exp(-||h_i - h_j||^2 / (2 s^2)), s the mean distance to the k-th neighbour
    linear  <h_i, h_j>

The number of iterations is fixed: a test for convergence would synchronise with the device. ``LaplacianAdjustment``
corrects the predictions of any other test-time adaptation method: ``--model Tent --model.output LaplacianAdjustment``.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.checks import at_least, one_of
from cl_lightning.distributed import all_gather_together, rank
from cl_lightning.losses import full_precision
from cl_lightning.strategies.test_time.base import TestTimeAdaptation
from cl_lightning.strategies.test_time.parts.part import OutputHead
from cl_lightning.strategy import Output

Affinity = Literal["knn", "rbf", "linear"]
_TINY = 1e-10


def affinities(features: Tensor, kind: Affinity, neighbours: int = 5, *, symmetric: bool = False) -> Tensor:
    """W ``(n, n)`` of features ``(n, d)``, see above; ``symmetric`` returns (W + W^T) / 2 for ``knn``."""
    unit = F.normalize(features, dim=1)
    if kind == "linear":
        return unit @ unit.T
    distances = torch.cdist(unit, unit)
    k = min(neighbours, len(unit) - 1)
    apart = distances.clone().fill_diagonal_(torch.inf)
    nearest = apart.topk(k, dim=1, largest=False)
    if kind == "rbf":
        width = nearest.values[:, -1].mean() if k else distances.new_ones(())
        return torch.exp(-distances.square() / (2 * width.clamp(min=_TINY).square()))
    found = torch.zeros_like(distances).scatter_(1, nearest.indices, 1.0)
    return (found + found.T) / 2 if symmetric else found


def laplacian_step(z: Tensor, q: Tensor, weights: Tensor) -> Tensor:
    """One step of the fixed-point iteration; z and q ``(n, C)``, rows on the simplex, W ``(n, n)``."""
    return ((q + _TINY).log() + weights @ z).softmax(dim=1)


def laplacian_objective(z: Tensor, q: Tensor, weights: Tensor) -> Tensor:
    """F(Z), a scalar, in nats."""
    divergence = (z * ((z + _TINY).log() - (q + _TINY).log())).sum()
    return divergence - (z * (weights @ z)).sum() / 2


def adjusted(q: Tensor, weights: Tensor, iterations: int = 100) -> Tensor:
    """Z ``(n, C)`` after the given number of iterations, starting from q."""
    z = q
    for _ in range(iterations):
        z = laplacian_step(z, q, weights)
    return z


class LaplacianAdjustment(OutputHead):
    """Laplacian regularisation of the predictions of a batch: similar features get similar predictions.

    The batch consists of the samples of all processes.

    Args:
        affinity: ``knn``, ``rbf`` or ``linear``, see above.
        neighbours: k, at least 1.
        symmetric: Whether to use (W + W^T) / 2 with ``knn``.
        iterations: Number of iterations, at least 1.
    """

    def __init__(
        self, affinity: Affinity = "knn", neighbours: int = 5, *, symmetric: bool = False, iterations: int = 100
    ) -> None:
        super().__init__()
        one_of(self, get_args(Affinity), affinity=affinity)
        at_least(self, 1, neighbours=neighbours, iterations=iterations)
        self.affinity: Affinity = affinity
        self.neighbours, self.symmetric, self.iterations = neighbours, symmetric, iterations

    @torch.no_grad()
    def forward(self, output: Output) -> Tensor:
        """log Z ``(B, C)`` of the rows of this process."""
        with torch.autocast(output.logits.device.type, enabled=False):
            q, features = full_precision(output.logits).softmax(dim=1), full_precision(output.features)
            owners = torch.full((len(q),), rank(), device=q.device)
            q, features, owners = all_gather_together([q, features, owners])
            weights = affinities(features, self.affinity, self.neighbours, symmetric=self.symmetric)
            z = adjusted(q, weights, self.iterations)
        return (z[owners == rank()] + _TINY).log()


class LAME(TestTimeAdaptation):
    """Laplacian regularisation of the predictions of the source network, without training.

    Args:
        affinity, neighbours, symmetric, iterations: Options of ``LaplacianAdjustment``.
        kwargs: Options of ``TestTimeAdaptation``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time", paper="Boudiaf et al., CVPR 2022, arXiv:2201.05718", transductive=True
    )

    def __init__(
        self,
        *,
        affinity: Affinity = "knn",
        neighbours: int = 5,
        symmetric: bool = False,
        iterations: int = 100,
        **kwargs: Any,
    ) -> None:
        output = LaplacianAdjustment(affinity, neighbours, symmetric=symmetric, iterations=iterations)
        super().__init__(
            statistics="source", params=None, reset="never", predict_when="before", output=output, **kwargs
        )
