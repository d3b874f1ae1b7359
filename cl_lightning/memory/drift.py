"""Drift of class means in feature space while the backbone is trained, and calibration of means of few samples."""

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.memory.class_statistics import squared_distances
from cl_lightning.memory.prototypes import Prototypes


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
    """Drift of each prototype: kernel-weighted mean of the displacements of the samples around it (SDC, EFC).

        w_ci = exp(-d_ci / (2 sigma^2)),   delta_c = sum_i w_ci (new_i - old_i) / sum_i w_ci

    with ``d_ci = || old_i - p_c ||^2`` in Semantic Drift Compensation (Yu et al., CVPR 2020, arXiv:2004.00440), and
    ``d_ci = (old_i - p_c)^T E (old_i - p_c)`` in Elastic Feature Consolidation (Magistri et al., ICLR 2024,
    arXiv:2402.03917), with E the empirical feature matrix before the task and ``rescale=True``. The smallest d of each
    prototype is subtracted before the exponential. The quotient is the same, and does not underflow for prototypes far
    from all samples.

    For 5 prototypes and 200 samples with 64 features: ``old`` and ``new`` ``(200, 64)``, ``prototypes`` and the result
    ``(5, 64)``.

    Args:
        old: Features of the task's images before training on it, of all processes, ``(n, d)``.
        new: Features of the same images after it, ``(n, d)``.
        prototypes: Class means before the task, ``(c, d)``.
        sigma: Width of the kernel, positive, in the unit of the features; relative to the square root of
            the range of d with ``rescale``.
        metric: E, symmetric positive semi-definite, ``(d, d)``; default the identity.
        rescale: Divide d by its range (largest minus smallest, over all classes and samples).
        block_size: Number of samples at a time; the weights take ``c * block_size`` numbers of 8 bytes.

    Returns:
        Displacements ``(c, d)``, to be added to the prototypes; 0 if there are no samples.

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
        return squared_distances(centred, block.double() - origin, metric)  # (c, b)

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
    """Means of few samples, calibrated by the means of similar base classes (TEEN: Wang et al., arXiv:2312.05229).

        w_nb = softmax_b(tau <c^_n, c^_b>),   Delta_n = normalise(sum_b w_nb c^_b)
        c~_n = (1 - beta) c^_n + beta Delta_n

    with c^ = c / ||c||. The result is not normalised again.

    Args:
        novel: Means of the new classes, ``(n, d)``.
        base: Means of the base classes, ``(b, d)``; b at least 1.
        beta: Weight of Delta, in [0, 1].
        tau: Inverse temperature of the softmax, at least 0. At 0 all base classes have the same weight; in the limit of
            infinity only the nearest one counts.

    Returns:
        c~, ``(n, d)``.
    """
    novel, base = F.normalize(novel, dim=1), F.normalize(base, dim=1)
    weight = (tau * novel @ base.T).softmax(dim=1)  # (n, b), rows sum to 1
    return (1 - beta) * novel + beta * F.normalize(weight @ base, dim=1)


@torch.no_grad()
def calibrate_new(prototypes: "Prototypes", task_columns: Tensor, *, beta: float, tau: float) -> None:
    """Apply :func:`calibrated`, in place, to the means of the classes that the last task added.

    The base classes are the classes of the first task. A calibrated mean keeps its length, so that it can be compared
    with other means and pooled with further samples of its class. All other means are unchanged to the bit. With beta 0
    or a single task, nothing changes.

    Args:
        prototypes: Means of all classes seen so far.
        task_columns: Whether a column belongs to a task, bool ``(T, C)``.
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
