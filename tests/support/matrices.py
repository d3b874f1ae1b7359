"""Rows of accuracy matrices, and values of measures."""

import pytest
import torch

from cl_lightning.measures import (
    EvaluationResult,
)

NAN = float("nan")


def close(value: float, expected: float) -> None:
    assert isinstance(value, float)
    assert value == pytest.approx(expected, abs=1e-12, nan_ok=True)


def row_of(
    accuracy: list[float], task_aware: list[float] | None = None, totals: list[int] | None = None
) -> EvaluationResult:
    counts = torch.tensor(totals or [20] * len(accuracy))
    correct, aware = ((torch.tensor(a) * counts).round().long() for a in (accuracy, task_aware or accuracy))
    return EvaluationResult(counts, correct, aware)
