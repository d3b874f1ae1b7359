"""Configuration files that are wrong or hostile: one line that names the file, and no endless work."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cl_lightning import checksums
from cl_lightning.cli import configs, main

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
WRONG = [
    ("run_dir: " + "{a: " * 2000 + "1" + "}" * 2000, "nested deeper than 100 levels"),
    ("run_dir: " + "[" * 120 + "]" * 120, "nested deeper than 100 levels"),
    ("trainer: {max_epochs: 1}\n" + LAUGHS, "line 7: remove aliases"),
    ("model: &m\n  init_args: [*m]\n", "contains itself"),
    ("trainer: {max_epochs: 1}\nseed_everything: 1\ntrainer: {max_steps: 2}\n", "line 3: remove one of the two"),
    (
        "model:\n  init_args:\n    memory_size: 1\n    memory_size: 2\n",
        "line 4: remove one of the two values of the key",
    ),
    ("data: !!python/object/apply:os.system ['touch proof']\n", "line 1: correct the YAML"),
    ("trainer: [1, 2\n", "correct the YAML"),
    ("trainer: {\x1b[31m: 1, \x07: 2}\n", "correct the YAML"),
    ('"\\e[2J": 1\n"\\e[2J": 2\n', "line 2: remove one of the two"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_wrong_config_is_one_line_that_names_the_file(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(text)
    for options in (["--config", "c.yaml"], ["--config=c.yaml"]):
        assert main(["fit", *options]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: config c.yaml")
        assert message in said
        assert said.count("\n") == 1
        assert "\x1b" not in said
    assert [path.name for path in Path().iterdir()] == ["c.yaml"]


@pytest.mark.parametrize("text", [text for text, _ in WRONG])
def test_a_wrong_config_in_a_checkpoint_is_one_line_that_names_the_file(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"cl_lightning": {"schema": 1, "config": text, "strategy": ""}, "state_dict": {}}, "c.ckpt")
    checksums.seal(Path("c.ckpt"))
    assert main(["test", "--ckpt_path", "c.ckpt"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: configuration in checkpoint c.ckpt")
    assert said.count("\n") == 1


@pytest.mark.parametrize("text", ["", "- 1", "just text", "1"])
def test_a_configuration_in_a_checkpoint_is_a_mapping(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"cl_lightning": {"schema": 1, "config": text or "null", "strategy": ""}, "state_dict": {}}, "c.ckpt")
    checksums.seal(Path("c.ckpt"))
    assert main(["test", "--ckpt_path", "c.ckpt"]) == 2
    assert capsys.readouterr().err.startswith("error: checkpoint c.ckpt: give --config")


@pytest.mark.parametrize(
    "arguments",
    [
        *("fit --config pipe", "fit --config=pipe", "fit --config part.yaml", "test --ckpt_path pipe"),
        *("fit --trainer pipe", "fit --model=pipe", "fit --model.optimizer pipe"),
    ],
)
def test_a_named_pipe_is_not_opened(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.mkfifo("pipe.yaml")
    Path("part.yaml").write_text("model: pipe.yaml\n")
    assert main(arguments.split()) == 2
    said = capsys.readouterr().err
    assert "pipe" in said
    assert said.count("\n") == 1


def test_a_last_checkpoint_that_is_a_named_pipe_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r/checkpoints").mkdir(parents=True)
    os.mkfifo("r/checkpoints/last.ckpt")
    assert main(["test", "--ckpt_path", "last", "--run_dir", "r"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --ckpt_path last: there is no")


def test_aliases_and_merged_keys_are_read_as_before() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: [*a, *a]\n"
    assert configs.parse(text, "c.yaml") == yaml.safe_load(text)
    assert configs.parse("", "c.yaml") is None
