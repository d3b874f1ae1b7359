"""Odd streams and odd files: each is learnt, with the right result, or told in one line before training starts."""

import os
import shutil
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from support.forks import pair
from support.runs import plain_net
from torch import Tensor
from torch.utils.data import Dataset

from cl_lightning.cli import main
from cl_lightning.data import TensorSource
from cl_lightning.data.images import image_files
from cl_lightning.datamodules import folder as folders
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.datamodules.dataset import UserDataset
from cl_lightning.datamodules.folder import ImageFolder
from cl_lightning.datamodules.npz import NpzData
from cl_lightning.loop import TaskLoop, results
from cl_lightning.report import command as report
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.stream import (
    Blurry,
    ClassIncremental,
    DomainIncremental,
    LabelFraction,
    Online,
    PermutedDomains,
    RotatedDomains,
    Scenario,
    SingleTask,
)


class Labels(ContinualDataModule):
    """Gray images of some labels; the brighter, the higher the label."""

    mean: ClassVar[tuple[float, ...]] = (0.5,)
    std: ClassVar[tuple[float, ...]] = (0.25,)

    def __init__(self, train: Any, test: Any, *, side: int = 4, domains: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.parts = {True: np.asarray(train, np.int64), False: np.asarray(test, np.int64)}
        self.side, self.domains = side, domains

    def source(self, *, train: bool) -> TensorSource:
        labels = self.parts[train]
        count = int(max(part.max(initial=0) for part in self.parts.values())) + 1
        images = np.zeros((len(labels), 1, self.side, self.side), np.uint8)
        images += (labels * (255 // count)).astype(np.uint8)[:, None, None, None]
        return TensorSource(
            images,
            labels,
            class_names=[str(label) for label in range(count)],
            domains=np.arange(len(labels)) % self.domains if self.domains else None,
            domain_names=[f"domain {index}" for index in range(self.domains)],
        )


def fast(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def loop(data: ContinualDataModule, method: Any = None, /, **trainer: Any) -> TaskLoop:
    settings: dict[str, Any] = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False}
    settings |= dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return TaskLoop(Trainer(**{**settings, **trainer}), method or Finetune(backbone=plain_net, optimizer=fast), data)


def learnt(data: ContinualDataModule, method: Any = None) -> TaskLoop:
    """Learn the stream, and check that all was seen once and counted once."""
    made = loop(data, method)
    matrix = made.fit()
    stream, found = made.stream, made.results()
    assert matrix.learned == found["finished"] == len(stream)
    assert matrix.totals.tolist() == [len(part) for part in stream.test]
    measured = ~matrix.R_ci.isnan()
    for t in range(len(stream)):
        assert measured[t].tolist() == [i <= t and len(stream.test[i]) > 0 for i in range(len(stream))]
    logits = made.strategy.network(torch.zeros(1, *data.image_shape)).logits
    assert logits.shape == (1, stream.tasks[-1].num_seen)
    assert logits.isfinite().all()
    assert 0 <= found["measures"]["average_accuracy"] <= 1
    return made


def told(data: ContinualDataModule) -> str:
    """The error with which a run ends before its first step."""
    made = loop(data)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        made.fit()
    assert not made.started
    return str(error.value)


# ---------------------------------------------------------------------- streams

THREE = np.repeat(np.arange(3), 6)


@pytest.mark.parametrize(
    ("labels", "scenario"),
    [
        (THREE, ClassIncremental(increment=1)),
        (THREE, SingleTask()),
        (np.arange(4), ClassIncremental(tasks=2)),
        (np.arange(4), ClassIncremental(increment=1)),
        (np.zeros(1), SingleTask()),
        (np.zeros(5), PermutedDomains(tasks=3)),
        (np.repeat(np.arange(3), 40), Blurry(tasks=6, disjoint=0, blurry=50)),
        (np.repeat(np.arange(2), 40), Blurry(tasks=4, disjoint=50, blurry=60)),
        (THREE, RotatedDomains(tasks=3)),
        (THREE, Online(ClassIncremental(increment=1), batch_size=100)),
        (THREE, Online(ClassIncremental(increment=1), batch_size=1)),
        (THREE, LabelFraction(ClassIncremental(increment=1), per_class=1)),
    ],
    ids=[
        "one class in a task",
        "one task",
        "one image in a class",
        "one image in a task",
        "one image of one class",
        "one class in all tasks",
        "classes that come back, with tasks that bring nothing new",
        "sharp and blurry classes",
        "nothing new but the angle",
        "batches larger than a task",
        "batches of one",
        "one label in a class",
    ],
)
@pytest.mark.filterwarnings("ignore:give --model.memory_size")
def test_small_and_repeating_tasks_are_learnt(labels: np.ndarray, scenario: Scenario) -> None:
    for data in ({}, {"batch_size": 1000, "drop_last": True}, {"batch_size": 2, "eval_batch_size": 1}):
        learnt(Labels(labels, np.unique(labels), scenario=scenario, **data))
    learnt(Labels(labels, np.unique(labels), scenario=scenario), ER(memory_size=2, backbone=plain_net))


def test_a_domain_that_lacks_classes_and_brings_none_is_learnt() -> None:
    data = Labels([0, 1, 0, 0, 1, 0], [0, 1, 1, 0], domains=2, scenario=DomainIncremental(["domain 1", "domain 0"]))
    assert [task.num_new for task in learnt(data).stream.tasks] == [2, 0]


def test_few_validation_samples_leave_one_to_train_on() -> None:
    made = learnt(Labels(np.arange(4), np.arange(4), scenario=ClassIncremental(tasks=2), val_fraction=0.9))
    assert [len(part) for part in made.stream.train] == [2, 2]
    made = learnt(Labels(THREE, np.arange(3), scenario=ClassIncremental(increment=1), val_fraction=0.9))
    assert [(len(a), len(b)) for a, b in zip(made.stream.train, made.stream.val, strict=True)] == [(1, 5)] * 3


def test_a_later_task_without_test_samples_is_learnt_and_a_first_one_is_reported() -> None:
    made = learnt(Labels(np.arange(4), [0, 1, 0], scenario=ClassIncremental(tasks=2)))
    assert made.matrix.R_ci[1].isnan().tolist() == [False, True]
    assert "forgetting" in made.results()["measures"]
    for tests in ([], [2, 3]):
        said = told(Labels(np.arange(4), tests, scenario=ClassIncremental(tasks=2)))
        assert said == (
            "Labels: the first task (task 0) has no test samples; add some, since each task "
            "ends with an evaluation, or begin with other classes"
        )


def test_a_thousand_classes_in_two_hundred_tasks_are_learnt(tmp_path: Path) -> None:
    labels = np.arange(1000)
    data = Labels(labels, labels, side=2, scenario=ClassIncremental(tasks=200, class_order="random"))
    made = learnt(data)
    assert made.matrix.R_ci.shape == (200, 200)
    assert made.matrix.per_class.shape == (200, 1000)
    assert made.trainer.global_step == 200
    results.write(tmp_path / "results.json", made.results())
    assert len(report.read([str(tmp_path)]).runs[0].class_names) == 1000


def _in_a_process(kind: str, target: str) -> None:
    """Learn tasks of few samples, in one of two processes or alone, and write what came out."""
    warnings.simplefilter("ignore")
    data = {
        "one test image": Labels(np.arange(3), np.arange(3), scenario=ClassIncremental(increment=1)),
        "one validation image": Labels(
            [0, 0, 1, 1], [0, 0, 1], scenario=ClassIncremental(increment=1), val_fraction=0.5, eval_batch_size=2
        ),
        "short tasks": Labels(
            [0, 0, 0, 1, 2, 2], [0, 0, 0, 1, 1, 2], scenario=ClassIncremental(increment=1), batch_size=4
        ),
        "classes that come back": Labels(
            np.repeat(np.arange(2), 20), [0, 1, 1], scenario=Blurry(tasks=4, disjoint=0, blurry=50)
        ),
    }[kind]
    two = {"devices": 2, "strategy": "ddp"} if "LOCAL_RANK" in os.environ else {}
    strategy = ER(memory_size=2, replay_size=3, backbone=plain_net, optimizer=fast)
    made = loop(data, strategy, max_epochs=2, **two)
    made.fit()
    parts = [made.matrix.R_ci, made.matrix.totals, *strategy.network.parameters(), strategy.memory.keys.sort().values]
    torch.save([part.detach().clone() for part in parts], f"{target}.{made.trainer.global_rank}")


@pytest.mark.parametrize("kind", ["one test image", "one validation image", "short tasks", "classes that come back"])
def test_two_processes_learn_tasks_shorter_than_a_batch_as_one_does(kind: str, tmp_path: Path) -> None:
    pair(_in_a_process, kind, str(tmp_path / "two"))
    _in_a_process(kind, str(tmp_path / "one"))
    alone = torch.load(tmp_path / "one.0", weights_only=True)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"two.{rank}", weights_only=True)
        for mine, other in zip(found, alone, strict=True):
            torch.testing.assert_close(mine, other, equal_nan=True)


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


# ---------------------------------------------------------------------- arrays


def archive(path: Path, **changes: Any) -> NpzData:
    chance = np.random.default_rng(0)
    parts = {
        "x_train": chance.integers(0, 256, (12, 4, 4), dtype=np.uint8),
        "y_train": np.arange(12) % 4,
        "x_test": chance.integers(0, 256, (8, 4, 4), dtype=np.uint8),
        "y_test": np.arange(8) % 4,
        **changes,
    }
    np.savez(path / "data.npz", **{key: value for key, value in parts.items() if value is not None})
    return NpzData(str(path / "data.npz"), scenario=ClassIncremental(tasks=2))


Y = np.arange(12) % 4


@pytest.mark.parametrize("dtype", ["i1", "u1", "<i2", ">i4", "u4", "i8", ">u8"])
def test_labels_of_any_integers_are_learnt(tmp_path: Path, dtype: str) -> None:
    made = learnt(archive(tmp_path, y_train=Y.astype(dtype), y_test=Y[:8].astype(dtype)[:, None]))
    assert made.stream.order == (0, 1, 2, 3)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": Y > 1}, "y_test: label 2 of sample 2 is no class of the training samples (False, True)"),
        ({"y_train": Y / 2}, "y_train: the label of sample 1 is 0.5, a value to be predicted (regression)"),
        ({"y_train": np.where(Y > 1, np.nan, 1.0)}, "y_train: the label of sample 2 is nan; remove such samples"),
        ({"y_train": Y.astype("m8[s]")}, "y_train: labels are timedelta64[s]"),
        ({"y_train": Y.astype("M8[s]")}, "y_train: labels are datetime64[s]"),
        ({"y_train": Y.astype("S")}, "y_test: labels are numbers, labels of the training samples strings"),
        ({"y_train": np.zeros(12, [("a", "i4")])}, "y_train: labels are [('a', '<i4')]"),
        (
            {"y_train": np.eye(4, dtype=int)[Y][:, [0, 0, 1]]},
            "y_train: the label of sample 0, (1, 1, 0), has 2 classes",
        ),
        ({"y_train": np.zeros((3, 4), int)}, "y_train: the label of sample 0, (0, 0, 0, 0), has 0 classes"),
        ({"y_train": np.int64(3)}, "y_train: labels are int64 of shape ()"),
        ({"y_train": Y.astype("u8") + np.uint64(2**63)}, "label 9223372036854775808 of sample 0 is outside the range"),
        (
            {"y_test": np.full(8, 10**13)},
            "y_test: label 10000000000000 of sample 0 is no class of the training samples",
        ),
        ({"y_train": Y * 2}, "y_test: label 1 of sample 1 is no class of the training samples (0, 2, 4, 6)"),
        ({"class_names": np.array([], str)}, "labels are limited to class names, of which there are none"),
        ({"class_names": np.array(list("abcdef"))}, "class 'e' has no training samples"),
        (
            {"x_train": np.full((12, 4, 4), np.nan)},
            "x_train is float64 from nan to nan: normalised images or measurements",
        ),
        ({"x_train": zeros(12, 4, 4).astype("V1")}, "save images as uint8"),
        ({"x_train": zeros(12, 4, 4, 3, 1)}, "x_train has shape (12, 4, 4, 3, 1); save images as (N, H, W)"),
        ({"x_train": zeros(12, 9, 9, 2)}, "x_train: images have shape (9, 9, 2); neither the first nor the last side"),
        ({"x_train": zeros(11, 4, 4)}, "y_train: labels are int64 of shape (12,); give 11 labels"),
        ({"x_train": np.array([object()] * 12)}, "x_train is refused: it holds pickled objects"),
        ({"x_test": None}, "x_test is missing; the file has x_train, y_test, y_train"),
        ({"x_test": zeros(8, 5, 5)}, "test images have shape (1, 5, 5), training images (1, 4, 4)"),
    ],
)
def test_arrays_that_cannot_be_learnt_from_are_reported(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert message in told(archive(tmp_path, **changes))


def test_a_label_that_would_make_a_million_million_classes_takes_no_memory(tmp_path: Path) -> None:
    names_ = np.array([f"class {label}" for label in range(4)])
    assert learnt(archive(tmp_path, y_train=Y * 2**60, y_test=Y[:8] * 2**60)).stream.class_names[1] == str(2**60)
    assert "0 .. 3, or 1 .. 4 throughout, as there are 4 class names" in told(
        archive(tmp_path, y_train=np.full(12, 2**62), class_names=names_)
    )


@pytest.mark.parametrize(
    ("shape", "image"),
    [
        ((1, 1), (1, 1, 1)),
        ((1, 1, 3), (3, 1, 1)),
        ((3, 1, 1), (3, 1, 1)),
        ((4, 4, 3), (3, 4, 4)),
        ((3, 4, 4), (3, 4, 4)),
        ((3, 3, 3), (3, 3, 3)),
        ((9, 5, 1), (1, 9, 5)),
        ((1, 28, 28), (1, 28, 28)),
        ((4, 9, 3), (4, 9, 3)),
    ],
)
def test_the_channels_of_small_images_are_found(tmp_path: Path, shape: tuple[int, ...], image: Any) -> None:
    data = archive(tmp_path, x_train=zeros(12, *shape), x_test=zeros(8, *shape))
    assert learnt(data).datamodule.image_shape == image


def test_names_that_are_no_text_in_utf8_stay_different(tmp_path: Path) -> None:
    data = archive(tmp_path, class_names=np.array([b"\xff", b"\xfe", b"a", b"b"]))
    assert learnt(data).stream.class_names == ("\\xff", "\\xfe", "a", "b")


# ---------------------------------------------------------------------- data sets of a user


class Items(Dataset[Any]):
    def __init__(self, items: Any, **attributes: Any) -> None:
        self.items = items
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def user(items: Any, attributes: dict[str, Any], **options: Any) -> UserDataset:
    return UserDataset(Items(items, **attributes), Items(items, **attributes), scenario=SingleTask(), **options)


BLACK = torch.zeros(3, 4, 4, dtype=torch.uint8)
GOOD: list[tuple[Tensor, int]] = [(BLACK, 0), (BLACK, 1)]


@pytest.mark.filterwarnings("ignore:.*every item is read once")
@pytest.mark.parametrize(
    ("items", "attributes", "message"),
    [
        ([("x", 0), ("y", 1)], {}, "train: item 0 is the str 'x'; give (image, label), the image a PIL image"),
        ([None, None], {"targets": [0, 1]}, "train: item 0 is of the type NoneType; give (image, label)"),
        ([3, 4], {"targets": [0, 1]}, "train: item 0 is of the type int; give (image, label)"),
        ([(), ()], {"targets": [0, 1]}, "train: items are empty; return (image, label)"),
        ([([[1], [1, 2]], 0)] * 2, {"targets": [0, 1]}, "train: item 0 is of the type list; give"),
        ([(BLACK[:, :0], 0)] * 2, {"targets": [0, 1]}, "item 0 is torch.uint8 of shape (3, 0, 4)"),
        ([(BLACK * torch.nan, 0)] * 2, {"targets": [0, 1]}, "item 0 is float32 from nan to nan: normalised images"),
        ([(Image.new("F", (4, 4)), 0)] * 2, {"targets": [0, 1]}, "item 0 cannot be read (pixels of mode F"),
        (GOOD, {"targets": [[0], [1, 2]]}, "train: labels are no array of numbers (setting an array element"),
        (GOOD, {"targets": [None, 1]}, "train: the label of sample 0 is None; remove such samples"),
        (GOOD, {"targets": {0, 1}}, "train: labels are no array of numbers (a set is not in the order of the images)"),
        (GOOD, {"targets": torch.tensor([0.0, 0.5], requires_grad=True)}, "train: the label of sample 1 is 0.5"),
        (GOOD, {"classes": 2}, "train: the attribute `classes` is a int; make it a list of names"),
        ([(BLACK, 0.5), (BLACK, 1.0)], {}, "the label of sample 0 is 0.5, a value to be predicted (regression)"),
        ([(BLACK, 2**70), (BLACK, 1)], {}, "labels are of the types int; give 2 labels"),
        ([{"image": BLACK}] * 2, {}, "items are dicts of 'image', and none is the label; give data.label_key"),
    ],
)
def test_data_sets_that_cannot_be_learnt_from_are_reported(
    items: Any, attributes: dict[str, Any], message: str
) -> None:
    said = told(user(items, attributes))
    assert said.startswith("UserDataset: train")
    assert message in said


@pytest.mark.filterwarnings("ignore:.*every item is read once")
@pytest.mark.parametrize(
    "attributes",
    [
        {"targets": [torch.tensor(0), torch.tensor(1)]},
        {"targets": np.array([0, 1], np.uint16)},
        {"targets": (0, 1)},
        {"targets": 3},  # no labels: the items tell them
        {"classes": lambda: 3},  # a method of that name
        {"classes": {"left": 0, "right": 1}},
        {"classes": [1, 2]},
    ],
)
def test_labels_and_names_of_all_sorts_are_learnt(attributes: dict[str, Any]) -> None:
    assert learnt(user(GOOD, attributes)).matrix.totals.tolist() == [2]


def test_gray_among_colours_is_reported_with_the_remedy_or_converted() -> None:
    mixed = [(Image.new("L", (5, 5)), 0), (Image.new("RGB", (5, 5)), 1)]
    assert "give `size` to scale and crop them, `mode` if only the channels differ" in told(
        user(mixed, {"targets": [0, 1]})
    )
    for mode in ("RGB", "L"):
        learnt(user(mixed, {"targets": [0, 1]}, mode=mode))


def test_a_shared_folder_is_not_written_to(photos: Path, tmp_path: Path) -> None:
    before = sorted(photos.rglob("*"))
    options = ["--data", "ImageFolder", "--data.root", str(photos), "--data.size", "8", "--trainer.max_epochs", "1"]
    options += ["--data.scenario", "SingleTask", "--model", "Finetune"]
    assert main(["fit", *options, "--run_dir", str(tmp_path / "run")]) == 0
    assert sorted(photos.rglob("*")) == before
    shutil.rmtree(tmp_path / "run")
