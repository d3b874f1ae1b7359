"""Losses that several methods share: tensors in, a scalar out.

Every function computes in float32 at least, also under autocast, and takes no gradient through what teaches
(``teacher``, ``targets``). A mean over a batch without rows is 0, so an empty memory adds nothing.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

LaterLogits = Literal["lowest", "zero", "free"]


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def mean_over_rows(values: Tensor) -> Tensor:
    """Mean of one number per row, ``(B,)``; 0, with a graph, where there are no rows."""
    return values.sum() / max(len(values), 1)


def _same_shape(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{name}: the student's shape is {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; they must "
            "be equal, so pass only what the teacher knows, for logits student[:, : teacher.shape[1]]"
        )


def masked_logits(logits: Tensor, visible: Tensor) -> Tensor:
    """Take classes out of a softmax: their logits become -inf, and no gradient reaches them (exactly 0).

    Args:
        logits: ``(B, C)``.
        visible: Which classes stay, bool, ``(C,)`` or one row per sample ``(B, C)``; at least one in each row.

    Returns:
        ``(B, C)``. A cross-entropy with a label whose class is not visible is infinite.
    """
    return logits.masked_fill(~visible, -torch.inf)


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of softmax(z), the mean over the labelled rows, in nats.

        L = 1/n sum_i [ -(1 - s) log p_i,y_i - s / V_i sum_{c visible} log p_ic ]

    The smoothing is spread over the V_i classes whose logits are finite, so it goes with :func:`masked_logits`.

    Args:
        logits: ``(B, C)``; -inf takes a class out.
        labels: Columns, int64 ``(B,)``; -1 for rows to leave out. Without any labelled row the loss and its gradient
            are 0.
        label_smoothing: s, in [0, 1).
    """
    labelled = labels >= 0
    log_p = F.log_softmax(full_precision(logits), dim=1)
    loss = F.nll_loss(log_p, labels, ignore_index=-1, reduction="sum")
    if label_smoothing:
        hidden = logits == -torch.inf
        uniform = -log_p.masked_fill(hidden, 0.0).sum(dim=1) / (~hidden).sum(dim=1)
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform.where(labelled, 0.0).sum()
    return loss / labelled.sum().clamp(min=1)


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
    """Cross-entropy of sigmoids, summed over classes, mean over the batch: the form of LwF.MC and iCaRL.

        L = -1/B sum_i sum_c [ y_ic log s(z_ic) + (1 - y_ic) log(1 - s(z_ic)) ],   dL/dz_ic = (s(z_ic) - y_ic) / B

    Rebuffi et al. (CVPR 2017, arXiv:1611.07725). Implementations that take the mean over the outputs too have this
    loss divided by C.

    Args:
        logits: ``(B, C)``, finite.
        targets: In [0, 1], ``(B, C)``.
    """
    logits = full_precision(logits)
    loss = F.binary_cross_entropy_with_logits(logits, targets.detach().to(logits.dtype), reduction="none")
    return mean_over_rows(loss.sum(dim=1))


def lwf_mc_targets(labels: Tensor, num_classes: int, teacher_logits: Tensor | None = None) -> Tensor:
    """Targets of LwF.MC and iCaRL (arXiv:1611.07725): one-hot, but what the teacher says for the classes it knows.

    Args:
        labels: Columns, int64 ``(B,)``; a row with label -1 is 0 where there is no teacher.
        num_classes: C, the number of columns.
        teacher_logits: ``(B, C_old)`` with ``C_old <= C``; their sigmoids replace the first C_old columns.

    Returns:
        ``(B, C)``, float32 (or the teacher's float64), without gradient.
    """
    columns = torch.arange(num_classes, device=labels.device)
    one_hot = labels[:, None] == columns
    if teacher_logits is None:
        return one_hot.float()
    old = full_precision(teacher_logits.detach()).sigmoid()
    return torch.cat([old, one_hot[:, old.shape[1] :].to(old.dtype)], dim=1)


def softmax_distillation(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 2.0,
    *,
    form: Literal["ce", "kl"] = "ce",
    scale_by_temperature: bool = False,
    groups: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Match the student's softened class probabilities p to the teacher's q, mean over the batch, in nats.

        p = softmax(z / T),  q = softmax(z_teacher / T)
        ce:  L = -1/B sum_i sum_c q_ic log p_ic            dL/dz = (p - q) / (T B)
        kl:  L =  1/B sum_i sum_c q_ic log(q_ic / p_ic)    the same gradient; 0 where p = q

    The forms in use are not interchangeable at equal weight: ``ce`` unscaled is LwF (Li & Hoiem, arXiv:1606.09282),
    FACIL, WA and PyCIL's iCaRL; ``kl`` with ``scale_by_temperature`` (times T^2) is Hinton et al. (arXiv:1503.02531);
    the same with ``groups`` is SS-IL's task-wise distillation (Ahn et al., arXiv:2003.13947). For sigmoids see
    :func:`sigmoid_distillation`.

    Args:
        student: Finite logits of the classes that the teacher knows, ``(B, C_old)``.
        teacher: The teacher's, ``(B, C_old)``.
        temperature: T, positive.
        form: Cross-entropy or Kullback-Leibler divergence.
        scale_by_temperature: Whether to multiply by T^2, which keeps the gradient's size as T grows.
        groups: Columns of each softmax, for one per old task, summed over the groups; default one over all columns.
    """
    _same_shape("softmax_distillation", student, teacher)
    student, teacher = full_precision(student) / temperature, full_precision(teacher.detach()) / temperature
    loss = student.new_zeros(())
    for columns in [range(student.shape[1])] if groups is None else groups:
        log_p, log_q = (F.log_softmax(_take(z, columns), dim=1) for z in (student, teacher))
        difference = log_q - log_p if form == "kl" else -log_p
        loss = loss + mean_over_rows((log_q.exp() * difference).sum(dim=1))
    return loss * temperature**2 if scale_by_temperature else loss


def balanced_distillation(
    ce: Tensor, logits: Tensor, teacher: Tensor, temperature: float = 2.0, share: float | None = None
) -> dict[str, Tensor]:
    """Classification and distillation, weighed by how many classes are old: the loss of BiC and WA.

        L = (1 - lambda) CE + lambda KD,    lambda = C_old / C

    with the unscaled cross-entropy form of :func:`softmax_distillation` as KD (Wu et al., BiC, CVPR 2019,
    arXiv:1905.13260; Zhao et al., WA, CVPR 2020, arXiv:1911.07053).

    Args:
        ce: Cross-entropy of all classes, a scalar.
        logits: ``(B, C)``.
        teacher: The teacher's, ``(B, C_old)``.
        temperature: T, positive.
        share: lambda in [0, 1], where it is not C_old / C.

    Returns:
        The two weighted terms, ``ce`` and ``distill``.
    """
    old = teacher.shape[1]
    weight = old / logits.shape[1] if share is None else share
    return {"ce": (1 - weight) * ce, "distill": weight * softmax_distillation(logits[:, :old], teacher, temperature)}


def logit_matching(logits: Tensor, stored: Tensor, *, later: LaterLogits = "lowest") -> Tensor:
    """Keep logits where they were when they were stored: mean squared error, the mean over the batch.

        L = 1/B sum_i 1/C_i sum_c (z_ic - z'_ic)^2

    Dark Experience Replay (Buzzega et al., NeurIPS 2020, arXiv:2004.07211). Row i was stored when fewer classes
    were known; what is asked of the logits of classes that came later is ``later``.

    Args:
        logits: ``(B, C)``.
        stored: ``(B, C')`` with ``C' <= C``; nan on the right of what a row has, as a memory pads it.
        later: ``lowest``: they are held at the row's lowest stored logit, like those of any class that it is not of;
            ``zero``: at 0; both with C_i = C. ``free``: nothing is asked, and C_i is what the row has.
    """
    target = F.pad(full_precision(stored.detach()), (0, logits.shape[1] - stored.shape[1]), value=torch.nan)
    known = ~target.isnan()
    lowest = target.masked_fill(~known, torch.inf).amin(dim=1, keepdim=True)
    target = target.where(known, lowest if later == "lowest" else 0.0)
    counted = known if later == "free" else torch.ones_like(known)
    error = (full_precision(logits) - target).square().where(counted, 0.0)
    return mean_over_rows(error.sum(dim=1) / counted.sum(dim=1).clamp(min=1))


def _take(logits: Tensor, columns: Sequence[int]) -> Tensor:
    """Columns of the logits; a slice where they are neighbours, since an index travels to the GPU at each step."""
    if len(columns) and list(columns) == list(range(columns[0], columns[-1] + 1)):
        return logits[:, columns[0] : columns[-1] + 1]
    return logits[:, list(columns)]


def sigmoid_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Match each class's sigmoid to the teacher's: :func:`binary_cross_entropy` with targets s(teacher).

    Sum over classes, mean over the batch (the old-class part of LwF.MC, arXiv:1611.07725).

    Args:
        student: Logits of the classes that the teacher knows, ``(B, C_old)``.
        teacher: The teacher's, ``(B, C_old)``.
    """
    _same_shape("sigmoid_distillation", student, teacher)
    return binary_cross_entropy(student, full_precision(teacher).sigmoid())


def feature_distillation(student: Tensor, teacher: Tensor, metric: Tensor | None = None) -> Tensor:
    """Keep features where the teacher has them: mean over the batch of a squared norm.

        L = 1/B sum_i || f(x_i) - g(x_i) ||^2,   with a metric M   1/B sum_i (f_i - g_i)^T M (f_i - g_i)

    Plain: Smith et al. (CVPR-W 2023, arXiv:2203.17269). With ``M = lambda E + eta I``, E the empirical feature
    matrix: Elastic Feature Consolidation (Magistri et al., ICLR 2024, arXiv:2402.03917).

    Args:
        student: Features, ``(B, d)``.
        teacher: The teacher's, ``(B, d)``.
        metric: M, symmetric positive semi-definite, ``(d, d)``; default the identity.
    """
    _same_shape("feature_distillation", student, teacher)
    gap = full_precision(student) - full_precision(teacher.detach())
    if metric is None:
        return mean_over_rows(gap.square().sum(dim=1))
    with torch.autocast(gap.device.type, enabled=False):  # a product of matrices would run in half precision
        return mean_over_rows((gap @ metric.to(gap.dtype) * gap).sum(dim=1))


def cosine_feature_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Keep the direction of features: ``1 - cos(f(x), g(x))``, mean over the batch, in [0, 2].

    The less-forget constraint of LUCIR (Hou et al., CVPR 2019, eq. 6).

    Args:
        student: Features, ``(B, d)``.
        teacher: The teacher's, ``(B, d)``.
    """
    _same_shape("cosine_feature_distillation", student, teacher)
    return mean_over_rows(1 - F.cosine_similarity(full_precision(student), full_precision(teacher.detach()), dim=1))


def supervised_contrastive(
    embeddings: Tensor, labels: Tensor, temperature: float = 0.1, *, base_temperature: float = 0.07
) -> Tensor:
    """Pull rows of one class together and all others apart (Khosla et al., NeurIPS 2020, arXiv:2004.11362, eq. 2).

        L = T / T_0 * 1/n sum_i -1/|P_i| sum_{p in P_i} log( exp(z_i z_p / T) / sum_{a != i} exp(z_i z_a / T) )

    with z the embeddings divided by their norm and P_i the other rows of the class of row i. The mean is over the n
    rows that have such others. T_0 = 0.07 is in the authors' code, not in the equation.

    Args:
        embeddings: ``(B, d)``; with two views of each image, both, so that each row has another of its class.
        labels: Columns, int64 ``(B,)``.
        temperature: T, positive.
        base_temperature: T_0, positive.
    """
    z = F.normalize(full_precision(embeddings), dim=1)
    with torch.autocast(z.device.type, enabled=False):
        similarity = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels) & ~itself
    log_p = similarity.masked_fill(itself, -torch.inf).log_softmax(dim=1).masked_fill(~positive, 0.0)
    counts = positive.sum(dim=1)
    loss = -(log_p.sum(dim=1) / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)
    return loss * (temperature / base_temperature)
