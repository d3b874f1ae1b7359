"""STAR: replay at weights that are perturbed against the memory."""

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from cl_lightning.batch import Batch
from cl_lightning.callback import ContinualCallback
from cl_lightning.callbacks._memory import memory_of
from cl_lightning.checks import at_least, within
from cl_lightning.distributed import all_sum, world_size
from cl_lightning.losses import full_precision
from cl_lightning.models import Output
from cl_lightning.strategies.base import mean_gradient, output_at, relative_step, trained_weights
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy

_DRAW, _NOISE = 0x57A1, 0x57A2  # salts of the samples and of the direction from which the ascent starts


class STAR(ContinualCallback):
    """Keeps the predictions on a memory where the weights are changed in the worst direction.

    With R the samples of a draw from the memory that the network f of the weights theta predicts correctly, and p their
    predicted probabilities, a perturbation delta is found by a step of gradient ascent, and the term ``star`` is added
    to the loss of any strategy with a memory:

        L_star = lambda * mean_R KL( p || f_(theta + delta) ),    delta_w = gamma ||w|| g_w / ||g_w||

    with g_w the gradient of the same divergence with respect to the tensor w (Eskandar et al., ICLR 2025,
    arXiv:2503.01595). gamma -> length, lambda -> weight. p and delta are constants. Only tensors with two dimensions or
    more are perturbed, no biases and no weights of normalisation. With n steps each has the length gamma / n. With
    fewer than two correct samples, over all processes, the term is 0.

    At delta = 0 the divergence has its minimum and the gradient 0, so the ascent starts at a random point near by:
    Gaussian noise whose norm is ``noise * gamma ||w||``. In the authors' code the factor is 1e-20, which vanishes when
    it is added to a weight, so that rounding errors decide the direction.
    As in the authors' code, batch normalisation has the statistics of all drawn samples, not of the correct ones alone.
    Departs from it: the passes do not change its running statistics, and the noise is no part of delta. A batch with
    fewer samples than processes has no such term.

    Args:
        length: gamma, at least 0.
        weight: lambda, at least 0; with 0 no term is added.
        steps: Number of steps of ascent, at least 1.
        noise: Norm of the start relative to gamma ||w||, above 0.
        replay_size: Number of samples drawn per step, over all processes, at least 1; None for the size of the batch.
    """

    paper: str = "Eskandar et al., ICLR 2025, arXiv:2503.01595"
    uses_old_logits = True

    def __init__(
        self,
        *,
        length: float = 0.05,
        weight: float = 0.05,
        steps: int = 1,
        noise: float = 0.01,
        replay_size: int | None = None,
    ) -> None:
        at_least(self, 0, length=length, weight=weight)
        at_least(self, 1, steps=steps)
        at_least(self, 1, replay_size=replay_size, optional=True)
        within(self, "(0, inf)", noise=noise)
        self.length, self.weight, self.steps, self.noise = length, weight, steps, noise
        self.replay_size = replay_size

    def on_task_start(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        memory_of(self, strategy)

    def losses(self, strategy: Any, batch: Batch, output: Output) -> dict[str, Tensor]:
        memory, total = strategy.memory, batch.draw.total
        if self.weight == 0 or len(memory) == 0 or total < world_size():  # a process without samples is not called
            return {}
        drawn = strategy.data.augment(memory.sample(self.replay_size or total, batch.draw.fork(_DRAW)))
        network, images = strategy.network, drawn.images
        weights = {name: value for name, value in trained_weights(network).items() if value.dim() > 1}
        with torch.no_grad():
            log_p = full_precision(output_at(network, {}, images).logits).log_softmax(dim=1)
            right = log_p.argmax(dim=1) == drawn.labels
            count = all_sum(right.sum())
            rows = right * (count >= 2) * (world_size() / count.clamp(min=1))  # weights of the mean over all processes

        def divergence(change: dict[str, Tensor]) -> Tensor:
            moved = {name: value + change[name] for name, value in weights.items()}
            log_q = full_precision(output_at(network, moved, images).logits).log_softmax(dim=1)
            mean: Tensor = ((log_p.exp() * (log_p - log_q)).sum(dim=1) * rows).sum()
            return mean

        generator = batch.draw.fork(_NOISE).generator(images.device)
        random = {
            name: torch.randn(value.shape, generator=generator, device=images.device) for name, value in weights.items()
        }
        change = relative_step(weights, random, self.noise * self.length)
        delta = {name: torch.zeros_like(value) for name, value in weights.items()}
        for _ in range(self.steps):
            step = relative_step(weights, mean_gradient(divergence(change), weights), self.length / self.steps)
            change = delta = {name: delta[name] + step[name] for name in weights}
        return {"star": self.weight * divergence(delta) / batch.weight}
