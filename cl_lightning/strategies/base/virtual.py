"""Outputs of a network at weights that are not written into it: virtual steps, and perturbations of the weights.

    theta' = theta - lr * grad L(theta),    f_theta'(x)

The network and its gradients stay as they are, so that nothing has to be restored. With theta' = theta + delta and a
constant delta, the gradient of a loss at theta' is the gradient with respect to the parameters of the network: a term
of the loss may use ``output_at(network, theta', x)``.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cl_lightning.batch import Batch
from cl_lightning.distributed import all_sum, is_distributed, world_size
from cl_lightning.models import Output, uncompiled

Weights = Mapping[str, Tensor]
"""Weights, gradients or directions by the names of the parameters of a network."""


def trained_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a network that require a gradient, by name."""
    return {name: value for name, value in network.named_parameters() if value.requires_grad}


def output_at(network: nn.Module, weights: Weights, images: Tensor, *, update_statistics: bool = False) -> Output:
    """Output of the network at other weights, in its present mode (training or evaluation).

    In training mode batch normalisation takes the statistics of the batch. Under ``16-mixed`` the pass is in single
    precision, since half precision would need a loss scale of its own.

    Args:
        network: Network; its weights do not change.
        weights: Values of some or all parameters by name.
        images: Finished images, ``(B, C, H, W)``.
        update_statistics: Whether the pass changes the running statistics of batch normalisation, in training mode.
    """
    buffers = {} if update_statistics else {name: value.clone() for name, value in network.named_buffers()}
    with uncompiled(network), no_half_precision(images.device):
        output: Output = functional_call(network, {**buffers, **weights}, (images,))
    return output


def mean_gradient(
    loss: Tensor | None, weights: Weights, weight: float = 1.0, *, retain_graph: bool = False
) -> dict[str, Tensor]:
    """Gradient of the mean loss over the samples of all processes, the same on every process.

    The gradients of the parameters (``.grad``) do not change. Every process must call this, with the same weights.

    Args:
        loss: Mean over the samples of this process, a scalar with a graph; None if this process has no samples.
        weights: Weights with respect to which the gradient is taken, by name.
        weight: Weight of the mean of this process, ``Batch.weight`` of its samples.
        retain_graph: Whether further gradients of the loss are computed after this one.

    Returns:
        Gradients by name, without a graph; 0 for weights on which the loss does not depend.
    """
    values = list(weights.values())
    if loss is None:
        found = [torch.zeros_like(value) for value in values]
    else:
        factor = torch.full_like(loss, weight)
        options = {"retain_graph": retain_graph, "allow_unused": True, "materialize_grads": True}
        found = list(torch.autograd.grad(loss, values, factor, **options))  # type: ignore[arg-type]
    if is_distributed() and values:
        flat = all_sum(torch.cat([gradient.flatten() for gradient in found])) / world_size()
        parts = torch.split(flat, [value.numel() for value in values])
        found = [part.view_as(value) for part, value in zip(parts, values, strict=True)]
    return dict(zip(weights, found, strict=True))


def virtual_step(weights: Weights, gradient: Weights, lr: float) -> dict[str, Tensor]:
    """Weights after a step of plain gradient descent, ``w - lr g``, without momentum and weight decay.

    Args:
        weights: w by name.
        gradient: g by name; a constant, so that the result has the gradient 1 with respect to w.
        lr: Learning rate; a negative one is a step of ascent.
    """
    return {name: value - lr * gradient[name].detach() for name, value in weights.items()}


def step_on(strategy: Any, batch: Batch, lr: float | None = None) -> dict[str, Tensor]:
    """Weights of the network after a virtual step on the classification loss of a batch, the same on every process.

    In training mode the loss takes the statistics of the batch. Every process must call this.

    Args:
        strategy: Strategy; its network does not change.
        batch: This process's rows of the batch, with finished images.
        lr: Learning rate; None for the present one of the optimizer.
    """
    weights, loss = trained_weights(strategy.network), None
    if len(batch):
        loss = strategy.classification_loss(output_at(strategy.network, weights, batch.images), batch)
    gradient = mean_gradient(loss, weights, batch.weight)
    return virtual_step(weights, gradient, strategy.trainer.optimizers[0].param_groups[0]["lr"] if lr is None else lr)


@torch.no_grad()
def relative_step(weights: Weights, direction: Weights, length: float) -> dict[str, Tensor]:
    """A change of each tensor w along a direction d by a share of its own norm, ``length ||w|| d / ||d||``.

    Args:
        weights: w by name.
        direction: d by name.
        length: Length relative to ||w||; negative to go against d.

    Returns:
        Changes by name of ``weights``; 0 where d or w is 0.
    """
    names = list(weights)
    sizes = torch._foreach_norm([weights[name] for name in names])
    lengths = torch._foreach_norm([direction[name] for name in names])
    factors = [(length * size / norm).masked_fill(norm == 0, 0.0) for size, norm in zip(sizes, lengths, strict=True)]
    return {name: direction[name] * factor for name, factor in zip(names, factors, strict=True)}


def no_half_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast to float16 is disabled, for gradients without a loss scale; bfloat16 stays."""
    half = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
    return torch.autocast(device.type, enabled=False) if half else nullcontext()
