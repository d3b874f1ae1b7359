"""Streams of many tasks: what a finished task measured is written once, and a crash loses none of it."""

import json
import os
import shutil

import pytest
from support.runs import loop, plain_net

from cl_lightning.callback import ContinualCallback
from cl_lightning.loop import run_files
from cl_lightning.report.runs import read
from cl_lightning.report.unfinished import LINES
from cl_lightning.strategies.baselines.finetune import Finetune


@pytest.fixture(autouse=True)
def _three_tasks_are_many(monkeypatch):
    monkeypatch.setattr(run_files, "SHORT", 2)


class Copies(ContinualCallback):
    """Copies the folder of the run at the start of each task: what a crash there would leave."""

    def __init__(self, folder, to):
        self.folder, self.to = folder, to

    def on_task_start(self, trainer, strategy, task):
        shutil.copytree(self.folder, self.to / str(task.index))


def learn(folder, *callbacks, ckpt_path=None, **options):
    run = loop(Finetune(backbone=plain_net), *callbacks, folder=folder, options=options, max_epochs=1)
    run.fit(ckpt_path=ckpt_path)
    return run


def measured(run):
    """What does not depend on the time of day."""
    kept = ("finished", "accuracy", "accuracy_known", "calibration", "per_class", "measures", "bytes_kept", "budget")
    return {name: getattr(run, name) for name in (*kept, "parameters", "bounds", "complete")}


def lines(folder):
    return [json.loads(text) for text in (folder / LINES).read_text().splitlines()]


def test_each_task_adds_a_line_and_the_end_writes_the_whole_file(tmp_path):
    folder, copies = tmp_path / "run", tmp_path / "copies"
    learn(folder, Copies(folder, copies))
    before = (copies / "1" / LINES).read_bytes()
    after = (copies / "2" / LINES).read_bytes()
    assert after.startswith(before)
    assert [line["task"] for line in lines(copies / "2")] == [0, 1]
    files = [(copies / str(task) / "results.json").read_bytes() for task in (0, 1, 2)]
    assert files[0] == files[1] == files[2]  # written at the start only
    assert json.loads(files[0])["finished"] == 0
    assert not (folder / LINES).exists()
    assert json.loads((folder / "results.json").read_text())["finished"] == 3


def test_report_joins_the_lines_of_a_run_that_crashed(tmp_path, monkeypatch):
    folder, copies = tmp_path / "run", tmp_path / "copies"
    learn(folder, Copies(folder, copies))
    monkeypatch.setattr(run_files, "SHORT", 50)
    learn(tmp_path / "short", stop_after_task=1)
    crashed, short = read(copies / "2"), read(tmp_path / "short")
    assert measured(crashed) == measured(short)
    assert [set(task) for task in crashed.seconds] == [set(task) for task in short.seconds]
    assert crashed.protocol.epochs == short.protocol.epochs
    assert crashed.protocol.steps == short.protocol.steps
    assert not crashed.notes
    one = read(copies / "1")
    assert one.finished == 1
    assert one.accuracy == ((short.accuracy[0][0],),)


def test_a_resumed_run_starts_its_lines_at_the_checkpoint(tmp_path):
    folder, copies = tmp_path / "run", tmp_path / "copies"
    learn(folder, Copies(folder, copies), keep_tasks=3)
    crashed, early = copies / "2", copies / "early"
    shutil.copytree(crashed, early)
    learn(crashed, Copies(crashed, tmp_path / "again"), ckpt_path="last")
    assert json.loads((tmp_path / "again" / "2" / "results.json").read_text())["finished"] == 2
    assert not (tmp_path / "again" / "2" / LINES).exists()
    assert measured(read(crashed)) == measured(read(folder))
    first = early / "checkpoints" / "task_000.ckpt"  # its successor has a line already
    learn(early, Copies(early, tmp_path / "early"), ckpt_path=first, stop_after_task=1)
    assert read(tmp_path / "early" / "1").finished == 1
    assert read(early).finished == 2


def test_lines_that_could_not_be_written_are_written_with_the_next_task(tmp_path, monkeypatch):
    folder, copies, writes = tmp_path / "run", tmp_path / "copies", []

    def fails_once(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(LINES):
            writes.append(descriptor)
            if len(writes) == 1:
                os.truncate(descriptor, 20)  # a part of the line is on the disk
                raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails_once)
    with pytest.warns(UserWarning, match="results.jsonl: cannot be written .No space left on device.*tries again"):
        learn(folder, Copies(folder, copies))
    assert read(copies / "1").finished == 0  # an incomplete line counts for nothing
    assert [line["task"] for line in lines(copies / "2")] == [0, 1]
    assert read(copies / "2").finished == 2


def test_an_error_in_a_task_leaves_the_whole_file_of_the_tasks_before(tmp_path):
    class Fails(ContinualCallback):
        def on_task_start(self, trainer, strategy, task):
            if task.index == 2:
                raise LookupError("a mistake in a callback")

    with pytest.raises(LookupError, match="a mistake"):
        learn(tmp_path, Fails())
    assert json.loads((tmp_path / "results.json").read_text())["finished"] == 2
    assert not (tmp_path / LINES).exists()
