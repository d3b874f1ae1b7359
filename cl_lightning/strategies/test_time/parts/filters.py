"""Filters choose the samples of a batch that a test-time adaptation method learns from, and weight them.

    EntropyFilter      H_i < E_0 = margin ln C; weight 1, or exp(E_0 - H_i)          (Niu et al., ICML 2022)
    DiversityFilter    |cos(p_i, m)| < eps,  m <- 0.9 m + 0.1 mean of the selected p_i   (Niu et al., ICML 2022)

H_i is the entropy of the prediction p_i, C the number of classes. A sample is selected if all filters select it; its
weight is the product of their weights.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Batch
from cl_lightning.checks import above, within
from cl_lightning.distributed import all_sum
from cl_lightning.losses import entropy, full_precision
from cl_lightning.strategies.test_time.parts.part import Adapting, Part
from cl_lightning.strategy import Output


def probabilities(logits: Tensor) -> Tensor:
    """Softmax of logits ``(B, C)`` in single precision or more, without gradient."""
    return full_precision(logits.detach()).softmax(dim=1)


class SampleFilter(Part, ABC):
    """Chooses samples of a batch, and weights them."""

    @abstractmethod
    def forward(self, strategy: Adapting, batch: Batch, output: Output) -> Tensor:
        """Weights ``(B,)`` of the rows of this process, at least 0, without gradient; 0 rejects a sample.

        Args:
            strategy: The method.
            batch: Batch of the stream.
            output: Features ``(B, d)`` and logits ``(B, classes of the source)`` of the network.
        """

    def learn(self, output: Output, selected: Tensor) -> None:
        """Update the state, once per batch, with the rows ``(B,)``, bool, that all filters selected."""


class EntropyFilter(SampleFilter):
    """Selects samples whose prediction has a low entropy.

    Args:
        margin: Threshold of the entropy as a share of its largest value ln C, above 0; ``inf`` for no threshold.
        weighted: Whether the weight is exp(E_0 - H_i) instead of 1; without a threshold weights are 1.
    """

    def __init__(self, margin: float = 0.4, *, weighted: bool = False) -> None:
        super().__init__()
        above(self, 0, margin=margin)
        self.margin, self.weighted = margin, weighted

    def forward(self, strategy: Adapting, batch: Batch, output: Output) -> Tensor:
        values, most = entropy(output.logits.detach()), self.margin * math.log(strategy.num_source)
        selected = values < most
        if self.weighted and math.isfinite(most):
            return (most - values).exp() * selected
        return selected.to(values)


class DiversityFilter(SampleFilter):
    """Selects samples whose prediction differs from the mean prediction so far.

    Before the first selection there is no mean, and all samples are selected.

    Args:
        diversity: eps, above 0: largest absolute cosine between prediction and mean prediction; above 1 all samples
            are selected.
        momentum: Weight of the previous mean, in [0, 1].
    """

    transductive = True
    mean: Tensor

    def __init__(self, diversity: float = 0.4, momentum: float = 0.9) -> None:
        super().__init__()
        above(self, 0, diversity=diversity)
        within(self, "[0, 1]", momentum=momentum)
        self.diversity, self.momentum = diversity, momentum
        self.register_buffer("mean", torch.zeros(0))  # m, (classes of the source,); zeros before the first selection

    def learn_source(self, strategy: Adapting) -> None:
        self.mean = self.mean.new_zeros(strategy.num_source)

    def reset(self) -> None:
        self.mean = torch.zeros_like(self.mean)

    def forward(self, strategy: Adapting, batch: Batch, output: Output) -> Tensor:
        p = probabilities(output.logits)
        return (F.cosine_similarity(p, self.mean[None], dim=1).abs() < self.diversity).to(p)

    @torch.no_grad()
    def learn(self, output: Output, selected: Tensor) -> None:
        p = probabilities(output.logits)
        sums = all_sum(torch.cat([(p * selected[:, None]).sum(dim=0), selected.sum()[None]]))  # over all processes
        mean = sums[:-1] / sums[-1].clamp(min=1)
        mean = torch.where(self.mean.sum() == 0, mean, torch.lerp(mean, self.mean, self.momentum))
        self.mean.copy_(torch.where(sums[-1] > 0, mean, self.mean))
