"""Image folders: what is found and left out is reported, and what is no file is refused."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cl_lightning.datamodules.domains import DomainFolder
from cl_lightning.datamodules.folder import ImageFolder


def class_folder(root: Path, name: str, count: int) -> None:
    (root / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        image = Image.fromarray(np.full((6, 6, 3), 10 * index, np.uint8))
        image.save(root / name / f"{index}.png")


def names_of(data: ImageFolder, *, train: bool) -> list[str]:
    return [path.relative_to(data.root).as_posix() for path in data.source(train=train).paths]


def test_what_a_folder_holds_is_reported(tmp_path, caplog):
    for part, names in (("train", "abc"), ("val", "ab"), ("Test", "ab")):
        for name in names:
            class_folder(tmp_path / "data" / part, name, 2)
    (tmp_path / "data" / "annotations").mkdir()
    for index in range(3):
        (tmp_path / "data" / "train" / "a" / f"{index}.npy").touch()
    (tmp_path / "data" / "train" / "list.txt").touch()
    data = ImageFolder(str(tmp_path), size=4)
    with pytest.warns(UserWarning, match="ImageFolder") as caught:
        assert len(names_of(data, train=True)) == 10
    (message,) = [str(warning.message) for warning in caught]
    for part in (
        "ImageFolder: 3 classes; 10 training images in .*train and .*val; 4 test images: .*Test",
        "Left out: files that are not read as images: 3 .npy, 1 .txt; folders without images: annotations; ",
        "1 classes without test images, such as 'c'$",
    ):
        assert re.search(part, message), message
    class_folder(tmp_path / "plain", "a", 4)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        ImageFolder(str(tmp_path / "plain"), size=4).source(train=True)
    assert "1 classes; 3 training images in" in caplog.text


def test_the_folders_that_are_given_are_read(tmp_path):
    for part in ("first", "second", "test"):
        class_folder(tmp_path / part, "a", 4)
    data = ImageFolder(str(tmp_path), size=4, train_folder="first", test_folder="second")
    assert {name.split("/")[0] for name in names_of(data, train=True)} == {"first"}
    assert {name.split("/")[0] for name in names_of(data, train=False)} == {"second"}


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_refused_by_name(tmp_path, in_memory, kind):
    class_folder(tmp_path, "a", 4)
    if kind == "pipe":
        os.mkfifo(tmp_path / "a" / "x.png")
    else:
        (tmp_path / "a" / "x.png").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=rf"a/x\.png: it is a (named )?{kind}, not a file; remove it"):
        ImageFolder(str(tmp_path), size=4, in_memory=in_memory).make_stream(0)


def test_files_of_every_level_are_counted_for_domains(tmp_path):
    class_folder(tmp_path / "train" / "photo", "a", 2)
    class_folder(tmp_path / "test" / "photo", "a", 2)
    for folder in ("train", "train/photo", "train/photo/a"):
        (tmp_path / folder / "notes.txt").touch()
    with pytest.warns(UserWarning, match=r"files that are not read as images: 3 \.txt$"):
        assert len(DomainFolder(str(tmp_path), size=4).source(train=True)) == 2


def test_a_class_without_a_readable_ending_is_refused_with_what_it_holds(tmp_path):
    class_folder(tmp_path, "a", 2)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "scan.dcm").touch()
    with pytest.raises(ValueError, match=r"no images in .*b \(its files: 1 \.dcm\); add images"):
        ImageFolder(str(tmp_path), size=4).make_stream(0)
