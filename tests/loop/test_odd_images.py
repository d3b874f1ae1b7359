"""Odd image files and folders: each is learnt with the right result, or refused in one line before training."""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.odd import learnt, told

from cl_lightning.cli import main
from cl_lightning.data.images import image_files
from cl_lightning.datamodules import folder as folders
from cl_lightning.datamodules.folder import ImageFolder
from cl_lightning.stream import (
    ClassIncremental,
)

# ---------------------------------------------------------------------- image files


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of four pictures."""
    for shade, name in ((60, "ape"), (200, "bee")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(4):
            picture(shade + index).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path / "photos"


def picture(shade: int, size: tuple[int, int] = (6, 6)) -> Image.Image:
    return Image.new("RGB", size, (shade, shade, shade))


def in_folder(root: Path, **options: Any) -> ImageFolder:
    return ImageFolder(str(root), **{"size": 8, "scenario": ClassIncremental(increment=1), **options})


def names(root: Path, **options: Any) -> dict[str, list[str]]:
    """Files of each class, as they are read."""
    data = in_folder(root, test_fraction=0.5, **options)
    return {
        name: sorted(file.name for part in data._files for file in part if file.class_name == name)
        for name in sorted({file.class_name for part in data._files for file in part})
    }


def twelve_bits(path: Path) -> None:
    Image.fromarray(np.linspace(0, 65535, 36).reshape(6, 6).astype(np.uint16)).save(path)


def palette(path: Path) -> None:
    image = Image.new("P", (6, 6), 1)
    image.putpalette([0, 0, 0, 250, 10, 10] + [0] * 756)
    image.save(path, transparency=0)


ODD_IMAGES: dict[str, Callable[[Path], Any]] = {
    "gray.png": lambda path: Image.new("L", (6, 6), 90).save(path),
    "gray_alpha.png": lambda path: Image.new("LA", (6, 6), (90, 128)).save(path),
    "black_white.png": lambda path: Image.new("1", (6, 6), 1).save(path),
    "sixteen_bits.png": twelve_bits,
    "palette.png": palette,
    "cmyk.jpg": lambda path: Image.new("CMYK", (6, 6), (0, 200, 200, 0)).save(path),
    "transparent.png": lambda path: Image.new("RGBA", (6, 6), (9, 9, 9, 0)).save(path),
    "one_pixel.png": lambda path: picture(90, (1, 1)).save(path),
    "one_row.png": lambda path: picture(90, (500, 1)).save(path),
    "large.jpg": lambda path: picture(90, (4000, 3000)).save(path),
    "animated.gif": lambda path: picture(90).save(path, save_all=True, append_images=[picture(9)]),
}


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_odd_images_among_plain_ones_are_learnt(photos: Path, mode: Any, in_memory: bool) -> None:
    for name, write in ODD_IMAGES.items():
        write(photos / "ape" / name)
    made = learnt(in_folder(photos, mode=mode, in_memory=in_memory))
    assert made.datamodule.image_shape == (3 if mode == "RGB" else 1, 8, 8)
    assert sum(len(part) for part in (*made.stream.train, *made.stream.test)) == 8 + len(ODD_IMAGES)
    source = in_folder(photos, mode=mode, in_memory=False, test_fraction=0.01).samples(train=True)
    paths = [path.name for path in source.paths]  # type: ignore[attr-defined]
    for name, shade in (("gray.png", 90), ("one_pixel.png", 90), ("large.jpg", 90), ("transparent.png", 255)):
        if name in paths:
            image = source.take(torch.tensor([paths.index(name)]))
            assert image.float().mean() == pytest.approx(shade, abs=1)


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_that_cannot_be_read_are_named_before_training(photos: Path, in_memory: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(photos / "ape" / "whole.jpg")
    whole = (photos / "ape" / "whole.jpg").read_bytes()
    bad: dict[str, Callable[[Path], Any]] = {
        "truncated.jpg": lambda path: path.write_bytes(whole[: len(whole) // 2]),
        "empty.png": lambda path: path.write_bytes(b""),
        "text.png": lambda path: path.write_text("no image"),
        "page.png": lambda path: path.write_bytes(b"<svg xmlns='http://www.w3.org/2000/svg'></svg>"),
        "gone.png": lambda path: path.symlink_to("nowhere.png"),
        "itself.png": lambda path: path.symlink_to("itself.png"),
    }
    for name, write in bad.items():
        path = photos / "bee" / name
        write(path)
        said = told(in_folder(photos, in_memory=in_memory))
        assert f"bee/{name}: not a readable image (" in said
        assert said.startswith("ImageFolder: 1 of ")
        assert said.endswith("Repair or remove them, or set skip_unreadable to leave them out")
        with pytest.warns(UserWarning, match="They are left out"):
            learnt(in_folder(photos, in_memory=in_memory, skip_unreadable=True))
        path.unlink()


def test_a_program_in_place_of_an_image_is_not_started(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was started")

    for name in ("Popen", "check_call", "run", "call"):
        monkeypatch.setattr(f"subprocess.{name}", never)
    picture(90).save(photos / "ape" / "x.eps")
    (photos / "ape" / "x.eps").rename(photos / "ape" / "x.png")  # Pillow has PostScript drawn by another program
    assert "ape/x.png: not a readable image (cannot identify image file" in told(in_folder(photos))


def test_files_of_one_name_in_several_places_are_distinguished(photos: Path) -> None:
    for index, place in enumerate(("ape/left", "ape/right", "bee/left")):
        (photos / place).mkdir()
        picture(90 + index).save(photos / place / "0.png")
    picture(10).save(photos / "ape" / "0.jpg")
    picture(10).save(photos / "ape" / "0.PNG")
    found = names(photos)
    assert found["ape"] == sorted(["0.PNG", "0.jpg", *(f"{i}.png" for i in range(4)), "left/0.png", "right/0.png"])
    assert found["bee"] == ["0.png", "1.png", "2.png", "3.png", "left/0.png"]
    learnt(in_folder(photos))


def test_names_that_differ_in_the_encoding_of_accents_alone_leave_an_image_on_either_side(photos: Path) -> None:
    (photos / "cat").mkdir()
    for name in ("\u00e9.png", "e\u0301.png"):
        picture(90).save(photos / "cat" / name)
    for fraction in (0.001, 0.5, 0.999):
        data = in_folder(photos, test_fraction=fraction)
        train, test = ([file for file in part if file.class_name == "cat"] for part in data._files)
        assert (len(train), len(test)) == (1, 1)
    learnt(in_folder(photos))


ODD_NAMES = ["\u00fcber", "\u732b", "\U0001f431\u200d\U0001f4bb", "a b", "'\"", "[/red]".replace("/", ""), "=1+1", "-x"]


def test_unicode_names_are_learnt_and_printed_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    undecodable = os.fsdecode(b"\xff\xfe")
    for shade, name in enumerate([*ODD_NAMES, "line\nbreak", "\x1b[31mred", undecodable]):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(3):
            picture(20 * shade).save(tmp_path / "photos" / name / f"{name.strip()}{index}.png")
    made = learnt(in_folder(tmp_path / "photos"))
    assert set(ODD_NAMES) < set(made.stream.class_names)
    run = str(tmp_path / "run")
    options = ["--data", "ImageFolder", "--data.root", str(tmp_path / "photos"), "--data.size", "8"]
    options += ["--data.scenario", "ClassIncremental", "--data.scenario.increment", "1", "--trainer.max_epochs", "1"]
    assert main(["fit", *options, "--run_dir", run]) == 0
    assert main(["test", "--ckpt_path", f"{run}/checkpoints/last.ckpt"]) == 0
    out, err = capsys.readouterr()
    assert "\x1b[31m" not in out + err
    out.encode()
    page = Path(run, "report.html").read_text(encoding="utf-8")
    assert "\U0001f431\u200d\U0001f4bb" in page


@pytest.mark.parametrize("end", [".png", ".jpeg", ".heic", ""])
def test_links_lead_anywhere_but_to_folders_above(photos: Path, tmp_path: Path, end: str) -> None:
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    picture(90).save(outside / "far.png")
    (photos / "ape" / f"link{end or '.png'}").symlink_to(outside / "far.png")
    (photos / "ape" / "folder").symlink_to(outside, target_is_directory=True)
    for number, target in enumerate(
        (".", "..", "../..", str(tmp_path))
    ):  # each of them holds the images of all classes
        (photos / "ape" / f"up{number}{end}").symlink_to(target, target_is_directory=True)
    (photos / "all").symlink_to(".", target_is_directory=True)
    found = names(photos)
    assert list(found) == ["ape", "bee"]
    assert found["ape"] == sorted([*(f"{i}.png" for i in range(4)), "folder/far.png", f"link{end or '.png'}"])
    assert len(found["bee"]) == 4
    learnt(in_folder(photos))


def test_a_link_to_the_folder_of_another_class_is_that_folder(photos: Path) -> None:
    (photos / "monkey").symlink_to("ape", target_is_directory=True)
    assert names(photos)["monkey"] == names(photos)["ape"]


@pytest.mark.parametrize("target", ["nowhere", "cat"])
def test_a_class_or_folder_that_is_a_link_to_nowhere_is_reported(photos: Path, target: str) -> None:
    (photos / "cat").symlink_to(target)
    said = told(in_folder(photos))
    assert said == f"{photos}/cat is a link to {target}, which does not exist; repair or remove the link"
    (photos / "cat").unlink()
    (photos / "bee" / "more").symlink_to(target)
    assert f"{photos}/bee/more is a link to {target}" in told(in_folder(photos))


def test_a_folder_that_may_only_be_read_is_learnt_from_and_stays_as_it_is(photos: Path) -> None:
    everything = [photos, *photos.rglob("*")]
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in everything}
    try:
        learnt(in_folder(photos))
        learnt(in_folder(photos, in_memory=False, workers=0))
    finally:
        for path in everything:
            path.chmod(stat.S_IRWXU)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [photos, *photos.rglob("*")]} == before


def test_a_folder_that_may_not_be_read_is_reported(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path, *_: object) -> list[Path]:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(folders, "image_files", refuse)
    said = told(in_folder(photos))
    assert said == f"ImageFolder: {photos}/ape cannot be read (permission denied); change its permissions"


def test_a_missing_folder_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        image_files(tmp_path / "nowhere")


def test_a_class_of_one_image_is_learnt_without_being_tested(photos: Path) -> None:
    (photos / "cat").mkdir()
    picture(10).save(photos / "cat" / "only.png")
    with pytest.warns(UserWarning, match="cat: a single image, so there is no test image"):
        made = learnt(in_folder(photos))
    assert made.matrix.totals.tolist()[2] == 0
    for path in (photos / "ape").iterdir():
        if path.name != "0.png":
            path.unlink()
    with pytest.warns(UserWarning, match="ape, cat: a single image"):
        assert "the first task (task 0) has no test samples" in told(in_folder(photos))


def test_a_shared_folder_is_not_written_to(photos: Path, tmp_path: Path) -> None:
    before = sorted(photos.rglob("*"))
    options = ["--data", "ImageFolder", "--data.root", str(photos), "--data.size", "8", "--trainer.max_epochs", "1"]
    options += ["--data.scenario", "SingleTask", "--model", "Finetune"]
    assert main(["fit", *options, "--run_dir", str(tmp_path / "run")]) == 0
    assert sorted(photos.rglob("*")) == before
    shutil.rmtree(tmp_path / "run")
