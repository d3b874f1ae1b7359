"""Rules that take the trained parameters back to, or near to, the source after a step of the optimizer.

    StochasticRestore  theta <- M theta_0 + (1 - M) theta,  M ~ Bernoulli(share) elementwise   (Wang et al., CVPR 2022)
    FisherRestore      the same with M_j = 1 where g_j^2 < q,  q a quantile of all g^2     (Brahma and Rai, CVPR 2023)
    WeightEnsembling   theta <- m theta + (1 - m) theta_0                              (Marsden et al., WACV 2024)
    MomentumFilter     theta <- g theta + (1 - g) h, with h a Kalman filter of theta       (Lee and Chang, ICLR 2024)
    PeriodicReset      every n steps: network, optimizer and further state are reset   (Press et al., NeurIPS 2023)
    EntropyReset       the same if a moving mean of the entropy is below a threshold   (Niu et al., ICLR 2023)

theta are the trained parameters, theta_0 their values in the source network, g the gradient of the step.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cl_lightning.batch import Batch, mix
from cl_lightning.checks import above, at_least, one_of, within
from cl_lightning.distributed import all_sum
from cl_lightning.losses import entropy, full_precision
from cl_lightning.strategies.test_time.parts.part import Adapting, Part, PersistentTensors
from cl_lightning.strategy import Output

_RESTORE = 0xC1  # salt


@torch.no_grad()
def restore(parameters: Mapping[str, nn.Parameter], source: Mapping[str, Tensor], share: float, key: int) -> None:
    """Reset each weight to its source value with probability ``share``, in place, the same on every process.

    Args:
        parameters: Parameters by name.
        source: Source values of the same names; parameters that it lacks are not reset.
        share: Probability for each weight, in [0, 1].
        key: Seed of the random mask.
    """
    device = next(iter(parameters.values())).device
    generator = torch.Generator(device).manual_seed(key)
    for name, value in parameters.items():
        mask = torch.rand(value.shape, generator=generator, device=device) < share
        if name in source:
            value.copy_(torch.where(mask, source[name], value))


@torch.no_grad()
def quantile(values: Tensor, share: float) -> Tensor:
    """Quantile with linear interpolation, a scalar; of any number of values, unlike ``torch.quantile``.

    Args:
        values: ``(n,)``.
        share: In [0, 1]: 0 for the smallest value, 1 for the largest.
    """
    ordered, place = values.sort().values, share * (len(values) - 1)
    below = math.floor(place)
    return ordered[below].lerp(ordered[math.ceil(place)], place - below)


class RestorationRule(Part, ABC):
    """Changes the trained parameters after a step of the optimizer."""

    def learn(self, output: Output, selected: Tensor | None) -> None:
        """Note a batch, before the step: its output, and the rows ``(B,)``, bool, that filters selected; None: all.

        A step of several forward passes (a sharpness-aware optimizer) gives each of them; the last one counts.
        """

    @abstractmethod
    def forward(self, strategy: Adapting, batch: Batch) -> None:
        """Change ``strategy.trained_parameters()`` in place; not called if no step was taken."""


class StochasticRestore(RestorationRule):
    """Resets a random share of the weights to the source.

    Args:
        share: Probability that a weight is reset, in [0, 1].
    """

    def __init__(self, share: float = 0.01) -> None:
        super().__init__()
        within(self, "[0, 1]", share=share)
        self.share = share

    def forward(self, strategy: Adapting, batch: Batch) -> None:
        if self.share:
            key = mix(batch.draw.key, _RESTORE)
            restore(strategy.trained_parameters(), strategy.start.tensors, self.share, key)


class FisherRestore(RestorationRule):
    """Resets the weights with the least Fisher information in the batch to the source.

    A weight is reset where its squared gradient in the step is below a quantile of the squared gradients of all trained
    weights. The gradient is 0 for a parameter that the loss does not reach.

    Args:
        share: Share of the weights that are reset, in [0, 1].
    """

    def __init__(self, share: float = 0.03) -> None:
        super().__init__()
        within(self, "[0, 1]", share=share)
        self.share = share

    @torch.no_grad()
    def forward(self, strategy: Adapting, batch: Batch) -> None:
        parameters, source = strategy.trained_parameters(), strategy.start.tensors
        squares = [
            torch.zeros_like(value) if value.grad is None else full_precision(value.grad).square()
            for value in parameters.values()
        ]
        bound = quantile(torch.cat([square.flatten() for square in squares]), self.share)
        for (name, value), square in zip(parameters.items(), squares, strict=True):
            value.copy_(torch.where(square < bound, source[name], value))


class WeightEnsembling(RestorationRule):
    """Moves the parameters towards the source.

    Args:
        momentum: m, in [0, 1]: 1 changes nothing, 0 resets to the source.
    """

    def __init__(self, momentum: float = 0.99) -> None:
        super().__init__()
        within(self, "[0, 1]", momentum=momentum)
        self.momentum = momentum

    @torch.no_grad()
    def forward(self, strategy: Adapting, batch: Batch) -> None:
        source = strategy.start.tensors
        pairs = [(value, source[name]) for name, value in strategy.trained_parameters().items()]
        mine, theirs = (list(column) for column in zip(*pairs, strict=True))
        torch._foreach_lerp_(mine, theirs, 1 - self.momentum)


class MomentumFilter(RestorationRule):
    """Moves the parameters towards a hidden state that a Kalman filter estimates from them.

    With n trained numbers, q = noise n / 38,400 and r = 1 - q, for each step

        h <- a h + (1 - a) theta_0,   v <- a^2 v + q,   b = r / (v + r),   v <- b v
        h <- b h + (1 - b) theta,     theta <- g theta + (1 - g) h

    from h = theta_0 and v = 0. b is set to 0.89 if it is smaller, and to 1 if it is 0.9999 or more.

    Args:
        decay: a, in [0, 1].
        momentum: g, in [0, 1].
        noise: q for the 38,400 trained numbers of a ViT-B/16, in [0, 1).
        ensemble: State that the parameters are moved to: the ``updated`` h, or the ``predicted`` one before the update.
    """

    variance: Tensor

    def __init__(
        self,
        decay: float = 0.99,
        momentum: float = 0.99,
        noise: float = 0.005,
        *,
        ensemble: Literal["updated", "predicted"] = "updated",
    ) -> None:
        super().__init__()
        within(self, "[0, 1]", decay=decay, momentum=momentum)
        within(self, "[0, 1)", noise=noise)
        one_of(self, ("updated", "predicted"), ensemble=ensemble)
        self.decay, self.momentum, self.noise, self.ensemble = decay, momentum, noise, ensemble
        self.hidden = PersistentTensors()  # h; not known before the first step
        self.register_buffer("variance", torch.zeros((), dtype=torch.float64))

    def learn_source(self, strategy: Adapting) -> None:
        self.hidden.take(strategy.trained_parameters())
        self.reset()

    def reset(self) -> None:
        self.hidden.known.zero_()
        self.variance.zero_()

    @torch.no_grad()
    def forward(self, strategy: Adapting, batch: Batch) -> None:
        parameters, source = strategy.trained_parameters(), strategy.start.tensors
        theta: list[Tensor] = list(parameters.values())
        start = [source[name] for name in parameters]
        hidden = [self.hidden.tensors[name] for name in parameters]
        for mine, first in zip(hidden, start, strict=True):
            mine.copy_(torch.where(self.hidden.known, mine, first))
        self.hidden.known.fill_(value=True)
        q = min(self.noise * sum(value.numel() for value in theta) / 38_400, 1 - 1e-6)
        predicted = self.variance * self.decay**2 + q
        gain = (1 - q) / (predicted + 1 - q)
        gain = torch.where(gain >= 0.9999, 1.0, gain.clamp(min=0.89))
        self.variance.copy_(gain * predicted)
        torch._foreach_lerp_(hidden, start, 1 - self.decay)
        seen = theta
        if self.ensemble == "predicted":
            seen = [value.clone() for value in theta]
            torch._foreach_lerp_(theta, hidden, 1 - self.momentum)
        for mine, value in zip(hidden, seen, strict=True):
            mine.lerp_(value, (1 - gain).to(value))
        if self.ensemble == "updated":
            torch._foreach_lerp_(theta, hidden, 1 - self.momentum)


class PeriodicReset(RestorationRule):
    """Resets the network, the optimizer and the state of all parts after a number of steps.

    Args:
        every: Number of steps, at least 1.
    """

    steps: Tensor

    def __init__(self, every: int = 1000) -> None:
        super().__init__()
        at_least(self, 1, every=every)
        self.every = every
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._count: int | None = None  # a copy on the host

    def learn_source(self, strategy: Adapting) -> None:
        self.reset()

    def reset(self) -> None:
        self._count = 0
        self.steps.zero_()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self._count = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, strategy: Adapting, batch: Batch) -> None:
        self._count = (int(self.steps) if self._count is None else self._count) + 1
        self.steps.fill_(self._count)
        if self._count == self.every:
            strategy.reset()


class EntropyReset(RestorationRule):
    """Resets the network, the optimizer and all parts if the entropy of the predictions collapses.

    ``e <- m e + (1 - m) mean H`` over the selected samples of a step; the first mean initialises e.

    Args:
        threshold: Least value of e in nats, above 0.
        momentum: m, in [0, 1].
    """

    moving: Tensor

    def __init__(self, threshold: float = 0.2, momentum: float = 0.9) -> None:
        super().__init__()
        above(self, 0, threshold=threshold)
        within(self, "[0, 1]", momentum=momentum)
        self.threshold, self.momentum = threshold, momentum
        self.register_buffer("moving", torch.full((), -1.0))  # e; -1 before the first step
        self._last: Tensor | None = None  # mean H of the last pass

    def reset(self) -> None:
        self.moving.fill_(-1.0)

    @torch.no_grad()
    def learn(self, output: Output, selected: Tensor | None) -> None:
        values = entropy(output.logits)
        rows = torch.ones_like(values) if selected is None else selected.to(values)
        total, count = all_sum(torch.stack([(values * rows).sum(), rows.sum()])).unbind()
        self._last = (total / count).to(self.moving)  # not a number without samples

    @torch.no_grad()
    def forward(self, strategy: Adapting, batch: Batch) -> None:
        assert self._last is not None
        moved = torch.lerp(self._last, self.moving, self.momentum)
        moved = torch.where(self.moving < 0, self._last, moved)
        self.moving.copy_(torch.where(self._last.isfinite(), moved, self.moving))
        if bool((self.moving >= 0) & (self.moving < self.threshold)):
            strategy.reset()
