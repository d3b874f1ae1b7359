"""Options that a config of a method sets, and the numbers of its source, in ``PUBLISHED`` of the method's test file."""

import ast
import shlex
from pathlib import Path
from typing import Any

import yaml

from support import ROOT

EXPERIMENTS = ROOT / "experiments"


def described(value: Any) -> Any:
    """``{"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}`` as ``SGD(lr=0.1)``; lists item by item."""
    if isinstance(value, dict) and "class_path" in value:
        options = ", ".join(f"{name}={described(part)}" for name, part in sorted(value.get("init_args", {}).items()))
        return f"{value['class_path'].rpartition('.')[2]}({options})"
    if isinstance(value, dict):
        return {name: described(part) for name, part in value.items()}
    if isinstance(value, list):
        return [described(part) for part in value]
    return value


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """``second`` over ``first``; options of another class replace those of the first."""
    if first.get("class_path", second.get("class_path")) != second.get("class_path", first.get("class_path")):
        return second
    both = {name: (first[name], second[name]) for name in first.keys() & second.keys()}
    joined = {
        name: merged(*pair) if all(isinstance(part, dict) for part in pair) else pair[1] for name, pair in both.items()
    }
    return {**first, **second, **joined}


def option(name: str, text: str) -> dict[str, Any]:
    """The option ``--data.scenario.tasks 20`` as a config; options of a class stand under ``init_args``."""
    first, *path = name.split(".")
    value = yaml.safe_load(text)
    if path and path[-1] in ("scenario", "base"):
        value = {"class_path": value}
    for position, part in reversed(list(enumerate(path))):
        value = {part: value}
        if first in ("data", "model") and position <= len(path) - 1:
            value = {"init_args": value}
    return {first: value}


def facts(path: Path, *, whole: bool) -> dict[str, Any]:
    """Options that a config sets, by name; with ``whole``, with the data of the last command in its head."""
    lines = path.read_text(encoding="utf-8").splitlines()
    config = yaml.safe_load("\n".join(lines))
    model = config.get("model", {})
    options = model.get("init_args", {}) if isinstance(model, dict) else {}
    found = {name: described(value) for name, value in options.items()}
    if not whole:
        return found | {f"trainer.{name}": described(value) for name, value in config.get("trainer", {}).items()}
    command = [line for line in lines if line.startswith("#   python -m cl_lightning fit ")][-1]
    words = shlex.split(command.partition(" fit ")[2])
    given: dict[str, Any] = {}
    for name, text in zip(words[::2], words[1::2], strict=True):
        if name == "--config":
            (file,) = [path] if text == path.stem else EXPERIMENTS.rglob(f"{text}.yaml")
            given = merged(given, yaml.safe_load(file.read_text(encoding="utf-8")))
        elif not name.startswith("--model"):
            given = merged(given, option(name.removeprefix("--"), text))
    data = {f"data.{name}": described(value) for name, value in given["data"]["init_args"].items() if name != "root"}
    loop = {
        f"{part}.{name}": described(value)
        for part in ("loop", "trainer")
        for name, value in given.get(part, {}).items()
    }
    return {**found, **data, **loop}


def claims(path: Path) -> bool:
    """Whether a config says that it has published numbers."""
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return path.parent.name == "published" or any(
        word in " ".join(head) for word in ("paper's", "of the paper", "authors' values")
    )


def numbers() -> dict[str, dict[str, Any]]:
    """``PUBLISHED`` of all test files of methods: literals, by the name of the config."""
    tables: dict[str, dict[str, Any]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "\nPUBLISHED = " not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PUBLISHED":
                found = ast.literal_eval(node.value)
                assert not tables.keys() & found.keys(), path
                tables.update(found)
    return tables
