"""Classifiers with a closed-form solution: sums over all features seen so far, and a linear map computed from the sums.

They require features that no longer change. The state consists of sums over samples, so the result does not depend on
the order of the samples or on the split of the stream into tasks, batches or processes, up to rounding. All computation
is in float64, predictions included, since the matrices that are inverted are ill-conditioned.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import mix
from cl_lightning.checks import at_least, one_of, within
from cl_lightning.distributed import all_sum, rank, world_size
from cl_lightning.models.heads import Head

Activation = Literal["relu", "tanh", "identity"]
Targets = Callable[[Tensor, Tensor], Tensor]
"""Targets of a regression, float64 ``(n, C)``, of features ``(n, d)`` and columns ``(n,)``."""
_ROWS = 2048  # samples whose expanded features are in memory at a time
_CHUNK = 256  # samples of one recursive update, which solves a system of _CHUNK equations
_HELD_OUT = 0x41D6E  # salt


def solve_positive(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix^-1 right`` for a symmetric positive semi-definite matrix; the pseudo-inverse if it is singular.

    Args:
        matrix: ``(d, d)``, float64.
        right: ``(d, m)``, float64.

    Returns:
        ``(d, m)``, float64.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not info:
        solved: Tensor = torch.cholesky_solve(right, factor)
        return solved
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > values[-1].clamp(min=0) * len(matrix) * torch.finfo(values.dtype).eps
    inverse = torch.where(kept, 1 / values, 0.0)
    pseudo: Tensor = vectors @ (inverse[:, None] * (vectors.T @ right))
    return pseudo


def gaussian_classifier(means: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Linear discriminant of Gaussian classes with a shared covariance and equal priors.

        log p(f | c) + const = w_c^T f + b_c,   w_c = Sigma^-1 mu_c,   b_c = -1/2 mu_c^T Sigma^-1 mu_c

    Args:
        means: mu, ``(C, d)``, float64.
        covariance: Sigma, ``(d, d)``, float64.

    Returns:
        Weights ``(C, d)`` and biases ``(C,)``.
    """
    weight = solve_positive(covariance, means.T).T
    return weight, -0.5 * (weight * means).sum(dim=1)


def recursive_ridge(inverse: Tensor, weight: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Recursive update of a ridge regression by the Woodbury identity (G-ACIL, arXiv:2403.15706, theorem 3.1).

        K = (I + X R X^T)^-1,   R <- R - R X^T K X R,   W <- W + R X^T (Y - X W)   with the new R

    maintains ``R = (X^T X + ridge I)^-1`` and ``W = R X^T Y`` over all samples so far, starting from
    ``R = I / ridge, W = 0``.

    Args:
        inverse: R, ``(E, E)``, symmetric, float64.
        weight: W, ``(E, C)``; columns of new classes are 0.
        inputs: X, ``(n, E)``.
        targets: Y, ``(n, C)``.

    Returns:
        The new R and W.
    """
    gain = inputs @ inverse  # (n, E)
    system = torch.eye(len(inputs), dtype=inputs.dtype, device=inputs.device) + gain @ inputs.T
    factor = torch.linalg.cholesky_ex(system).L  # positive definite; without a check, which waits for the device
    step = torch.cholesky_solve(gain, factor)  # K X R, which is (R X^T)^T with the new R
    inverse = inverse - gain.T @ step
    return (inverse + inverse.T) / 2, weight + step.T @ (targets - inputs @ weight)


def validated_ridge(
    expand: Callable[[Tensor], Tensor],
    features: Tensor,
    targets: Tensor,
    held_out: Tensor,
    ridges: Sequence[float],
) -> float:
    """The ridge with the lowest mean squared error on held-out samples, after regression on the others.

    One eigendecomposition serves all candidates: of ``X^T X``, or of ``X X^T`` if there are fewer samples than inputs.

    Args:
        expand: Maps features ``(n, d)`` to inputs ``(n, E)``, float64.
        features: ``(n, d)``.
        targets: ``(n, C)``, float64.
        held_out: Samples on which the error is computed, bool ``(n,)``; at least one True and one False.
        ridges: Candidates; ties go to the first.

    Returns:
        One of ``ridges``.
    """
    fitted, wanted = features[~held_out], targets[~held_out]
    judged = torch.split(features[held_out], _ROWS)
    width = expand(features[:1]).shape[1]
    if len(fitted) <= width:
        inputs = torch.cat([expand(rows) for rows in torch.split(fitted, _ROWS)])
        values, vectors = torch.linalg.eigh(inputs @ inputs.T)
        basis, inner = inputs.T @ vectors, vectors.T @ wanted
    else:
        gram, cross = wanted.new_zeros(width, width), wanted.new_zeros(width, wanted.shape[1])
        for rows, part in zip(torch.split(fitted, _ROWS), torch.split(wanted, _ROWS), strict=True):
            inputs = expand(rows)
            gram += inputs.T @ inputs
            cross += inputs.T @ part
        values, basis = torch.linalg.eigh(gram)
        inner = basis.T @ cross
    outer = torch.cat([expand(rows) @ basis for rows in judged])
    values = values.clamp(min=0)
    errors = [((outer / (values + ridge)) @ inner - targets[held_out]).square().mean() for ridge in ridges]
    return ridges[int(torch.stack(errors).argmin())]


class _Solved(nn.Module):
    """Weights and biases of a block, as buffers."""

    weight: Tensor
    bias: Tensor

    def __init__(self, num_inputs: int, num_new: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_new, num_inputs, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(num_new, dtype=torch.float64))


class ClosedFormHead(Head):
    """Base class of heads that are solved at the end of each task.

    A subclass defines the sums (``add``) and the linear map computed from them (``solution``). These heads have no
    parameters and are not trained by gradient descent. The score of classes without samples is -inf, so they are never
    predicted.

    Args:
        num_features: Size of a feature vector, d.

    Attributes:
        counts: Samples of each class so far, over all processes, int64 ``(C,)``.
    """

    kept_as: ClassVar[str] = "statistics"
    needs_statistics = True
    counts: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))

    @property
    def num_inputs(self) -> int:
        """Number of inputs of the linear map, E."""
        return self.num_features

    def expand(self, features: Tensor) -> Tensor:
        """Inputs of the linear map, float64 ``(n, E)``, from features ``(n, d)``."""
        return features.double()

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add samples to the sums.

        Args:
            features: As in ``fit_features``, ``(n, d)``.
            labels: Columns, int64 ``(n,)``, without -1. ``counts`` already includes these samples.
        """
        raise NotImplementedError

    def solution(self) -> tuple[Tensor, Tensor | None]:
        """Weights ``(C, E)`` and biases ``(C,)`` (None for 0) computed from the sums, float64."""
        raise NotImplementedError

    def new_block(self, num_new: int) -> nn.Module:
        return _Solved(self.num_inputs, num_new)

    def grow(self, num_new: int) -> None:
        super().grow(num_new)
        self.counts = torch.cat([self.counts, self.counts.new_zeros(num_new)])

    def forward(self, features: Tensor) -> Tensor:
        scores = features.new_zeros(len(features), 0, dtype=torch.promote_types(features.dtype, torch.float32))
        if not self.blocks:
            return scores
        with torch.autocast(features.device.type, enabled=False):
            solved = self.linear(features)
        return solved.to(scores.dtype).masked_fill(self.counts == 0, -torch.inf)

    def linear(self, features: Tensor) -> Tensor:
        """The linear map of features ``(n, d)``, float64 ``(n, C)``; 0 for classes without samples."""
        bias = torch.cat([cast(Tensor, block.bias) for block in self.blocks])
        return F.linear(self.expand(features), self.weight(), bias)

    @torch.no_grad()
    def fit_features(self, features: Tensor, labels: Tensor) -> None:
        features, labels = self._counted(features, labels)
        self.add(features, labels)
        self._place(*self.solution())

    def num_bytes(self) -> int:
        """Memory of sums and solution, in bytes."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def one_hot(self, labels: Tensor) -> Tensor:
        """One-hot targets ``(n, C)``, float64, of labels ``(n,)``."""
        return F.one_hot(labels, len(self.counts)).double()

    def _counted(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that have a label, after they are added to ``counts``."""
        features, labels = features[labels >= 0], labels[labels >= 0]
        counts = labels.bincount(minlength=len(self.counts))
        self.counts += counts if self.needs_all_rows else all_sum(counts)
        return features, labels

    def _place(self, weight: Tensor, bias: Tensor | None) -> None:
        sizes = self.block_sizes()
        for block, rows in zip(self.blocks, torch.split(weight, sizes), strict=True):
            cast(Tensor, block.weight).copy_(rows)
        if bias is not None:
            for block, values in zip(self.blocks, torch.split(bias, sizes), strict=True):
                cast(Tensor, block.bias).copy_(values)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name, buffer in list(self.named_buffers(recurse=False)):
            if (saved := state_dict.get(prefix + name)) is not None and saved.ndim == buffer.ndim:
                self.register_buffer(name, buffer.new_zeros(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


class LDAHead(ClosedFormHead):
    """Streaming linear discriminant analysis: Gaussian classes with a shared covariance, computed from running sums.

        mu_c = s_c / n_c,   Sigma = (1 - a) S + a tr(S) / d I + r I
        total:   S = (H - n mu mu^T) / (n - 1)                      within: S = (H - sum_c n_c mu_c mu_c^T) / (n - C)
        score_c = mu_c^T Sigma^-1 f - 1/2 mu_c^T Sigma^-1 mu_c (+ log n_c / n)

    with ``H = sum f f^T``. a -> shrinkage, r -> ridge. First Session Adaptation (Panos et al., ICCV 2023,
    arXiv:2303.13199) uses ``total`` and r = 1, for features with variance about 1. ``within`` is the pooled covariance
    of the Mahalanobis classifier (Lee et al., NeurIPS 2018, arXiv:1807.03888). With Sigma = I it is the
    nearest-class-mean classifier.

    Args:
        num_features: Size of a feature vector, d.
        covariance: ``total``: covariance of all features around their mean; ``within``: around the mean of each class.
        ridge: r, at least 0, in the squared unit of the features. With ridge = shrinkage = 0, a singular covariance is
            replaced by its pseudo-inverse.
        shrinkage: a, in [0, 1].
        priors: ``equal`` for all classes, or proportional to the ``counts``.

    Raises:
        ValueError: If an option is out of range.
    """

    sums: Tensor
    second: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        covariance: Literal["total", "within"] = "total",
        ridge: float = 1.0,
        shrinkage: float = 0.0,
        priors: Literal["equal", "counts"] = "equal",
    ) -> None:
        super().__init__(num_features)
        one_of(self, ("total", "within"), covariance=covariance)
        one_of(self, ("equal", "counts"), priors=priors)
        at_least(self, 0, ridge=ridge)
        within(self, "[0, 1]", shrinkage=shrinkage)
        self.covariance, self.ridge, self.shrinkage, self.priors = covariance, ridge, shrinkage, priors
        self.register_buffer("sums", torch.zeros(0, num_features, dtype=torch.float64))
        self.register_buffer("second", torch.zeros(num_features, num_features, dtype=torch.float64))

    def grow(self, num_new: int) -> None:
        super().grow(num_new)
        self.sums = torch.cat([self.sums, self.sums.new_zeros(num_new, self.num_features)])

    def add(self, features: Tensor, labels: Tensor) -> None:
        sums, second = torch.zeros_like(self.sums), torch.zeros_like(self.second)
        for rows, part in zip(torch.split(features, _ROWS), torch.split(labels, _ROWS), strict=True):
            inputs = self.expand(rows)
            sums += self.one_hot(part).T @ inputs
            second += inputs.T @ inputs
        self.sums += all_sum(sums)
        self.second += all_sum(second)

    def means(self) -> Tensor:
        """mu, float64 ``(C, d)``; 0 for classes without samples."""
        return self.sums / self.counts.clamp(min=1)[:, None]

    def scatter(self) -> Tensor:
        """Sum of squared distances to the common mean or to the class means, float64 ``(d, d)``."""
        if self.covariance == "total":
            centre = self.sums.sum(dim=0)
            scatter = self.second - centre[:, None] * centre / self.counts.sum().clamp(min=1)
        else:
            scatter = self.second - self.means().T @ self.sums
        return (scatter + scatter.T) / 2

    def shared_covariance(self) -> Tensor:
        """Sigma, float64 ``(d, d)``."""
        total, classes = self.counts.sum().clamp(min=1), (self.counts > 0).sum()
        freedom = total - 1 if self.covariance == "total" else total - classes
        spread = self.scatter() / freedom.clamp(min=1)
        mean_variance = spread.diagonal().mean()
        identity = torch.eye(self.num_features, dtype=spread.dtype, device=spread.device)
        return (1 - self.shrinkage) * spread + (self.shrinkage * mean_variance + self.ridge) * identity

    def solution(self) -> tuple[Tensor, Tensor]:
        weight, bias = gaussian_classifier(self.means(), self.shared_covariance())
        if self.priors == "counts":
            bias = bias + (self.counts.clamp(min=1) / self.counts.sum().clamp(min=1)).log()
        return weight, bias


class RidgeHead(ClosedFormHead):
    """Ridge regression to one-hot targets, on the features or on a random projection of them.

        phi(f) = activation(P^T f),   W = (G + r I)^-1 Q,   G = sum phi phi^T,   Q = sum phi y^T,   scores phi(f)^T W

    with P fixed and random, ``(d, E)``: RanPAC (McDonnell et al., NeurIPS 2023, arXiv:2307.02251, eq. 6-8) draws
    P ~ N(0, 1), analytic continual learning (G-ACIL, Zhuang et al., NeurIPS 2024, arXiv:2403.15706) the initial weights
    of ``nn.Linear``, P ~ U(-1/sqrt(d), 1/sqrt(d)), whose variance is 3 d times smaller. A ridge belongs to its P: with
    ``relu`` and ``identity`` r for the uniform P acts as 3 d r for the normal P. r -> ridge, E -> projection.

    ``accumulate`` stores G and Q and solves at the end of a task; ``recursive`` stores ``(G + r I)^-1`` and W and
    updates them in chunks of samples (:func:`recursive_ridge`). Both give the same result. ``accumulate`` is cheaper if
    a task has more than E samples. Both store ``E * E`` float64 numbers from the end of the first task on (800 MB for E
    = 10,000).

    Given a list of ridges, the head selects the ridge with the lowest squared error on one fifth of the task's samples,
    after a fit on the other four fifths (RanPAC, appendix F.5 and its code); the held-out samples enter G and Q like
    all others. This choice is the only part that depends on the split of the stream into tasks.

    Args:
        num_features: Size of a feature vector, d.
        ridge: r, above 0, or a list of candidates.
        projection: E; None to use the features directly, without projection and activation.
        activation: ``relu``, ``tanh`` or ``identity``.
        init: Distribution of P: ``normal`` for N(0, 1), ``uniform`` for U(-1/sqrt(d), 1/sqrt(d)).
        backend: ``accumulate`` or ``recursive``; ``recursive`` requires a single ridge.

    Attributes:
        random: P, drawn from torch's global generator at construction; ``(0, 0)`` without a projection.
        gram: G, ``(E, E)``, with ``accumulate``.
        cross: Q, ``(E, C)``, with ``accumulate``.
        inverse: ``(G + r I)^-1``, ``(E, E)``, with ``recursive``.
        chosen: The ridge of the last solution; 0 before the first.

    Raises:
        ValueError: If an option is out of range, or ``recursive`` has several ridges.
    """

    random: Tensor
    gram: Tensor
    cross: Tensor
    inverse: Tensor
    chosen: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        ridge: float | list[float] = 1.0,
        projection: int | None = None,
        activation: Activation = "relu",
        init: Literal["normal", "uniform"] = "normal",
        backend: Literal["accumulate", "recursive"] = "accumulate",
    ) -> None:
        super().__init__(num_features)
        self.ridges = [float(value) for value in ridge] if isinstance(ridge, Sequence) else [float(ridge)]
        if not self.ridges or not min(self.ridges) > 0:
            raise ValueError(f"RidgeHead: ridge is {ridge}; give a number above 0 or a non-empty list of such numbers")
        at_least(self, 1, projection=projection, optional=True)
        one_of(self, get_args(Activation), activation=activation)
        one_of(self, ("accumulate", "recursive"), backend=backend)
        one_of(self, ("normal", "uniform"), init=init)
        if backend == "recursive" and len(self.ridges) > 1:
            raise ValueError(
                f"RidgeHead: backend recursive with {len(self.ridges)} ridges; give one, or use accumulate"
            )
        self.projection, self.activation, self.backend = projection, activation, backend
        self.needs_all_rows = backend == "recursive" or len(self.ridges) > 1
        nothing = torch.zeros(0, 0, dtype=torch.float64)
        shape = (0, 0) if projection is None else (num_features, projection)
        drawn = torch.randn(shape) if init == "normal" else (2 * torch.rand(shape) - 1) / num_features**0.5
        self.register_buffer("random", drawn)
        for name in ("gram", "cross") if backend == "accumulate" else ("inverse",):
            self.register_buffer(name, nothing.clone())
        self.register_buffer("chosen", torch.zeros((), dtype=torch.float64))

    @property
    def num_inputs(self) -> int:
        return self.projection or self.num_features

    def expand(self, features: Tensor) -> Tensor:
        if self.projection is None:
            return features.double()
        projected = features.double() @ self.random.double()
        if self.activation == "identity":
            return projected
        return projected.relu() if self.activation == "relu" else projected.tanh()

    @torch.no_grad()
    def fit_targets(self, features: Tensor, labels: Tensor, targets: Targets) -> None:
        """Fit the head as :meth:`fit_features` does, to other targets than one-hot labels.

        Args:
            features: ``(n, d)``.
            labels: Columns, int64 ``(n,)``; rows with label -1 are left out.
            targets: Returns the targets, float64 ``(m, C)``, of some of the features, ``(m, d)``, and of their labels.
        """
        features, labels = self._counted(features, labels)
        self.add(features, labels, targets)
        self._place(*self.solution())

    def add(self, features: Tensor, labels: Tensor, targets: Targets | None = None) -> None:
        targets = targets or (lambda _, columns: self.one_hot(columns))
        if self.backend == "recursive":
            self._update(features, labels, targets)
            return
        self._choose(features, labels, targets)
        width, columns = self.num_inputs, len(self.counts)
        if not len(self.gram):
            self.gram, self.cross = self.gram.new_zeros(width, width), self.cross.new_zeros(width, 0)
        self.cross = torch.cat([self.cross, self.cross.new_zeros(width, columns - self.cross.shape[1])], dim=1)
        gram, cross = torch.zeros_like(self.gram), torch.zeros_like(self.cross)
        if self.needs_all_rows:  # every process has all rows and sums its share
            features, labels = features[rank() :: world_size()], labels[rank() :: world_size()]
        for inputs, wanted in self._rows(features, labels, targets, _ROWS):
            gram += inputs.T @ inputs
            cross += inputs.T @ wanted
        self.gram += all_sum(gram)
        self.cross += all_sum(cross)

    def solution(self) -> tuple[Tensor, None]:
        if self.backend == "recursive":
            return self.weight(), None
        shifted = self.gram.clone()
        shifted.diagonal().add_(self.chosen)
        return solve_positive(shifted, self.cross).T, None

    def _rows(self, features: Tensor, labels: Tensor, targets: Targets, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for rows, part in zip(torch.split(features, size), torch.split(labels, size), strict=True):
            yield self.expand(rows), targets(rows, part)

    def _update(self, features: Tensor, labels: Tensor, targets: Targets) -> None:
        self.chosen.fill_(self.ridges[0])
        if not len(self.inverse):
            identity = torch.eye(self.num_inputs, dtype=torch.float64, device=features.device)
            self.inverse = identity / self.ridges[0]
        weight = self.weight().T
        for inputs, wanted in self._rows(features, labels, targets, _CHUNK):
            self.inverse, weight = recursive_ridge(self.inverse, weight, inputs, wanted)
        self._place(weight.T, None)

    def _choose(self, features: Tensor, labels: Tensor, targets: Targets) -> None:
        """Set ``chosen``: a task with fewer than 5 samples keeps the previous ridge, the first one the median ridge."""
        if len(self.ridges) == 1 or (len(labels) < 5 and not self.chosen):
            self.chosen.fill_(sorted(self.ridges)[len(self.ridges) // 2])
        elif len(labels) >= 5:
            generator = torch.Generator().manual_seed(mix(_HELD_OUT, int(self.counts.sum())))
            held_out = torch.zeros(len(labels), dtype=torch.bool)
            held_out[torch.randperm(len(labels), generator=generator)[: len(labels) // 5]] = True
            held_out = held_out.to(features.device)
            wanted = targets(features, labels)
            self.chosen.fill_(validated_ridge(self.expand, features, wanted, held_out, self.ridges))
