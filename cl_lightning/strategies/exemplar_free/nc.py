"""NC, Neural Consolidation (Lee, arXiv:2405.16498).

The summed loss of the earlier tasks is replaced by a network kappa, the consolidator, that maps parameters to a loss.
When a task ends it is fitted to the present total loss at random parameters near the present ones:

    target(theta_s) = lambda kappa(theta_s) + l_t(theta_s),   theta_s uniform in the ball of radius r around theta*
    min_phi  sum_s Huber(kappa'(theta_s; phi) - target(theta_s)) + 1/2 ||phi||^2

with ``points`` new theta_s at each of ``steps`` steps of Adam with a one-cycle learning rate, starting from the
previous phi. A step of the next task minimises the cross-entropy and lambda kappa'(theta) / N; see ``SequentialMAP``
for lambda, l_t, N and the prior, which is the target's first term in the first task.
With few parameters the fit is close: on two logistic regressions with 6 parameters the joint loss at its minimum is
31.8, at the joint minimum 31.5, without consolidation 124. For a head of 650 parameters it is rough: on Split-Digits
the last accuracy is .33 with 1,000 steps (fine-tuning .19, AQC with lambda = 30 .93), and with 150 steps as low as
fine-tuning.
kappa: P -> ``units`` -> ``units`` -> 1 with swish. r -> radius. The loss is not assumed to be quadratic; the fit is
rough in many dimensions, since a ball of radius r around theta* is mostly its surface.
Departs from the code, which sums the loss of a task over passes in batches: the target is the loss of the whole task.
"""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

from cl_lightning.batch import mix
from cl_lightning.checks import above, at_least
from cl_lightning.distributed import all_sum
from cl_lightning.strategies.exemplar_free.sequential_map import Likelihood, SequentialMAP
from cl_lightning.strategy import Task, Traits

_POINTS = 0x7C0  # salt


def points_in_ball(centre: Tensor, radius: float, count: int, generator: torch.Generator) -> Tensor:
    """Points that are uniformly distributed in a ball, ``(count, P)``.

    Args:
        centre: ``(P,)``.
        radius: Radius of the ball.
        count: Number of points.
        generator: On the CPU.
    """
    directions = torch.randn(count, len(centre), generator=generator, dtype=torch.float64)
    lengths = torch.rand(count, 1, generator=generator, dtype=torch.float64) ** (1 / len(centre))
    return centre + radius * (lengths * F.normalize(directions, dim=1)).to(centre)


class Consolidator(nn.Module):
    """Network from a parameter vector to a loss, in float64; its input grows with the parameters.

    Args:
        units: Units of each of the two hidden layers.

    Attributes:
        layers: Empty before the first fit.
    """

    kept_as: ClassVar[str] = "importance"

    def __init__(self, units: int) -> None:
        super().__init__()
        self.units = units
        self.layers = nn.Sequential()

    @property
    def num_inputs(self) -> int:
        """Number of parameters at the last fit; 0 before the first."""
        first = self.layers[0] if len(self.layers) else None
        return first.in_features if isinstance(first, nn.Linear) else 0

    def grow(self, size: int, key: int) -> None:
        """Widen the input to ``size``, with weights 0 for what is new; draw the weights at first, by ``key``."""
        if not len(self.layers):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(key)
                self._build(size)
            return
        first = self.layers[0]
        assert isinstance(first, nn.Linear)
        wide = nn.Linear(size, self.units, dtype=torch.float64, device=first.weight.device)
        with torch.no_grad():
            wide.weight.zero_()
            wide.weight[:, : first.in_features] = first.weight
            wide.bias.copy_(first.bias)
        self.layers[0] = wide

    def forward(self, theta: Tensor) -> Tensor:
        """Losses ``(n,)`` of parameters ``(n, P)``; parameters after the first ``num_inputs`` have no influence."""
        losses: Tensor = self.layers(theta[:, : self.num_inputs])[:, 0]
        return losses

    def num_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters())

    def _build(self, size: int) -> None:
        layers: list[nn.Module] = [nn.Linear(size, self.units), nn.SiLU(), nn.Linear(self.units, self.units)]
        self.layers = nn.Sequential(*layers, nn.SiLU(), nn.Linear(self.units, 1)).double().requires_grad_(False)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(f"{prefix}layers.0.weight")
        if weight is not None and weight.shape[1] != self.num_inputs:
            self.units = weight.shape[0]
            with torch.random.fork_rng(devices=[]):
                self._build(weight.shape[1])
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]


def fit_loss(fitted: Consolidator, points: Tensor, targets: Tensor, decay: float) -> Tensor:
    """``sum_s Huber(kappa(theta_s) - target_s) + decay / 2 ||phi||^2``, with the Huber loss of threshold 1.

    Args:
        fitted: kappa, with parameters phi.
        points: theta_s, ``(n, P)``.
        targets: ``(n,)``.
        decay: At least 0.
    """
    norm = torch.stack([weight.square().sum() for weight in fitted.parameters()]).sum()
    return F.huber_loss(fitted(points), targets, reduction="sum") + decay / 2 * norm


class NC(SequentialMAP):
    """Cross-entropy, and a network that predicts the summed loss of earlier tasks from the parameters.

    Args:
        strength: lambda, at least 0.
        radius: r, above 0.
        points: Parameter vectors of one step of the fit, at least 1.
        steps: Steps of the fit after each task, at least 2.
        units: Units of each hidden layer of the consolidator, at least 1.
        consolidator_lr: Largest learning rate of the one-cycle schedule of the fit, above 0.
        consolidator_decay: Factor of ``1/2 ||phi||^2``, at least 0; 1 in the paper.
        kwargs: Options of ``SequentialMAP`` and of the base class.
    """

    traits = Traits(family="exemplar-free", paper="Lee, arXiv:2405.16498", losses_use_images=False)

    def __init__(
        self,
        *,
        strength: float = 1.0,
        radius: float = 10.0,
        points: int = 64,
        steps: int = 1000,
        units: int = 256,
        consolidator_lr: float = 0.01,
        consolidator_decay: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(strength=strength, **kwargs)
        above(self, 0, radius=radius, consolidator_lr=consolidator_lr)
        at_least(self, 1, points=points, units=units)
        at_least(self, 2, steps=steps)
        at_least(self, 0, consolidator_decay=consolidator_decay)
        self.radius, self.points, self.steps = radius, points, steps
        self.consolidator_lr, self.consolidator_decay = consolidator_lr, consolidator_decay
        self.consolidator = Consolidator(units)

    def trainable(self) -> Iterable[nn.Parameter]:
        return self.network.parameters()

    def earlier_loss(self, theta: Tensor) -> Tensor:
        return self._earlier_losses(theta[None])[0]

    def _earlier_losses(self, theta: Tensor) -> Tensor:
        """lambda L_{t-1} of parameters ``(n, P)``, ``(n,)``."""
        known = self.consolidator.num_inputs
        prior = self.prior_precision / 2 * theta[:, known:].square().sum(dim=1)
        if not known:
            return prior
        earlier: Tensor = self.consolidator(theta) + prior
        return self.strength * earlier

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        theta, likelihood, batches = self.theta().detach(), Likelihood(self.network), list(self.task_batches())

        @torch.no_grad()
        def total(points: Tensor) -> Tensor:
            """lambda L_{t-1} + l_t of parameters ``(n, P)``, the same on every process."""
            sums = torch.zeros_like(points[:, 0])
            for inputs, labels in batches:
                if len(labels):
                    sums += vmap(lambda at, x=inputs, y=labels: likelihood(at, x, y))(points)
            return self._earlier_losses(points) + all_sum(sums)

        # The targets are made by a copy of kappa as it is before the fit.
        fitted = Consolidator(self.consolidator.units).to(theta.device)
        fitted.load_state_dict(self.consolidator.state_dict())
        fitted.grow(len(theta), mix(self.seed, _POINTS))
        self._fit(fitted.to(theta.device), total, theta)
        self.consolidator = fitted.requires_grad_(False)

    def _fit(self, fitted: Consolidator, total: Any, theta: Tensor) -> None:
        weights = [parameter.requires_grad_() for parameter in fitted.parameters()]
        optimizer = torch.optim.Adam(weights, lr=self.consolidator_lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.consolidator_lr, total_steps=self.steps, cycle_momentum=False
        )
        generator = torch.Generator().manual_seed(mix(self.seed, _POINTS, self.task.index))
        for _ in range(self.steps):
            points = points_in_ball(theta, self.radius, self.points, generator)
            targets = total(points)
            with torch.enable_grad():
                gradients = torch.autograd.grad(fit_loss(fitted, points, targets, self.consolidator_decay), weights)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()
