import os
import random
import zipfile

import pytest
import torch

from cl_lightning.checksums import (
    DamagedError,
    candidates,
    check,
    clear_torn,
    keep_earlier,
    link,
    newest,
    resume_from,
    seal,
)


def written(path, value=0):
    torch.save({"x": torch.arange(500) + value, "name": "abc"}, path)
    seal(path)
    return path


def test_a_sealed_file_is_still_one_that_torch_and_zip_read(tmp_path):
    path = written(tmp_path / "a.ckpt")
    check(path)
    assert torch.load(path, weights_only=True)["x"].equal(torch.arange(500))
    assert torch.load(path, weights_only=True, mmap=True)["name"] == "abc"
    assert zipfile.ZipFile(path).testzip() is None


def test_any_flipped_bit_is_seen_or_does_no_harm(tmp_path):
    path = written(tmp_path / "a.ckpt")
    whole = path.read_bytes()
    chance = random.Random(0)
    for place in {chance.randrange(len(whole)) for _ in range(400)} | set(range(len(whole) - 120, len(whole))):
        content = bytearray(whole)
        content[place] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            check(path)
        except DamagedError:
            continue
        # Without a valid mark, the checksums of the archive are used.
        assert place >= len(whole) - 120
        assert torch.load(path, weights_only=True)["x"].equal(torch.arange(500))


def test_any_shorter_file_is_seen(tmp_path):
    path = written(tmp_path / "a.ckpt")
    whole = path.read_bytes()
    archive = len(whole) - 84  # without the seal, of which a part does no harm
    for size in (*range(0, archive, 37), archive - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedError, match=r"a\.ckpt"):
            check(path)


def test_a_file_without_a_seal_is_judged_by_the_checksums_of_its_parts(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"x": torch.arange(500)}, path)
    check(path)
    content = bytearray(path.read_bytes())
    place = content.index(torch.arange(500).numpy().tobytes()[800:900])
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedError, match="damaged"):
        check(path)


def test_what_is_no_archive_is_not_sealed(tmp_path):
    (tmp_path / "a").write_bytes(b"no archive, but long enough to hold its end")
    with pytest.raises(ValueError, match="it must be a zip archive without a comment"):
        seal(tmp_path / "a")


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_so_many_files_are_kept_in_their_order(tmp_path, keep):
    last = tmp_path / "last.ckpt"
    for number in range(6):
        keep_earlier(last, keep)
        (tmp_path / "draft").write_text(str(number))
        os.replace(tmp_path / "draft", last)
        assert last.read_text() == str(number)
    expected = {"last.ckpt": "5", **{f"last-{age}.ckpt": str(5 - age) for age in range(1, keep)}}
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == expected
    keep_earlier(last, 1)  # fewer than before: the others go
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_newest_whole_file_is_found_and_damage_is_reported(tmp_path):
    last = tmp_path / "last.ckpt"
    assert newest(last) == (None, [])
    for age, name in enumerate(("task_000.ckpt", "task_001.ckpt", "last-2.ckpt", "last-1.ckpt", "last.ckpt")):
        path = written(tmp_path / name)
        os.utime(path, ns=(age * 10**9, age * 10**9))
    expected = ["last.ckpt", "last-1.ckpt", "last-2.ckpt", "task_001.ckpt", "task_000.ckpt"]
    assert [path.name for path in candidates(last)] == expected
    for damaged, name in enumerate(expected):
        found, problems = newest(last)
        assert found == tmp_path / name
        assert [problem.split(":")[0] for problem in problems] == [
            f"checkpoint {tmp_path / other}" for other in expected[:damaged]
        ]
        found.write_bytes(b"torn")
    assert newest(last)[0] is None


def test_a_run_is_resumed_from_an_earlier_file_and_later_files_are_removed(tmp_path):
    last = tmp_path / "last.ckpt"
    for age, name in enumerate(("last-3.ckpt", "task_000.ckpt", "last-2.ckpt", "last-1.ckpt", "last.ckpt")):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, ns=(age * 10**9, age * 10**9))
    resume_from(last, tmp_path / "task_000.ckpt")
    assert last.read_text() == "task_000.ckpt"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last-3.ckpt", "last.ckpt", "task_000.ckpt"]
    resume_from(last, last)
    resume_from(last, tmp_path.parent / "elsewhere.ckpt")
    assert last.read_text() == "task_000.ckpt"


def test_a_file_system_without_hard_links_gets_copies(tmp_path, monkeypatch):
    def refused(*args):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refused)
    (tmp_path / "a").write_text("a")
    link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a").write_text("changed")
    assert (tmp_path / "b").read_text() == "a"


def test_torn_drafts_are_cleared_and_nothing_else(tmp_path):
    for name in (".last.ckpt.x1y2", ".task_000.ckpt.zz", "last.ckpt", ".hidden"):
        (tmp_path / name).touch()
    clear_torn(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "last.ckpt"]


def test_the_newest_whole_file_may_be_of_a_finished_task(tmp_path):
    """With ``last`` damaged, the age of a file counts, not the kind of its name; links of one file have one age."""
    last = tmp_path / "last.ckpt"
    for age, name in enumerate(("task_009", "last-1", "task_010", "last")):
        written(tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", ns=(age * 10**9, age * 10**9))
    os.link(tmp_path / "task_010.ckpt", tmp_path / "task_1000.ckpt")
    assert [path.stem for path in candidates(last)] == ["last", "task_1000", "task_010", "last-1", "task_009"]
    last.write_bytes(b"torn")
    assert newest(last)[0] == tmp_path / "task_1000.ckpt"


def test_a_file_that_cannot_be_read_is_not_whole(tmp_path, monkeypatch):
    last, earlier = tmp_path / "last.ckpt", tmp_path / "last-1.ckpt"
    written(last)
    written(earlier)

    def broken(path, check=check):
        if path == last:
            raise OSError(5, "Input/output error")
        check(path)

    monkeypatch.setattr("cl_lightning.checksums.check", broken)
    assert newest(last) == (earlier, [f"checkpoint {last}: cannot be read (Input/output error)"])
