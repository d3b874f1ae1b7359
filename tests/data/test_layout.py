"""The rule that finds training and test images in folders."""

import re

import pytest

from cl_lightning.data.layout import find_layout, part_of


def grow(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *((name, "train") for name in ("train", "Train", "TRAINING", "training_set", "train2017", "images_train")),
        *((name, "val") for name in ("val", "valid", "Validation", "valset", "dev")),
        *((name, "test") for name in ("test", "Testing", "test_images", "eval", "evaluation", "holdout", "hold-out")),
        *((name, None) for name in ("train_station", "testudo", "valley", "device", "images", "dataset", "", "17")),
    ],
)
def test_names_of_parts_are_found_in_any_spelling(name, part):
    assert part_of(name) == part


@pytest.mark.parametrize(
    ("files", "levels", "train", "test"),
    [
        (("train/a/1.png", "test/a/1.png"), 1, ["train"], "test"),
        (("Training_Set/a/1.png", "EVAL/a/1.png"), 1, ["Training_Set"], "EVAL"),
        (("train/a/1.png", "holdout/a/1.jfif"), 1, ["train"], "holdout"),
        (("train/a/1.png", "val/a/1.png"), 1, ["train"], "val"),
        (("train/a/1.png", "val/a/1.png", "test/a/1.png"), 1, ["train", "val"], "test"),
        (("data/train/a/1.png", "data/test/a/1.png"), 1, ["data/train"], "data/test"),
        (("x/y/train/a/1.png", "x/y/test/a/1.png", "x/readme.txt"), 1, ["x/y/train"], "x/y/test"),
        (("train/a/1.png", "test/a/1.png", "labels/a.txt"), 1, ["train"], "test"),
        (("a/1.png", "b/1.png"), 1, ["."], None),
        (("test/1.png", "a/1.png", "train/1.png"), 1, ["."], None),  # classes of these names
        (("a/inner/1.png", "b/inner/1.png"), 1, ["."], None),
        (("a/1.png",), 1, ["."], None),
        (("photo/a/1.png", "sketch/a/1.png"), 2, ["."], None),
        (("test/a/1.png", "sketch/a/1.png"), 2, ["."], None),  # a domain of this name
        (("train/photo/a/1.png", "test/photo/a/1.png"), 2, ["train"], "test"),
    ],
)
def test_layouts_are_found_by_names_and_depth(tmp_path, files, levels, train, test):
    found = find_layout(grow(tmp_path, *files), levels, owner="X")
    assert [path.relative_to(tmp_path).as_posix() for path in found.train] == train
    assert (None if found.test is None else found.test.relative_to(tmp_path).as_posix()) == test


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("train/a/1.png", "Train/a/1.png", "test/a/1.png"), "'Train', 'train' may each be the train part"),
        (("train/a/1.png", "test/a/1.png", "eval/a/1.png"), "'eval', 'test' may each be the test part"),
        (("train/a/1.png", "test/a/1.png", "bee/1.png"), "'train', 'test' look like parts .* 'bee' like classes"),
        (
            ("train/a/1.png", "test/1.png"),
            "'train' look like parts .* 'test' like classes",
        ),  # test images without labels
        (("test/part/1.png", "ant/part/1.png"), "'test' look like parts .* 'ant' like classes"),
        (("train/1.png", "test/1.png"), "hold images without a folder for each class"),
        (("train/a/1.png",), "has `train` but no `test`; add `test`, or give .*train as root"),
        (("eval/a/1.png",), "has 'eval' but no `train`"),
        (("images/a/1.png", "images/b/1.png"), "single folder 'images'.*give .*images as root"),
    ],
)
def test_what_is_ambiguous_is_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=message) as raised:
        find_layout(grow(tmp_path, *files), 1, owner="X")
    assert re.search("rename|give|add|put", str(raised.value))


def test_folders_that_are_given_replace_the_rule(tmp_path):
    grow(tmp_path, "first/a/1.png", "second/a/1.png", "test/1.png")
    found = find_layout(tmp_path, 1, owner="X", train_folder="first", test_folder="second")
    assert (found.train, found.test) == ((tmp_path / "first",), tmp_path / "second")
    assert find_layout(tmp_path, 1, owner="X", train_folder=".").train == (tmp_path / ".",)
    for train, test, message in (
        (None, "second", "give train_folder too"),
        ("nowhere", None, "train_folder is 'nowhere'; give a folder inside"),
        ("first", "..", r"test_folder is '\.\.'; give a folder inside"),
        ("first", "./first", "are both 'first'"),
    ):
        with pytest.raises(ValueError, match=message):
            find_layout(tmp_path, 1, owner="X", train_folder=train, test_folder=test)
