"""What is printed: tables of results and messages."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from support.command import is_one_line

from cl_lightning import cli
from cl_lightning.loop import results


def content_of(tasks: int, name: Callable[[int], str] = lambda task: f"task {task}") -> dict[str, Any]:
    row = [1.0] * tasks
    return {
        "strategy": "package.Method",
        "finished": tasks,
        "tasks": [{"name": name(task)} for task in range(tasks)],
        "matrix": {"R_ci": [row] * tasks, "R_ti": [row] * tasks},
        "measures_per_task": [{"average_accuracy": 1.0, "forgetting": 0.5}] * tasks,
        "measures": {"average_accuracy": 1.0, "average_incremental_accuracy": 1.0, "forgetting": 0.5},
        "cost": {
            "seconds": [{"training": 1000.0, "statistics": 1.0, "evaluation": 1.0}] * tasks,
            "bytes_kept": {"exemplars": 3 * 2**20},
        },
    }


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("tasks", [1, 2, 5, 10, 20, 100])
def test_the_table_of_results_fits_the_terminal(tasks, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    results.show(content_of(tasks))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    rows = [line for line in lines if re.match(r"\d+ ", line)]
    assert len(rows) == tasks  # none is broken
    for row in rows:
        assert "…" not in row
        assert row.rstrip().endswith("16.7 min")


def test_tasks_are_named_where_their_names_say_more_than_their_number(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    results.show(content_of(3, name=lambda task: f"rotated by {30 * task} degrees"))
    out = capsys.readouterr().out
    assert "0 rotated by 0 …" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_value_of_an_option_is_the_last_one_given():
    arguments = ["fit", "--run_dir", "a", "--images=b", "--run_dir=c"]
    assert cli.value_of(arguments, "--run_dir") == "c"
    assert cli.value_of(arguments, "--images") == "b"
    assert cli.value_of(arguments, "--output") is None
    assert cli.without(arguments, "--run_dir") == ["fit", "--images=b"]


def test_a_message_that_is_not_understood_is_one_line_and_complete():
    from cl_lightning.cli.parsing import explain

    assert explain("first line\nsecond line") == "first line second line"
    assert explain("word\n" * 1000) == " ".join(["word"] * 1000)


def test_what_to_do_stands_before_a_list_of_names_and_no_name_is_cut(run):
    for options, start, names in (
        ("--model Qqqqqq", "model: there is no class 'Qqqqqq'; give an import path, or one of", ("APER", "LwF", "WA")),
        (
            "--model.foo 3",
            "model: ER takes no 'foo'; leave it out, or use",
            ("memory_size", "freeze_norm", "optimizer"),
        ),
        ("--model.optimizer Qqqq", "model.optimizer: there is no class 'Qqqq'; give an import path", ("SGD", "Adam")),
    ):
        said = run(f"fit {options}")
        assert is_one_line(said)
        assert said.err.startswith(f"error: {start}")
        assert not said.err.endswith("...\n")
        listed = said.err.removeprefix(f"error: {start}")
        assert all(name in listed for name in names), said.err
