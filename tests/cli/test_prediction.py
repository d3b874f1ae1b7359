"""``predict``: a checkpoint classifies new image files."""

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cl_lightning.cli import main, prediction
from cl_lightning.datamodules.digits import Digits

COLOURS = {"blue": (20, 40, 220), "green, dark": (10, 90, 20), "red": (220, 30, 20)}


def paint(path: Path, colour: tuple[int, ...] | int, size: tuple[int, int] = (12, 10), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*size, len(colour)) if isinstance(colour, tuple) else size
    noise = np.random.default_rng(seed).integers(-15, 15, shape)
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


def rows_of(path: str | Path) -> tuple[list[str], list[list[str]]]:
    with open(path, newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    return head, rows


def check_probabilities(rows: list[list[str]], names: list[str]) -> None:
    values = np.array([[float(cell) for cell in row[2:]] for row in rows])
    assert values.shape == (len(rows), len(names))
    assert np.isfinite(values).all()
    np.testing.assert_allclose(values.sum(1), 1.0, atol=1e-5)
    assert [row[1] for row in rows] == [names[column] for column in values.argmax(1)]


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """Checkpoint of a run on a folder of colours, which is gone."""
    folder = tmp_path_factory.mktemp("colours")
    for name, colour in COLOURS.items():
        for index in range(12):
            paint(folder / "photos" / name / f"{index}.png", colour, seed=index)
    options = (
        f"--data ImageFolder --data.root {folder}/photos --data.size 8 --data.batch_size 6 --trainer.max_epochs 15"
    )
    scenario = (
        "--data.scenario ClassIncremental --data.scenario.sizes [2,1] --model.optimizer Adam --model.optimizer.lr 0.01"
    )
    assert main(["fit", *options.split(), *scenario.split(), "--run_dir", f"{folder}/run"]) == 0
    shutil.rmtree(folder / "photos")
    return folder / "run" / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    options = "--trainer.max_epochs 2 --loop.stop_after_task 2 --trainer.callbacks+=EMAEnsemble"
    assert main(["fit", *options.split(), "--run_dir", f"{folder}/run"]) == 0
    return folder / "run" / "checkpoints" / "last.ckpt"


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)


def predict(checkpoint: Path, *options: str) -> int:
    return main(["predict", "--ckpt_path", str(checkpoint), *options])


def test_images_of_a_folder_are_classified_without_the_training_data(colours, capsys):
    paint(Path("new/a.png"), COLOURS["red"], (40, 30))
    paint(Path("new/deep/b.jpg"), COLOURS["blue"], (9, 31))
    paint(Path("new/deep/c.png"), 128)  # grayscale
    paint(Path("new/deep/d.webp"), (*COLOURS["green, dark"], 255))  # with transparency
    Path("new/notes.txt").write_text("no image")
    assert predict(colours, "--images", "new", "--output", "out/found.csv") == 0
    assert capsys.readouterr().out == "4 images: out/found.csv\n"
    head, rows = rows_of("out/found.csv")
    names = list(COLOURS)
    assert head == ["path", "prediction", *names]
    assert [row[0] for row in rows] == ["new/a.png", "new/deep/b.jpg", "new/deep/c.png", "new/deep/d.webp"]
    assert [rows[index][1] for index in (0, 1, 3)] == ["red", "blue", "green, dark"]
    check_probabilities(rows, names)
    assert [path.name for path in Path("out").iterdir()] == ["found.csv"]
    assert not Path("runs").exists()


def test_a_single_file_is_classified(colours):
    paint(Path("one.png"), COLOURS["blue"])
    assert predict(colours, "--images", "one.png") == 0
    _, rows = rows_of("predictions.csv")
    assert [row[:2] for row in rows] == [["one.png", "blue"]]


def test_grayscale_models_know_the_classes_seen_and_see_what_a_test_sees(digits, monkeypatch):
    source = Digits().source(train=False)

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("the training data were asked for")

    monkeypatch.setattr(Digits, "source", forbidden)
    monkeypatch.setattr(Digits, "prepare_data", forbidden)
    for index, (image, label) in enumerate(zip(source.images[:, 0].numpy(), source.labels, strict=True)):
        if label < 6:
            path = Path("new") / f"{label}_{index:03d}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).convert("RGB" if index % 2 else "L").save(path)
    assert predict(digits, "--images", "new") == 0
    head, rows = rows_of("predictions.csv")
    assert head[2:] == ["0", "1", "2", "3", "4", "5"]  # of three tasks
    check_probabilities(rows, head[2:])
    right = [row[1] == Path(row[0]).name[0] for row in rows]
    found = json.loads((digits.parents[1] / "results.json").read_text())
    assert sum(right) / len(right) == pytest.approx(found["measures"]["average_accuracy"])


def test_callbacks_that_change_the_weights_for_evaluation_do_so_here(digits):
    paint(Path("one.png"), 128, (8, 8))
    assert predict(digits, "--images", "one.png", "--output", "with.csv") == 0
    assert predict(digits, "--images", "one.png", "--output", "without.csv", "--trainer.callbacks", "null") == 0
    assert rows_of("with.csv")[1] != rows_of("without.csv")[1]


def test_an_unreadable_image_is_named_and_nothing_is_written(colours, capsys):
    paint(Path("new/good.png"), COLOURS["red"])
    Path("new/bad.png").write_bytes(b"nothing")
    assert predict(colours, "--images", "new") == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: predict: 1 of 2 files cannot be read: new/bad.png: not a readable image")
    assert said.err.count("\n") == 1
    assert not Path("predictions.csv").exists()
    assert predict(colours, "--images", "new", "--skip_unreadable") == 0
    said = capsys.readouterr()
    assert said.err == "skipped new/bad.png\n"
    assert said.out == "1 images: predictions.csv\n"
    assert [row[0] for row in rows_of("predictions.csv")[1]] == ["new/good.png"]


def test_names_of_files_do_nothing_in_the_terminal_and_in_a_spreadsheet(colours, capsys, recwarn):
    for name in ("=1+1.png", "-a.png", "@b.png", "+c.png", "d\x1b[2J\n.png"):
        paint(Path("new") / name, COLOURS["red"])
    Path("new/bad\x1b[2J\x1b]0;owned\x07\nfake line.png").write_bytes(b"x")
    with contextlib.chdir("new"):
        assert predict(colours, "--images", ".", "--output", "../found.csv", "--skip_unreadable") == 0
    said = capsys.readouterr()
    assert said.err == "skipped bad\ufffd[2J\ufffd]0;owned\ufffd\ufffdfake line.png\n"
    assert not [warning for warning in recwarn if "left out" in str(warning.message)]
    paths = [row[0] for row in rows_of("found.csv")[1]]
    assert paths == ["./+c.png", "./-a.png", "./=1+1.png", "./@b.png", "d\ufffd[2J\ufffd.png"]
    assert all((Path("new") / path).exists() for path in paths[:4])


def test_names_of_classes_do_nothing_in_a_spreadsheet():
    file = io.StringIO()
    prediction._Writer(file, [], ["=1+1", "@x", " +y", "a\x1b[0m", "-", "plain"])
    assert next(csv.reader([file.getvalue()]))[2:] == ["'=1+1", "'@x", "' +y", "a\ufffd[0m", "'-", "plain"]


def test_a_file_that_turns_out_damaged_half_way_leaves_the_earlier_output_as_it_was(colours, capsys):
    paint(Path("new/bad.png"), COLOURS["red"], (60, 60))
    content = bytearray(Path("new/bad.png").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 40] = bytes(40)
    Path("new/bad.png").write_bytes(bytes(content))
    Path("predictions.csv").write_text("earlier")
    assert predict(colours, "--images", "new") == 2
    assert "new/bad.png: not a readable image" in capsys.readouterr().err
    assert Path("predictions.csv").read_text() == "earlier"
    assert sorted(path.name for path in Path().iterdir()) == ["new", "predictions.csv"]


def test_a_folder_without_images_is_an_error(colours, capsys):
    Path("empty").mkdir()
    assert predict(colours, "--images", "empty") == 2
    assert capsys.readouterr().err.startswith("error: predict: no images under empty; known endings are .jpg")
    assert predict(colours, "--images", "nowhere") == 2
    assert capsys.readouterr().err.startswith("error: predict: there is nothing at nowhere")
    assert predict(colours) == 2
    assert capsys.readouterr().err.startswith("error: predict: give --images")


def test_a_checkpoint_of_another_strategy_is_an_error(colours, capsys):
    paint(Path("one.png"), COLOURS["blue"])
    assert predict(colours, "--images", "one.png", "--model", "LwF") == 2
    assert "the checkpoint is of another strategy" in capsys.readouterr().err


def test_images_that_are_not_square_are_covered_and_cropped_at_the_centre():
    pixels = np.zeros((40, 100), np.uint8)
    pixels[:, 44:56] = 255
    tensor = prediction.cover(Image.fromarray(pixels), height=20, width=10)
    assert tensor.shape == (1, 20, 10)
    assert tensor.dtype == torch.uint8
    bright = (tensor[0] > 128).float().mean(0)
    assert torch.equal(bright, bright.flip(0))  # in the middle
    assert bright.sum() == 6  # 12 pixels at half the size
    Image.fromarray(pixels).save("wide.png")
    source = prediction.file_source([Path("wide.png")], Path(), [3, 20, 10], skip_unreadable=False)
    assert source.take(torch.tensor([0])).shape == (1, 3, 20, 10)


def test_images_of_a_number_of_channels_that_files_do_not_have_are_an_error():
    with pytest.raises(ValueError, match="images of 13 channels; files have 1 or 3"):
        prediction.file_source([], Path(), [13, 8, 8], skip_unreadable=False)
