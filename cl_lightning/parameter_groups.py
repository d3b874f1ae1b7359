"""Learning rates of their own for some parameters, by patterns of their names."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

_KEY = "lr_factor"


def with_lr_factors(
    groups: Sequence[nn.Parameter] | Sequence[dict[str, Any]],
    names: Iterable[tuple[str, nn.Parameter]],
    factors: Mapping[str, float],
    *,
    owner: str,
) -> list[dict[str, Any]]:
    """Split groups of parameters, so that each has one factor of the learning rate; :func:`apply_lr_factors` uses it.

    Args:
        groups: Parameters, or groups of them as torch's optimizers take them; options of a group stay with its parts.
        names: Of all parameters that there are, whether they are in a group or not. A name counts as it is, and
            without a leading ``network.``.
        factors: By patterns of names such as ``backbone.*``; the first one that fits a name decides. The rest has 1.
        owner: Who asks, for messages.

    Returns:
        Groups, without empty ones; of each group the part with factor 1 first.

    Raises:
        ValueError: If a factor is negative, or a pattern fits no name.
    """
    chosen: dict[int, float] = {}
    used: set[str] = set()
    for name, named in names:
        short = name.removeprefix("network.")
        fits = (p for p in factors if fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(short, p))
        if (pattern := next(fits, None)) is not None:
            chosen[id(named)] = factors[pattern]
            used.add(pattern)
    for pattern, factor in factors.items():
        if factor < 0 or pattern not in used:
            raise ValueError(
                f"{owner}: lr_factors has {pattern!r}: {factor}; factors are at least 0, and patterns fit the name of "
                "some parameter that no earlier pattern fits, such as 'backbone.*'"
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


def apply_lr_factors(optimizer: torch.optim.Optimizer) -> None:
    """Multiply the learning rate of each group by its factor; before a schedule is made, whose base rates they are."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group.pop(_KEY, 1.0)
