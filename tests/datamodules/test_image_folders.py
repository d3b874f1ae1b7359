"""Image folders: layouts, growing folders, domains."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.data_modules import again, begun, class_folder, image, loop, names_of

from cl_lightning.datamodules.domains import DomainFolder
from cl_lightning.datamodules.folder import ImageFolder, share
from cl_lightning.loop import TaskLoop
from cl_lightning.stream import (
    ClassIncremental,
    DomainIncremental,
)


def test_both_layouts_of_folders_are_read(tmp_path):
    for part, count in (("train", 5), ("test", 2)):
        for name in ("cat", "dog"):
            class_folder(tmp_path / "split" / part, name, count)
    data = ImageFolder(str(tmp_path / "split"), size=8, scenario=ClassIncremental(tasks=2))
    assert data.make_stream(0).class_names == ("cat", "dog")
    assert [len(part) for part in (*data.stream.train, *data.stream.test)] == [5, 5, 2, 2]
    for name in ("cat", "dog"):
        class_folder(tmp_path / "whole", name, 40)
    data = ImageFolder(str(tmp_path / "whole"), size=8, test_fraction=0.25, mode="L")
    tested, trained = names_of(data, train=False), names_of(data, train=True)
    assert len(tested | trained) == 80
    assert not tested & trained
    assert 8 <= len(tested) <= 32
    assert data.image_shape == (1, 8, 8)


def test_test_images_stay_test_images_when_files_and_classes_are_added(tmp_path):
    class_folder(tmp_path, "cat", 30)
    class_folder(tmp_path, "dog", 30)
    before = ImageFolder(str(tmp_path), size=4)
    tested, trained = names_of(before, train=False), names_of(before, train=True)
    class_folder(tmp_path, "bird", 30)
    for index in range(30, 50):
        image(9).save(tmp_path / "cat" / f"{index:03}.png")
    after = ImageFolder(str(tmp_path), size=4, seed=5)  # the seed of the run has no say
    assert tested <= names_of(after, train=False)
    assert trained <= names_of(after, train=True)
    assert names_of(ImageFolder(str(tmp_path), size=4, test_seed=1), train=False) != names_of(after, train=False)


def test_the_share_of_a_name_is_the_same_everywhere():
    assert share(0, "", "cat", "001.png") == pytest.approx(0.5, abs=0.5)
    assert share(0, "", "cat", "e\u0301.png") == share(0, "", "cat", "\u00e9.png")  # two ways to write one letter
    values = [share(0, "", "cat", f"{index}.png") for index in range(2000)]
    assert np.mean(np.array(values) < 0.2) == pytest.approx(0.2, abs=0.03)


def test_small_classes_have_an_image_on_either_side(tmp_path):
    for name, count in (("two", 2), ("three", 3), ("one", 1)):
        class_folder(tmp_path, name, count)
    for fraction in (0.001, 0.999):
        data = ImageFolder(str(tmp_path), size=4, test_fraction=fraction)
        with pytest.warns(UserWarning, match="ImageFolder: one: a single image, so there is no test image"):
            tested = {name.split("/")[0] for name in names_of(data, train=False)}
        assert tested == {"two", "three"}
        assert {name.split("/")[0] for name in names_of(data, train=True)} == {"one", "two", "three"}


def test_names_and_kinds_of_all_sorts_are_read(tmp_path):
    class_folder(tmp_path / "real", "caf\u00e9 au lait", 2)
    class_folder(tmp_path / "real", "b", 2)  # the same file names again
    big = Image.new("RGB", (4000, 3000), (10, 200, 30))
    big.save(tmp_path / "real" / "b" / "PHOTO.JPG")
    Image.new("RGB", (1, 1), (10, 200, 30)).save(tmp_path / "real" / "b" / "dot.bmp")
    Image.fromarray(np.full((6, 6), 1000, np.uint16)).save(tmp_path / "real" / "b" / "deep.png")
    image(5).quantize(8).save(tmp_path / "real" / "b" / "palette.gif")
    image(5).convert("L").save(tmp_path / "real" / "b" / "gray.png")
    class_folder(tmp_path / "elsewhere", "nested/deeper", 2)
    (tmp_path / "real" / "linked").symlink_to(tmp_path / "elsewhere" / "nested")
    (tmp_path / "real" / ".thumbnails").mkdir()
    (tmp_path / "real" / "readme.txt").touch()
    for options in ({"in_memory": True}, {"in_memory": False}):
        with pytest.warns(UserWarning, match="Left out: files that are not read as images: 1 .txt$"):
            data = begun(ImageFolder(str(tmp_path / "real"), size=16, scenario=ClassIncremental(tasks=1), **options))
        assert data.stream.class_names == ("b", "caf\u00e9 au lait", "linked")
        assert len(names_of(data, train=True) | names_of(data, train=False)) == 11
        assert sum(len(batch) for batch in data.train_dataloader()) == len(names_of(data, train=True))
        assert data.samples(train=True).in_memory == options["in_memory"]


def test_a_folder_gives_the_same_with_and_without_memory_and_with_workers(tmp_path):
    for value, name in ((20, "a"), (120, "b"), (200, "c")):
        class_folder(tmp_path, name, 8, value)
    results = []
    for options in ({"in_memory": True}, {"in_memory": False}, {"in_memory": False, "workers": 2}):
        data = ImageFolder(str(tmp_path), size=4, scenario=ClassIncremental(increment=1), batch_size=3, **options)
        run = loop(data, None)
        matrix = run.fit()
        results.append((matrix.R_ci, run.strategy.state_dict(), run.fingerprints, data.normalize.mean))
    for accuracies, state, prints, mean in results[1:]:
        assert accuracies.nan_to_num().equal(results[0][0].nan_to_num())
        assert all(value.equal(results[0][1][name]) for name, value in state.items())
        assert (prints, mean) == results[0][2:]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "ImageFolder: no folder at .*photos; give the folder that holds the images"),
        (lambda root: root.mkdir(), "photos holds no folders; make one for each class"),
        (lambda root: (root / "cat").mkdir(parents=True), r"no images in .*cat; add images \(allowed suffixes: \.jpg"),
        (
            lambda root: [class_folder(root / "train", "cat", 2), class_folder(root / "val", "dog", 2)],
            "val has the class 'dog', which is missing in .*train",
        ),
        (
            lambda root: class_folder(root / "train", "cat", 2),
            "photos has `train` but no `test`; add `test`, or give .*train as",
        ),
    ],
)
def test_folders_without_what_is_needed_are_refused(tmp_path, make, message):
    make(tmp_path / "photos")
    with pytest.raises(ValueError, match=message):
        ImageFolder(str(tmp_path / "photos")).make_stream(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "ImageFolder: size is 0"),
        ({"mode": "CMYK"}, "ImageFolder: mode is 'CMYK'; use 'RGB', or 'L'"),
        ({"test_fraction": 0.0}, r"ImageFolder: test_fraction is 0\.0; it must be in \(0, 1\)"),
    ],
)
def test_options_of_folders_are_checked_by_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        ImageFolder("photos", **options)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_damaged_file_is_told_before_training_or_left_out(tmp_path, in_memory):
    class_folder(tmp_path / "train", "a", 4)
    class_folder(tmp_path / "train", "b", 4, value=150)
    class_folder(tmp_path / "test", "a", 2)
    class_folder(tmp_path / "test", "b", 2)
    whole = (tmp_path / "train" / "a" / "001.png").read_bytes()
    (tmp_path / "train" / "a" / "001.png").write_bytes(whole[:-30])
    options = {"size": 4, "in_memory": in_memory, "scenario": ClassIncremental(tasks=2)}
    with pytest.raises(ValueError, match=r"ImageFolder: 1 of 8 files cannot be read: .*001\.png.*set skip_unreadable"):
        loop(ImageFolder(str(tmp_path), **options), tmp_path / "run").fit()
    assert not (tmp_path / "run").exists()
    data = ImageFolder(str(tmp_path), skip_unreadable=True, **options)
    with pytest.warns(UserWarning, match=r"001\.png.*They are left out"):
        stream = data.make_stream(0)
    assert [len(part) for part in stream.train] == [3, 4]


def test_damage_inside_a_file_that_is_not_kept_in_memory_is_found_where_files_are_skipped(tmp_path):
    class_folder(tmp_path, "a", 6)
    class_folder(tmp_path, "b", 6)
    path = tmp_path / "a" / "001.png"
    content = bytearray(path.read_bytes())
    content[60:80] = bytes(20)
    path.write_bytes(content)
    data = ImageFolder(str(tmp_path), size=4, in_memory=False, skip_unreadable=True)
    with pytest.warns(UserWarning, match=r"001\.png"):
        assert len(names_of(data, train=True) | names_of(data, train=False)) == 11


# ---------------------------------------------------------------------- folders that grow, through the loop


def folder_run(root: Path, run: Path, **options: Any) -> TaskLoop:
    data = ImageFolder(str(root), size=6, scenario=ClassIncremental(increment=2), batch_size=4, val_fraction=0.1)
    return loop(data, run, **options)


@pytest.mark.parametrize("new", [["ape"], ["ape", "zebra"]])
def test_class_folders_that_are_added_become_a_further_task_of_a_finished_run(tmp_path, new):
    for value, name in ((10, "cat"), (210, "dog")):
        class_folder(tmp_path / "data", name, value=value)
    first = folder_run(tmp_path / "data", tmp_path / "run")
    first.fit()
    assert first.matrix.learned == 1
    mean = first.datamodule.normalize.mean
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["ImageFolder"]["mean"] == list(mean)
    for place, name in enumerate(new):  # one name that comes before the others, and shifts their labels
        class_folder(tmp_path / "data", name, value=80 + 50 * place)
    second = folder_run(tmp_path / "data", tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run already"):
        second.fit()
    second = folder_run(tmp_path / "data", tmp_path / "run")
    steps = []
    second.strategy.on_train_start = lambda: steps.append(second.strategy.task.index)  # type: ignore[method-assign]
    second.fit("last")
    assert steps == [1]
    assert second.stream.class_names == ("cat", "dog", *new)
    assert second.matrix.learned == 2
    assert second.matrix.R_ci[0, 0] == first.matrix.R_ci[0, 0]
    assert second.fingerprints[0] == first.fingerprints[0]
    assert second.datamodule.normalize.mean == mean
    # Nothing new: the run stays as it is.
    third = folder_run(tmp_path / "data", tmp_path / "run")
    assert third.fit("last").learned == 2


def test_an_extended_run_can_be_stopped_and_resumed(tmp_path):
    for value, name in ((10, "cat"), (210, "dog")):
        class_folder(tmp_path / "data", name, value=value)
    folder_run(tmp_path / "data", tmp_path / "run").fit()
    class_folder(tmp_path / "data", "ape", value=100)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    whole = folder_run(tmp_path / "data", tmp_path / "run")
    whole.fit("last")

    stopped = folder_run(tmp_path / "data", tmp_path / "other", save_every_n_steps=1)
    save, count = stopped.files.save, []

    def killed(*, needed: bool = True) -> Path | None:
        path = save(needed=needed)
        count.append(path)
        if len(count) == 2:
            raise KeyboardInterrupt
        return path

    stopped.files.save = killed  # type: ignore[method-assign]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        stopped.fit("last")
    resumed = folder_run(tmp_path / "data", tmp_path / "other")
    resumed.fit("last")
    expected = whole.strategy.state_dict()
    assert all(value.equal(expected[name]) for name, value in resumed.strategy.state_dict().items())


def test_files_that_are_added_to_a_learnt_class_are_told(tmp_path):
    for value, name in ((10, "cat"), (210, "dog")):
        class_folder(tmp_path / "data", name, value=value)
    folder_run(tmp_path / "data", tmp_path / "run").fit()
    for index in range(40, 50):
        image(10).save(tmp_path / "data" / "cat" / f"{index}.png")
    with pytest.raises(ValueError, match=r"task 0 \(task 0\) has other classes or other samples"):
        folder_run(tmp_path / "data", tmp_path / "run").fit("last")


# ---------------------------------------------------------------------- domains


def test_domains_are_tasks_and_new_ones_extend_the_stream(tmp_path):
    for domain, names in (("photo", "ab"), ("sketch", "abc")):
        for value, name in enumerate(names):
            class_folder(tmp_path / domain, name, 8, 40 * value)
    data = DomainFolder(str(tmp_path), size=4)
    stream = data.make_stream(0)
    assert [task.name for task in stream.tasks] == ["photo", "sketch"]
    assert stream.class_names == ("a", "b", "c")
    assert [task.num_new for task in stream.tasks] == [2, 1]
    assert isinstance(data.default_scenario(data.dataset_info()), DomainIncremental)
    class_folder(tmp_path / "art", "b", 8)
    later = DomainFolder(str(tmp_path), size=4)
    longer = later.make_stream(0, again(stream))
    assert [task.name for task in longer.tasks] == ["photo", "sketch", "art"]
    assert [later.fingerprint(task) for task in range(2)] == [data.fingerprint(task) for task in range(2)]
    assert names_of(data, train=False) <= names_of(later, train=False)


def test_domains_come_in_both_layouts_and_are_refused_where_empty(tmp_path):
    for part in ("train", "test"):
        for domain in ("x", "y"):
            class_folder(tmp_path / "split" / part / domain, "a", 3)
            class_folder(tmp_path / "split" / part / domain, "b", 3)
    stream = DomainFolder(str(tmp_path / "split"), size=4).make_stream(0)
    assert [len(part) for part in (*stream.train, *stream.test)] == [6, 6, 6, 6]
    class_folder(tmp_path / "split" / "test" / "z", "a", 3)
    with pytest.raises(ValueError, match=r"has the domain 'z', which is missing in .*train"):
        DomainFolder(str(tmp_path / "split"), size=4).make_stream(0)
    (tmp_path / "empty" / "x").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"DomainFolder: .*x holds no folders"):
        DomainFolder(str(tmp_path / "empty")).make_stream(0)
    with pytest.raises(ValueError, match="DomainFolder: no folder at"):
        DomainFolder(str(tmp_path / "nowhere")).make_stream(0)
