"""IBCL: Imprecise Bayesian Continual Learning (Lu, Caprio, Eaton & Lee, arXiv:2305.14782).

A small classifier on the features of a frozen network has E mean-field Gaussian posteriors q_ij over its weights theta
for each task i, the extremes j of a convex set of posteriors. In task i, independently for each j,

    L = E_{theta ~ q} [ CE(f_theta(x), y) ] + 1/n KL( q || prior_j ),   q from mu = 0 and sigma = 1
    prior_j = q_{i-1,j},  N(0, s_j^2) in the first task

with one theta per step and n samples in the task. A posterior is left out of the memory where one in it is near,

    min_k  ( ||mu_ij - mu_k|| + ||sigma_ij - sigma_k|| ) / P <= threshold,   P weights

and the nearest one takes its place, also as the next prior. No training gives a model for a preference w over the tasks
(w_i >= 0, sum 1), a point of the convex hull of the posteriors:

    q_w = N( sum_ij w_i/E mu_ij, (sum_ij w_i/E sigma_ij)^2 )
    each weight in the central interval of q_w that has the mass alpha; models are drawn uniformly from this box

s_j -> prior_scales. :meth:`IBCL.models` returns models for any preference; :meth:`prefer` makes predictions use one. By
default a test image of task i is predicted by the preference for i alone: the mean of the probabilities of
``num_models`` models. Output m of the classifier is the m-th class of the task, so that all tasks share the outputs and
have at most as many classes as the first one.
Departs from the paper: tasks may have more than two classes, with a softmax; the mean over models is ours, the paper
reports their mean and best accuracy. Combined are standard deviations, as in the released code; a mixture of the
posteriors would be another distribution. Tensors of a model are drawn from the box weight by weight; ``released=True``
draws one number for each tensor, as the released code does.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Batch, Draw
from cl_lightning.checks import above, at_least, within
from cl_lightning.losses import cross_entropy
from cl_lightning.memory import restore_shapes
from cl_lightning.models import Head
from cl_lightning.strategies.base import BY_TASK, TaskIncremental
from cl_lightning.strategy import Output, Task, Traits

_WEIGHTS, _MODELS = 0x1BC1, 0x1BC2  # salts


def gaussian_kl(mu: Tensor, log_sigma: Tensor, prior_mu: Tensor, prior_sigma: Tensor) -> Tensor:
    """``KL( N(mu, sigma^2) || N(prior_mu, prior_sigma^2) )`` of independent variables, in nats, summed over the last
    dimension."""
    ratio = log_sigma - prior_sigma.log()
    gap = (mu - prior_mu) / prior_sigma
    return 0.5 * ((2 * ratio).exp() + gap.square() - 1 - 2 * ratio).sum(dim=-1)


def density_box(mu: Tensor, sigma: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Bounds of the central intervals of mass ``alpha`` of independent Gaussians."""
    reach = math.sqrt(2) * float(torch.erfinv(torch.tensor(alpha, dtype=torch.float64))) * sigma
    return mu - reach, mu + reach


class PosteriorHead(Head):
    """A classifier whose weights are Gaussian, with a posterior for each task and extreme.

    Args:
        num_features: Size of a feature vector, d.
        hidden: Sizes of hidden layers, which are followed by a ReLU.
        extremes: E, number of posteriors of a task.

    Attributes:
        mu, log_sigma: The posteriors that are trained, ``(E, P)``.
        means, sigmas: The posteriors in memory, ``(K, P)``.
        used: Posterior in memory of each task and extreme, int64 ``(tasks, E)``.
        position: Output of a class in a task, int64 ``(tasks, columns)``; -1 where the task does not have it.
    """

    means: Tensor
    sigmas: Tensor
    used: Tensor
    position: Tensor

    def __init__(self, num_features: int, *, hidden: Sequence[int], extremes: int) -> None:
        super().__init__(num_features)
        self.hidden, self.extremes = tuple(hidden), extremes
        self.mu, self.log_sigma = (nn.Parameter(torch.zeros(extremes, 0)) for _ in range(2))
        self.register_buffer("means", torch.zeros(0, 0))
        self.register_buffer("sigmas", torch.zeros(0, 0))
        self.register_buffer("used", torch.zeros(0, extremes, dtype=torch.int64))
        self.register_buffer("position", torch.zeros(0, 0, dtype=torch.int64))

    @property
    def num_columns(self) -> int:
        return self.position.shape[1]

    @property
    def outputs(self) -> int:
        """Number of outputs of the classifier."""
        last = (self.num_features, *self.hidden)[-1]
        before = sum((inputs + 1) * outputs for inputs, outputs in pairwise((self.num_features, *self.hidden)))
        return (self.mu.shape[1] - before) // (last + 1)

    def shapes(self, outputs: int) -> list[tuple[int, ...]]:
        """Shapes of the tensors of a classifier in the order of its weights: W and b of each layer."""
        sizes = pairwise((self.num_features, *self.hidden, outputs))
        return [shape for inputs, units in sizes for shape in ((units, inputs), (units,))]

    def begin(self, columns: Sequence[int], num_seen: int) -> None:
        """Add a task with these columns; the posteriors that are trained begin again with mu = 0 and sigma = 1.

        Raises:
            ValueError: If the task has more classes than the first one.
        """
        if not self.mu.shape[1]:
            size = sum(math.prod(shape) for shape in self.shapes(len(columns)))
            self.mu, self.log_sigma = (nn.Parameter(self.mu.new_zeros(self.extremes, size)) for _ in range(2))
            self.means, self.sigmas = self.means.new_zeros(0, size), self.sigmas.new_zeros(0, size)
        if len(columns) > self.outputs:
            raise ValueError(
                f"IBCL: a task has {len(columns)} classes and the first one {self.outputs}, but all tasks share the "
                "outputs; order the tasks so that the first one is the largest"
            )
        with torch.no_grad():
            self.mu.zero_()
            self.log_sigma.zero_()
        position = F.pad(self.position, (0, num_seen - self.num_columns), value=-1)
        own = position.new_full((1, num_seen), -1)
        own[0, list(columns)] = torch.arange(len(columns), device=own.device)
        self.position = torch.cat([position, own])

    def outputs_of(self, features: Tensor, weights: Tensor) -> Tensor:
        """Outputs ``(M, B, outputs)`` of M classifiers with the weights ``(M, P)``, of features ``(B, d)``."""
        shapes = self.shapes(self.outputs)
        parts = torch.split(weights, [math.prod(shape) for shape in shapes], dim=1)
        values = features.expand(len(weights), -1, -1)
        for number in range(0, len(shapes), 2):
            weight, bias = parts[number].view(-1, *shapes[number]), parts[number + 1]
            values = torch.baddbmm(bias[:, None], values.relu() if number else values, weight.mT)
        return values

    def in_columns(self, outputs: Tensor, task: int) -> Tensor:
        """Outputs ``(..., outputs)`` as columns ``(..., columns)``; -inf for the classes that a task does not have."""
        position = self.position[task]
        chosen = outputs[..., position.clamp(min=0)]
        return chosen.masked_fill(position < 0, -torch.inf)

    def forward(self, features: Tensor) -> Tensor:
        """Logits by the mean weights of the posteriors that are trained, in the columns of the newest task."""
        if not len(self.position):
            return features.new_zeros(len(features), 0)
        mean = self.mu.mean(dim=0, keepdim=True).to(features.dtype)
        return self.in_columns(self.outputs_of(features, mean)[0], -1)

    @torch.no_grad()
    def keep(self, threshold: float) -> None:
        """Store the posteriors that are trained; the nearest one in memory replaces one at most ``threshold`` away."""
        chosen = []
        for mu, sigma in zip(self.mu, self.log_sigma.exp(), strict=True):
            gaps = ((self.means - mu).norm(dim=1) + (self.sigmas - sigma).norm(dim=1)) / len(mu)
            if len(gaps) and float(gaps.min()) <= threshold:
                chosen.append(int(gaps.argmin()))
            else:
                chosen.append(len(gaps))
                self.means, self.sigmas = torch.cat([self.means, mu[None]]), torch.cat([self.sigmas, sigma[None]])
        self.used = torch.cat([self.used, self.used.new_tensor([chosen])])

    def combined(self, preference: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each weight in q_w, ``(P,)`` each, of a preference ``(tasks,)``."""
        shares = preference.to(self.means) / self.extremes
        mean, sigma = (torch.einsum("i,ijp->p", shares, rows[self.used]) for rows in (self.means, self.sigmas))
        return mean, sigma

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        restore_shapes(self, state_dict, prefix, ("means", "sigmas", "used", "position"))
        if (saved := state_dict.get(f"{prefix}mu")) is not None and saved.shape != self.mu.shape:
            self.mu, self.log_sigma = (nn.Parameter(self.mu.new_zeros(saved.shape)) for _ in range(2))
        super()._load_from_state_dict(state_dict, prefix, *args)


class IBCL(TaskIncremental):
    """Gaussian posteriors of a small classifier for each task; any preference over the tasks gives models untrained.

    Args:
        prior_scales: s_j, standard deviations of the first priors, above 0; one extreme for each.
        hidden: Sizes of the hidden layers of the classifier.
        threshold: Distance up to which a posterior in memory takes the place of a new one, at least 0.
        alpha: Mass of the interval of each weight, in [0, 1).
        num_models: Number of models whose probabilities are averaged, at least 1.
        released: Whether one number is drawn for each tensor of a model instead of each weight.
        optimizer: Builds the optimizer; None for Adam with learning rate 0.001.
        kwargs: Options of the base class, without ``head`` and ``freeze_backbone``.

    Attributes:
        preference: Preference of all predictions, ``(tasks,)``, or None for the task of each image alone.
    """

    traits = Traits(
        family="exemplar-free",
        paper="Lu et al., arXiv:2305.14782",
        needs_pretrained=True,
        task_ids="needed",
        scenarios=BY_TASK,
        losses_use_images=False,
    )

    def __init__(
        self,
        *,
        prior_scales: Sequence[float] = (0.2, 0.25, 0.3),
        hidden: Sequence[int] = (),
        threshold: float = 0.01,
        alpha: float = 0.01,
        num_models: int = 10,
        released: bool = False,
        optimizer: OptimizerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        scales = tuple(prior_scales)
        head = functools.partial(PosteriorHead, hidden=hidden, extremes=len(scales))
        adam = functools.partial(torch.optim.Adam, lr=1e-3)
        super().__init__(head=head, freeze_backbone=True, optimizer=optimizer or adam, **kwargs)
        for scale in scales or (None,):
            above(self, 0, prior_scales=scale)
        for units in hidden:
            at_least(self, 1, hidden=units)
        at_least(self, 0, threshold=threshold)
        within(self, "[0, 1)", alpha=alpha)
        at_least(self, 1, num_models=num_models)
        self.prior_scales, self.threshold, self.alpha = scales, threshold, alpha
        self.num_models, self.released = num_models, released
        self.preference: Tensor | None = None
        self._count = 1

    @property
    def posteriors(self) -> PosteriorHead:
        """The head."""
        head = self.network.head
        assert isinstance(head, PosteriorHead)
        return head

    def begin_task(self, task: Task) -> None:
        self.posteriors.begin(task.columns, task.num_seen)

    def trainable(self) -> Iterator[nn.Parameter]:
        yield from self.posteriors.parameters()

    def on_train_start(self) -> None:
        super().on_train_start()
        self._count = max(1, int((self.data.labels() >= 0).sum()))

    def prior(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the priors of the task, ``(E, P)`` each."""
        head = self.posteriors
        if self.task.is_first:
            scales = head.mu.new_tensor(self.prior_scales)[:, None].expand_as(head.mu)
            return torch.zeros_like(scales), scales
        last = head.used[self.task.index - 1]
        return head.means[last], head.sigmas[last]

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        head = self.posteriors
        draw = Draw.of(head.extremes, batch.draw.key, _WEIGHTS)
        noise = draw.randn(head.mu.shape[1], device=head.mu.device)
        weights = head.mu + head.log_sigma.exp() * noise
        logits = head.in_columns(head.outputs_of(output.features, weights), self.task.index)
        of_batch = self.data.weights_of(batch)
        fits = [cross_entropy(rows, batch.labels, weights=of_batch) for rows in logits]
        # A sum over the extremes, so that each of them is trained as if it were alone.
        kl = gaussian_kl(head.mu, head.log_sigma, *self.prior()).sum() / self._count
        return {"ce": torch.stack(fits).sum(), "kl": kl}

    def end_task(self, task: Task) -> None:
        self.posteriors.keep(self.threshold)
        super().end_task(task)

    def models(self, preference: Sequence[float] | Tensor, *, count: int | None = None) -> Tensor:
        """Weights of models for a preference, ``(count, P)``, drawn by the seed of the run; no training.

        Args:
            preference: w, at least 0 for each task that has ended; it is divided by its sum.
            count: Number of models; None for ``num_models``.

        Raises:
            ValueError: If there is not one number per task, a number is negative, or all are 0.
        """
        head = self.posteriors
        w = torch.as_tensor(preference, dtype=torch.float64)
        if w.shape != head.used.shape[:1] or bool((w < 0).any()) or not bool(w.sum() > 0):
            raise ValueError(
                f"IBCL: preference is {w.tolist()}; give {len(head.used)} numbers of at least 0, not all 0"
            )
        low, high = density_box(*head.combined(w / w.sum()), self.alpha)
        draw = Draw.of(self.num_models if count is None else count, self.seed, _MODELS)
        if self.released:
            sizes = torch.tensor([math.prod(shape) for shape in head.shapes(head.outputs)])
            places = torch.rand(0) if not len(sizes) else draw.rand(len(sizes)).repeat_interleave(sizes, dim=1)
        else:
            places = draw.rand(len(low))
        return low + places.to(low) * (high - low)

    def bytes_kept(self) -> dict[str, int]:
        kept, head = super().bytes_kept(), self.posteriors
        return {**kept, "posteriors": head.means.nbytes + head.sigmas.nbytes}

    def prefer(self, preference: Sequence[float] | None) -> None:
        """Predict with models for a preference from now on; None for the preference for the task of each image."""
        self.preference = None if preference is None else torch.as_tensor(preference, dtype=torch.float64)

    def predict_task(self, images: Tensor, task: int) -> Tensor:
        head = self.posteriors
        if task >= len(head.used):  # in training
            return head.classify(self.network.backbone(images))
        chosen = self.preference
        if chosen is None:
            chosen = F.one_hot(torch.tensor(task), len(head.used)).double()
        features = self.network.backbone(images)
        with torch.autocast(features.device.type, enabled=False):
            outputs = head.outputs_of(features.float(), self.models(chosen).float())
            log_p = head.in_columns(outputs, task).log_softmax(dim=2)
        return log_p.logsumexp(dim=0) - math.log(len(log_p))
