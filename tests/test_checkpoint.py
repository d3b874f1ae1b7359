import copy
import os
import pickle

import pytest
import torch

from cl_lightning.checkpoint import SCHEMA, AtomicCheckpointIO, load, settle_progress


def test_what_is_written_is_read_and_no_temporary_file_stays(tmp_path):
    path = tmp_path / "new" / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"cl_lightning": {"schema": SCHEMA}, "x": torch.arange(3)}, path)
    assert torch.equal(load(path)["x"], torch.arange(3))
    assert os.listdir(path.parent) == ["a.ckpt"]


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "a.ckpt"
    writer = AtomicCheckpointIO()
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
def test_a_torn_file_is_told(tmp_path, content):
    path = tmp_path / "torn.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"torn\.ckpt: not a readable checkpoint"):
        load(path)


def test_half_a_checkpoint_is_told(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"cl_lightning": {"schema": SCHEMA}, "x": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load(path)


def test_files_of_others_and_of_later_versions_are_told(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="not written by this framework"):
        load(tmp_path / "other.ckpt")
    torch.save({"cl_lightning": {"schema": SCHEMA + 1}}, tmp_path / "later.ckpt")
    with pytest.raises(ValueError, match=f"its version is {SCHEMA + 1}"):
        load(tmp_path / "later.ckpt")
    with pytest.raises(ValueError, match="no such file"):
        load(tmp_path / "missing.ckpt")


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
