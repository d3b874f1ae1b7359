"""Running statistics of batch normalisation in a checkpoint: between two epochs each process has its own."""

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from cl_lightning import distributed

_NAMES = ("running_mean", "running_var", "num_batches_tracked")
_HOLDERS = ("state_dict", "callbacks")  # a callback may hold the statistics of a teacher, or their moving average


def share(checkpoint: dict[str, Any], device: torch.device) -> None:
    """Replace the statistics in a checkpoint by their mean over all processes; called on all processes.

    The tensors of the run do not change. If the statistics of the processes differ, the statistics of each process are
    added under ``process_statistics``, from which :func:`own` restores them.

    Args:
        checkpoint: Content of a checkpoint with the part ``cl_lightning``; changed in place.
        device: Device of the run, on which the processes communicate.
    """
    state = {name: checkpoint.get(name, {}) for name in _HOLDERS}
    mine = list(_statistics(state))
    if not distributed.is_distributed() or not mine:
        return
    # float64 holds float32 and the number of batches exactly.
    flat = torch.cat([value.detach().to(device, torch.float64).flatten() for value in mine])
    of_all = distributed.all_gather_rows(flat).view(distributed.world_size(), -1)
    if (of_all == of_all[0]).all():
        return
    stacked = [
        part.reshape(-1, *value.shape).to(value.dtype)
        for part, value in zip(torch.split(of_all, [value.numel() for value in mine], dim=1), mine, strict=True)
    ]
    parts = iter(stacked)
    checkpoint["cl_lightning"]["process_statistics"] = _only(_mapped(state, lambda _: next(parts)))
    parts = iter(stacked)
    checkpoint |= _mapped(state, lambda _: _mean(next(parts)))


def own(checkpoint: dict[str, Any], rank: int, processes: int) -> dict[str, Any]:
    """A checkpoint with the statistics of one process, if it was written by the same number of processes.

    Raises:
        ValueError: If ``process_statistics`` does not have the statistics of each process.
    """
    part = checkpoint["cl_lightning"]
    if "process_statistics" not in part or part.get("processes") != processes:
        return checkpoint
    state = {name: checkpoint.get(name, {}) for name in _HOLDERS}
    values, stacked = list(_statistics(state)), list(_statistics(part["process_statistics"]))
    if [(processes, *value.shape) for value in values] != [tuple(value.shape) for value in stacked]:
        raise ValueError("its part process_statistics does not have the statistics of each process and layer")
    parts = iter(stacked)
    return {**checkpoint, **_mapped(state, lambda _: next(parts)[rank].clone())}


def _statistics(state: Mapping[Any, Any]) -> Iterator[Tensor]:
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _statistics(value)
        elif _is_statistic(key, value):
            yield value


def _is_statistic(key: Any, value: Any) -> bool:
    return isinstance(value, Tensor) and str(key).rpartition(".")[2] in _NAMES


def _mapped(state: Mapping[Any, Any], function: Callable[[Tensor], Tensor]) -> Any:
    """The same nested mappings with other statistics, in the order of :func:`_statistics`."""
    made: Any = copy(state)  # keeps the type of a state dict
    for key, value in state.items():
        if isinstance(value, Mapping):
            made[key] = _mapped(value, function)
        elif _is_statistic(key, value):
            made[key] = function(value)
    return made


def _only(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """The statistics alone, without empty mappings."""
    found: dict[Any, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Mapping):
            found |= {key: value} if _is_statistic(key, value) else {}
        elif inside := _only(value):
            found[key] = inside
    return found


def _mean(of_all: Tensor) -> Tensor:
    return of_all.double().mean(0).to(of_all.dtype) if of_all.is_floating_point() else of_all[0]
