"""Files and loggers that fail during a run: reported, tried again, and never the end of the run."""

import csv
import errno
import json
import re
import warnings
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch.loggers import Logger
from support.runs import StopAt, assert_same_run, loop, plain_net, run, sgd

from cl_lightning.files import replaced
from cl_lightning.loop import WriteError, logger_guard, results
from cl_lightning.loop.logging import MetricsFile
from cl_lightning.strategies.baselines.finetune import Finetune


def finetune():
    return Finetune(backbone=plain_net, optimizer=sgd)


class Unreliable(Logger):
    """Takes values, except for some calls, which fail as they do without a connection."""

    name, version = "unreliable", ""

    def __init__(self, fails=lambda call: False):
        super().__init__()
        self.fails, self.calls, self.rows = fails, 0, []

    def log_hyperparams(self, *args, **kwargs): ...

    def log_metrics(self, metrics, step=None):
        self.calls += 1
        if self.fails(self.calls):
            raise ConnectionError("no answer")
        self.rows.append((step, dict(metrics)))


def logged(logger):
    """Rows without times and memory, which differ between two runs."""
    return [(step, {k: v for k, v in row.items() if not k.startswith("cost/")}) for step, row in logger.rows]


def rows_of(folder):
    with (folder / "metrics.csv").open() as file:
        return [
            {key: value for key, value in row.items() if not key.startswith("cost/")} for row in csv.DictReader(file)
        ]


def values_of(folder):
    """Values by step and name."""
    found = {}
    for row in rows_of(folder):
        found.setdefault(row["step"], {}).update({name: value for name, value in row.items() if value})
    return found


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def told():
    """Warnings about files and loggers, one line each."""
    lines: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lines
        lines += [str(entry.message) for entry in caught if re.search("log|written|works", str(entry.message))]


@pytest.mark.parametrize(("first", "last"), [(1, 3), (5, 5), (4, 8)])
def test_a_logger_that_fails_for_a_while_gets_all_values_in_order(tmp_path, monkeypatch, first, last):
    monkeypatch.setattr(logger_guard, "_FIRST_PAUSE", 0.0)
    whole, failing = Unreliable(), Unreliable(lambda call: first <= call <= last)
    reference = run(finetune(), folder=tmp_path / "whole", logger=whole)
    with told() as lines:
        made = run(finetune(), folder=tmp_path / "failing", logger=failing)
    assert [line.partition(";")[0] for line in lines] == [
        "Unreliable: cannot log (no answer)",
        "Unreliable: works again",
    ]
    assert_same_run(reference, made)
    assert logged(failing) == logged(whole)


def test_a_logger_that_always_fails_does_not_end_the_run(tmp_path):
    with told() as lines:
        made = run(finetune(), folder=tmp_path, logger=Unreliable(lambda call: True))
    assert len(lines) == 2
    assert lines[1] == "Unreliable: the run ends, and some of what it logged is not written (no answer)"
    assert json.loads((tmp_path / "results.json").read_text())["finished"] == 3
    assert (tmp_path / "checkpoints" / "task_002.ckpt").is_file()
    assert "log_metrics" not in vars(made.trainer.loggers[0])  # it has its own methods again


def test_a_logger_that_waits_long_is_tried_seldom(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(logger_guard.time, "monotonic", lambda: now[0])

    def waits(call):
        now[0] += 30.0
        return True

    logger = Unreliable(waits)
    guard = logger_guard.LoggerGuard(logger)
    with told():
        for step in range(3600):
            logger.log_metrics({"x": 1.0}, step=step)
            now[0] += 1.0
        guard.release()
    assert now[0] < 3600 * 1.1


def test_a_full_disk_leaves_rows_of_metrics_whole_and_they_are_written_later(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path)
    for step in range(3):
        file.log_metrics({"x": float(step)}, step=step)
        file.save()
    before = path.read_bytes()

    class Torn(csv.DictWriter):
        def writerows(self, rows):
            self.writer.writerow([3, "0."])  # a part of the row reaches the disk
            full()

    file.log_metrics({"x": 3.0}, step=3)
    with monkeypatch.context() as context:
        context.setattr(csv, "DictWriter", Torn)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                file.save()
            assert path.read_bytes() == before
        file.log_metrics({"y": 1.0}, step=4)  # a new column: the whole file is written again
        with pytest.raises(OSError, match="No space left"):
            file.save()
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.csv"]
    file.save()
    assert [(row["step"], row["x"], row["y"]) for row in rows_of(tmp_path)] == [
        *((str(step), repr(float(step)), "") for step in range(4)),
        ("4", "", "1.0"),
    ]


def test_rows_that_could_not_be_written_are_in_the_checkpoint(tmp_path, monkeypatch):
    saving = {"save_every_n_steps": 2, "save_every_seconds": 0.0}
    run(finetune(), folder=tmp_path / "whole", options=saving)
    crashed = loop(finetune(), StopAt(1, 4), folder=tmp_path / "crashed", options=saving)
    with monkeypatch.context() as context, told():
        context.setattr(MetricsFile, "_append", full)
        context.setattr(MetricsFile, "_rewrite", full)
        with pytest.raises(StopAt.CrashError):
            crashed.fit()
    assert not (tmp_path / "crashed" / "metrics.csv").exists()
    loop(finetune(), folder=tmp_path / "crashed", options=saving).fit("last")
    # Values of a step are in one row or in two, whether the first was written before the second came.
    assert values_of(tmp_path / "crashed") == values_of(tmp_path / "whole")


def test_results_that_cannot_be_written_are_tried_again_at_the_next_task(tmp_path, monkeypatch):
    write, calls = results.write, []

    def fails_once(path, content):
        calls.append(path.name)
        return full() if len(calls) == 2 else write(path, content)  # after the first task

    monkeypatch.setattr(results, "write", fails_once)
    with told() as lines:
        run(finetune(), folder=tmp_path)
    [line] = lines
    assert "results.json: cannot be written (No space left on device); the run continues" in line
    assert json.loads((tmp_path / "results.json").read_text())["finished"] == 3


def test_results_that_were_never_written_are_an_error_after_the_checkpoint_and_written_by_resuming(
    tmp_path, monkeypatch
):
    write = results.write
    with monkeypatch.context() as context:
        context.setattr(
            results, "write", lambda path, content: full() if content["finished"] == 3 else write(path, content)
        )
        with told(), pytest.raises(WriteError, match="free the disk, then resume"):
            run(finetune(), folder=tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["finished"] == 2
    again = loop(finetune(), folder=tmp_path)
    again.fit("last")
    assert again.trainer.global_step == 0 or again.matrix.learned == 3
    assert json.loads((tmp_path / "results.json").read_text())["finished"] == 3


def test_a_link_to_the_checkpoint_of_a_task_that_fails_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("cl_lightning.checksums.link", full)
    with told() as lines:
        made = run(finetune(), folder=tmp_path, options={"keep_last": 1})
    assert ["task_000.ckpt: cannot be written" in line for line in lines] == [True, False, False]
    assert torch.load(made.files.newest, weights_only=True)["cl_lightning"]["place"]["done"]


def test_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path):
    path = tmp_path / "folder" / "a.txt"
    with replaced(path) as file:
        file.write("first\n")

    def fails():
        with replaced(path) as file:
            file.write("second\n")
            full()

    with pytest.raises(OSError, match="No space"):
        fails()
    assert path.read_text() == "first\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]
