"""Collectives for one process and for several: with a single process each returns its input."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_alone = False


def is_distributed() -> bool:
    """Whether a process group with more than one process is initialised."""
    return not _alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def alone() -> Iterator[None]:
    """Let this process compute as the only one: nothing is exchanged with the other processes."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def leave() -> None:
    """Destroy the process group, if there is one: its threads may abort a process that exits."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over all processes, in place, without gradient; returns the same tensor. Every process must call it."""
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
    """Sum over all processes with gradient, for statistics in a loss.

    The backward pass sums the gradients of all processes, so every process must run both the forward and the backward
    pass. Distributed training averages gradients over processes; the result is then the gradient of the mean of their
    losses, as for one process with all rows.

    Args:
        tensor: Of the same shape and dtype on every process, such as the sum of this process's rows.

    Returns:
        The sum, the same on every process.
    """
    if not is_distributed():
        return tensor
    summed: Tensor = _SumOverProcesses.apply(tensor)  # type: ignore[no-untyped-call]
    return summed


def all_names(names: Iterable[str]) -> list[str]:
    """Union of the names of all processes, in the same order on each; synchronises with the device."""
    mine = list(names)
    gathered: list[list[str]] = [mine]
    if is_distributed():
        gathered *= world_size()
        dist.all_gather_object(gathered, mine)
    return list(dict.fromkeys(chain.from_iterable(gathered)))


def all_gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate the rows of all processes in the order of their ranks, without gradient.

    With 3 rows on rank 0 and 2 on rank 1, ``(3, d)`` and ``(2, d)``, each process gets ``(5, d)``.

    Args:
        tensor: ``(n, ...)`` with the same trailing shape and dtype on every process; ``n`` may differ, and may be 0.

    Returns:
        ``(sum of n, ...)``, the same on every process, without gradient.
    """
    return all_gather_together([tensor])[0]


def all_gather_together(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Apply :func:`all_gather_rows` to several tensors, with one exchange of the number of rows.

    Args:
        tensors: At least one tensor, all with the same number of rows on this process.

    Returns:
        The gathered tensors, in the same order.
    """
    if not is_distributed():
        return [tensor.detach() for tensor in tensors]
    return [torch.cat(parts) for parts in _gather_parts(tensors)]


def gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate the rows of all processes with gradient for this process's rows, for losses that compare rows.

    The gradient of these rows is multiplied by the number of processes. If each process computes the same loss of the
    gathered rows, the mean over processes, which distributed training takes, is the gradient of that loss. The backward
    pass needs no communication. Every process must call this.

    Args:
        tensor: ``(n, ...)``; ``n`` may differ between processes.

    Returns:
        ``(sum of n, ...)``, the same values on every process.
    """
    if not is_distributed():
        return tensor
    [parts] = _gather_parts([tensor])
    parts[rank()] = tensor.detach() + world_size() * (tensor - tensor.detach())
    return torch.cat(parts)


def _gather_parts(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """For each tensor, the rows of each process; all tensors have the same number of rows on this process."""
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
    """Euclidean norm of the rows of all processes, concatenated to one vector.

    The value is the same on every process. The gradient of this process's rows is multiplied by the number of
    processes, so that the mean over processes, which distributed training takes, is the gradient of the norm. The
    gradient at 0 is 0. Every process must call this.

    Args:
        rows: Rows of this process, ``(n, ...)``.

    Returns:
        Scalar.
    """
    square = rows.square().sum()
    norm = all_sum(square.detach().clone()).sqrt()
    slope = (world_size() / (2 * norm)).masked_fill(norm == 0, 0.0)
    return norm + slope * (square - square.detach())


def average_batch_statistics(module: nn.Module) -> None:
    """Average the running statistics of batch normalisation over processes, in place; every process must call it."""
    if not is_distributed():
        return
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            for statistic in (layer.running_mean, layer.running_var):
                assert statistic is not None
                # In float64, so that the statistics of a frozen layer, equal on all processes, do not change by a bit.
                statistic.copy_(all_sum(statistic.double()).div_(world_size()))
