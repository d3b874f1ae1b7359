"""Distillation losses between the outputs of a network and of its teacher."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Batch
from cl_lightning.distributed import rows_norm, world_size
from cl_lightning.losses.classification import binary_cross_entropy, full_precision, mean_over_rows

NewClassTargets = Literal["lowest", "zero", "free"]


def _same_shape(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{name}: the student's shape is {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; shapes must "
            "be equal; for logits, pass the teacher's classes only: student[:, : teacher.shape[1]]"
        )


def lwf_mc_targets(labels: Tensor, num_classes: int, teacher_logits: Tensor | None = None) -> Tensor:
    """Targets of LwF.MC and iCaRL (arXiv:1611.07725): sigmoids of the teacher for old classes, one-hot for new ones.

    Args:
        labels: Columns, int64 ``(B,)``; a row with label -1 is 0 in the one-hot columns.
        num_classes: C, the number of columns.
        teacher_logits: ``(B, C_old)`` with ``C_old <= C``; their sigmoids replace the first C_old columns. None:
            one-hot targets in all columns.

    Returns:
        ``(B, C)``, float32 (float64 for a float64 teacher), without gradient.
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
    """Distillation of softened class probabilities, mean over the batch, in nats.

        p = softmax(z / T),  q = softmax(z_teacher / T)
        ce:  L = -1/B sum_i sum_c q_ic log p_ic            dL/dz = (p - q) / (T B)
        kl:  L =  1/B sum_i sum_c q_ic log(q_ic / p_ic)    the same gradient; 0 where p = q

    The published forms have different scales, so their weights are not interchangeable: ``ce`` without scaling is LwF
    (Li & Hoiem, arXiv:1606.09282), FACIL, WA and PyCIL's iCaRL; ``kl`` with ``scale_by_temperature`` (times T^2) is
    Hinton et al. (arXiv:1503.02531); ``kl`` with ``scale_by_temperature`` and ``groups`` is the task-wise distillation
    of SS-IL (Ahn et al., arXiv:2003.13947). For sigmoids see :func:`sigmoid_distillation`.

    Args:
        student: Logits of the student for the teacher's classes, finite, ``(B, C_old)``.
        teacher: Logits of the teacher, ``(B, C_old)``.
        temperature: T, positive.
        form: Cross-entropy or Kullback-Leibler divergence.
        scale_by_temperature: Whether to multiply by T^2, which keeps the scale of the gradient as T grows.
        groups: Columns of each softmax, for example one group per old task; the loss is summed over the groups. None:
            one softmax over all columns.

    Returns:
        A scalar.

    Raises:
        ValueError: If the shapes of ``student`` and ``teacher`` differ.
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
    """Cross-entropy and distillation, weighted by the share of old classes: the loss of BiC and WA.

        L = (1 - lambda) CE + lambda KD,    lambda = C_old / C

    with the unscaled cross-entropy form of :func:`softmax_distillation` as KD (Wu et al., BiC, CVPR 2019,
    arXiv:1905.13260; Zhao et al., WA, CVPR 2020, arXiv:1911.07053).

    Args:
        ce: Cross-entropy over all classes, a scalar.
        logits: Logits of the student, ``(B, C)``.
        teacher: Logits of the teacher, ``(B, C_old)``.
        temperature: T, positive.
        share: lambda in [0, 1]; None for C_old / C.

    Returns:
        The two weighted terms, ``ce`` and ``distill``, scalars.
    """
    old = teacher.shape[1]
    weight = old / logits.shape[1] if share is None else share
    return {"ce": (1 - weight) * ce, "distill": weight * softmax_distillation(logits[:, :old], teacher, temperature)}


def logit_matching(logits: Tensor, stored: Tensor, *, new_class_targets: NewClassTargets = "lowest") -> Tensor:
    """Mean squared error between logits and stored logits, the regression loss of Dark Experience Replay.

        L = 1/B sum_i 1/C_i sum_c (z_ic - z'_ic)^2

    Buzzega et al. (NeurIPS 2020, arXiv:2004.07211). The logits z' of row i were stored when C'_i <= C classes were
    known; ``new_class_targets`` defines the targets of the classes that were added after the row was stored.

    Args:
        logits: ``(B, C)``.
        stored: ``(B, C')`` with ``C' <= C``. Columns that were unknown when a row was stored are nan, as a memory pads
            them.
        new_class_targets: ``lowest``: the lowest stored logit of the row, like a class that the row does not belong to;
            ``zero``: 0; both with C_i = C. ``free``: no target, and C_i = C'_i.

    Returns:
        A scalar.
    """
    return mean_over_rows(logit_errors(logits, stored, new_class_targets=new_class_targets))


def logit_errors(logits: Tensor, stored: Tensor, *, new_class_targets: NewClassTargets = "lowest") -> Tensor:
    """The terms of :func:`logit_matching` for each row, ``(B,)``: means over the classes; arguments as there."""
    target = F.pad(full_precision(stored.detach()), (0, logits.shape[1] - stored.shape[1]), value=torch.nan)
    known = ~target.isnan()
    lowest = target.masked_fill(~known, torch.inf).amin(dim=1, keepdim=True)
    target = target.where(known, lowest if new_class_targets == "lowest" else 0.0)
    counted = known if new_class_targets == "free" else torch.ones_like(known)
    error = (full_precision(logits) - target).square().where(counted, 0.0)
    return error.sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def _take(logits: Tensor, columns: Sequence[int]) -> Tensor:
    """Columns of the logits. Adjacent columns are a slice, since an index is copied to the GPU at each step."""
    if len(columns) and list(columns) == list(range(columns[0], columns[-1] + 1)):
        return logits[:, columns[0] : columns[-1] + 1]
    return logits[:, list(columns)]


def sigmoid_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Distillation of each class's sigmoid: :func:`binary_cross_entropy` with the sigmoids of the teacher as targets.

    Sum over classes, mean over the batch (the term of LwF.MC for old classes, arXiv:1611.07725).

    Args:
        student: Logits of the student for the teacher's classes, ``(B, C_old)``.
        teacher: Logits of the teacher, ``(B, C_old)``.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: If the shapes differ.
    """
    _same_shape("sigmoid_distillation", student, teacher)
    return binary_cross_entropy(student, full_precision(teacher).sigmoid())


def feature_distillation(student: Tensor, teacher: Tensor, metric: Tensor | None = None) -> Tensor:
    """Squared distance between the features of student and teacher, mean over the batch.

        L = 1/B sum_i || f(x_i) - g(x_i) ||^2,   with a metric M   1/B sum_i (f_i - g_i)^T M (f_i - g_i)

    Without a metric: Smith et al. (CVPR-W 2023, arXiv:2203.17269). With ``M = lambda E + eta I``, E the empirical
    feature matrix: Elastic Feature Consolidation (Magistri et al., ICLR 2024, arXiv:2402.03917).

    Args:
        student: Features of the student, ``(B, d)``.
        teacher: Features of the teacher, ``(B, d)``.
        metric: M, symmetric positive semi-definite, ``(d, d)``; None for the identity.

    Returns:
        A scalar.

    Raises:
        ValueError: If the shapes differ.
    """
    _same_shape("feature_distillation", student, teacher)
    gap = full_precision(student) - full_precision(teacher.detach())
    if metric is None:
        return mean_over_rows(gap.square().sum(dim=1))
    with torch.autocast(gap.device.type, enabled=False):  # under autocast, matrix products run in half precision
        return mean_over_rows((gap @ metric.to(gap.dtype) * gap).sum(dim=1))


def feature_norm_distillation(student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
    """Euclidean distance between the features of student and teacher, all rows of the batch as one vector.

        L = || f(X) - g(X) ||_2 = ( sum_i || f(x_i) - g(x_i) ||^2 )^(1/2),   gradient 0 at 0

    Neither squared nor divided by the batch size, so it grows with the square root of the batch size (PASS, IL2A,
    NAPA-VQ). With several processes it is over the rows of all processes; if a batch has fewer rows than there are
    processes, each process takes its own rows. With gradients accumulated over n batches, the norms of the batches are
    averaged, which is smaller than the norm over all of their rows by a factor of about sqrt(n).

    Args:
        student: Features of the student, ``(n, d)``.
        teacher: Features of the teacher, ``(n, d)``.
        batch: The batch of the step: the strategy multiplies the loss by its weight, and the norm is divided by it.

    Returns:
        A scalar.

    Raises:
        ValueError: If the shapes differ.
    """
    _same_shape("feature_norm_distillation", student, teacher)
    gap = full_precision(student) - full_precision(teacher.detach())
    if batch.draw.total < world_size():  # a process without rows takes no part in an exchange
        own: Tensor = gap.norm()
        return own
    return rows_norm(gap) / batch.weight


def cosine_feature_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine distance between the features of student and teacher, ``1 - cos(f(x), g(x))``, mean over the batch.

    The less-forget constraint of LUCIR (Hou et al., CVPR 2019, eq. 6).

    Args:
        student: Features of the student, ``(B, d)``.
        teacher: Features of the teacher, ``(B, d)``.

    Returns:
        A scalar, in [0, 2].

    Raises:
        ValueError: If the shapes differ.
    """
    _same_shape("cosine_feature_distillation", student, teacher)
    return mean_over_rows(1 - F.cosine_similarity(full_precision(student), full_precision(teacher.detach()), dim=1))


def norm_and_direction(student: Tensor, teacher: Tensor, directions: Tensor, known: Tensor | None = None) -> Tensor:
    """Distance of features from the direction of their class and from the teacher's norm (KD++, arXiv:2305.17007).

        L = mean_i [ 1 - <f_i, e_i> / max(||f_i||, ||t_i||) ]

    A feature that is shorter than the teacher's is drawn along e_i, a longer one only turns.

    Args:
        student: Features f, ``(B, d)``.
        teacher: Features t of the same images, ``(B, d)``.
        directions: Unit vectors e of the classes of the rows, ``(B, d)``.
        known: Rows that count, bool ``(B,)``; the others add 0 to the mean over B rows. None for all.

    Returns:
        A scalar, in [0, 2].

    Raises:
        ValueError: If the shapes of student and teacher differ.
    """
    _same_shape("norm_and_direction", student, teacher)
    student, teacher = full_precision(student), full_precision(teacher.detach())
    longest = torch.maximum(student.norm(dim=1), teacher.norm(dim=1)).clamp(min=1e-12)
    rows = 1 - (student * directions.to(student.dtype)).sum(1) / longest
    return mean_over_rows(rows if known is None else rows * known)


def pod_spatial(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Distance between pooled maps of student and teacher, mean over the batch and the maps.

        P(a) = [sum_w a^2, sum_h a^2] / || . ||    of a map a (C, H, W): C H sums over rows, and C W sums over columns
        L = 1/(M B) sum_m sum_i || P(a_im) - P(b_im) ||

    POD-spatial of Pooled Outputs Distillation (Douillard et al., ECCV 2020, arXiv:2004.13513, eq. 3, with the squares
    and the norm of the authors' code). The gradient of a distance of 0 is 0.

    Args:
        student: M maps a of the student, at least one, ``(B, C, H, W)`` each.
        teacher: Maps b of the teacher, of the same shapes.

    Returns:
        A scalar, in [0, 2].

    Raises:
        ValueError: If numbers or shapes of the maps differ, or there are none.
    """
    if not student or len(student) != len(teacher):
        raise ValueError(
            f"pod_spatial: there are {len(student)} maps of the student and {len(teacher)} of the teacher; give as "
            "many of both, at least one"
        )
    distances = []
    for own, other in zip(student, teacher, strict=True):
        _same_shape("pod_spatial", own, other)
        gap = _pooled(full_precision(own)) - _pooled(full_precision(other.detach()))
        distances.append(mean_over_rows(gap.norm(dim=1)))
    return torch.stack(distances).mean()


def _pooled(maps: Tensor) -> Tensor:
    """Normalised sums of the squares of maps ``(B, C, H, W)`` over rows and over columns, ``(B, C (H + W))``."""
    square = maps.square()
    return F.normalize(torch.cat([square.sum(dim=3).flatten(1), square.sum(dim=2).flatten(1)], dim=1), dim=1)
