"""Comparison of the outcomes of two runs."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cl_lightning.models import example
from cl_lightning.testing.bench import Outcome


def difference(expected: Any, actual: Any, *, rtol: float = 0.0, atol: float = 0.0, name: str = "") -> str | None:
    """Message about the first difference of two nested structures of tensors and plain values; None if they are equal.

    Without tolerances, tensors must be equal bit by bit. Tolerances do not apply to integers and booleans.
    """
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        if expected.keys() != actual.keys():
            lacking, more = expected.keys() - actual.keys(), actual.keys() - expected.keys()
            return f"{name or 'the state'} has other entries: {sorted(lacking)} lacking, {sorted(more)} too many"
        pairs = ((f"{name}.{key}" if name else str(key), expected[key], actual[key]) for key in expected)
    elif isinstance(expected, (list, tuple)) and isinstance(actual, (list, tuple)):
        if len(expected) != len(actual):
            return f"{name} has {len(actual)} entries instead of {len(expected)}"
        pairs = ((f"{name}[{i}]", a, b) for i, (a, b) in enumerate(zip(expected, actual, strict=True)))
    elif isinstance(expected, Tensor) and isinstance(actual, Tensor):
        return _tensor_difference(expected, actual, rtol, atol, name)
    else:
        same = expected == actual or (expected != expected and actual != actual)  # nan
        if not same and rtol and isinstance(expected, float) and isinstance(actual, float):
            same = math.isclose(expected, actual, rel_tol=rtol, abs_tol=atol)
        return None if same else f"{name} is {actual!r} instead of {expected!r}"
    return next((found for key, a, b in pairs if (found := difference(a, b, rtol=rtol, atol=atol, name=key))), None)


def _tensor_difference(expected: Tensor, actual: Tensor, rtol: float, atol: float, name: str) -> str | None:
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        old, new = ((str(value.dtype), tuple(value.shape)) for value in (expected, actual))
        return f"{name} is {new[0]} {new[1]} instead of {old[0]} {old[1]}"
    close = rtol if expected.is_floating_point() else 0.0
    if torch.allclose(expected, actual, rtol=close, atol=atol if close else 0.0, equal_nan=True):
        return None
    gap = (expected.double() - actual.double()).abs()
    gap = torch.where(expected.isnan() & actual.isnan() | (expected == actual), 0.0, gap)
    count, most = int((gap != 0).sum()), float(gap.max())
    return f"{name} {tuple(expected.shape)} differs in {count} of {gap.numel()} entries, max |difference| {most:.3g}"


def first_other_step(expected: Outcome, actual: Outcome) -> str | None:
    """Message about the first step of ``actual`` that differs from the same step of ``expected``; None if none does."""
    known = {str(step): step for step in expected.steps}
    for step in actual.steps:
        twin = known.get(str(step))
        if twin is None:
            return f"{step} (not a step of the other run)"
        for part in ("indices", "labels", "tasks"):
            if not torch.equal(getattr(twin, part), getattr(step, part)):
                return f"{step} (other samples: {part})"
        if twin.loss != step.loss and not (math.isnan(twin.loss) and math.isnan(step.loss)):
            return f"{step} (loss {step.loss!r} instead of {twin.loss!r})"
    return None


def trial(strategy: Any, seed: int) -> torch.Tensor:
    """Five samples for the predictions of a strategy, on the CPU: numbers in [0, 1), or tokens."""
    generator = torch.Generator().manual_seed(seed)
    inputs = example(strategy.network.backbone, 5, strategy.image_shape, generator)
    if inputs.dtype == torch.int64:
        return inputs
    return torch.rand(inputs.shape, generator=torch.Generator().manual_seed(seed))
