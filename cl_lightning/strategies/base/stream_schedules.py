"""Learning-rate schedules that know the place of a task in the stream.

They are meant for ``scheduler_interval="step"``: N is then the number of optimizer steps of the phase, and n counts its
steps from 0. With ``"epoch"``, N and n count epochs. All lengths are fractions of N. Rates are factors of the rate of
the optimizer, eta_max = 1. A warm-up has the factors (n + 1) / (w + 1) for n < w, as ``CosineOverPhase``, since n / w
would waste its first step.

``CosineOverPhase`` with a ``warmup`` and ``final=0.1`` is the re-warming and re-decaying cosine (Ibrahim et al., TMLR
2024, arXiv:2403.08763), and ``torch.optim.lr_scheduler.CosineAnnealingWarmRestarts`` is SGDR over the steps of a phase.
"""

import math
from typing import Literal, get_args

from torch.optim import Optimizer

from cl_lightning.checks import one_of, within
from cl_lightning.strategies.base.schedules import PhaseSchedule

Decay = Literal["cosine", "rsqrt", "linear"]
Anneals = Literal["last", "each", "never"]
Form = Literal["autoregressive", "continued"]
_BEND = 10.0  # a of the inverse square root of a cool-down


class InfiniteOverStream(PhaseSchedule):
    """Warm-up, cool-down and a constant rate over any number of tasks, then an annealing (arXiv:2503.02844).

    The infinite schedule of "Beyond Cosine Decay" (CoLLAs 2025) and of Ibrahim et al. (TMLR 2024, arXiv:2403.08763). In
    the first task, with w and c the lengths of warm-up and cool-down, p = (n - w) / c, and k = constant:

        warm-up    (n + 1) / (w + 1)                          n < w
        cool-down  k + (1 - k) (1 + cos(pi p)) / 2            n < w + c, cosine
                   1 + (k - 1) g(p) / g(1)                    rsqrt, g(p) = 1 / sqrt(1 + 10 p) - 1
                   1 + (k - 1) p                              linear
        constant   k
        annealing  k (final / k)^((n - n_a) / (N - n_a))      n >= n_a = (1 - anneal) N

    Later tasks have no warm-up and no cool-down. Where the paper starts the next task from the checkpoint before the
    annealing, here the network is one: with ``anneals="last"`` the last task alone is annealed, and the rate is
    continuous over the stream; with ``"each"``, every task starts again at k after the annealed one. Fractions and
    rates are of an implementation of the schedule by others.

    Args:
        optimizer: Optimizer whose learning rates are scheduled.
        warmup: Length of the warm-up, a fraction of the first task, in [0, 1).
        cooldown: Length of the cool-down, a fraction of the first task, in [0, 1).
        anneal: Length of the annealing, a fraction of an annealed task, in [0, 1]; 1 anneals from the first step on.
        constant: k, in (0, 1].
        final: Factor after the annealing, in (0, 1].
        decay: Form of the cool-down.
        anneals: Tasks that are annealed: the ``last`` of the stream, ``each``, or ``never``.

    Raises:
        ValueError: If an option is out of range, or if warm-up and cool-down are longer than the first task.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup: float = 0.05,
        cooldown: float = 0.1,
        anneal: float = 0.2,
        constant: float = 0.1,
        final: float = 0.01,
        decay: Decay = "cosine",
        anneals: Anneals = "last",
    ) -> None:
        within(self, "[0, 1)", warmup=warmup, cooldown=cooldown)
        within(self, "[0, 1]", anneal=anneal)
        within(self, "(0, 1]", constant=constant, final=final)
        one_of(self, get_args(Decay), decay=decay)
        one_of(self, get_args(Anneals), anneals=anneals)
        if warmup + cooldown > 1:
            raise ValueError(
                f"InfiniteOverStream: warmup is {warmup} and cooldown is {cooldown}; their sum must be at most 1"
            )
        self.warmup, self.cooldown, self.anneal = warmup, cooldown, anneal
        self.constant, self.final, self.decay, self.anneals = constant, final, decay, anneals
        super().__init__(optimizer)

    def factor(self, epoch: int) -> float:
        annealed = self.anneals == "each" or (self.anneals == "last" and self.task == self.tasks - 1)
        start = self.epochs - round(self.anneal * self.epochs) if annealed else None
        if start is None or epoch < start:
            return self._before(epoch)
        done = min((epoch - start) / max(self.epochs - start, 1), 1.0)
        before = self._before(start)  # k, unless the first task is annealed before its cool-down ends
        return before * math.pow(self.final / before, done)

    def _before(self, epoch: int) -> float:
        """Factor without an annealing."""
        if self.task > 0:
            return self.constant
        rise, fall = round(self.warmup * self.epochs), round(self.cooldown * self.epochs)
        if epoch < rise:
            return (epoch + 1) / (rise + 1)
        if epoch >= rise + fall:
            return self.constant
        p = (epoch - rise) / fall
        if self.decay == "cosine":
            return self.constant + (1 - self.constant) * 0.5 * (1 + math.cos(math.pi * p))
        share = p if self.decay == "linear" else _bent(p) / _bent(1.0)
        return 1 + (self.constant - 1) * share


class CosineOverStream(PhaseSchedule):
    """Warm-up and cosine in each task, from a peak that follows a cosine over the stream.

    The "autoregressive cosine" of FoMo-in-Flux (Roth et al., NeurIPS 2024, arXiv:2408.14471). With w = ceil(warmup N),
    task t = 0, 1, ..., and l = final, the cosine of a task goes from peak_t to l, with

        peak_t = l + (1 - l) (1 + cos(pi (t (N - w) + 1) / ((t + 1) (N - w)))) / 2,   peak_0 = 1

    about .50, .25, .146 in tasks 1, 2, 3: the rate that one cosine over all tasks so far has when the task begins. N is
    the length of the present task, as if all were as long.

    Args:
        optimizer: Optimizer whose learning rates are scheduled.
        warmup: Length of the warm-up as a fraction of a task, in [0, 1).
        final: l, in [0, 1].
    """

    def __init__(self, optimizer: Optimizer, *, warmup: float = 0.1, final: float = 0.001) -> None:
        within(self, "[0, 1)", warmup=warmup)
        within(self, "[0, 1]", final=final)
        self.warmup, self.final = warmup, final
        super().__init__(optimizer)

    def factor(self, epoch: int) -> float:
        rise = math.ceil(self.warmup * self.epochs)
        length = max(self.epochs - rise, 1)
        peak = self._cosine(1.0, min((self.task * length + 1) / ((self.task + 1) * length), 1.0)) if self.task else 1.0
        if epoch < rise:
            return peak * (epoch + 1) / (rise + 1)
        return self._cosine(peak, min((epoch - rise) / length, 1.0))

    def _cosine(self, peak: float, done: float) -> float:
        return self.final + (peak - self.final) * 0.5 * (1 + math.cos(math.pi * done))


class RsqrtOverStream(PhaseSchedule):
    """Inverse square root in each task, from a peak that falls over the stream.

    Of FoMo-in-Flux (Roth et al., NeurIPS 2024, arXiv:2408.14471). With w = ceil(warmup N), c = ceil(cooldown N), task
    t = 0, 1, ..., and l = final:

        peak_t = l + (1 - l) sqrt((t + 1) w / (t N + w)),   l + sqrt(w / n) (peak_t - l)          autoregressive
        position = t (N - c) - (t - 1) w,                   l + (1 - l) sqrt(w / (position + n - w))   continued

    from n = w on, and the last c steps go linearly to 0. In the ``continued`` form a task continues the curve where the
    previous one left it for the cool-down; its peak is the published one, the curve in the task is derived from it. N
    is the length of the present task, as if all were as long.

    Args:
        optimizer: Optimizer whose learning rates are scheduled.
        warmup: Length of the warm-up as a fraction of a task, in (0, 1).
        cooldown: Length of the cool-down as a fraction of a task, in [0, 1); 0 for none.
        final: l, in [0, 1].
        form: Form of the peaks.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup: float = 0.1,
        cooldown: float = 0.1,
        final: float = 0.001,
        form: Form = "autoregressive",
    ) -> None:
        within(self, "(0, 1)", warmup=warmup)
        within(self, "[0, 1)", cooldown=cooldown)
        within(self, "[0, 1]", final=final)
        one_of(self, get_args(Form), form=form)
        self.warmup, self.cooldown, self.final, self.form = warmup, cooldown, final, form
        super().__init__(optimizer)

    def factor(self, epoch: int) -> float:
        rise = math.ceil(self.warmup * self.epochs)
        fall = math.ceil(self.cooldown * self.epochs)
        if epoch < rise:
            return self._curve(rise, rise, fall) * (epoch + 1) / (rise + 1)
        start = max(self.epochs - fall, rise)
        if not fall or epoch < start:
            return self._curve(epoch, rise, fall)
        return self._curve(start, rise, fall) * max(self.epochs - epoch, 0) / max(self.epochs - start, 1)

    def _curve(self, n: int, rise: int, fall: int) -> float:
        """Factor in step n >= w, without the cool-down."""
        t, steps = self.task, self.epochs
        if self.form == "continued":
            position = max(t * (steps - fall) - (t - 1) * rise, rise)
            return self.final + (1 - self.final) * math.sqrt(rise / (position + n - rise))
        share = math.sqrt((t + 1) * rise / (t * steps + rise))
        return self.final + math.sqrt(rise / n) * share * (1 - self.final)


def _bent(p: float) -> float:
    return 1 / math.sqrt(1 + _BEND * p) - 1
