"""Learning-rate schedules that take their length from the phase they run in.

Tasks may have different numbers of epochs (a longer first task is usual), and a schedule is built anew for each phase:
these learn the number of epochs from the strategy instead of from the config.
"""

import math
from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class PhaseSchedule(LRScheduler):
    """Schedule over the epochs of one phase; a subclass gives the factor of the learning rate."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.epochs = 1
        super().__init__(optimizer)

    def begin(self, epochs: int) -> None:
        """Tell the length of the phase, in epochs, before its first step."""
        self.epochs = max(epochs, 1)
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = self.get_lr()

    def factor(self, epoch: int) -> float:
        """Factor of the base learning rate in ``epoch``, counted from 0."""
        raise NotImplementedError

    def get_lr(self) -> list[float | Tensor]:
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]


class CosineOverPhase(PhaseSchedule):
    """Half a cosine from the base learning rate to ``final`` times it (Loshchilov & Hutter, ICLR 2017).

    Args:
        optimizer: Whose learning rates are scheduled.
        warmup: Epochs of linear warm-up before it.
        final: Factor that is reached after the last epoch, in [0, 1].
    """

    def __init__(self, optimizer: Optimizer, *, warmup: int = 0, final: float = 0.0) -> None:
        if warmup < 0 or not 0 <= final <= 1:
            raise ValueError(f"CosineOverPhase: warmup={warmup}, final={final}; warmup is at least 0, final in [0, 1]")
        self.warmup, self.final = warmup, final
        super().__init__(optimizer)

    def factor(self, epoch: int) -> float:
        if epoch < self.warmup:
            return (epoch + 1) / (self.warmup + 1)
        done = min((epoch - self.warmup) / max(self.epochs - self.warmup, 1), 1.0)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))


class QuarterCosineOverPhase(PhaseSchedule):
    """The first quarter of a cosine: the learning rate falls late, to 0.016 of it (CODA-Prompt, arXiv:2211.13218).

    factor(e) = cos( 0.99 pi / 2 * e / (E - 1) ),   e = 0 .. E - 1
    """

    def factor(self, epoch: int) -> float:
        return math.cos(0.99 * math.pi / 2 * min(epoch / max(self.epochs - 1, 1), 1.0))


class StepsOverPhase(PhaseSchedule):
    """The learning rate is multiplied by ``gamma`` at given fractions of the phase.

    Args:
        optimizer: Whose learning rates are scheduled.
        at: Fractions of the phase in (0, 1), increasing; 0.5 of 200 epochs is before epoch 100, counted from 0.
        gamma: Factor, positive.
    """

    def __init__(self, optimizer: Optimizer, *, at: Sequence[float] = (0.5, 0.75), gamma: float = 0.1) -> None:
        if gamma <= 0 or list(at) != sorted(at) or any(not 0 < fraction < 1 for fraction in at):
            raise ValueError(
                f"StepsOverPhase: at={list(at)}, gamma={gamma}; at increases inside (0, 1), gamma is positive"
            )
        self.at, self.gamma = tuple(at), gamma
        super().__init__(optimizer)

    def factor(self, epoch: int) -> float:
        return float(self.gamma ** sum(epoch >= round(fraction * self.epochs) for fraction in self.at))
