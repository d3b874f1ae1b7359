"""Kalman filter for online classification of non-stationary data (Titsias et al., ICLR 2024, arXiv:2306.08448).

The weights w of a linear classifier on features phi drift, and are tracked by their posterior, with mean M ``(m, C)``
and one covariance A ``(m, m)`` for all classes. With a batch Phi ``(b, m)`` and its one-hot targets T,

    w_n ~ N(gamma w_{n-1}, (1 - gamma^2) sigma_w^2 I),   w_0 ~ N(0, sigma_w^2 I),   t = Phi w_n + N(0, sigma^2 I)
    predict: M^- = gamma M,   A^- = gamma^2 A + (1 - gamma^2) sigma_w^2 I
    update:  S = sigma^2 I + Phi A^- Phi^T,   K = A^- Phi^T S^-1,   M = M^- + K (T - Phi M^-),   A = A^- - K Phi A^-
    p(y | phi) = E softmax(c f)_y,   f_k ~ N(phi^T M^-_k, phi^T A^- phi),   independent for each class k

gamma = 1 is Bayesian linear regression on all samples so far, gamma = 0 forgets everything before each batch; the prior
variance stays sigma_w^2. sigma_w^2 -> prior_variance, sigma^2 -> noise_variance. One step of time is one batch. gamma,
the scale c and, unless it is frozen, the backbone are trained by L = -log p(y) of the batch before the update, with M
and A constant:

    gamma = exp(-softplus(u) / 2),   E by the mean of ``samples`` draws f_k = phi^T M^-_k + sqrt(phi^T A^- phi) eps_k

The likelihood is Gaussian in the update and categorical in L, as in the paper. Without a published value, the defaults
of prior_variance (1 / m), noise_variance, samples, scale and the learning rate of u and c are ours, and so is the form
of phi: features with the norm sqrt(d), followed by a 1.
Departs from the paper: log c is trained, so that c is positive; its form is not known. Predictions are the largest
mean, which is the most probable class for any c. Their scores are c f / sqrt(1 + pi c^2 v / 8) with the mean f and
the variance v (MacKay 1992), without draws. A sample is learnt in its first pass only: further passes have the loss
0.
After a step of the backbone, M and A refer to the features before it; the drift accounts for the change.
The prediction is of the next batch: with drift, classes that have not occurred for some time are improbable. Where all
classes of a class-incremental stream count in the same way, gamma = 1 with ``learn_gamma=False`` forgets none.
"""

import functools
import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.checks import above, at_least, within
from cl_lightning.losses import cross_entropy
from cl_lightning.models import recursive_ridge
from cl_lightning.strategies.online.streamed import StreamedHead
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Phase, PhaseOptions, Task, Traits

_DRAW = 0xCA1  # salt


def log_predictive(mean: Tensor, variance: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """Logarithm of the mean of softmax(c f) over draws of Gaussian logits f with a common variance.

    Args:
        mean: Means of the logits, ``(n, C)``.
        variance: Their variance, the same for all classes, above 0, ``(n,)``.
        scale: c, a scalar.
        noise: eps, standard normal numbers, ``(n, S, C)``.

    Returns:
        Log-probabilities ``(n, C)``.
    """
    logits = scale * (mean[:, None] + variance.sqrt()[:, None, None] * noise)  # (n, S, C)
    return torch.logsumexp(F.log_softmax(logits, dim=2), dim=1) - math.log(noise.shape[1])


class KalmanHead(StreamedHead):
    """Posterior of drifting weights of a linear classifier; the equations are in the docstring of the module.

    The blocks hold the mean M. A class that appears late starts at 0: its targets were 0 so far.

    Args:
        num_features: Size of a feature vector, d; m = d + 1.
        prior_variance: sigma_w^2, above 0; None for 1 / m.
        noise_variance: sigma^2, above 0.
        gamma: Initial gamma, in [0, 1]; above 0 and below 1 where it is learnt.
        learn_gamma: Whether u is a parameter.
        scale: Initial c, above 0.

    Attributes:
        covariance: A, float64 ``(m, m)``.
        u: Parameter, a scalar; None if gamma is not learnt.
        log_scale: Parameter log c, a scalar.

    Raises:
        ValueError: If an option is out of range.
    """

    covariance: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        prior_variance: float | None = None,
        noise_variance: float = 1.0,
        gamma: float = 0.9999,
        learn_gamma: bool = True,
        scale: float = 10.0,
    ) -> None:
        super().__init__(num_features)
        above(self, 0, prior_variance=prior_variance, optional=True)
        above(self, 0, noise_variance=noise_variance, scale=scale)
        within(self, "(0, 1)" if learn_gamma else "[0, 1]", gamma=gamma)
        self.prior_variance = 1 / self.num_inputs if prior_variance is None else prior_variance
        self.noise_variance, self._fixed = noise_variance, gamma
        self.u = nn.Parameter(torch.tensor(math.log(math.expm1(-2 * math.log(gamma))))) if learn_gamma else None
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.register_buffer("covariance", self.prior_variance * torch.eye(self.num_inputs, dtype=torch.float64))

    @property
    def num_inputs(self) -> int:
        return self.num_features + 1

    def expand(self, features: Tensor) -> Tensor:
        """phi, float64 ``(n, m)``: features ``(n, d)`` of norm sqrt(d), and a 1; features of 0 stay 0."""
        directions = math.sqrt(self.num_features) * F.normalize(features.double(), dim=1)
        return F.pad(directions, (0, 1), value=1.0)

    def gamma(self) -> Tensor:
        """gamma, a scalar, float64; with gradient if it is learnt."""
        if self.u is None:
            return self.covariance.new_full((), self._fixed)
        return (-F.softplus(self.u.double()) / 2).exp()

    def predicted(self) -> tuple[Tensor, Tensor]:
        """M^- ``(m, C)`` and A^- ``(m, m)`` of the next batch; with gradient for gamma if it is learnt."""
        gamma = self.gamma()
        prior = (1 - gamma.square()) * self.prior_variance
        identity = torch.eye(self.num_inputs, dtype=torch.float64, device=gamma.device)
        return gamma * self.weight().T, gamma.square() * self.covariance + prior * identity

    def logits_of(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Means ``(n, C)`` and common variances ``(n,)`` of f for features ``(n, d)`` of the next batch, float64."""
        mean, covariance = self.predicted()
        phi = self.expand(features)
        variance = ((phi @ covariance) * phi).sum(dim=1)
        return phi @ mean, variance.clamp(min=torch.finfo(variance.dtype).tiny)

    def linear(self, features: Tensor) -> Tensor:
        mean, variance = self.logits_of(features)
        scale = self.log_scale.double().exp()
        return scale * mean / (1 + math.pi / 8 * scale.square() * variance).sqrt()[:, None]

    @torch.no_grad()
    def learn(self, inputs: Tensor, labels: Tensor, known: Tensor) -> None:
        phi = self.expand(inputs) * known[:, None]  # a row of zeros changes nothing
        mean, covariance = self.predicted()
        targets = self.one_hot(labels) * known[:, None]
        posterior, mean = recursive_ridge(covariance / self.noise_variance, mean, phi, targets)
        self.covariance = self.noise_variance * posterior  # a new tensor: the loss of the step refers to the old one
        self._place(mean.T, None)

    def solution(self) -> tuple[Tensor, None]:
        return self.weight(), None


class KalmanClassifier(ContinualStrategy):
    """Recursive Bayesian classifier on features, whose weights drift at a rate that is learnt.

    Args:
        prior_variance: sigma_w^2, above 0; None for 1 / m, with which f has a variance of about 1 before any data.
        noise_variance: sigma^2, above 0.
        gamma: Initial gamma, in (0, 1), for a batch; with ``learn_gamma=False`` in [0, 1].
        learn_gamma: Whether gamma is trained.
        scale: Initial c, above 0.
        samples: S, draws for the loss of each sample, at least 1.
        dynamics_lr: Learning rate of u and of log c, at least 0.
        kwargs: Options of the base class: ``freeze_backbone`` for fixed features, ....
    """

    traits = Traits(
        family="online",
        paper="Titsias et al., ICLR 2024, arXiv:2306.08448",
        needs_pretrained=True,
        needs_empty_batches=True,
        losses_use_images=False,
        task_free=True,
    )

    def __init__(
        self,
        *,
        prior_variance: float | None = None,
        noise_variance: float = 1.0,
        gamma: float = 0.9999,
        learn_gamma: bool = True,
        scale: float = 10.0,
        samples: int = 64,
        dynamics_lr: float = 0.01,
        **kwargs: Any,
    ) -> None:
        head = functools.partial(
            KalmanHead,
            prior_variance=prior_variance,
            noise_variance=noise_variance,
            gamma=gamma,
            learn_gamma=learn_gamma,
            scale=scale,
        )
        head(1)  # so that an option out of range raises here, not when the network is built
        super().__init__(head=head, **kwargs)
        at_least(self, 1, samples=samples)
        at_least(self, 0, dynamics_lr=dynamics_lr)
        if self.loss_classes != "all":
            raise ValueError(
                f"KalmanClassifier: loss_classes is {self.loss_classes!r}, but the filter is of all classes; use 'all'"
            )
        self.samples, self.dynamics_lr = samples, dynamics_lr

    @property
    def filter(self) -> KalmanHead:
        """The head of the network."""
        return cast(KalmanHead, self.network.head)

    def phases(self, task: Task) -> list[Phase]:
        return [Phase("stream", PhaseOptions(epochs=1), unaugmented=True)]

    def parameter_groups(self, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        own = {id(parameter) for parameter in self.filter.parameters()}
        rest = [parameter for parameter in parameters if id(parameter) not in own]
        dynamics = [parameter for parameter in parameters if id(parameter) in own]
        groups: list[dict[str, Any]] = [{"params": rest}] if rest else []
        return [*groups, {"params": dynamics, "lr": self.dynamics_lr, "weight_decay": 0.0}]

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        head = self.filter
        with torch.autocast(self.device.type, enabled=False):
            mean, variance = head.logits_of(output.features)
            noise = batch.draw.fork(_DRAW).randn(self.samples, mean.shape[1], device=self.device).double()
            log_p = log_predictive(mean, variance, head.log_scale.double().exp(), noise)
            loss = cross_entropy(log_p, batch.labels)  # log_p is normalised
            if batch.first_pass:
                head.observe(output.features.detach(), batch.labels)
        return {"predictive": loss if batch.first_pass else 0.0 * loss}
