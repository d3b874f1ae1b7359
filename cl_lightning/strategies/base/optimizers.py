"""Learning-rate factors by patterns of parameter names, and fused optimizers."""

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from cl_lightning.optim import SAM

_KEY = "lr_factor"


def separate_group(
    parameters: Iterable[nn.Parameter], chosen: Iterable[nn.Parameter], **options: Any
) -> list[dict[str, Any]]:
    """Parameter groups: the parameters that are not among ``chosen``, then the parameters that are, with options.

    Args:
        parameters: Parameters that a phase trains.
        chosen: Parameters of the second group; those that the phase does not train are left out.
        options: Options of the second group, such as ``weight_decay=0.0``; an optimizer ignores options of others.
    """
    own = {id(parameter) for parameter in chosen}
    parameters = list(parameters)
    others = [parameter for parameter in parameters if id(parameter) not in own]
    return [{"params": others}, {"params": [p for p in parameters if id(p) in own], **options}]


def with_lr_factors(
    groups: Sequence[nn.Parameter] | Sequence[dict[str, Any]],
    names: Iterable[tuple[str, nn.Parameter]],
    factors: Mapping[str, float],
    *,
    owner: str,
) -> list[dict[str, Any]]:
    """Split parameter groups so that each group has one learning-rate factor, for :func:`apply_lr_factors`.

    With ``{"backbone.*": 0.1}`` a group of backbone and head becomes a group of the head (factor 1) and a group of the
    backbone (factor 0.1).

    Args:
        groups: Parameters, or parameter groups as torch's optimizers take them. The options of a group are copied to
            its parts.
        names: Name and parameter of all parameters, in a group or not. A pattern is matched against the name and
            against the name without a leading ``network.``.
        factors: Factors, at least 0, by patterns of names such as ``backbone.*``. The first pattern that matches a name
            decides; parameters without a match have factor 1.
        owner: Name of the strategy, for error messages.

    Returns:
        Non-empty groups; the part with factor 1 of each group comes first.

    Raises:
        ValueError: If a factor is negative, or a pattern decides for no parameter.
    """
    chosen: dict[int, float] = {}
    used: set[str] = set()
    for named, pattern in _deciding(names, factors):
        chosen[id(named)] = factors[pattern]
        used.add(pattern)
    for pattern, factor in factors.items():
        if factor < 0 or pattern not in used:
            raise ValueError(
                f"{owner}: lr_factors has {pattern!r}: {factor}; a factor must be at least 0, and a pattern, such as "
                "'backbone.*', must match the name of a parameter that no earlier pattern matches"
            )
    whole = not groups or not isinstance(groups[0], dict)
    given = cast(Sequence[dict[str, Any]], [{"params": groups}] if whole else groups)
    found: list[dict[str, Any]] = []
    for group in given:
        parts: dict[float, list[nn.Parameter]] = {1.0: []}
        for parameter in cast(Sequence[nn.Parameter], group["params"]):
            parts.setdefault(chosen.get(id(parameter), 1.0), []).append(parameter)
        found += [{**group, "params": part, _KEY: factor} for factor, part in parts.items() if part]
    return found


def _deciding(
    names: Iterable[tuple[str, nn.Parameter]], factors: Mapping[str, float]
) -> Iterator[tuple[nn.Parameter, str]]:
    """Each parameter that a pattern matches, and the first such pattern."""
    for name, named in names:
        short = name.removeprefix("network.")
        matching = (p for p in factors if fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(short, p))
        if (pattern := next(matching, None)) is not None:
            yield named, pattern


def without_lr(names: Iterable[tuple[str, nn.Parameter]], factors: Mapping[str, float]) -> Iterator[nn.Parameter]:
    """Parameters with a learning-rate factor of 0, which are not trained; arguments as in :func:`with_lr_factors`."""
    return (named for named, pattern in _deciding(names, factors) if factors[pattern] == 0)


def apply_lr_factors(optimizer: torch.optim.Optimizer) -> None:
    """Multiply the learning rate of each group by its factor. Call it before a scheduler reads the base rates."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group.pop(_KEY, 1.0)


def refuse_weight_decay(owner: object, made: OptimizerLRScheduler, kinds: tuple[type, ...] = ()) -> None:
    """Check the result of ``configure_optimizers`` of a method that holds weights by their gradients alone.

    Args:
        owner: Strategy, for the error.
        made: An optimizer, or a dict with the key ``optimizer``.
        kinds: Classes of optimizers that are allowed; empty for all.

    Raises:
        ValueError: If a group has weight decay, which moves weights without a gradient, or for another optimizer.
    """
    optimizer = cast(torch.optim.Optimizer, made["optimizer"] if isinstance(made, dict) else made)
    decay = max(group.get("weight_decay", 0) for group in optimizer.param_groups)
    if decay or (kinds and not isinstance(optimizer, kinds)):
        what = f"{type(optimizer).__name__} with weight_decay {decay}" if decay else type(optimizer).__name__
        allowed = " or ".join(f"torch.optim.{kind.__name__}" for kind in kinds) or "an optimizer"
        raise ValueError(
            f"{type(owner).__name__}: optimizer is {what}, which moves weights that must be kept; use {allowed} "
            "without weight decay"
        )


def require_plain_sgd(owner: object, made: OptimizerLRScheduler, reason: str) -> None:
    """Check the result of ``configure_optimizers`` of a method whose own steps reach the weights as gradients.

    Args:
        owner: Strategy, for the error.
        made: An optimizer, or a dict with the key ``optimizer``.
        reason: Why, as a relative clause for the error, such as "which moves the weights under Reptile".

    Raises:
        ValueError: If the optimizer is not SGD, or a group has momentum or weight decay.
    """
    optimizer = cast(torch.optim.Optimizer, made["optimizer"] if isinstance(made, dict) else made)
    added = {name for group in optimizer.param_groups for name in ("momentum", "weight_decay") if group.get(name)}
    if type(optimizer) is not torch.optim.SGD or added:
        what = f"{type(optimizer).__name__}{' with ' + ' and '.join(sorted(added)) if added else ''}"
        raise ValueError(
            f"{type(owner).__name__}: optimizer is {what}, {reason}; use torch.optim.SGD without momentum and weight "
            "decay"
        )


_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
_DEVICES = ("cpu", "cuda")


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Select the fused implementation of SGD, Adam and AdamW, unless ``fused`` or ``foreach`` was given.

    The flag is set on the groups, not in the constructor, so that gradients can still be clipped under mixed precision:
    an optimizer constructed with ``fused=True`` also declares that it unscales gradients itself. Of :class:`SAM` it is
    the base optimizer.
    """
    if isinstance(optimizer, SAM):
        optimizer = optimizer.base
    if type(optimizer) not in _FUSED:
        return
    for group in optimizer.param_groups:
        is_set = any(group.get(key) for key in ("fused", "foreach", "capturable", "differentiable"))
        is_set |= group.get("fused") is False or group.get("foreach") is False
        plain = all(p.is_floating_point() and p.device.type in _DEVICES for p in group["params"])
        if is_set or not plain or isinstance(group["lr"], Tensor) or group.get("dampening"):
            continue
        group["fused"] = True
        if group.get("momentum"):
            # Fused SGD needs momentum buffers of all parameters or of none, also if some get a gradient only later.
            # With buffers of 0 the first step is the same.
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
