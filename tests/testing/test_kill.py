"""A fit that is killed (SIGKILL) at any event and resumed ends, bit by bit, as one that nothing interrupts.

In an ordinary run of the tests a few methods are killed at a few kinds of events, others each day
(``support/rotation.py``). ``make stress`` kills all methods at many events. The conformance suite resumes every method
from checkpoints of every kind, without a signal.
"""

import os
import random
import shutil
import signal
import time
from inspect import signature
from pathlib import Path

import pytest
import torch
import yaml
from support import ROOT, kills, rotation, selection
from support.forks import free_port, start
from support.runs import assert_same

from cl_lightning.cli import discovery

CONFIGS = ROOT / "experiments" / "methods"
POINTS = int(os.environ.get("CL_LIGHTNING_KILL_POINTS", "2"))
"""How often each run is killed."""


def _needs_nothing(path: Path) -> bool:
    """Whether a config runs on digits: not one for another data set, nor for weights that are elsewhere."""
    return "_cifar" not in path.stem and "Timm" not in path.read_text()


CONFIG_OF = {path.stem: path for path in sorted(CONFIGS.rglob("*.yaml")) if _needs_nothing(path)}
METHODS = sorted(CONFIG_OF)


def _arguments(method: str, folder: str = "run") -> str:
    path = CONFIG_OF[method]
    model = yaml.safe_load(path.read_text())["model"]
    strategies = {cls.__name__: cls for cls in discovery.strategies()}
    strategy = strategies[model if isinstance(model, str) else model["class_path"]]
    options = signature(strategy).parameters
    # Phases of their own, of many epochs, would take the most time.
    short = " ".join(f"--model.{name} 2" for name in options if name.endswith("_epochs"))
    data = kills.DATA if "class" in strategy.traits.targets else kills.MASKS
    return f"--config {path} {short} --run_dir {folder} {data} {kills.TRAINER} {kills.SAVING}"


def _chosen(events: list[str], chance: random.Random) -> int:
    """An event of a kind, each kind as likely as the others, however rare it is."""
    kind = chance.choice(sorted(set(events)))
    return chance.choice([number for number, event in enumerate(events) if event == kind])


@pytest.mark.rotating(4, of=lambda method: selection.files_of_config(CONFIG_OF[method]))
@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(method, tmp_path):
    assert kills.run(_arguments(method), tmp_path / "whole", trace=True) == 0, kills.tail(tmp_path / "whole")
    expected = kills.left(tmp_path / "whole" / "run")
    events = (tmp_path / "whole" / "events.txt").read_text().split()
    chance = random.Random(f"{method} {rotation.ROTATION} {os.environ.get('CL_LIGHTNING_KILL_SEED', '0')}")
    folder = tmp_path / "killed"
    places = []
    for _ in range(POINTS):
        number = _chosen(events, chance)
        places.append(f"{number} ({events[number]})")
        code = kills.run(_arguments(method) + " --ckpt_path auto", folder, kill=number)
        if code == 0:  # it went on from so late a place that the event of this number never came
            break
        assert code == -signal.SIGKILL, kills.tail(folder)
    code = kills.run(_arguments(method) + " --ckpt_path auto", folder)
    assert code == 0, f"killed at {places}: {kills.tail(folder)}"
    try:
        assert_same(expected, kills.left(folder / "run"))
    except AssertionError as error:
        raise AssertionError(f"killed at {places}: {error}") from None
    assert not list((folder / "run" / "checkpoints").glob(".*.ckpt.*")), "torn checkpoints were left behind"


@pytest.mark.stress
@pytest.mark.parametrize("method", METHODS)
def test_a_process_that_is_killed_at_any_time_can_be_resumed(method, tmp_path):
    """Killed by the clock, not by an event: whatever it was about to do."""
    assert kills.run(_arguments(method), tmp_path / "whole") == 0, kills.tail(tmp_path / "whole")
    chance = random.Random(f"{method} {os.environ.get('CL_LIGHTNING_KILL_SEED', '0')}")
    folder = tmp_path / "killed"
    folder.mkdir()
    arguments = (_arguments(method) + " --ckpt_path auto").split()
    for _ in range(POINTS):
        process = start(kills.fit, arguments, str(folder), None, None)
        process.join(chance.uniform(0.2, 3.0))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
    assert kills.run(" ".join(arguments), folder) == 0, kills.tail(folder)
    assert_same(kills.left(tmp_path / "whole" / "run"), kills.left(folder / "run"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of ER."""
    folder = tmp_path_factory.mktemp("whole")
    assert kills.run(_arguments("er"), folder) == 0, kills.tail(folder)
    return folder


def _stopped(folder: Path, whole: Path) -> Path:
    """A copy of a run of ER that was killed in its second task."""
    kills.run(_arguments("er"), folder, kill=1100)
    assert yaml.safe_load((folder / "run" / "config.yaml").read_text())
    return folder / "run" / "checkpoints"


def _flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("harm", ["a bit", "the end", "everything", "the file"])
def test_a_damaged_last_checkpoint_is_reported_and_the_one_before_is_used(whole, tmp_path, harm):
    folder = _stopped(tmp_path, whole)
    last = folder / "last.ckpt"
    assert (folder / "last-1.ckpt").exists()
    if harm == "a bit":
        _flip(last, 0.4)
    elif harm == "the end":
        last.write_bytes(last.read_bytes()[:-1000])
    elif harm == "everything":
        last.write_bytes(b"")
    else:
        last.unlink()
    (tmp_path / "log.txt").unlink()
    assert kills.run(_arguments("er") + " --ckpt_path last", tmp_path) == 0, kills.tail(tmp_path)
    if harm != "the file":
        assert "checkpoint run/checkpoints/last.ckpt: " in kills.tail(tmp_path)
    assert "checkpoint: run/checkpoints/last-1.ckpt" in kills.tail(tmp_path)
    assert_same(kills.left(whole / "run"), kills.left(tmp_path / "run"))


def test_damage_of_all_checkpoints_is_reported(whole, tmp_path):
    folder = _stopped(tmp_path, whole)
    for path in folder.glob("*.ckpt"):
        _flip(path, 0.5)
    assert kills.run(_arguments("er") + " --ckpt_path last", tmp_path) == 2
    assert "there is no undamaged checkpoint under run" in kills.tail(tmp_path)


def test_a_run_can_be_resumed_from_an_earlier_task(whole, tmp_path):
    shutil.copytree(whole / "run", tmp_path / "run")
    assert kills.run(_arguments("er") + " --loop.keep_tasks null", tmp_path / "other") == 0
    arguments = _arguments("er", str(tmp_path / "other" / "run"))
    first = tmp_path / "other" / "run" / "checkpoints" / "task_000.ckpt"
    assert kills.run(f"{arguments} --ckpt_path {first}", tmp_path) == 0, kills.tail(tmp_path)
    assert_same(kills.left(whole / "run"), kills.left(tmp_path / "other" / "run"))


# ------------------------------------------------------------------ two processes

PAIR = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": "0"}


def _pair(arguments: str, folder: Path, port: int, kill: int | None = None) -> tuple[list[int], float]:
    """Two processes, of which the second one is killed; their exit codes and the seconds that the first outlived it."""
    folder.mkdir(parents=True, exist_ok=True)
    given = (arguments + " --trainer.devices 2 --trainer.strategy ddp").split()
    common = {**PAIR, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    first = start(kills.fit, given, str(folder), None, None, **common, RANK="0", LOCAL_RANK="0")
    second = start(kills.fit, given, str(folder), kill, None, **common, RANK="1", LOCAL_RANK="1")
    second.join(300)
    since = time.monotonic()
    first.join(120)
    alone = time.monotonic() - since
    codes = [first.exitcode, second.exitcode]
    first.kill()
    second.kill()
    return codes, alone


def test_a_process_that_dies_ends_the_others_and_the_run_can_be_resumed(tmp_path):
    arguments = _arguments("er")
    codes, _ = _pair(arguments, tmp_path / "whole", free_port())
    assert codes == [0, 0], kills.tail(tmp_path / "whole")
    folder = tmp_path / "killed"
    codes, alone = _pair(arguments, folder, free_port(), kill=40)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] == 1, f"the other process ended with {codes[0]}"
    assert alone < 60
    assert "error: another process of this run has ended" in kills.tail(folder)
    codes, _ = _pair(arguments + " --ckpt_path auto", folder, free_port())
    assert codes == [0, 0], kills.tail(folder)
    expected, actual = (kills.left(tmp_path / name / "run")["weights"] for name in ("whole", "killed"))
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-5, atol=1e-6)
