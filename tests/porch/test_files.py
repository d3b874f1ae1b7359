"""Files that block, and files that are replaced."""

import os
import subprocess
import sys
import threading

import pytest
from support import ROOT

from cl_lightning.cli import main
from cl_lightning.files import read_pipe, read_text


def written_by(path, *parts):
    def write():
        with path.open("wb") as file:
            for part in parts:
                file.write(part)
                file.flush()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_a_pipe_is_no_text_file(pipe):
    with pytest.raises(OSError, match=r"it is a .*, not a file"):
        read_text(pipe)


def test_a_pipe_is_read_to_its_end(pipe):
    content = [os.urandom(100_000) for _ in range(3)]  # more than the system holds back
    thread = written_by(pipe, *content)
    assert read_pipe(pipe) == b"".join(content)
    thread.join()


def test_a_pipe_is_read_with_limits(pipe):
    with pytest.raises(ValueError, match=r"nothing was written to the pipe for 0.1 seconds"):
        read_pipe(pipe, seconds=0.1)
    thread = written_by(pipe, b"x" * 200)
    with pytest.raises(ValueError, match="more than 100 bytes"):
        read_pipe(pipe, most=100)
    thread.join()


def test_a_configuration_may_come_from_a_pipe(tmp_path):
    """Process substitution of a shell: a pipe that can be read once."""
    config = "{loop: {nan_loss: sometimes}}"
    command = f"{sys.executable} -m cl_lightning fit --config <(echo '{config}') --run_dir run"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert run.returncode == 2
    [line] = run.stderr.splitlines()
    assert "nan_loss: 'sometimes' is not allowed" in line  # it was read


def test_a_configuration_that_nobody_writes_is_an_error(pipe, monkeypatch, capsys):
    monkeypatch.setattr("cl_lightning.cli.configs.read_pipe", lambda path: read_pipe(path, seconds=0.1))
    assert main(["fit", "--config", str(pipe)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"--config {pipe}: give YAML in UTF-8; nothing was written" in line


def test_a_report_does_not_wait_for_a_pipe(tmp_path, capsys):
    os.mkfifo(tmp_path / "results.json")
    assert main(["report", str(tmp_path)]) == 2
    assert "results.json cannot be read: it is a named pipe, not a file" in capsys.readouterr().err
