"""Classification losses that several methods share: tensors in, a scalar out.

All losses of this room compute in float32 or float64, also under autocast, and propagate no gradient into the outputs
of a teacher (``teacher``) or into ``targets``. The mean over a batch without rows is 0, so an empty memory adds
nothing.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Batch
from cl_lightning.distributed import all_sum, world_size


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32; a float64 tensor stays float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def mean_over_rows(values: Tensor) -> Tensor:
    """Mean of one number per row, ``(B,)``; for B = 0 it is 0 and still has a gradient graph."""
    return values.sum() / max(len(values), 1)


def row_factor(count: Tensor, batch: Batch) -> Tensor:
    """Factor that makes a sum over some rows of this process its share of the mean over such rows of all processes.

    With n rows over all processes it is 1 / n for a single process. A process without rows of the batch takes no part
    in the exchange: in a batch with fewer rows than processes, n is the number of rows of this process.

    Args:
        count: Number of such rows on this process, a scalar; a mean over 0 rows is 0.
        batch: The batch of the step: the base class multiplies the loss by its weight, and the factor is divided by it.

    Returns:
        A scalar, float32.
    """
    count = count.detach().float()
    if batch.draw.total < world_size():
        return 1 / count.clamp(min=1)
    return world_size() / (batch.weight * all_sum(count.clone()).clamp(min=1))


def mean_over_selected(values: Tensor, selected: Tensor, batch: Batch) -> Tensor:
    """Mean over the selected rows of the global batch, of all processes; 0, with a gradient of 0, if there are none.

    Each process must call it in the same steps. If a batch has fewer rows than there are processes, it is the mean over
    the own rows.

    Args:
        values: One number per row of this process, ``(B,)``.
        selected: Which rows count, bool ``(B,)``.
        batch: The batch of the step: the strategy multiplies the loss by its weight, and the mean is divided by it.

    Returns:
        A scalar.
    """
    return torch.where(selected, values, 0.0).sum() * row_factor(selected.sum(), batch)


def classes_present(labels: Tensor, columns: int) -> Tensor:
    """Which classes the samples of all processes have; each process must call it.

    Args:
        labels: Columns of the samples of this process, int64 ``(B,)``; -1 for a hidden label.
        columns: Number of classes, C.

    Returns:
        bool ``(C,)``, on the device of the labels.
    """
    counts = torch.zeros(columns, device=labels.device)
    counts.index_add_(0, labels.clamp(min=0), (labels >= 0).to(counts.dtype))
    return all_sum(counts) > 0


def masked_logits(logits: Tensor, loss_classes: Tensor, fill: float | Literal["adaptive"] = -math.inf) -> Tensor:
    """Replace the logits of classes by a constant without gradient; with -inf they are excluded from a softmax.

        z~_c = z_c for c in the loss classes A, else m;   q_c = exp(z_c) / (sum_A exp(z) + n exp(m))
        dCE/dz_c = q_c - [c = y] for c in A, exactly 0 for the n others

    With a finite m (softmax masking, arXiv:2309.14808) the logits of A are compared with the level m: their gradients
    sum to ``-n exp(m) / (sum_A exp(z) + n exp(m))``, which is 0 for m = -inf. With ``adaptive``, which is not in the
    paper, m of each row is the logarithm of the mean of exp over its own masked logits: value and gradient of A are
    those of the cross-entropy over all classes.

    Args:
        logits: ``(B, C)``.
        loss_classes: A, the classes that keep their logits, bool, ``(C,)`` or one row per sample ``(B, C)``; at least
            one True in each row.
        fill: m, below infinity, or ``adaptive``.

    Returns:
        ``(B, C)``. With -inf the cross-entropy of a label whose class is masked is infinite.
    """
    if fill != "adaptive":
        return logits.masked_fill(~loss_classes, fill)
    hidden = full_precision(logits.detach()).masked_fill(loss_classes, -math.inf)
    number = (~loss_classes).sum(dim=-1, keepdim=True).to(hidden.dtype)
    level = hidden.logsumexp(dim=1, keepdim=True) - number.clamp(min=1).log()  # -inf where nothing is masked
    return torch.where(loss_classes, logits, level.to(logits.dtype))


def cross_entropy(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy of softmax(z), mean over the labelled rows, in nats.

        L = 1/n sum_i w_i [ -(1 - s) log p_i,y_i - s / V_i sum_{c in loss classes} log p_ic ]

    The sum is divided by the number of rows, not by the sum of their weights as in torch: a weighted mean over the
    batch of one process is then its share of the weighted mean over the global batch.

    The smoothing is spread over the V_i classes with a finite logit, so it can be combined with :func:`masked_logits`.

    Args:
        logits: ``(B, C)``; -inf excludes a class.
        labels: Columns, int64 ``(B,)``; rows with -1 are ignored. Without any labelled row, loss and gradient are 0.
        label_smoothing: s, in [0, 1).
        weights: w, a factor for each row, at least 0, without gradient, ``(B,)``; None for 1.

    Returns:
        A scalar.
    """
    labelled = labels >= 0
    log_p = F.log_softmax(full_precision(logits), dim=1)
    loss = _weighted_sum(F.nll_loss(log_p, labels, ignore_index=-1, reduction="none"), weights)
    if label_smoothing:
        hidden = logits == -torch.inf
        uniform = -log_p.masked_fill(hidden, 0.0).sum(dim=1) / (~hidden).sum(dim=1)
        loss = (1 - label_smoothing) * loss + label_smoothing * _weighted_sum(uniform.where(labelled, 0.0), weights)
    return loss / labelled.sum().clamp(min=1)


def dot_regression(cosines: Tensor, labels: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Half of the squared difference between 1 and the cosine of the own class, mean over the labelled rows.

        L = 1/(2n) sum_i w_i (z_i,y_i - 1)^2

    Yang et al., NeurIPS 2022, arXiv:2203.09081, for fixed unit vectors of the classes. Unlike in a cross-entropy, there
    is no term that moves a sample away from other classes.

    Args:
        cosines: Cosines of the samples and the vectors of the classes, ``(B, C)``.
        labels: Columns, int64 ``(B,)``; rows with -1 are ignored. Without any labelled row, loss and gradient are 0.
        weights: w, a factor for each row, at least 0, without gradient, ``(B,)``; None for 1.

    Returns:
        A scalar, in [0, 2] for weights of 1.
    """
    labelled = labels >= 0
    own = full_precision(cosines).gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    loss = _weighted_sum(0.5 * (own - 1).square().where(labelled, 0.0), weights)
    return loss / labelled.sum().clamp(min=1)


def _weighted_sum(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.sum() if weights is None else (weights.detach().to(values.dtype) * values).sum()


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(z) of each row, ``-sum_c p_c log p_c``, in nats; in [0, log C].

    Args:
        logits: ``(B, C)``, finite.

    Returns:
        ``(B,)``.
    """
    log_p = F.log_softmax(full_precision(logits), dim=1)
    return -(log_p.exp() * log_p).sum(dim=1)


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of sigmoids, summed over classes, mean over the batch: the loss of LwF.MC and iCaRL.

        L = -1/B sum_i sum_c [ y_ic log s(z_ic) + (1 - y_ic) log(1 - s(z_ic)) ],   dL/dz_ic = (s(z_ic) - y_ic) / B

    Rebuffi et al. (CVPR 2017, arXiv:1611.07725). Implementations that also take the mean over the classes compute this
    loss divided by C: a learning rate for the mean is C times the learning rate for the sum.

    Args:
        logits: ``(B, C)``, finite.
        targets: In [0, 1], ``(B, C)``.

    Returns:
        A scalar, in nats.
    """
    logits = full_precision(logits)
    loss = F.binary_cross_entropy_with_logits(logits, targets.detach().to(logits.dtype), reduction="none")
    return mean_over_rows(loss.sum(dim=1))
