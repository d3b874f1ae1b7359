"""Collectives that work alike on one process and on many."""

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether a process group of more than one process is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over all processes, in place; the same tensor is returned."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def all_gather_rows(tensor: Tensor) -> Tensor:
    """Rows of all processes in the order of their ranks.

    Args:
        tensor: ``(n, ...)`` with the same trailing shape and dtype on every process; ``n`` may differ, and may be 0.

    Returns:
        ``(sum of n, ...)``, the same on every process, without gradient.
    """
    if not is_distributed():
        return tensor.detach()
    tensor = tensor.detach().contiguous()
    counts = torch.zeros(world_size(), dtype=torch.int64, device=tensor.device)
    counts[rank()] = tensor.shape[0]
    sizes: list[int] = all_sum(counts).tolist()
    padded = tensor.new_zeros((max(sizes), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    gathered = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])
