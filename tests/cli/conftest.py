import sys
from functools import partial
from pathlib import Path

import pytest
from support.command import SHORT, Run, command

from cl_lightning.cli import main


@pytest.fixture
def run(tmp_path, monkeypatch, capsys) -> Run:
    """Runs a command in an empty folder: one string, or arguments one by one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("COLUMNS", "80")
    return partial(command, capsys)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """Folder of a run of two tasks; tests read it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(["fit", *SHORT, "--data.val_fraction", "0.1", "--run_dir", str(folder)]) == 0
    return folder
