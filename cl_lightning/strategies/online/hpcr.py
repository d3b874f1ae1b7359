"""Holistic Proxy-based Contrastive Replay, HPCR (Lin et al., TNNLS 2025, arXiv:2309.15038), for online streams.

The loss of ``PCR`` with a gradient that rises and falls, and from the second task on two distillations. Each sample of
the memory has the logits o' and the features h' of its first step. With R the two views of the samples drawn from the
memory, y_1 .. y_N the labels of all rows of the step, and tau the temperature of PCR,

    L = s(i) L_PCR + alpha L_PCD + beta L_SCD
    s(i) = tau / high + (tau / low - tau / high) (1 - cos(2 pi i / period)) / 2,   i: steps since the start of the task
    L_PCD = 1/(|R| N) sum_{r in R} sum_k ( o_r,y_k - o'_r,y_k )^2                             proxies
    L_SCD = -1/|R| sum_r sum_{j != r} p'_rj log p_rj,   p_rj = softmax_{j != r} cos(h_r, h_j) / tau    structure

and p' of the stored features. low -> low_temperature, high -> high_temperature: tau / T is the factor between gradients
with the temperatures T and tau. alpha -> proxy_weight, beta -> structure_weight.

Logits and features are stored from the un-augmented view in the forward pass of the step after which the sample is
offered to the memory, and are the targets of both of its views. Columns of classes that did not exist then are left out
of L_PCD, and N counts the others. In the paper anchor-to-sample pairs are added to L_PCR for large batches; as in the
released code, they are left out. See ``PCR`` for what departs there. The method depends on where tasks begin, so it is
not task-free. With several processes L_SCD is among the rows of all processes. If a batch of the stream has fewer
samples than there are processes, each process takes its own rows.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.checks import above, at_least
from cl_lightning.losses import full_precision, mean_over_rows, rows_of_all, softmax_distillation
from cl_lightning.memory import valid_columns
from cl_lightning.strategies.online.pcr import PCR
from cl_lightning.strategy import Batch, Output, Task

_REPLAYED = ("replay", "strong replay")


def gradient_scale(steps: Tensor, low: float, high: float, period: int) -> Tensor:
    """A factor that moves from ``low`` to ``high`` and back along a cosine.

        s(i) = low + (high - low) (1 - cos(2 pi i / period)) / 2

    Args:
        steps: i, int64 scalar.
        low: Factor at step 0.
        high: Factor at half a period.
        period: Number of steps.
    """
    return low + (high - low) * (1 - (2 * math.pi * steps / period).cos()) / 2


def proxy_distillation(logits: Tensor, stored: Tensor, counts: Tensor) -> Tensor:
    """Squared differences of logits, a weighted mean over the classes of the step and the mean over the rows.

        L = 1/B sum_i sum_c n_c (o_ic - o'_ic)^2 / sum_c n_c,   c over the columns that o'_i has

    Args:
        logits: o, ``(B, C)``.
        stored: o', ``(B, C_stored)`` with ``C_stored <= C``; NaN in columns that did not exist.
        counts: n_c, number of rows of each class in the step, ``(C,)``.
    """
    logits, stored = full_precision(logits), full_precision(stored.detach())
    stored = F.pad(stored, (0, logits.shape[1] - stored.shape[1]), value=torch.nan)
    weights = counts * valid_columns(stored)
    squares = (logits - stored.where(valid_columns(stored), 0.0)).square()
    return mean_over_rows((weights * squares).sum(dim=1) / weights.sum(dim=1).clamp(min=1))


def structure_distillation(features: Tensor, stored: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between the similarities of rows by stored features and by present ones, mean over rows, in nats.

        L = -1/B sum_i sum_{j != i} p'_ij log p_ij,   p_ij = softmax_{j != i} cos(h_i, h_j) / T

    Args:
        features: h, ``(B, d)``, B at least 2.
        stored: h' of the same rows, ``(B, d)``, without gradient.
        temperature: T, positive.
    """
    with torch.autocast(features.device.type, enabled=False):
        directions = (F.normalize(full_precision(rows), dim=1) for rows in (features, stored.detach()))
        present, before = (without_diagonal(z @ z.T) for z in directions)
    return softmax_distillation(present, before, temperature)


def without_diagonal(matrix: Tensor) -> Tensor:
    """A square matrix without its diagonal, ``(n, n)`` to ``(n, n - 1)``."""
    size = len(matrix)
    return matrix.flatten()[1:].view(size - 1, size + 1)[:, :-1].reshape(size, size - 1)


class HPCR(PCR):
    """PCR with a factor of the gradient that rises and falls, and distillation of logits and of similarities.

    Args:
        proxy_weight: alpha, at least 0; the authors have 0.01 for CIFAR-10.
        structure_weight: beta, at least 0.
        low_temperature, high_temperature: Temperatures between whose gradients the factor moves, above 0.
        period: Number of steps after which the factor repeats, at least 1.
        temperature: tau, above 0; the default head has the scale 1 / tau.
        kwargs: Options of ``PCR``.
    """

    traits = PCR.traits.but(paper="Lin et al., TNNLS 2025, arXiv:2309.15038", task_free=False, inputs=("image",))
    steps: Tensor

    def __init__(
        self,
        *,
        proxy_weight: float = 0.1,
        structure_weight: float = 0.5,
        low_temperature: float = 0.05,
        high_temperature: float = 0.16,
        period: int = 500,
        temperature: float = 0.09,
        **kwargs: Any,
    ) -> None:
        super().__init__(temperature=temperature, **kwargs)
        at_least(self, 0, proxy_weight=proxy_weight, structure_weight=structure_weight)
        above(self, 0, low_temperature=low_temperature, high_temperature=high_temperature)
        at_least(self, 1, period=period)
        self.proxy_weight, self.structure_weight, self.period = proxy_weight, structure_weight, period
        self.temperature = temperature
        self.scales = temperature / high_temperature, temperature / low_temperature
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # since the start of the task
        self._stored: Output | None = None  # of the un-augmented view of the batch

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.steps.zero_()

    def prepare_batch(self, batch: Batch) -> Batch:
        self._stored = None
        return super().prepare_batch(batch)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        assert self._counts is not None
        stream = batch.part("stream", output).output
        self._stored = Output(stream.features.detach().float(), stream.logits.detach().float())
        terms = super().losses(batch, output)
        terms["pcr"] = gradient_scale(self.steps, *self.scales, self.period) * terms["pcr"]
        if self.task.is_first or "replay" not in batch.parts:
            return terms
        rows, factor = rows_of_all(batch)
        views = [batch.part(name, output) for name in _REPLAYED]
        proxies = [
            share * proxy_distillation(of_part.logits, samples.extra["logits"], self._counts)
            for samples, of_part, share in views
        ]
        terms["proxies"] = self.proxy_weight * torch.stack(proxies).mean()
        present, before = (
            torch.cat([rows(full_precision(view)) for view in features])
            for features in zip(
                *((of_part.features, part.extra["features"]) for part, of_part, _ in views), strict=True
            )
        )
        if len(present) > 1:
            structure = structure_distillation(present, before, self.temperature)
            terms["structure"] = self.structure_weight * factor * structure
        return terms

    def offer(self, batch: Batch, **extra: Tensor) -> None:
        if self._stored is None:  # a process without rows
            head = self.network.head
            empty = torch.zeros(0, head.num_features, device=self.device)
            self._stored = Output(empty, torch.zeros(0, head.num_columns, device=self.device))
        super().offer(batch, features=self._stored.features, logits=self._stored.logits, **extra)

    def after_step(self, batch: Batch) -> None:
        super().after_step(batch)
        self.steps += 1
        self._stored = None
