"""Quantile-risk rehearsal (Chen et al., "Analysis of the Memorization and Generalization Capabilities of AI Agents: Are
Continual Learners Robust?", ICASSP 2024, arXiv:2309.10149).

For domain-incremental streams: the cross-entropies of single samples stand for the risks of environments, and a high
quantile of these risks is minimised in place of their mean, so that the network also holds on domains that it has not
seen. With l_i the cross-entropies of n samples, of the batch of the stream and of e draws from the memory, their mean
mu and their standard deviation s, and R a further draw from the memory,

    L = beta * q + mean CE(R),    q = mu + z s,   z = Phi^-1(alpha)

q is the quantile alpha of a normal distribution. alpha -> quantile, beta -> balance, e -> environments. A negative
``quantile`` gives an extreme level by its logarithm, z = sqrt(-2 alpha). While the memory is empty, L = q. The gradient
of q is

    dq = sum_i w_i dl_i,   w_i = 1/n + z (l_i - mu) / ((n - 1) s),    sum_i w_i = 1,   sum_i w_i l_i = q

so that samples of a small loss have a negative weight where z is large: they are unlearned. ``positive_weights`` sets
negative weights to 0 (not in the paper). As in the authors' code, samples of the memory are not augmented in the
quantile, and s = sqrt(variance + 1e-16); here R is augmented. Not implemented are the code's quantile by kernel density
estimation and its first steps on the mean.
"""

import math
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Batch, join
from cl_lightning.checks import at_least, within
from cl_lightning.distributed import all_sum, world_size
from cl_lightning.losses import full_precision
from cl_lightning.strategies.base import check_loss_classes
from cl_lightning.strategy import Output, Replay, Traits

_ENVIRONMENT = 0xE9


def normal_quantile(level: float) -> float:
    """z, the quantile of the standard normal distribution; of a negative level ``sqrt(-2 level)``."""
    return math.sqrt(-2 * level) if level < 0 else NormalDist().inv_cdf(level)


def quantile_weights(losses: Tensor, z: float, *, exchange: bool = False) -> Tensor:
    """Weights of losses in the gradient of their normal quantile; the weighted sum is the quantile.

        w_i = 1/n + z (l_i - mu) / ((n - 1) s),   q = mu + z s = sum_i w_i l_i

    Args:
        losses: l, ``(n,)``.
        z: Number of standard deviations.
        exchange: Whether mean and deviation are of the losses of all processes; all of them must call this.

    Returns:
        ``(n,)``, float64, without gradient. Their sum, over all processes, is 1.
    """
    values = losses.detach().double()
    sums = torch.stack([torch.ones_like(values).sum(), values.sum()])
    count, total = all_sum(sums) if exchange else sums
    mean = total / count.clamp(min=1)
    squares = (values - mean).square().sum()
    squares = all_sum(squares) if exchange else squares
    deviation = (squares / (count - 1).clamp(min=1) + 1e-16).sqrt()
    weights: Tensor = 1 / count.clamp(min=1) + z * (values - mean) / ((count - 1).clamp(min=1) * deviation)
    return weights


class EQRMReplay(Replay):
    """A high quantile of the cross-entropies of batch and memory, and the mean cross-entropy of the memory.

    Args:
        quantile: alpha, below 1 and not 0: a level in (0, 1), or about the logarithm of 1 - level.
        balance: beta, at least 0.
        environments: e, number of draws from the memory for the quantile, at least 0.
        positive_weights: Whether negative weights of samples of a small loss are set to 0.
        kwargs: Options of ``Replay``; ``replay_size`` is the number of samples of each draw.
    """

    traits = Traits(family="rehearsal", paper="Chen et al., ICASSP 2024, arXiv:2309.10149", keeps_exemplars=True)

    def __init__(
        self,
        *,
        quantile: float = 0.9999,
        balance: float = 0.5,
        environments: int = 3,
        positive_weights: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_loss_classes(self)
        within(self, "(-inf, 1)", quantile=quantile)
        if quantile == 0:
            raise ValueError("EQRMReplay: quantile is 0; give a level in (0, 1), or a negative logarithm of 1 - level")
        at_least(self, 0, balance=balance, environments=environments)
        if self.loss_classes != "all":
            raise ValueError(f"EQRMReplay: loss_classes is {self.loss_classes!r}; use 'all'")
        self.z, self.balance = normal_quantile(quantile), balance
        self.environments, self.positive_weights = environments, positive_weights

    def prepare_batch(self, batch: Batch) -> Batch:
        parts: dict[str, Batch | None] = {"stream": batch}
        for environment in range(self.environments):
            drawn = self.draw(batch, _ENVIRONMENT, environment)
            parts[f"environment {environment}"] = None if drawn is None else self.data.finish(drawn)
        return join({**parts, "replay": self.replay(batch)})

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        pool, terms, balance = slice(None), dict[str, Tensor](), 1.0
        if "replay" in batch.parts:
            samples, of_part, share = batch.part("replay", output)
            terms["replay"] = share * self.classification_loss(of_part, samples)
            pool, balance = slice(batch.parts["replay"][0].start), self.balance  # all rows before the last part
        losses = F.cross_entropy(full_precision(output.logits[pool]), batch.labels[pool], reduction="none")
        if (of_class := self.data.weights_of(batch)) is not None:
            losses = losses * of_class[pool]
        # In a batch with fewer samples than processes, one process has all of the samples from the memory too.
        weights = quantile_weights(losses, self.z, exchange=batch.draw.total >= world_size())
        if self.positive_weights:
            weights = weights.clamp(min=0)
        quantile = (weights.to(losses.dtype) * losses).sum() * (world_size() / batch.weight)
        return {"quantile": balance * quantile, **terms}
