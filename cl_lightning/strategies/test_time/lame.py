"""LAME, Laplacian adjusted maximum-likelihood estimation (Boudiaf et al., CVPR 2022, arXiv:2201.05718).

The source network stays as it is. Its predictions q_i for a batch are corrected so that samples with similar features
get similar ones: from z = q, each step of

    z_i <- softmax(log q_i + sum_j w_ij z_j)

brings down, for a symmetric positive semi-definite W,

    F(Z) = sum_i KL(z_i || q_i) - 1/2 sum_ij w_ij <z_i, z_j>

since the step minimises F with its concave part replaced by the tangent. (The paper writes the second term without 1/2;
that quantity need not fall.) No state, no parameters. It helps where neighbours in the stream have the same class, and
hurts where classes come mixed; the more, the more samples have a say: k at most with ``knn``, all of the batch with
``rbf``, which published tables of mixed CIFAR-10-C batches have. The features h are normalised; w_ij is

    knn     1 if h_j is among the k nearest of h_i, not itself, else 0
    rbf     exp(-||h_i - h_j||^2 / (2 s^2)), s the mean distance to the k-th neighbour
    linear  <h_i, h_j>

All iterations are done: to ask whether they may end would wait for the device. ``LaplacianAdjustment`` does the same to
the predictions of any other method for test-time adaptation: ``--model Tent --model.output LaplacianAdjustment``.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.distributed import all_gather_together, rank
from cl_lightning.losses import full_precision
from cl_lightning.network import Output
from cl_lightning.strategies.test_time.base import OutputHead, TestTimeAdaptation

Affinity = Literal["knn", "rbf", "linear"]
_TINY = 1e-10


def affinities(features: Tensor, kind: Affinity, neighbours: int = 5, *, symmetric: bool = False) -> Tensor:
    """W ``(n, n)`` of features ``(n, d)``, see above; ``symmetric`` for the mean of W and its transpose."""
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
    """One step of the fixed point; z and q ``(n, C)`` on the simplex, W ``(n, n)``."""
    return ((q + _TINY).log() + weights @ z).softmax(dim=1)


def laplacian_objective(z: Tensor, q: Tensor, weights: Tensor) -> Tensor:
    """F(Z), a scalar."""
    divergence = (z * ((z + _TINY).log() - (q + _TINY).log())).sum()
    return divergence - (z * (weights @ z)).sum() / 2


def adjusted(q: Tensor, weights: Tensor, iterations: int = 100) -> Tensor:
    """Z ``(n, C)`` after the iterations, from q."""
    z = q
    for _ in range(iterations):
        z = laplacian_step(z, q, weights)
    return z


class LaplacianAdjustment(OutputHead):
    """Predictions of a batch, made alike where features are; the batch is that of all processes.

    Args:
        affinity: ``knn``, ``rbf`` or ``linear``, see above.
        neighbours: k, at least 1.
        symmetric: With ``knn``, whether W is made symmetric.
        iterations: At least 1.
    """

    def __init__(
        self, affinity: Affinity = "knn", neighbours: int = 5, *, symmetric: bool = False, iterations: int = 100
    ) -> None:
        if affinity not in ("knn", "rbf", "linear"):
            raise ValueError(f"LaplacianAdjustment: affinity is {affinity!r}; use knn, rbf or linear")
        if neighbours < 1 or iterations < 1:
            raise ValueError(f"LaplacianAdjustment: neighbours={neighbours}, iterations={iterations}; at least 1 each")
        self.affinity: Affinity = affinity
        self.neighbours, self.symmetric, self.iterations = neighbours, symmetric, iterations

    @torch.no_grad()
    def __call__(self, output: Output) -> Tensor:
        """log Z ``(B, C)`` of this process's rows."""
        with torch.autocast(output.logits.device.type, enabled=False):
            q, features = full_precision(output.logits).softmax(dim=1), full_precision(output.features)
            owners = torch.full((len(q),), rank(), device=q.device)
            q, features, owners = all_gather_together([q, features, owners])
            weights = affinities(features, self.affinity, self.neighbours, symmetric=self.symmetric)
            z = adjusted(q, weights, self.iterations)
        return (z[owners == rank()] + _TINY).log()


class LAME(TestTimeAdaptation):
    """Predictions of a batch, made alike where features are; nothing is trained.

    Args:
        affinity, neighbours, symmetric, iterations: Of ``LaplacianAdjustment``.
        kwargs: Of ``TestTimeAdaptation``.
    """

    family: ClassVar[str] = "test-time"
    paper: ClassVar[str] = "Boudiaf et al., CVPR 2022, arXiv:2201.05718"
    uses_test_batch = True

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
        super().__init__(statistics="source", trained=None, reset="never", scored="before", output=output, **kwargs)
