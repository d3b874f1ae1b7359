import copy
import os
import pickle
import resource
import shutil

import pytest
import torch
from support import ROOT, forks
from support.runs import assert_same_run, loop, plain_net, run, sgd

from cl_lightning.cli import main
from cl_lightning.loop import CheckpointFiles, WriteError
from cl_lightning.loop.checkpoint import SCHEMA, load, settle_progress
from cl_lightning.strategies.baselines.finetune import Finetune


def test_what_is_written_is_read_and_no_temporary_file_stays(tmp_path):
    path = tmp_path / "new" / "a.ckpt"
    CheckpointFiles().save_checkpoint({"cl_lightning": {"schema": SCHEMA}, "x": torch.arange(3)}, path)
    assert torch.equal(load(path)["x"], torch.arange(3))
    assert os.listdir(path.parent) == ["a.ckpt"]


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "a.ckpt"
    writer = CheckpointFiles()
    writer.save_checkpoint({"cl_lightning": {"schema": SCHEMA}, "x": 1}, path)

    class Unpicklable:
        def __reduce__(self):
            raise RuntimeError("cannot be written")

    with pytest.raises(RuntimeError, match="cannot be written"):
        writer.save_checkpoint({"x": Unpicklable()}, path)
    assert load(path)["x"] == 1
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_a_file_with_pickled_code_is_refused_and_does_not_run(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    for path, write in ((tmp_path / "zip.ckpt", torch.save), (tmp_path / "plain.ckpt", None)):
        content = {"cl_lightning": {"schema": SCHEMA}, "callbacks": Malicious()}
        if write is not None:
            write(content, path)
        else:
            path.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match=path.name):
            load(path)
    assert not (tmp_path / "owned").exists()


def test_the_refusal_says_why(tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"x": Malicious()}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="refused, it holds pickled objects"):
        load(tmp_path / "a.ckpt")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", b"PK\x03\x04 torn"])
def test_a_torn_file_is_reported(tmp_path, content):
    path = tmp_path / "torn.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"torn\.ckpt: not a readable checkpoint"):
        load(path)


def test_half_a_checkpoint_is_reported(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"cl_lightning": {"schema": SCHEMA}, "x": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load(path)


def test_files_of_others_and_of_later_versions_are_reported(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="not written by this framework"):
        load(tmp_path / "other.ckpt")
    torch.save({"cl_lightning": {"schema": SCHEMA + 1}}, tmp_path / "later.ckpt")
    with pytest.raises(ValueError, match=f"its version is {SCHEMA + 1}"):
        load(tmp_path / "later.ckpt")
    with pytest.raises(ValueError, match="no such file"):
        load(tmp_path / "missing.ckpt")


def full(limit):
    """From now on no file of this process can be longer: a write comes short, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _write_too_much(folder):
    files = CheckpointFiles()
    files.save_checkpoint({"cl_lightning": {"schema": SCHEMA}, "x": 1}, folder / "a.ckpt")
    full(200_000)
    files.save_checkpoint({"cl_lightning": {"schema": SCHEMA}, "x": torch.zeros(10**6)}, folder / "a.ckpt")
    assert isinstance(files.failure, OSError)
    assert load(folder / "a.ckpt")["x"] == 1
    assert os.listdir(folder) == ["a.ckpt"]
    files.save_checkpoint({"cl_lightning": {"schema": SCHEMA}, "x": 2}, folder / "a.ckpt")
    assert files.failure is None


def test_a_full_disk_is_noted_and_leaves_the_earlier_file(tmp_path):
    process = forks.start(_write_too_much, tmp_path)
    process.join(60)
    assert process.exitcode == 0


def _learn_on_a_full_disk(folder, due):
    made = loop(
        Finetune(backbone=plain_net, optimizer=sgd),
        folder=folder,
        options={"save_every_seconds": 0.0 if due else 1000.0, "keep_last": 3},
    )
    size = (folder / "checkpoints" / "last.ckpt").stat().st_size
    full(size - 1000)
    try:
        made.fit("last")
    except WriteError as error:
        (folder / "told.txt").write_text(str(error))
    else:
        raise AssertionError("nothing was told")


def test_a_run_on_a_full_disk_continues_until_a_task_ends_and_can_be_resumed(tmp_path):
    """What is between is tried again; what a task has learnt must be kept."""
    options = {"save_every_seconds": 0.0, "keep_last": 3}
    made = loop(Finetune(backbone=plain_net, optimizer=sgd), folder=tmp_path, options={**options, "stop_after_task": 0})
    made.fit()
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    process = forks.start(_learn_on_a_full_disk, tmp_path, True)
    process.join(60)
    assert process.exitcode == 0
    said = (tmp_path / "told.txt").read_text()
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert said == f"checkpoint {last}: cannot be written (File too large); the newest earlier checkpoint: {last}"
    assert {path.name: path.read_bytes() for path in last.parent.iterdir()} == before
    again = loop(Finetune(backbone=plain_net, optimizer=sgd), folder=tmp_path, options=options)
    again.fit("last")
    assert_same_run(again, run(Finetune(backbone=plain_net, optimizer=sgd)))


def counters(ready, started, processed, completed):
    return {"ready": ready, "started": started, "processed": processed, "completed": completed}


def test_counters_are_settled_between_two_steps():
    loops = {
        "epoch_progress": {"total": counters(3, 3, 2, 2), "current": counters(3, 3, 2, 2)},
        "epoch_loop.batch_progress": {
            "total": counters(25, 24, 24, 24),
            "current": counters(5, 4, 4, 4),
            "is_last_batch": True,
        },
    }
    before = copy.deepcopy(loops)
    settle_progress(loops, mid_epoch=True)
    assert loops["epoch_loop.batch_progress"]["current"] == counters(4, 4, 4, 4)
    assert loops["epoch_loop.batch_progress"]["total"] == counters(24, 24, 24, 24)
    assert loops["epoch_loop.batch_progress"]["is_last_batch"] is False
    assert loops["epoch_progress"] == before["epoch_progress"]


def test_counters_are_settled_between_two_epochs():
    loops = {
        "epoch_progress": {"total": counters(4, 3, 3, 3), "current": counters(4, 3, 3, 3)},
        "epoch_loop.batch_progress": {"total": counters(9, 9, 9, 9), "current": counters(3, 3, 3, 3)},
    }
    settle_progress(loops, mid_epoch=False)
    assert loops["epoch_progress"]["current"] == loops["epoch_progress"]["total"] == counters(3, 3, 3, 3)


# ------------------------------------------------------------------ old checkpoints

OLD = ROOT / "tests" / "support" / "checkpoint_v1.ckpt"
"""Written by version 1, in the middle of an epoch of task 2: ``fit --model ER --model.memory_size 20 --model.backbone
MLP --model.backbone.hidden [8] --data.batch_size 100 --trainer.max_epochs 2 --trainer.accelerator cpu``."""


def test_a_checkpoint_of_version_1_holds_what_it_held():
    saved = load(OLD)
    part = saved["cl_lightning"]
    assert part["schema"] == 1
    assert part["place"] == {"task": 2, "phase": 0, "running": True, "origin": 4, "done": False}
    assert saved["global_step"] == 13
    assert saved["state_dict"]["memory.labels"].shape == (20,)
    assert part["matrix"]["R_ci"][1].tolist() == [0.0, 1.0]


def test_a_checkpoint_of_version_1_is_resumed_and_tested(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(OLD, tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert main(["test", "--ckpt_path", "run/checkpoints/last.ckpt"]) == 0
    said = capfd.readouterr().out
    assert "accuracy in % after task 2" in said
    assert main(["fit", "--ckpt_path", "run/checkpoints/last.ckpt"]) == 0
    assert "last accuracy" in capfd.readouterr().out
    assert load(tmp_path / "run" / "checkpoints" / "last.ckpt")["cl_lightning"]["place"]["task"] == 4
