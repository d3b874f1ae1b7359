"""The accuracy matrix: rows fill it, measures are read off it, and it survives a checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from support.matrices import NAN, close, row_of

from cl_lightning.measures import (
    AccuracyMatrix,
)

# AccuracyMatrix


def filled() -> AccuracyMatrix:
    matrix = AccuracyMatrix()
    matrix.fill(-1, row_of([0.1, 0.1, 0.0]))
    matrix.fill(0, row_of([0.9, 0.0]))
    matrix.fill(1, row_of([0.5, 0.8, 0.2], [0.9, 0.9, 0.5], [20, 40, 20]))
    return matrix


def test_rows_fill_the_matrix_and_the_rest_is_nan():
    matrix = filled()
    torch.testing.assert_close(
        matrix.R_ci,
        torch.tensor([[0.9, 0.0, NAN], [0.5, 0.8, 0.2], [NAN] * 3], dtype=torch.float64),
        equal_nan=True,
    )
    assert matrix.R_ti[1].tolist() == [0.9, 0.9, 0.5]
    assert matrix.start_ci.tolist() == [0.1, 0.1, 0.0]
    assert matrix.totals.tolist() == [20, 40, 20]
    assert matrix.R_prefix.isnan().all()
    assert matrix.learned == 2
    matrix.fill(1, row_of([0.4, 0.6]))
    assert matrix.R_ci[1, :2].tolist() == [0.4, 0.6]
    assert matrix.R_ci[1, 2].isnan()  # nothing is left of the row before


def test_measures_by_name_delegate_and_leave_out_what_is_undefined():
    matrix = filled()
    measures = matrix.measures()
    close(measures["average_accuracy"], (20 * 0.5 + 40 * 0.8) / 60)
    close(measures["average_incremental_accuracy"], (0.9 + 0.7) / 2)
    close(measures["forgetting"], 0.4)
    close(measures["backward_transfer"], -0.4)
    close(measures["forward_transfer"], -0.1)
    close(measures["task_aware/average_accuracy"], 0.9)
    close(measures["new_accuracy"], 0.8)
    assert "cumulative_forgetting" not in measures
    first = matrix.measures(0)
    close(first["average_accuracy"], 0.9)
    assert "forgetting" not in first
    assert "old_accuracy" not in first
    with pytest.raises(ValueError, match="2 tasks are filled in"):
        matrix.measures(2)
    with pytest.raises(ValueError, match="0 tasks are filled in"):
        AccuracyMatrix(3).measures()


@pytest.mark.parametrize("empty", [0, 1, 2, 3])
def test_a_task_without_test_samples_is_left_out_of_all_measures(empty: int):
    accuracies = [[0.9, 0.3, 0.2, 0.1], [0.6, 0.8, 0.2, 0.3], [0.5, 0.4, 0.7, 0.2], [0.2, 0.3, 0.5, 0.6]]
    counts = [20 * (task != empty) for task in range(4)]
    matrix, others = AccuracyMatrix(), AccuracyMatrix()
    matrix.fill(-1, row_of([0.25] * 4, totals=counts))
    for task, values in enumerate(accuracies):
        row = row_of(values, totals=counts)
        prefix = [sum(values[: k + 1]) - (values[empty] if k >= empty else 0) for k in range(task + 1)]
        row.prefix = torch.tensor([NAN if empty == k == 0 else value for k, value in enumerate(prefix)]).double()
        matrix.fill(task, row)
        if task != empty:
            rest = row_of([value for index, value in enumerate(values) if index != empty])
            rest.prefix = row.prefix[[k for k in range(task + 1) if k != empty]]
            others.fill(task - (task > empty), rest)
    assert matrix.R_ci[3, empty].isnan()
    found, expected = matrix.measures(), others.measures()
    left_out = {"average_incremental_accuracy", "forward_transfer"}  # the row after the empty task takes part in them
    if empty == 3:  # the last task: nothing is new after it, and all that was learnt is old
        left_out |= {"new_accuracy", "old_accuracy", "average_accuracy", "learning_accuracy", "forgetting"}
        left_out |= {"backward_transfer", "cumulative_forgetting"}
        assert {"new_accuracy", "task_aware/new_accuracy"}.isdisjoint(found)
        for name in ("average_accuracy", "old_accuracy", "task_aware/average_accuracy", "task_aware/old_accuracy"):
            close(found[name], (0.2 + 0.3 + 0.5) / 3)
        close(found["forgetting"], (0.7 + 0.5 + 0.2) / 3)
        close(found["learning_accuracy"], (0.9 + 0.8 + 0.7) / 3)
    for name in expected:
        if name.removeprefix("task_aware/") not in left_out:
            close(found[name], expected[name])
    before = [accuracies[i - 1][i] for i in range(1, 4) if i != empty]
    close(matrix.measures()["task_aware/forward_transfer"], sum(before) / len(before) - 0.25)
    lines = [sum(a for i, a in enumerate(row[: t + 1]) if i != empty) for t, row in enumerate(accuracies)]
    means = [line / n for t, line in enumerate(lines) if (n := t + 1 - (empty <= t))]
    close(found["average_incremental_accuracy"], sum(means) / len(means))


def test_cumulative_forgetting_comes_from_the_prefix_rows():
    matrix = AccuracyMatrix(2)
    for task, prefix in enumerate(([0.9], [0.6, 0.5])):
        row = row_of([0.5] * (task + 1))
        row.prefix = torch.tensor(prefix, dtype=torch.float64)
        matrix.fill(task, row)
    close(matrix.measures()["cumulative_forgetting"], 0.3)


def test_the_matrix_survives_a_checkpoint_and_json_to_the_bit(tmp_path: Path):
    matrix = filled()
    torch.save(matrix.state_dict(), tmp_path / "state.pt")
    loaded = AccuracyMatrix(7)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    parsed = AccuracyMatrix.from_dict(json.loads(json.dumps(matrix.to_dict(), allow_nan=False)))
    empty = AccuracyMatrix.from_dict(json.loads(json.dumps(AccuracyMatrix().to_dict())))
    for copy, original in ((loaded, matrix), (parsed, matrix), (empty, AccuracyMatrix())):
        for name, tensor in original.state_dict().items():
            torch.testing.assert_close(copy.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True)
    parsed.fill(2, row_of([0.3, 0.3, 0.3]))
    assert parsed.learned == 3
    assert matrix.learned == 2
