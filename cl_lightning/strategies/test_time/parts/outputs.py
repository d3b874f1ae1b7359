"""Corrections of the scores of a batch, as options of every test-time adaptation method."""

from typing import Literal

import torch
from torch import Tensor

from cl_lightning.checks import one_of
from cl_lightning.distributed import all_sum
from cl_lightning.losses import full_precision
from cl_lightning.strategies.test_time.parts.part import OutputHead
from cl_lightning.strategy import Output


def smoothed_prior(mean: Tensor, count: Tensor) -> Tensor:
    """p~ ``(C,)`` of the mean prediction ``(C,)`` of a batch of ``count`` samples, see ``PriorCorrection``."""
    smoothing = torch.maximum(1 / count.clamp(min=1), mean.new_full((), 1 / len(mean))) / mean.amax().clamp(min=1e-12)
    return (mean + smoothing) / (1 + smoothing * len(mean))


class PriorCorrection(OutputHead):
    """Weights the scores of each class by its smoothed share of the predictions of the batch.

    With p^ the mean prediction of the batch of B samples, over all processes,

        p~ = (p^ + s) / (1 + s C),   s = max(1/B, 1/C) / max_c p^_c,   score = log(p p~)

    Source: Marsden, Doebler, Yang, Universal test-time adaptation, WACV 2024, arXiv:2306.00650.

    Args:
        on: What p~ multiplies: the ``probabilities`` p, or the ``logits`` as in the authors' code.
    """

    def __init__(self, on: Literal["probabilities", "logits"] = "probabilities") -> None:
        super().__init__()
        one_of(self, ("probabilities", "logits"), on=on)
        self.on = on

    @torch.no_grad()
    def forward(self, output: Output) -> Tensor:
        logits = full_precision(output.logits)
        p = logits.softmax(dim=1)
        sums = all_sum(torch.cat([p.sum(dim=0), p.new_full((1,), len(p))]))
        prior = smoothed_prior(sums[:-1] / sums[-1].clamp(min=1), sums[-1])
        return logits * prior if self.on == "logits" else logits.log_softmax(dim=1) + prior.log()
