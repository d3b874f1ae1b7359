"""Class means (prototypes) and covariances in feature space: how they are measured, kept, compared and moved.

Statistics are computed in float64, whatever the features are: a covariance is a small difference of large sums.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.distributed import all_sum, is_distributed
from cl_lightning.losses import full_precision

Metric = Literal["euclidean", "cosine"]


class ClassStatistics(NamedTuple):
    """Statistics of the features of each class; all 0 for a class without features.

    Attributes:
        counts: Number of samples, int64 ``(C,)``.
        means: float64 ``(C, d)``.
        covariances: Unbiased (divided by count - 1; 0 for a single sample), float64 ``(C, d, d)``; None if not wanted.
    """

    counts: Tensor
    means: Tensor
    covariances: Tensor | None


@torch.no_grad()
def class_statistics(
    features: Tensor, labels: Tensor, num_classes: int, *, covariance: bool = True, reduce: bool = True
) -> ClassStatistics:
    """Count, mean and covariance of the features of each class.

        mu_c = 1/n_c sum_{y_i = c} f_i,   Sigma_c = 1/(n_c - 1) sum_{y_i = c} (f_i - mu_c)(f_i - mu_c)^T

    Args:
        features: ``(n, d)``; n may be 0.
        labels: Columns, int64 ``(n,)``; rows with label -1 are left out.
        num_classes: C.
        covariance: Whether to compute covariances, which take ``C * d * d`` numbers.
        reduce: Whether the features are this process's share, so that sums are taken over all processes: the result
            is then that of all features, the same on every process. False: they are all there already.
    """
    d = features.shape[1]
    sums = torch.zeros(num_classes, d, dtype=torch.float64, device=features.device)
    scatters = sums.new_zeros(num_classes, d, d) if covariance else sums.new_zeros(0)
    features, labels = features[labels >= 0], labels[labels >= 0]
    counts = labels.bincount(minlength=num_classes)
    # One product of matrices per class, and not index_add_, whose order of summation varies on a GPU.
    for column, rows in enumerate(torch.split(features[labels.argsort(stable=True)], counts.tolist())):
        sums[column] = rows.double().sum(dim=0)
        if covariance and len(rows):
            centred = rows.double() - sums[column] / len(rows)
            scatters[column] = centred.T @ centred
    local_counts, local_sums = counts, sums
    if reduce:
        counts, sums = all_sum(counts.clone()), all_sum(sums.clone())
    means = sums / counts.clamp(min=1)[:, None]
    if not covariance:
        return ClassStatistics(counts, means, None)
    if reduce and is_distributed():
        # Each process has centred on its own mean: add what it takes to centre on the common one.
        gap = local_sums / local_counts.clamp(min=1)[:, None] - means
        scatters += local_counts[:, None, None] * gap[:, :, None] * gap[:, None, :]
        all_sum(scatters)
    return ClassStatistics(counts, means, scatters.div_((counts - 1).clamp(min=1)[:, None, None]))


def class_means(features: Tensor, labels: Tensor, num_classes: int, *, reduce: bool = True) -> Tensor:
    """Mean feature of each class, 0 for a class without features.

    Args:
        features: ``(n, d)``.
        labels: Columns, int64 ``(n,)``; rows with label -1 are left out.
        num_classes: C.
        reduce: As in :func:`class_statistics`: whether other processes hold further features.

    Returns:
        ``(C, d)`` in the features' type, float32 at least.
    """
    means = class_statistics(features, labels, num_classes, covariance=False, reduce=reduce).means
    return means.to(torch.promote_types(features.dtype, torch.float32))


def _squared_distances(rows: Tensor, columns: Tensor, metric: Tensor | None = None) -> Tensor:
    """``(r - c)^T M (r - c)`` of all pairs ``(n, m)``, by one product of matrices; M symmetric, default identity."""
    mapped = columns if metric is None else columns @ metric
    own = rows if metric is None else rows @ metric
    distances = (own * rows).sum(dim=1)[:, None] - 2 * rows @ mapped.T + (mapped * columns).sum(dim=1)
    return distances.clamp(min=0)


def nearest_mean_scores(
    features: Tensor, means: Tensor, metric: Metric = "euclidean", *, block_size: int = 8192
) -> Tensor:
    """Score of each class by how near its mean is; the largest one is the prediction.

    Args:
        features: ``(n, d)``.
        means: ``(C, d)``.
        metric: ``euclidean``: minus the squared distance; ``cosine``: the cosine of the angle, in [-1, 1].
        block_size: Number of features that are compared at a time.

    Returns:
        ``(n, C)`` in the features' type, float32 at least.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    means = means.to(dtype)
    # Distances do not depend on the origin, but the digits that their expansion into products loses do.
    origin = means.mean(dim=0)

    def score(block: Tensor) -> Tensor:
        if metric == "cosine":
            return F.normalize(block, dim=1) @ F.normalize(means, dim=1).T
        return -_squared_distances(block - origin, means - origin)

    with torch.autocast(features.device.type, enabled=False):
        return torch.cat([score(block.to(dtype)) for block in torch.split(features, block_size)])


@torch.no_grad()
def kernel_drift(
    old: Tensor,
    new: Tensor,
    prototypes: Tensor,
    sigma: float,
    *,
    metric: Tensor | None = None,
    rescale: bool = False,
    block_size: int = 8192,
) -> Tensor:
    """How far each prototype has moved: the average movement of the samples around it (SDC, EFC).

        w_ci = exp(-d_ci / (2 sigma^2)),   delta_c = sum_i w_ci (new_i - old_i) / sum_i w_ci

    with ``d_ci = || old_i - p_c ||^2`` in Semantic Drift Compensation (Yu et al., CVPR 2020, arXiv:2004.00440), and
    ``(old_i - p_c)^T E (old_i - p_c)``, E the empirical feature matrix before the task, ``rescale`` on, in Elastic
    Feature Consolidation (Magistri et al., ICLR 2024, arXiv:2402.03917). The smallest d of each row is subtracted
    before the exponential: the same quotient, without underflow for prototypes far from all samples.

    Args:
        old: Features of the task's images before training on it, of all processes, ``(n, d)``.
        new: Features of the same images after it, ``(n, d)``.
        prototypes: Where the classes were before the task, ``(c, d)``.
        sigma: Width of the kernel, positive, in the unit of the features; of ``rescale``, a fraction.
        metric: E, symmetric positive semi-definite, ``(d, d)``; default the identity.
        rescale: Divide d by its range (largest minus smallest, over all classes and samples).
        block_size: Number of samples at a time; memory is ``c * block_size``.

    Returns:
        Displacements ``(c, d)``, to be added to the prototypes; 0 where there are no samples.

    Raises:
        ValueError: If sigma is not positive.
    """
    if not sigma > 0:
        raise ValueError(f"kernel_drift: sigma is {sigma}; it must be positive, about the distance between neighbours")
    if len(old) == 0 or len(prototypes) == 0:
        return torch.zeros_like(prototypes)
    origin = prototypes.double().mean(dim=0)
    centred = prototypes.double() - origin
    if metric is not None:
        metric = metric.double()

    def distances(block: Tensor) -> Tensor:
        return _squared_distances(centred, block.double() - origin, metric)  # (c, b)

    nearest = centred.new_full((len(centred),), torch.inf)
    farthest = centred.new_zeros(())
    for block in torch.split(old, block_size):
        d = distances(block)
        nearest = torch.minimum(nearest, d.amin(dim=1))
        farthest = torch.maximum(farthest, d.amax())
    unit = (farthest - nearest.min()).clamp(min=torch.finfo(torch.float64).tiny) if rescale else 1.0

    weight_sum, moved = torch.zeros_like(nearest), torch.zeros_like(centred)
    for before, after in zip(torch.split(old, block_size), torch.split(new, block_size), strict=True):
        weight = ((nearest[:, None] - distances(before)) / unit / (2 * sigma**2)).exp()
        weight_sum += weight.sum(dim=1)
        moved += weight @ (after.double() - before.double())
    return (moved / weight_sum[:, None]).to(prototypes.dtype)


@torch.no_grad()
def calibrated(novel: Tensor, base: Tensor, *, beta: float, tau: float) -> Tensor:
    """Means of few samples, moved towards those of similar base classes (TEEN: Wang et al., arXiv:2312.05229).

        w_nb = softmax_b(tau <c^_n, c^_b>),   Delta_n = normalise(sum_b w_nb c^_b)
        c~_n = (1 - beta) c^_n + beta Delta_n

    with c^ = c / ||c||. The result is not normalised again.

    Args:
        novel: Means to be moved, ``(n, d)``.
        base: Means to move them to, ``(b, d)``; b at least 1.
        beta: Share of Delta, in [0, 1].
        tau: Sharpness of the weights, at least 0; at 0 all base classes count alike, at infinity the nearest alone.

    Returns:
        c~, ``(n, d)``.
    """
    novel, base = F.normalize(novel, dim=1), F.normalize(base, dim=1)
    weight = (tau * novel @ base.T).softmax(dim=1)  # (n, b), rows sum to 1
    return (1 - beta) * novel + beta * F.normalize(weight @ base, dim=1)


@torch.no_grad()
def calibrate_new(prototypes: "Prototypes", task_columns: Tensor, *, beta: float, tau: float) -> None:
    """Apply :func:`calibrated` to the means of the last task's new classes, in place; nothing after the first task.

    The base is the classes of the first task. A mean keeps its length, so that it can still be measured against others
    and pooled with further samples of its class. All other means stay, to the bit, as do all where beta is 0.

    Args:
        prototypes: Of all classes seen so far.
        task_columns: Which columns belong to which task, bool ``(T, C)``.
        beta: As in :func:`calibrated`.
        tau: As in :func:`calibrated`.
    """
    if beta == 0 or len(task_columns) < 2:
        return
    new = task_columns[-1] & ~task_columns[:-1].any(dim=0) & prototypes.known
    base = task_columns[0] & prototypes.known
    if new.any() and base.any():
        means = prototypes.means[new]
        moved = calibrated(means, prototypes.means[base], beta=beta, tau=tau)
        prototypes.means[new] = means.norm(dim=1, keepdim=True) * F.normalize(moved, dim=1)


class Prototypes(nn.Module):
    """Mean, count and, if wanted, covariance of each class, in the order of the logits' columns.

    Holds as many classes as it has been told of, and takes its size from the state dict that it loads.

    Args:
        num_features: d.
        covariance: Whether to keep covariances, ``d * d`` numbers per class.

    Attributes:
        means: ``(C, d)``, 0 for classes without samples.
        counts: Number of samples that the mean is of, int64 ``(C,)``; 0 for a class whose mean is not known yet.
        covariances: ``(C, d, d)``, only with ``covariance``.
    """

    means: Tensor
    counts: Tensor
    covariances: Tensor

    def __init__(self, num_features: int, *, covariance: bool = False) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"Prototypes: num_features is {num_features}; it must be at least 1")
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
        return True  # an empty store is no absent one

    @property
    def known(self) -> Tensor:
        """Which classes have samples, bool ``(C,)``."""
        return self.counts > 0

    def grow(self, num_classes: int) -> None:
        """Make room for ``num_classes`` classes in all; those that are there stay."""
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
        """Add features to the statistics of their classes: as if all that was ever given had been given at once.

        Sums are taken over processes, so that the store is the same on all of them; call it on each.

        Args:
            features: This process's share, ``(n, d)``.
            labels: Columns, int64 ``(n,)``; rows with label -1 are left out.
            num_classes: Number of classes seen so far, the same on all processes; default as many as there are now.
            replace: Forget what was known of the classes that occur here, instead of pooling.
            reduce: As in :func:`class_statistics`: False if each process gives all features.
        """
        self.grow(len(self) if num_classes is None else num_classes)
        present = labels[labels >= 0].bincount(minlength=len(self))
        columns = (all_sum(present) if reduce else present).nonzero().squeeze(1)
        place = torch.full((len(self) + 1,), -1, device=labels.device)  # the last entry is for label -1
        place[columns] = torch.arange(len(columns), device=labels.device)
        fresh = class_statistics(features, place[labels], len(columns), covariance=self.covariance, reduce=reduce)

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
        # Stepping back from the new mean leaves exactly that where nothing was known.
        self.means[columns] = (fresh.means - gap * (n / (n + m))[:, None]).to(self.means.dtype)

    def scores(self, features: Tensor, num_classes: int, metric: Metric = "euclidean") -> Tensor:
        """Scores ``(n, num_classes)`` of features ``(n, d)``: :func:`nearest_mean_scores`, -inf for unknown classes.

        In float32 at least: in half precision the scores of many classes would be equal.
        """
        features = full_precision(features)
        scores = features.new_full((len(features), num_classes), -torch.inf)
        columns = self.known.nonzero().squeeze(1)
        if len(columns):
            scores[:, columns] = nearest_mean_scores(features, self.means[columns].to(features.dtype), metric=metric)
        return scores

    def num_bytes(self) -> int:
        """Memory that the store takes, in bytes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def _covariances_of(self, columns: Tensor) -> Tensor:
        return self.covariances[columns]

    def _keep_covariances(self, columns: Tensor, covariances: Tensor) -> None:
        self.covariances[columns] = covariances.to(self.covariances.dtype)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for name, buffer in list(self.named_buffers(recurse=False)):
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.shape[1:] == buffer.shape[1:]:
                self.register_buffer(name, buffer.new_zeros(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


class GaussianPrototypes(Prototypes):
    """A normal distribution of the features of each class, to draw from: mean and Cholesky factor of the covariance.

        f = mu_c + L_c eps,   L_c L_c^T = Sigma_c + jitter I,   eps ~ N(0, I)

    Args:
        num_features: d.
        jitter: Variance that is added in each direction, above 0: a covariance of fewer samples than features is
            singular.

    Attributes:
        factors: L, lower triangular, ``(C, d, d)``; 0 for classes without samples.
    """

    factors: Tensor

    def __init__(self, num_features: int, *, jitter: float = 1e-5) -> None:
        super().__init__(num_features)
        if not jitter > 0:
            raise ValueError(f"GaussianPrototypes: jitter is {jitter}; it must be above 0, such as 1e-5")
        self.covariance, self.jitter = True, jitter
        self.register_buffer("factors", torch.zeros(0, num_features, num_features))

    @torch.no_grad()
    def sample(self, columns: Tensor, noise: Tensor) -> Tensor:
        """A feature of each of the given classes.

        Args:
            columns: int64 ``(n,)``, on the CPU.
            noise: eps, standard normal numbers ``(n, d)``, on the device.

        Returns:
            ``(n, d)``, on the device.
        """
        counts = columns.bincount(minlength=len(self))
        order = columns.argsort(stable=True)
        places = torch.empty_like(columns)  # of each row among those of its class
        places[order] = torch.arange(len(columns)) - (counts.cumsum(0) - counts)[columns[order]]
        columns, places, most = columns.to(noise.device), places.to(noise.device), int(counts.max())
        # One product per class, with all of its rows: a copy of the factor for each row would be far more to move.
        by_class = noise.new_zeros(len(self), most, self.num_features)
        by_class[columns, places] = noise
        with torch.autocast(noise.device.type, enabled=False):
            drawn: Tensor = torch.bmm(by_class, self.factors.mT)[columns, places] + self.means[columns]
        return drawn

    def _covariances_of(self, columns: Tensor) -> Tensor:
        factors = self.factors[columns].double()
        identity = torch.eye(self.num_features, dtype=torch.float64, device=factors.device)
        return factors @ factors.mT - self.jitter * identity

    def _keep_covariances(self, columns: Tensor, covariances: Tensor) -> None:
        identity = torch.eye(self.num_features, dtype=torch.float64, device=covariances.device)
        self.factors[columns] = torch.linalg.cholesky(covariances + self.jitter * identity).to(self.factors.dtype)
