"""Losses of test-time adaptation without labels, as options of ``Tent``.

With p = softmax(z) of the logits z of a sample, y^ = argmax p and C classes:

    Entropy              -sum_c p_c log p_c                                      (Wang et al., ICLR 2021)
    SoftLikelihoodRatio  -sum_c q_c log(q_c / (1 - q_c) + 1e-5),  q = min(p, 0.99)   (Marsden et al., WACV 2024)
    GeneralizedCrossEntropy  (1 - p_y^^q) / q                                    (Rusak et al., TMLR 2022)
    PseudoLabelCrossEntropy  -log p_y^
    ClassCorrelation     how often two classes share the probability of a sample  (You et al., arXiv:2110.04065)
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Batch
from cl_lightning.checks import above, within
from cl_lightning.distributed import all_sum, sum_over_processes, world_size
from cl_lightning.losses import entropy, full_precision, mean_over_rows
from cl_lightning.strategies.test_time.parts.part import Adapting, Part
from cl_lightning.strategy import Output


def soft_likelihood_ratio(logits: Tensor, *, ceiling: float = 0.99) -> Tensor:
    """``-sum_c q_c log(q_c / (1 - q_c) + 1e-5)`` with q = min(softmax, ceiling), ``(B,)``, in nats."""
    q = full_precision(logits).softmax(dim=1).clamp(max=ceiling)
    return -(q * (q / (1 - q) + 1e-5).log()).sum(dim=1)


def generalized_cross_entropy(logits: Tensor, q: float) -> Tensor:
    """``(1 - p^q) / q`` with p the largest probability, ``(B,)``; q in (0, 1], 1 for the mean absolute error."""
    largest = F.log_softmax(full_precision(logits), dim=1).amax(dim=1)
    return -torch.expm1(q * largest) / q


def symmetric_cross_entropy(logits: Tensor, others: Tensor) -> Tensor:
    """``-1/2 sum_c p'_c log p_c - 1/2 sum_c p_c log p'_c`` of two predictions, ``(B,)``, in nats; symmetric."""
    first, second = (F.log_softmax(full_precision(values), dim=1) for values in (logits, others))
    return -(second.exp() * first + first.exp() * second).sum(dim=1) / 2


def marginal_entropy(logits: Tensor, batch: Batch) -> Tensor:
    """Entropy of the mean prediction of the batch, as this process's share of it, a scalar, in nats.

    With ``p^ = sum_i p_i / B`` over the B rows of all processes, the share is the mean over the rows of this process of
    ``-sum_c p_ic log p^_c``. Its mean over the batch has the value and the gradient of H(p^).
    """
    p = full_precision(logits).softmax(dim=1)
    mean = all_sum(p.detach().sum(dim=0)) / batch.draw.total
    return mean_over_rows(-(p * mean.clamp(min=1e-12).log()).sum(dim=1))


class TestTimeLoss(Part, ABC):
    """Loss of a batch without labels."""

    __test__ = False  # pytest would collect a class of this name

    @abstractmethod
    def forward(self, strategy: Adapting, batch: Batch, output: Output) -> Tensor:
        """The loss of each row, ``(B,)``, or a scalar: this process's share of the mean over the batch.

        Args:
            strategy: The method.
            batch: Batch of the stream.
            output: Features ``(B, d)`` and logits ``(B, classes of the source)`` of the network.
        """


class Entropy(TestTimeLoss):
    """Entropy of the prediction."""

    def forward(self, strategy: Adapting, batch: Batch, output: Output) -> Tensor:
        return entropy(output.logits)


class SoftLikelihoodRatio(TestTimeLoss):
    """Negative log-likelihood ratio of the soft prediction; its gradient does not vanish for sure predictions.

    Source: Marsden, Doebler, Yang, Universal test-time adaptation, WACV 2024, arXiv:2306.00650.
    """

    def forward(self, strategy: Adapting, batch: Batch, output: Output) -> Tensor:
        return soft_likelihood_ratio(output.logits)


class GeneralizedCrossEntropy(TestTimeLoss):
    """Generalised cross-entropy with the predicted class as label.

    Source: Rusak et al., If your data distribution shifts, use self-learning, TMLR 2022, arXiv:2104.12928.

    Args:
        q: In (0, 1]: near 0 for cross-entropy, 1 for the mean absolute error.
    """

    def __init__(self, q: float = 0.8) -> None:
        super().__init__()
        within(self, "(0, 1]", q=q)
        self.q = q

    def forward(self, strategy: Adapting, batch: Batch, output: Output) -> Tensor:
        return generalized_cross_entropy(output.logits, self.q)


class PseudoLabelCrossEntropy(TestTimeLoss):
    """Cross-entropy with the predicted class as label."""

    def forward(self, strategy: Adapting, batch: Batch, output: Output) -> Tensor:
        return -F.log_softmax(full_precision(output.logits), dim=1).amax(dim=1)


def class_correlation(p: Tensor, weights: Tensor) -> Tensor:
    """``1/C sum_{i != j} C_ij`` with ``C = P^T diag(w) P`` whose rows are divided by their sums, a scalar in [0, 1].

    The batch consists of the rows of all processes; gradients reach the rows of this process.

    Args:
        p: Predictions of the rows of this process, ``(B, C)``.
        weights: Weights w of the rows, ``(B,)``, without gradient; their scale does not matter.
    """
    sums = sum_over_processes((p * weights[:, None]).T @ p)
    return (1 - sums.diagonal() / sums.sum(dim=1).clamp(min=1e-12)).mean()


class ClassCorrelation(TestTimeLoss):
    """Pairwise correlation of classes: how often two classes share the probability of a sample.

    With P the predictions of the batch at temperature T and weights w_i = 1 + exp(-H_i), ``C = P^T diag(w) P`` with
    rows divided by their sums, and ``L = 1/K sum_{i != j} C_ij`` for K classes: 0 for one-hot predictions, (K - 1)/K
    for uniform ones. Source: You et al., Test-time batch statistics calibration, arXiv:2110.04065; the paper describes
    the loss in words, the formula is our reading.

    Args:
        temperature: T, above 0.
    """

    transductive = True

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        above(self, 0, temperature=temperature)
        self.temperature = temperature

    def forward(self, strategy: Adapting, batch: Batch, output: Output) -> Tensor:
        logits = full_precision(output.logits)
        weights = 1 + (-entropy(logits.detach())).exp()
        loss = class_correlation((logits / self.temperature).softmax(dim=1), weights)
        # Every process with rows has the loss of the whole batch. The base class multiplies it by the weight, and takes
        # the mean over all processes.
        sharing = all_sum(loss.new_full((), float(batch.weight > 0)))
        return loss * (world_size() / sharing.clamp(min=1) / (batch.weight or 1.0))
