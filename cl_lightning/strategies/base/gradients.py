"""Gradients of several parameters as one vector, and the projection that removes the conflict of two gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def flat_gradient(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The gradients of the parameters as one vector ``(P,)``; 0 for a parameter without a gradient."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([part.flatten() for part in parts])


def set_gradient(parameters: Sequence[nn.Parameter], gradient: Tensor) -> None:
    """Write a vector ``(P,)``, in the order of :func:`flat_gradient`, into the gradients of the parameters."""
    for parameter, values in zip(parameters, torch.split(gradient, [p.numel() for p in parameters]), strict=True):
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.copy_(values.view_as(parameter))  # in place: with DDP it may be a view of a bucket


def without_conflict(gradient: Tensor, reference: Tensor) -> Tensor:
    """Remove the component of a gradient opposite to a reference gradient. Without a synchronisation.

        g - <g, r> / <r, r> r   if <g, r> < 0;   else g

    Along the result the loss with gradient r does not increase, to first order (A-GEM: Chaudhry et al., ICLR 2019,
    arXiv:1812.00420; gradient surgery: Yu et al., NeurIPS 2020, arXiv:2001.06782).

    Args:
        gradient: g, ``(P,)``.
        reference: r, ``(P,)``.

    Returns:
        ``(P,)``; g itself to the bit if there is no conflict.
    """
    product, square = torch.dot(gradient, reference), torch.dot(reference, reference)
    share = torch.where(product < 0, product / square, 0.0)
    return torch.addcmul(gradient, reference, share, value=-1)
