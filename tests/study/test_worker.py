"""Workers: what they carry out, what they repeat, and what is left when they are stopped or killed."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.forks import start
from support.studies import PROGRAM, done_tasks, study, write

from cl_lightning.study.command import main, read

ALL = [f"runs/b/{method}/seed_{seed}" for method in ("er", "finetune") for seed in (0, 1)]


def finish(process, code=0):
    process.join(60)
    assert process.exitcode == code


def said(folder):
    return (folder / "said.txt").read_text()


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def test_two_workers_carry_out_every_cell_once_and_a_second_start_does_what_is_missing(tmp_path):
    write(tmp_path)
    finish(start(study, tmp_path, "s.yaml", "--workers", "2"))
    first = done_tasks(tmp_path)
    assert list(first) == ALL
    assert all(run.tasks == [0, 1, 2] for run in first.values())
    assert len({process for run in first.values() for process in run.processes}) == 4  # one process per run
    write(tmp_path, seeds=[0, 1, 2], methods=["finetune", "er"])
    finish(start(study, tmp_path, "s.yaml"))
    more = done_tasks(tmp_path)
    assert {place: run for place, run in more.items() if "seed_2" not in place} == first
    assert len(more) == 6


def test_a_cell_that_fails_is_reported_and_the_others_are_done(tmp_path):
    methods = ["finetune", {"name": "er", "config": "er", "options": {"model.level": 2}}]
    write(tmp_path, methods=methods, seeds=[0])
    finish(start(study, tmp_path, "s.yaml"), 1)
    assert "failed: b/er/seed_0: model.level must be at most 1 (log: studies/s/logs/runs/b/er/seed_0.log)" in said(
        tmp_path
    )
    assert done_tasks(tmp_path)["runs/b/finetune/seed_0"].tasks == [0, 1, 2]


def test_a_stopped_study_goes_on_from_the_checkpoints(tmp_path):
    write(tmp_path, seeds=[0], options={"model.gate": 1})
    process = start(study, tmp_path, "s.yaml", "--workers", "2")
    until(lambda: len(done_tasks(tmp_path)) == 2)
    os.kill(process.pid, signal.SIGTERM)
    finish(process, 128 + signal.SIGTERM)
    before = done_tasks(tmp_path)
    assert all(run.tasks == [0] for run in before.values())
    assert "2 of 2 cells are missing; go on with: python -m cl_lightning study studies/s/study.yaml" in said(tmp_path)
    (tmp_path / "go").touch()
    finish(start(study, tmp_path, "studies/s/study.yaml"))
    for place, run in done_tasks(tmp_path).items():
        assert run.tasks == [0, 1, 2]  # none twice
        assert run.processes[0] == before[place].processes[0] != run.processes[1]


def killed_worker(folder, *storage):
    """Two workers, of which one is killed; the other one repeats its trial from where the run was."""
    write(folder, seeds=[0], options={"model.gate": 1})
    process = start(study, folder, "s.yaml", "--workers", "2", "--heartbeat", "1", *storage)
    until(lambda: len(done_tasks(folder)) == 2)
    running = [run.processes[0] for run in done_tasks(folder).values()]
    os.kill(children(process.pid)[0], signal.SIGKILL)
    until(lambda: not all(Path(f"/proc/{pid}").exists() for pid in running))  # its run has ended with it
    (folder / "go").touch()
    finish(process)
    for run in done_tasks(folder).values():
        assert run.tasks == [0, 1, 2]
    assert sorted(len(set(run.processes)) for run in done_tasks(folder).values()) == [1, 2]


def test_a_killed_worker_is_noticed_and_its_trial_repeated_on_sqlite(tmp_path):
    killed_worker(tmp_path)


@pytest.fixture
def postgresql():
    """URL of a PostgreSQL server that is started for the test."""
    missing = [name for name in ("initdb", "pg_ctl") if shutil.which(name) is None]
    if missing or find_spec("psycopg") is None:
        pytest.skip(f"no PostgreSQL server at hand: {', '.join(missing) or 'psycopg'} is not installed")
    user: dict[str, str] = {}
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    if os.getuid() == 0:  # which the server refuses
        try:
            shutil.chown(folder, "postgres")
        except LookupError:
            pytest.skip("no PostgreSQL server at hand: the tests run as root, and there is no user postgres")
        user = {"user": "postgres"}

    def run(*command):
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **user
        )
        if done.returncode:
            pytest.skip(f"no PostgreSQL server at hand: {done.stdout.decode()[-300:]}")

    data, log = str(folder / "data"), str(folder / "log")
    run("initdb", "-D", data, "-U", "tests", "-A", "trust", "--no-sync")
    settings = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c fsync=off"
    run("pg_ctl", "-D", data, "-l", log, "-w", "-o", settings, "start")
    yield f"postgresql+psycopg://tests@/postgres?host={folder}"
    run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    shutil.rmtree(folder)


def test_a_killed_worker_is_noticed_and_its_trial_repeated_on_postgresql(tmp_path, postgresql):
    killed_worker(tmp_path, "--storage", postgresql)


def test_a_worker_joins_by_the_folder(tmp_path, capsys):
    made = write(tmp_path, seeds=[0])
    finish(start(study, tmp_path, "s.yaml", "--workers", "0", "--storage", f"sqlite:///{tmp_path}/other.sqlite3"))
    assert done_tasks(tmp_path) == {}
    finish(start(study, tmp_path, "join", "studies/s"))
    assert len(done_tasks(tmp_path)) == 2
    assert not (tmp_path / "studies" / "s" / "storage.sqlite3").exists()
    again, written, storage = read(str(tmp_path / "studies" / "s" / "study.yaml"))  # with which `study` goes on
    assert (again, written, storage) == (made, True, f"sqlite:///{tmp_path}/other.sqlite3")
    assert main(["join", str(tmp_path)], PROGRAM) == 2
    assert f"{tmp_path} has no study.yaml" in capsys.readouterr().err
