"""Measures of unlearning: membership inference, and the divergence of the outputs of two networks."""

import torch
from torch import Tensor

UNLEARNING = (
    "kept_accuracy",
    "forgotten_accuracy",
    "kept_test_accuracy",
    "forgotten_test_accuracy",
    "membership",
)
"""Names of the measures after each task: of the callback ``UnlearningMeasures`` and its results."""


def membership_threshold(members: Tensor, others: Tensor) -> float:
    """Loss up to which a sample is best taken for a member of the training set (Yeom et al., arXiv:1709.01604).

    Args:
        members: Losses of training samples, ``(n,)``.
        others: Losses of samples that were not trained on, ``(m,)``.

    Returns:
        The loss t among the given ones with the largest ``share(members <= t) - share(others <= t)``; of equal ones the
        smallest.
    """
    losses = torch.cat([members, others]).double()
    step = torch.cat([torch.full_like(members, 1 / len(members)), torch.full_like(others, -1 / len(others))]).double()
    losses, order = losses.sort()
    advantage = step[order].cumsum(0)
    last = torch.cat([losses[1:] != losses[:-1], torch.ones(1, dtype=torch.bool, device=losses.device)])
    return float(losses[advantage.masked_fill(~last, -torch.inf).argmax()])


def membership(samples: Tensor, members: Tensor, others: Tensor) -> float:
    """Share of samples that are taken for members of the training set by their loss, in [0, 1].

    After unlearning it should be the share of a network that was retrained without the samples, which need not be 0.

    Args:
        samples: Losses of the samples in question, ``(k,)``.
        members, others: As in :func:`membership_threshold`.
    """
    return float((samples.double() <= membership_threshold(members, others)).double().mean())


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of two distributions in each row, in nats, in [0, ln 2].

    Args:
        p, q: Probabilities, ``(n, columns)``.

    Returns:
        ``(n,)``.
    """
    middle = (p + q) / 2
    entropies = [torch.special.entr(x).sum(dim=1) for x in (middle, p, q)]
    divergence: Tensor = entropies[0] - (entropies[1] + entropies[2]) / 2
    return divergence.clamp(min=0)
