"""Measures of plasticity: how well a network that has learnt many tasks can still learn a new one."""

from collections.abc import Iterable

import torch
from torch import Tensor

PLASTICITY = (
    "online_accuracy",
    "task_accuracy",
    "dormant_units",
    "effective_rank",
    "weight_norm",
    "gradient_norm",
)
"""Names of the measures after each task: of the callback ``Plasticity``, its results and the report."""


def dormant_units(activity: Tensor, threshold: float = 0.025) -> Tensor:
    """Which units of a layer are dormant, ``a_i / mean_k a_k <= threshold`` (Sokar et al., arXiv:2302.12902).

    Args:
        activity: a, mean absolute activation of each unit over many samples, ``(units,)``.
        threshold: tau, at least 0.

    Returns:
        bool ``(units,)``; all units are dormant if no unit is ever active.
    """
    mean: Tensor = activity.mean()
    dormant: Tensor = activity <= threshold * mean
    return dormant | (mean == 0)


def effective_rank(features: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values (Roy & Vetterli, EUSIPCO 2007).

    Args:
        features: ``(n, d)``; not centred.

    Returns:
        From 1 to min(n, d), and 0 if all features are 0.
    """
    values = torch.linalg.svdvals(features.double())
    total = values.sum()
    if total == 0:
        return 0.0
    p = values / total
    return float(torch.special.entr(p).sum().exp())


def joint_norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm of all values of the tensors together; 0 without tensors."""
    norms = [tensor.detach().double().norm().cpu() for tensor in tensors]
    return float(torch.stack(norms).norm()) if norms else 0.0
