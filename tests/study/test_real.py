"""A study of the command line: its cells are the runs that the commands would make."""

import json
import os

from support.command import ORDER, SHORT
from support.forks import start

from cl_lightning.cli import main


def study(folder, *arguments):
    os.chdir(folder)
    with open("said.txt", "a", buffering=1) as said:
        for descriptor in (1, 2):
            os.dup2(said.fileno(), descriptor)
    os._exit(main(["study", *arguments]))


def options():
    words = [*ORDER.split(), "natural", *SHORT]
    return {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}


def test_a_cell_is_the_run_that_its_command_makes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {
        "data": [{"name": "digits", "options": {"data": "Digits", **options()}}],
        "methods": [{"name": name.lower(), "options": {"model": name}} for name in ("ER",)],
        "seeds": [3],
    }
    (tmp_path / "s.yaml").write_text(json.dumps(content))
    process = start(study, tmp_path, "s.yaml")
    process.join(60)
    assert process.exitcode == 0, (tmp_path / "said.txt").read_text()
    cell = tmp_path / "studies" / "s" / "runs" / "digits" / "er" / "seed_3"
    (first, *_) = (
        (tmp_path / "studies" / "s" / "logs" / "runs" / "digits" / "er" / "seed_3.log").read_text().splitlines()
    )
    command = first.split()[2:]
    assert command[-2:] == ["--run_dir=studies/s/runs/digits/er/seed_3", "--ckpt_path=auto"]
    assert main([*command[:-2], "--run_dir", "byhand"]) == 0
    ours, theirs = (json.loads((place / "results.json").read_text()) for place in (cell, tmp_path / "byhand"))
    assert ours["matrix"] == theirs["matrix"]
    assert ours["fingerprints"] == theirs["fingerprints"]
    assert ours["hardware"]["threads"] == 1


def test_mistakes_of_the_command_line_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for content, said in (
        ({"methods": ["no_such"]}, "no_such"),
        (
            {"methods": [{"name": "er", "options": {"model": "ER", "model.sise": 1}}]},
            "er on digits: model: ER takes no 'sise'",
        ),
    ):
        data = {"name": "digits", "options": {"data": "Digits"}}
        (tmp_path / "s.yaml").write_text(json.dumps({"data": [data], **content}))
        assert main(["study", "s.yaml"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: study: ")
        assert error.count("\n") == 1
        assert said in error
