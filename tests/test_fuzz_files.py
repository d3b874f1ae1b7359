"""Damage to all files that are read: only clear errors come out.

``HYPOTHESIS_PROFILE=stress`` tries twenty times as many examples.
"""

import contextlib
import copy
import io
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.fuzzing import JUNK, cases, check_message, damaged, mangled
from support.reports import content as run_content

from cl_lightning import cli
from cl_lightning.datamodules.npz import NpzData
from cl_lightning.loop import results
from cl_lightning.report import command
from cl_lightning.stream import (
    ClassIncremental,
    DatasetInfo,
    LabelFraction,
    Stream,
)
from cl_lightning.stream.scenarios import read_lists


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# ---------------------------------------------------------------------- streams


def manifest() -> tuple[Stream, DatasetInfo]:
    info = DatasetInfo(np.arange(18) % 3, np.arange(6) % 3, ("a", "b|", "<c>"))
    scenario = LabelFraction(ClassIncremental(sizes=[1, 2]), fraction=0.5)
    return scenario(info, seed=3, val_fraction=0.2), info


MANIFEST = json.dumps(manifest()[0].to_dict()).encode()


@cases(100)
@given(st.one_of(damaged(MANIFEST), mangled(lambda: json.loads(MANIFEST)).map(lambda data: json.dumps(data).encode())))
def test_a_damaged_manifest_gives_a_stream_of_the_data_or_a_clear_error(folder: Path, content: bytes) -> None:
    path = folder / "damaged.json"
    path.write_bytes(content)
    stream, info = manifest()
    try:
        found = Stream.load(path)
        found.check(info)
    except ValueError as error:
        check_message(error)
        return
    # What survives is a stream of the same samples, that can be written again.
    assert found.hashes == stream.hashes
    found.save(path)
    assert Stream.load(path) == found


@pytest.mark.parametrize(
    ("scenario", "problem"),
    [
        ('{"x": 1e999}', "scenario: holds a number that is not finite"),
        ('{"x": ' + "[" * 990 + "]" * 990 + "}", "nested too deeply"),
    ],
)
def test_a_manifest_that_could_not_be_written_again_is_reported(tmp_path: Path, scenario: str, problem: str) -> None:
    data = {**json.loads(MANIFEST), "scenario": "HERE"}
    (tmp_path / "stream.json").write_text(json.dumps(data).replace('"HERE"', scenario))
    with pytest.raises(ValueError, match=rf"stream\.json: .*{problem}"):
        Stream.load(tmp_path / "stream.json")


def test_numbers_out_of_range_in_a_manifest_are_reported() -> None:
    for name in ("passes", "batch_size"):
        with pytest.raises(ValueError, match=f"{name}: is beyond 64 bits"):
            Stream.from_dict({**json.loads(MANIFEST), name: 10**30})


@cases(50)
@given(st.sampled_from([b"[[1, 2], [3, 4]]", b"1 2\n3, 4  # two\n"]).flatmap(damaged))
def test_damaged_lists_of_indices_give_lists_or_a_clear_error(folder: Path, content: bytes) -> None:
    path = folder / "lists"
    path.write_bytes(content)
    with contextlib.suppress(ValueError):
        assert all(type(index) is int for items in read_lists(str(path)) for index in items)


RESULTS = json.dumps(run_content(tasks=2)).encode()
OTHER = json.dumps(run_content("cl_lightning.strategies.baselines.finetune.Finetune", tasks=2)).encode()


@cases(15)
@given(
    st.one_of(damaged(RESULTS), mangled(lambda: json.loads(RESULTS)).map(lambda data: json.dumps(data).encode())),
    st.sampled_from(command.FORMATS),
    st.booleans(),
)
def test_damaged_results_are_read_or_reported_in_a_line(folder: Path, content: bytes, form: str, two: bool) -> None:
    for name, data in (("one", content), ("two", OTHER)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "results.json").write_bytes(data)
    runs = [str(folder / "one"), *([str(folder / "two")] if two else [])]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command.main([*runs, "--format", form, "--output", str(folder / "report.html")])
    assert code in (0, 2)
    assert code == 0 or (not two and err.getvalue().count("\n") == 1)
    out.getvalue().encode()


def arrays() -> dict[str, np.ndarray]:
    chance = np.random.default_rng(0)
    return {
        "x_train": chance.integers(0, 256, (12, 4, 4), dtype=np.uint8),
        "y_train": np.arange(12) % 4,
        "x_test": chance.integers(0, 256, (8, 4, 4), dtype=np.uint8),
        "y_test": np.arange(8) % 4,
        "class_names": np.array(["a", "b", "c", "d"]),
    }


def archive(parts: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, part in parts.items():
            made.writestr(zipfile.ZipInfo(name), part)  # without the time of day
    return file.getvalue()


def parts() -> dict[str, bytes]:
    """The members of the archive, as numpy writes them."""
    found = {}
    for key, array in arrays().items():
        file = io.BytesIO()
        np.save(file, array)
        found[f"{key}.npy"] = file.getvalue()
    return found


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """Damaged as a whole, in one member (with a checksum that fits), or with other arrays in it."""
    kind = draw(st.sampled_from(["bytes", "header", "arrays"]))
    if kind == "bytes":
        return draw(damaged(archive(parts())))
    made, key = parts(), draw(st.sampled_from(sorted(parts())))
    if kind == "header":
        made[key] = draw(damaged(made[key][:128])) + made[key][128:]
        return archive(made)
    dtype = draw(st.sampled_from(["?", "i1", "u8", ">i4", "f2", "f8", "c8", "S3", "U2", "V2", "M8[s]", "m8[s]", "O"]))
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 12]), max_size=5)))
    file = io.BytesIO()
    array = np.full(shape, draw(st.sampled_from([0, 1, 200, 127]))).astype(dtype)
    np.save(file, array, allow_pickle=True)
    made[key] = file.getvalue()
    if draw(st.booleans()):
        del made[draw(st.sampled_from(sorted(made)))]
    return archive(made)


@cases(150)
@given(archives())
def test_a_damaged_archive_of_arrays_is_learnt_from_or_reported(folder: Path, content: bytes) -> None:
    path = folder / "data.npz"
    path.write_bytes(content)
    data = NpzData(str(path), scenario=ClassIncremental(increment=1))
    try:
        data.make_stream(0)
    except ValueError as error:
        check_message(error)
        return
    assert data.samples(train=True).take(torch.tensor([0])).dtype == torch.uint8


def test_an_archive_that_asks_for_more_memory_than_there_is_is_reported(tmp_path: Path) -> None:
    made = parts()
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 1000, 1000), }".ljust(117) + b"\n"
    made["x_train.npy"] = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(100)
    (tmp_path / "data.npz").write_bytes(archive(made))
    with pytest.raises(ValueError, match=r"data\.npz: x_train is damaged \(.*llocate"):
        NpzData(str(tmp_path / "data.npz")).make_stream(0)


# ---------------------------------------------------------------------- configurations

CONFIG: dict[str, Any] = {
    "seed_everything": 3,
    "trainer": {
        "max_epochs": 1,
        "accelerator": "cpu",
        "callbacks": [{"class_path": "EMAEnsemble", "init_args": {"momentum": 0.9}}],
    },
    "model": {
        "class_path": "ER",
        "init_args": {
            "memory_size": 20,
            "policy": {"class_path": "ClassBalanced", "init_args": {"by": "class"}},
            "backbone": {"class_path": "MLP", "init_args": {"hidden": [8]}},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        },
    },
    "data": {
        "class_path": "Digits",
        "init_args": {
            "batch_size": 32,
            "val_fraction": 0.1,
            "scenario": {"class_path": "ClassIncremental", "init_args": {"tasks": 5, "class_order": "random"}},
            "transforms": [{"class_path": "RandomCrop", "init_args": {"padding": 1}}],
        },
    },
    "loop": {"stop_after_task": 1, "phase_epochs": {"train": 1}},
}
TEXT = yaml.safe_dump(CONFIG).encode()
TALE = st.sampled_from(
    ["${x", "${seed_everything}", "${nosuch.key}", "${loop", "a.b.c", "os.system", "builtins.eval", "Nosuch", "1e999"]
)


@pytest.fixture
def built(monkeypatch, tmp_path) -> Iterator[list[bool]]:
    """Runs of ``fit`` end where training would begin; tells of each whether it came so far."""
    from cl_lightning.cli import commands

    reached: list[bool] = []

    def prepare(self: commands.ContinualCLI) -> None:
        self._make_loop()
        self.datamodule.make_stream(0)
        reached.append(True)

    monkeypatch.setattr(commands.ContinualCLI, "act", prepare)
    monkeypatch.chdir(tmp_path)
    return reached


def fit(content: bytes | str) -> tuple[int, str]:
    """Exit code of ``fit`` with a configuration, and what it says on standard error."""
    Path("config.yaml").write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["fit", "--config", "config.yaml", "--run_dir", "run"])
    shutil.rmtree("run", ignore_errors=True)
    return code, err.getvalue()


def check_fit(content: bytes | str) -> None:
    code, said = fit(content)
    assert code in (0, 2), said
    if code == 2:
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        said.encode()


def test_the_configuration_that_is_damaged_below_is_right(built) -> None:
    assert fit(TEXT) == (0, "")
    assert built == [True]


@cases(15)
@given(st.one_of(damaged(TEXT), mangled(lambda: copy.deepcopy(CONFIG), JUNK | TALE)))
def test_a_damaged_configuration_is_accepted_or_reported_in_a_line(built, content: Any) -> None:
    check_fit(content if isinstance(content, bytes) else json.dumps(content))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a: &a [*a]", "remove the alias; the value contains itself"),
        ("model: &m {class_path: ER, init_args: *m}", "remove the alias; the value contains itself"),
        ("trainer: null", "trainer: None is not allowed; give keys and values, or remove it"),
        ("loop: 3", "loop: 3 is not allowed; give keys and values, or remove it"),
        ("trainer: [1]", "trainer: "),
        ("trainer: {max_epochs: '${x'}", "trainer.max_epochs: "),
        (
            "trainer: {max_epochs: '${loop.nosuch}'}",
            "refer to another key by its full name, such as ${loop.keep_tasks}",
        ),
        ("model: !!python/object/apply:os.mkdir ['hacked']", "could not determine a constructor for the tag"),
        ("trainer: {logger: {class_path: Nosuch}}", "no class 'Nosuch'; give an import path, or one of CSVLogger"),
        ('model: "a\\e[31m.b"', "model: "),
    ],
)
def test_configurations_that_once_ended_in_a_traceback_are_an_error(built, content: str, told: str) -> None:
    check_fit(content)
    code, said = fit(content)
    assert code == 2
    assert told in said
    assert "\x1b" not in said
    assert not Path("hacked").exists()


def test_results_are_shown_whatever_the_names() -> None:
    data = run_content(tasks=2)
    data["tasks"][0]["name"], data["tasks"][1]["name"] = "[/x]", "\x1b[31m\ud800[b]"
    file = io.StringIO()
    from rich.console import Console

    results.show(data, Console(file=file, width=200))
    assert "0 [/x]" in file.getvalue()
    assert "1 \ufffd[31m\ufffd[b]" in file.getvalue()
    file.getvalue().encode()
