"""Joining of ``results.json`` with the lines of tasks that finished since."""

import json

import pytest

from cl_lightning.loop import task_lines
from cl_lightning.report.unfinished import LINES, joined


def started():
    return {
        "finished": 1,
        "tasks": [{}, {}, {}],
        "matrix": {"R_ci": [[0.5]], "totals": [4]},
        "cost": {"seconds": [1.0], "parameters": 7},
    }


def line(task, **now):
    rows = {"matrix.R_ci": [0.25, 0.75][: task + 1], "matrix.totals": 6, "cost.seconds": 2.0, "protocol.steps": 9}
    return json.dumps({"task": task, "rows": rows, "now": now})


def test_lists_get_an_entry_and_values_are_replaced(tmp_path):
    (tmp_path / LINES).write_text(line(1, **{"cost.parameters": 8, "measures": {"forgetting": 0.1}}) + "\n")
    assert joined(started(), tmp_path) == {
        "finished": 2,
        "tasks": [{}, {}, {}],
        "matrix": {"R_ci": [[0.5, None, None], [0.25, 0.75, None]], "totals": [4, 6]},
        "cost": {"seconds": [1.0, 2.0], "parameters": 8},
        "protocol": {"steps": [None, 9]},
        "measures": {"forgetting": 0.1},
    }


@pytest.mark.parametrize(
    "text",
    [
        line(1)[:-5],
        "[]",
        "7",
        '{"task": 1}',
        '{"task": 1, "rows": [], "now": {}}',
        line(0),  # it is in the file
        line(2),  # the line before it is missing
        line(3).replace("3", "99"),
        line(1).replace("0.25", "NaN"),
        line(1).replace('"task": 1', '"task": true'),
        "[" * 100_000,
        "\x00\xff",
    ],
)
def test_other_lines_change_nothing(text, tmp_path):
    (tmp_path / LINES).write_text(text)
    result = joined(started(), tmp_path)
    assert result["finished"] == 1
    assert result["cost"] == started()["cost"]


def test_content_of_no_run_is_left_to_the_reader(tmp_path):
    (tmp_path / LINES).write_text(line(1))
    assert joined([1], tmp_path) == [1]
    assert joined({"finished": 1}, tmp_path) == {"finished": 1}


def test_writer_and_reader_mean_the_same_file():
    assert task_lines.NAME == LINES
