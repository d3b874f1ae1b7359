"""mix-cd: rehearsal of collateral damage (Bai et al., Findings of NAACL 2025, arXiv:2402.08096).

All data of earlier tasks may be stored; the budget is computation. A stored sample x is collateral damage if the
network f_0 before the task predicts it correctly and the present network f does not. Rehearsal of others is wasted, but
which samples are damaged is known only after a forward pass. So the memory is divided into bins, the share of damaged
samples of each bin is estimated from the samples that are replayed anyway, and bins of larger shares are replayed more:

    L = mean of CE over B u R,   R r samples of the memory
    n_k <- n_k + replayed samples of bin k,   d_k <- d_k + damaged ones among them        in each step
    alpha_k = (d_k + a) / (n_k + a + b),   then n_k <- rho n_k,  d_k <- rho d_k           every ``refresh_every`` steps
    P(bin k) = alpha_k N_k / sum_j alpha_j N_j,   uniform within a bin

N_k is the number of samples in bin k, of those only that f_0 predicts correctly. r -> replay_size, a and b -> prior,
rho -> decay. With equal alpha_k samples are drawn uniformly. The samples of a step are drawn without replacement, one
after the other. Bins are quantiles of the loss of f_0, classes, or both.

Only abstracts of the paper were accessible: the number of bins, a, b, rho and the interval are ours. Damage is measured
on the forward pass of the step, of augmented images. The memory is filled when a task ends; if fewer samples than r are
predicted correctly by f_0, others are drawn too, and not counted.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Batch, Draw
from cl_lightning.checks import at_least, one_of, within
from cl_lightning.distributed import all_gather_together, all_sum
from cl_lightning.losses import full_precision
from cl_lightning.memory import GrowingBuffers
from cl_lightning.strategies.base import MemoryReplay, check_loss_classes
from cl_lightning.strategy import Output, Task, Traits

Partition = Literal["loss", "class", "both"]
_CHOSEN, _SHARE = 0x3CD, 0x3CE
_UNDAMAGED, _WRONG = -1e3, -1e6  # logarithms of weights: after all others, and after those too


class DamageBins(GrowingBuffers):
    """Bins of the samples of a memory, and the estimated share of damaged samples in each.

    Attributes:
        bins: Bin of each sample in memory, int64 ``(held,)``; -1 for a sample that f_0 did not predict correctly.
        counts: n and d of each bin, ``(K, 2)``.
        rates: alpha, ``(K,)``, since the last refresh.
    """

    kept_as: ClassVar[str] = "statistics"
    bins: Tensor
    counts: Tensor
    rates: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bins", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(0, 2))
        self.register_buffer("rates", torch.zeros(0))

    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    def reset(self, bins: Tensor, count: int) -> None:
        """Begin with the given bins of all samples, numbered below ``count``, and equal rates."""
        self.bins, self.counts = bins, torch.zeros(count, 2, device=bins.device)
        self.rates = torch.ones(count, device=bins.device)

    def refresh(self, prior: float, decay: float) -> None:
        """Estimate the rates from the counts, with a = b = ``prior``; then multiply the counts by ``decay``."""
        seen, damaged = self.counts.unbind(dim=1)
        total = seen + 2 * prior
        self.rates = torch.where(total > 0, (damaged + prior) / total, 1.0)
        self.counts *= decay

    def shares(self) -> Tensor:
        """P of each bin, ``(K,)``; if no bin has damage, in proportion to the sizes."""
        sizes = torch.zeros_like(self.rates).index_add_(0, self.bins.clamp(min=0), (self.bins >= 0).to(self.rates))
        weights = sizes * self.rates
        weights = torch.where(weights.sum() > 0, weights, sizes)
        return weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)

    def draw(self, count: int, key: int) -> Tensor:
        """Rows of the memory, drawn one after the other without replacement, int64 ``(count,)``.

        Args:
            count: Number of rows, at most the number of samples.
            key: Key of the random numbers.
        """
        rates = self.rates.double().log().clamp(min=_UNDAMAGED)
        weights = torch.where(self.bins >= 0, rates[self.bins.clamp(min=0)], _WRONG)
        uniform = Draw.of(len(weights), key, _CHOSEN).rand().to(weights, non_blocking=True)
        times = torch.log(-torch.log1p(-uniform)) - weights  # the logarithm of exponential variables of rates exp(w)
        return times.argsort(stable=True)[:count]


def loss_quantiles(losses: Tensor, chosen: Tensor, count: int) -> Tensor:
    """Quantile of each chosen loss among the chosen ones, int64 ``(n,)`` in ``0 .. count - 1``; -1 for others.

    Args:
        losses: ``(n,)``.
        chosen: bool ``(n,)``.
        count: Number of quantiles, whose sizes differ by at most 1.
    """
    order = torch.where(chosen, losses, torch.inf).argsort(stable=True)
    ranks = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    return torch.where(chosen, ranks * count // chosen.sum().clamp(min=1), -1)


class MixCD(MemoryReplay):
    """Replay of the samples of a memory that the training on the task is estimated to damage most.

    Args:
        partition: Bins by quantiles of the ``loss`` before the task, by ``class``, or ``both``.
        num_bins: Number of quantiles, at least 1.
        prior: a = b, at least 0; with 0 a bin without damage so far is drawn only after all others.
        decay: rho, in [0, 1].
        refresh_every: Number of optimizer steps between two estimates, at least 1.
        kwargs: Options of ``MemoryReplay``: ``memory_size``, ``policy``, ``replay_size``.
    """

    traits = Traits(
        family="rehearsal", paper="Bai et al., Findings of NAACL 2025, arXiv:2402.08096", keeps_exemplars=True
    )

    def __init__(
        self,
        *,
        partition: Partition = "loss",
        num_bins: int = 10,
        prior: float = 1.0,
        decay: float = 0.9,
        refresh_every: int = 50,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_loss_classes(self)
        one_of(self, get_args(Partition), partition=partition)
        at_least(self, 1, num_bins=num_bins, refresh_every=refresh_every)
        at_least(self, 0, prior=prior)
        within(self, "[0, 1]", decay=decay)
        self.partition, self.num_bins, self.prior = partition, num_bins, prior
        self.decay, self.refresh_every = decay, refresh_every
        self.damage = DamageBins()
        self._rows: Tensor | None = None
        self._damaged: Tensor | None = None

    def draw(self, batch: Batch, *salt: int, tasks: Iterable[int] | None = None) -> Batch | None:
        self._rows = self._damaged = None
        count = min(self.replay_size or batch.draw.total, len(self.memory))
        if count == 0:
            return None
        draw = batch.draw.fork(*salt) if salt else batch.draw
        share = draw.share(count, _SHARE)
        self._rows = self.damage.draw(count, share.key)[share.start : share.stop]
        return self.memory.at(self._rows, share)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if "replay" in batch.parts:
            samples, of_part, _ = batch.part("replay", output)
            self._damaged = of_part.logits.detach().argmax(dim=1) != samples.labels
        return super().losses(batch, output)

    def after_step(self, batch: Batch) -> None:
        if len(self.memory) == 0:
            return
        counts = torch.zeros_like(self.damage.counts)
        if self._rows is not None and self._damaged is not None:
            bins = self.damage.bins[self._rows]
            seen = (bins >= 0).to(counts)
            counts.index_add_(0, bins.clamp(min=0), torch.stack([seen, seen * self._damaged], dim=1))
        self.damage.counts += all_sum(counts)
        if self.trainer.global_step % self.refresh_every == 0:
            self.damage.refresh(self.prior, self.decay)

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        super().end_task(task)
        for batch in self.passes.batches():
            self.offer(batch)
        parts = [all_gather_together(self._before(batch)) for batch in self.passes.batches(memory=self.memory)]
        if not parts:
            return
        losses, right = (torch.cat(column) for column in zip(*parts, strict=True))
        bins, count = loss_quantiles(losses, right, self.num_bins), self.num_bins
        labels = self.memory.labels
        if self.partition == "class":
            bins, count = torch.where(right, labels, -1), self.network.head.num_columns
        elif self.partition == "both":
            bins = torch.where(right, labels * count + bins, -1)
            count *= self.network.head.num_columns
        self.damage.reset(bins, count)

    def _before(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of samples of the memory, and whether they are predicted correctly, by the network after its task."""
        if not len(batch):
            return torch.zeros(0, device=self.device), torch.zeros(0, dtype=torch.bool, device=self.device)
        with self.trainer.precision_plugin.forward_context():
            logits = self.network(batch.images).logits
        losses = F.cross_entropy(full_precision(logits), batch.labels, reduction="none").float()
        return losses, logits.argmax(dim=1) == batch.labels
