"""Losses of test-time adaptation without labels, as options of ``Tent``.

With p = softmax(z) of the logits z of a sample, y^ = argmax p and C classes:

    Entropy              -sum_c p_c log p_c                                      (Wang et al., ICLR 2021)
    SoftLikelihoodRatio  -sum_c q_c log(q_c / (1 - q_c) + 1e-5),  q = min(p, 0.99)   (Marsden et al., WACV 2024)
    GeneralizedCrossEntropy  (1 - p_y^^q) / q                                    (Rusak et al., TMLR 2022)
    PseudoLabelCrossEntropy  -log p_y^
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Batch
from cl_lightning.checks import within
from cl_lightning.losses import entropy, full_precision
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
