"""Collectives that work alike on one process and on many."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_distributed() -> bool:
    """Whether a process group of more than one process is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def leave() -> None:
    """Leave the process group, if there is one: threads that still serve it may abort a process that ends."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over all processes, in place; the same tensor is returned."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_sum(tensor.clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return all_sum(gradients[0].clone(memory_format=torch.contiguous_format))


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum over all processes, for statistics that a loss depends on: all that went in takes gradient.

    The gradients of all processes are summed in the backward pass, which every one of them has to come by, too. With
    distributed training, which takes the mean over the processes, the result is the gradient of the mean of their
    losses, as where one process has all rows.
    """
    if not is_distributed():
        return tensor
    summed: Tensor = _SumOverProcesses.apply(tensor)  # type: ignore[no-untyped-call]
    return summed


def all_names(names: Iterable[str]) -> list[str]:
    """Names that any process has, each once, in an order that is the same everywhere; waits for the device."""
    mine = list(names)
    gathered: list[list[str]] = [mine]
    if is_distributed():
        gathered *= world_size()
        dist.all_gather_object(gathered, mine)
    return list(dict.fromkeys(chain.from_iterable(gathered)))


def all_gather_rows(tensor: Tensor) -> Tensor:
    """Rows of all processes in the order of their ranks.

    Args:
        tensor: ``(n, ...)`` with the same trailing shape and dtype on every process; ``n`` may differ, and may be 0.

    Returns:
        ``(sum of n, ...)``, the same on every process, without gradient.
    """
    return all_gather_together([tensor])[0]


def all_gather_together(tensors: Iterable[Tensor]) -> list[Tensor]:
    """As :func:`all_gather_rows` for tensors of as many rows each, whose number is asked for, and waited for, once."""
    if not is_distributed():
        return [tensor.detach() for tensor in tensors]
    return [torch.cat(parts) for parts in _gather_parts(tensors)]


def gather_rows(tensor: Tensor) -> Tensor:
    """As :func:`all_gather_rows`, for losses that compare rows with one another: this process's rows take gradient.

    It is the gradient of those rows times the number of processes. A loss of the gathered rows, the same on every
    process, so leads to the mean over the processes, which distributed training takes, that is the gradient of the
    loss. Nothing is exchanged in the backward pass.

    Args:
        tensor: ``(n, ...)``; call it on every process.

    Returns:
        ``(sum of n, ...)``, the same values on every process.
    """
    if not is_distributed():
        return tensor
    [parts] = _gather_parts([tensor])
    parts[rank()] = tensor.detach() + world_size() * (tensor - tensor.detach())
    return torch.cat(parts)


def _gather_parts(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The rows of each process, of each of the tensors; all of them have the same number of rows."""
    mine = [tensor.detach().contiguous() for tensor in tensors]
    counts = torch.zeros(world_size(), dtype=torch.int64, device=mine[0].device)
    counts[rank()] = mine[0].shape[0]
    sizes: list[int] = all_sum(counts).tolist()
    found = []
    for tensor in mine:
        padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        found.append([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])
    return found


def rows_norm(rows: Tensor) -> Tensor:
    """Euclidean norm of the rows of all processes, as one vector.

    The value is the same on every process. The gradient is that of this process's rows times the number of processes,
    so that the mean over the processes, which distributed training takes, is the gradient of the norm; at 0 it is 0.

    Args:
        rows: This process's, ``(n, ...)``; call it on every process.
    """
    square = rows.square().sum()
    norm = all_sum(square.detach().clone()).sqrt()
    slope = (world_size() / (2 * norm)).masked_fill(norm == 0, 0.0)
    return norm + slope * (square - square.detach())


def average_batch_statistics(module: nn.Module) -> None:
    """Average the running statistics of batch normalisation over the processes, in place."""
    if not is_distributed():
        return
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            for statistic in (layer.running_mean, layer.running_var):
                assert statistic is not None
                # In float64, so that those of a frozen layer, the same everywhere, stay what they are to the bit.
                statistic.copy_(all_sum(statistic.double()).div_(world_size()))
