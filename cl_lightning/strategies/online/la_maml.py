"""Look-ahead MAML, La-MAML (Gupta et al., NeurIPS 2020, arXiv:2007.13904).

Each weight has a learning rate of its own, which grows where a step on the batch also lowers the loss on a memory, and
shrinks where it raises it. At each step the batch B is cut into k parts B_0 .. B_{k-1}, and R are samples drawn from
the memory. With theta_0 = theta the weights and alpha their rates,

    theta_{j+1} = theta_j - alpha * clip( grad l(theta_j; B_j) )                     inner steps
    M(theta, alpha) = 1/k sum_j l(theta_{j+1}; B u R)                                meta-loss, after each inner step
    alpha <- alpha - eta * grad_alpha M,     then     theta <- theta - max(0, alpha) * grad_theta M

with the mean cross-entropy l, and the products of weights by element. For one inner step grad_alpha M is
-grad l(theta_1; B u R) * grad l(theta_0; B). In first order (the default) the inner gradients are constants;
``second_order`` differentiates through them. clip bounds the elements of an inner gradient; the norms of grad_alpha M
and of grad_theta M, each over all weights, are bounded by the same number. alpha_0 -> initial_rate, eta -> rate_lr,
k -> parts. With ``sync`` the weights move by the optimizer with the gradient grad_theta M, and alpha is used in the
inner steps alone (Sync-La-MAML); with ``rate_lr=0`` too, alpha does not change (C-MAML). The "glances" of the paper are
the ``passes`` of the scenario ``Online`` over each batch, its task ids are ``loss_classes="task"``; without them the
method is task-free.
Departs from the authors' code: R is drawn from the samples of the stream so far, there from those of earlier tasks; the
passes over a batch do not shuffle it again. The code of their MNIST experiments has max(0, alpha) in the inner steps
too, with which a negative rate cannot grow again, and does not clip there.

Without ``sync`` the step reaches the optimizer as the gradient max(0, alpha) grad_theta M / lr: plain SGD then takes
it; momentum and weight decay, which would be added, are refused. An ordinary pass over batch and memory updates the
running statistics of batch normalisation, and its cross-entropy is logged; the passes at other weights do not change
the statistics.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from cl_lightning.checks import above, at_least
from cl_lightning.distributed import all_sum, sum_over_processes, world_size
from cl_lightning.memory import NamedBuffers
from cl_lightning.strategies.base import (
    check_loss_classes,
    output_at,
    require_plain_sgd,
    sum_of_zeros,
    trained_weights,
)
from cl_lightning.strategy import Batch, Replay, Traits

Tensors = dict[str, Tensor]


class LearningRates(NamedBuffers):
    """A learning rate for each weight, the same on every process.

    Args:
        initial: Rate of new weights.
    """

    kept_as: ClassVar[str] = "learning rates"
    initial: Tensor

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.register_buffer("initial", torch.tensor(float(initial)))

    def of(self, weights: Tensors) -> Tensors:
        """Rates of the weights, by name; weights that are new get the initial rate."""
        known = self._get("rate")
        for name, value in weights.items():  # in the order of the weights: DDP matches buffers by their order
            if name not in known:
                self._set("rate", name, torch.ones_like(value) * self.initial)
        known = self._get("rate")
        return {name: known[name] for name in weights}


def clip_norm(gradients: list[Tensor], bound: float | None) -> list[Tensor]:
    """Scale gradients so that their common Euclidean norm is at most ``bound``; None for no bound."""
    if bound is None:
        return gradients
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    return list(torch._foreach_mul(gradients, (bound / norm.clamp(min=1e-12)).clamp(max=1)))


class LaMAML(Replay):
    """Steps with a learning rate per weight, learnt by the loss on batch and memory after steps on the batch.

    Args:
        initial_rate: alpha_0, at least 0.
        rate_lr: eta, at least 0.
        parts: k, at least 1; at most one part per sample of the batch is used.
        second_order: Whether to differentiate through the inner gradients.
        sync: Whether the optimizer moves the weights by its own learning rate.
        clip: Bound of the elements of inner gradients and of the norms of the meta-gradients, above 0; None for none.
        optimizer: SGD without momentum and weight decay, unless ``sync``; None for a learning rate of 0.1.
        kwargs: Options of ``Replay``.
    """

    traits = Traits(
        family="online", paper="Gupta et al., NeurIPS 2020, arXiv:2007.13904", keeps_exemplars=True, task_free=True
    )

    def __init__(
        self,
        *,
        initial_rate: float = 0.15,
        rate_lr: float = 0.3,
        parts: int = 5,
        second_order: bool = False,
        sync: bool = False,
        clip: float | None = 2.0,
        optimizer: OptimizerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer or _plain_sgd, **kwargs)
        check_loss_classes(self)
        at_least(self, 0, initial_rate=initial_rate, rate_lr=rate_lr)
        at_least(self, 1, parts=parts)
        above(self, 0, clip=clip, optional=True)
        self.rate_lr, self.parts, self.second_order, self.sync, self.clip = rate_lr, parts, second_order, sync, clip
        self.rates = LearningRates(initial_rate)
        self._joint: Batch | None = None

    def configure_optimizers(self) -> OptimizerLRScheduler:
        made = super().configure_optimizers()
        if not self.sync:
            require_plain_sgd(self, made, "which changes the step that each weight takes")
        return made

    def prepare_batch(self, batch: Batch) -> Batch:
        self._joint = super().prepare_batch(batch)
        return self._joint

    def edit_gradients(self, batch: Batch) -> None:
        parameters = trained_weights(self.network)
        rates = self.rates.of({name: value.detach() for name, value in parameters.items()})
        slopes, steps = self.meta_gradients(batch, parameters, rates)
        for name, slope in slopes.items():
            rates[name].sub_(slope, alpha=self.rate_lr)
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        if lr == 0:
            return
        for name, value in parameters.items():
            if value.grad is None:
                value.grad = torch.empty_like(value)
            value.grad.copy_(steps[name] if self.sync else rates[name].relu() * steps[name] / lr)

    @torch.enable_grad()
    def meta_gradients(self, batch: Batch, parameters: Any, rates: Tensors) -> tuple[Tensors, Tensors]:
        """Gradients of the meta-loss with respect to the rates and to the weights, the same on every process.

        Args:
            batch: This process's rows of the batch.
            parameters: theta by name.
            rates: alpha by name.
        """
        weights: Tensors = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        alpha: Tensors = {name: value.detach().requires_grad_() for name, value in rates.items()}
        moved, losses = weights, []
        assert self._joint is not None
        for part, weight in self.cut(batch):
            gradients = self.inner_gradient(moved, part, weight)
            moved = {name: value - alpha[name] * gradients[name] for name, value in moved.items()}
            losses.append(self.loss_at(moved, self._joint) * self._joint.weight)
        found = torch.autograd.grad(torch.stack(losses).mean(), [*alpha.values(), *weights.values()])
        flat = all_sum(torch.cat([gradient.flatten() for gradient in found])) / world_size()
        split = torch.split(flat, [gradient.numel() for gradient in found])
        shaped = [part.view_as(gradient) for part, gradient in zip(split, found, strict=True)]
        both = (clip_norm(half, self.clip) for half in (shaped[: len(alpha)], shaped[len(alpha) :]))
        slopes, steps = (dict(zip(weights, half, strict=True)) for half in both)
        return slopes, steps

    def cut(self, batch: Batch) -> Iterator[tuple[Batch, float]]:
        """Parts of the batch of all processes: the rows of this process, and the weight of their mean."""
        total, start = batch.draw.total, batch.draw.start
        count = min(self.parts, total)
        bounds = [total * part // count for part in range(count + 1)]
        for low, high in pairwise(bounds):
            rows = batch.select(slice(max(low - start, 0), max(high - start, 0)))
            yield rows, world_size() * len(rows) / (high - low)

    def inner_gradient(self, weights: Tensors, samples: Batch, weight: float) -> Tensors:
        """Gradient of the mean loss on the samples of all processes, its elements clipped.

        In second order it has a graph, also on a process without samples: the exchange of its backward pass needs all.
        """
        if len(samples):
            loss = self.loss_at(weights, samples) * weight
            found = torch.autograd.grad(
                loss, list(weights.values()), create_graph=self.second_order, allow_unused=True, materialize_grads=True
            )
        else:
            found = tuple(value * 0.0 for value in weights.values())
        flat = torch.cat([gradient.flatten() for gradient in found])
        if not self.second_order:
            flat = flat.detach()
        flat = sum_over_processes(flat) / world_size()
        if self.clip is not None:
            flat = flat.clamp(-self.clip, self.clip)
        parts = torch.split(flat, [value.numel() for value in weights.values()])
        return {name: part.view_as(value) for (name, value), part in zip(weights.items(), parts, strict=True)}

    def loss_at(self, weights: Tensors, samples: Batch) -> Tensor:
        """Mean cross-entropy of samples at other weights; 0, with a graph, without samples."""
        if not len(samples):
            return sum_of_zeros(weights.values())
        with self.trainer.precision_plugin.forward_context():
            return self.classification_loss(output_at(self.network, weights, samples.images), samples)


def _plain_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)
