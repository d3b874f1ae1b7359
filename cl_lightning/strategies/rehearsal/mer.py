"""Meta-Experience Replay, MER (Riemer et al., ICLR 2019, arXiv:1810.11910).

Reptile inside replay: gradients of samples are aligned by taking steps on them one after another, and moving only a
part of the way. For a batch B of the stream, with theta the weights at its arrival,

    for each of s lists:   w = theta;  one step of plain SGD on each of R samples of the memory, then on each of B
                           theta <- w + beta (theta - w)
    then                   theta <- theta_0 + gamma (theta - theta_0),     theta_0 the weights before the first list

beta -> within_rate, gamma -> across_rate, s -> lists, the number of samples R -> replay_size. Batches of one sample are
the algorithm 1 of the paper. ``per_sample=False`` takes one step on the mean over each list, R and B together
(algorithm 6), which networks with batch normalisation need.

The steps are virtual: their result is given to the optimizer as the gradient (theta_0 - theta) / lr. Plain SGD then
arrives at theta; momentum and weight decay, which would be added to it, are refused. A last ordinary pass over batch
and memory updates the running statistics of batch normalisation, and its cross-entropy is logged.
"""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from cl_lightning.batch import join
from cl_lightning.checks import above, at_least, within
from cl_lightning.distributed import world_size
from cl_lightning.strategies.base import (
    check_loss_classes,
    mean_gradient,
    output_at,
    require_plain_sgd,
    trained_weights,
    virtual_step,
)
from cl_lightning.strategy import Batch, Replay, Traits

_LIST = 0x3E2  # salt of the draws from the memory


class MER(Replay):
    """Steps on samples of a memory and of the batch one after another, of which Reptile takes a part.

    Args:
        within_rate: beta, in [0, 1]: part of the way of a list.
        across_rate: gamma, in [0, 1]: part of the way of all lists of a batch.
        lists: s, number of lists, at least 1.
        inner_lr: Learning rate of the steps, above 0; None for the present one of the optimizer.
        per_sample: Whether there is a step for each sample of a list, or one for its mean.
        optimizer: SGD without momentum and weight decay; None for a learning rate of 0.1.
        kwargs: Options of ``Replay``.
    """

    traits = Traits(family="rehearsal", paper="Riemer et al., ICLR 2019, arXiv:1810.11910", keeps_exemplars=True)

    def __init__(
        self,
        *,
        within_rate: float = 0.3,
        across_rate: float = 0.3,
        lists: int = 1,
        inner_lr: float | None = None,
        per_sample: bool = True,
        optimizer: OptimizerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer=optimizer or _plain_sgd, **kwargs)
        check_loss_classes(self)
        within(self, "[0, 1]", within_rate=within_rate, across_rate=across_rate)
        at_least(self, 1, lists=lists)
        above(self, 0, inner_lr=inner_lr, optional=True)
        self.within_rate, self.across_rate, self.lists = within_rate, across_rate, lists
        self.inner_lr, self.per_sample = inner_lr, per_sample

    def configure_optimizers(self) -> OptimizerLRScheduler:
        made = super().configure_optimizers()
        require_plain_sgd(self, made, "which moves the weights under Reptile")
        return made

    def edit_gradients(self, batch: Batch) -> None:
        parameters = trained_weights(self.network)
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        if lr == 0:
            return
        start: dict[str, Tensor] = {name: value.detach() for name, value in parameters.items()}
        weights = start
        for index in range(self.lists):
            before = weights
            for step in self.steps(batch, index):
                weights = self.descend(weights, *step, self.inner_lr or lr)
            weights = _between(before, weights, self.within_rate)
        weights = _between(start, weights, self.across_rate)
        for name, value in parameters.items():
            if value.grad is None:
                value.grad = torch.empty_like(value)
            value.grad.copy_((start[name] - weights[name]) / lr)

    def steps(self, batch: Batch, index: int) -> Iterator[tuple[Batch, float]]:
        """Samples of each step of a list that this process has, and the weight of their mean."""
        replay = self.replay(batch, _LIST, index)
        if not self.per_sample:
            joint = join({"replay": replay, "stream": batch})
            yield joint, joint.weight
            return
        for part in (batch,) if replay is None else (replay, batch):
            for row in range(part.draw.total):
                here = row - part.draw.start
                yield part.select(slice(max(here, 0), max(here + 1, 0))), float(world_size())

    def descend(self, weights: dict[str, Tensor], samples: Batch, weight: float, lr: float) -> dict[str, Tensor]:
        """Weights after a step on the mean cross-entropy of the samples of all processes."""
        free = {name: value.requires_grad_() for name, value in weights.items()}
        loss = None
        if len(samples):
            with torch.enable_grad(), self.trainer.precision_plugin.forward_context():
                loss = self.classification_loss(output_at(self.network, free, samples.images), samples)
        with torch.no_grad():
            return virtual_step(free, mean_gradient(loss, free, weight), lr)


@torch.no_grad()
def _between(first: dict[str, Tensor], last: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    return {name: value + share * (last[name] - value) for name, value in first.items()}


def _plain_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)
