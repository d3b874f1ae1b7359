"""Command-line arguments that are resolved without torch: checkpoints, configs by name, defaults, required options."""

import difflib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from cl_lightning import checksums, renamed
from cl_lightning.cli import configs
from cl_lightning.escape_control import printable

PROGRAM = "python -m cl_lightning"
COMMANDS = {
    "fit": "train on a stream of tasks; by default experience replay on Split-Digits",
    "test": "evaluate a checkpoint on the test data of its tasks",
    "validate": "evaluate a checkpoint on the samples held out by data.val_fraction",
    "predict": "classify a folder of images with a checkpoint, into a CSV file",
    "report": "compare runs: a table, and one HTML page",
    "study": "run many methods, streams and seeds, and compare them",
    "methods": "list the strategies and callbacks",
}


def fail(message: str) -> NoReturn:
    """Print one line on standard error and exit with code 2."""
    print(f"error: {printable(message)}", file=sys.stderr)
    raise SystemExit(2)


def value_of(arguments: Sequence[str], option: str) -> str | None:
    """Value of an option; the last value if the option is given more than once."""
    found = None
    for index, argument in enumerate(arguments):
        if argument == option and index + 1 < len(arguments):
            found = arguments[index + 1]
        elif argument.startswith(f"{option}="):
            found = argument.partition("=")[2]
    return found


def without(arguments: Sequence[str], option: str) -> list[str]:
    """The arguments without an option and its value."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != option and not argument.startswith(f"{option}="):
            kept.append(argument)
        skip = not skip and argument == option
    return kept


def resolve_last(arguments: list[str]) -> list[str]:
    """The arguments with ``--ckpt_path last`` or ``auto`` replaced by the path of the checkpoint."""
    path = value_of(arguments, "--ckpt_path")
    if path is None:
        return arguments
    if path == "auto":
        run_dir = value_of(arguments, "--run_dir")
        if run_dir is None:
            fail("--ckpt_path auto: give --run_dir, the folder whose last checkpoint is resumed if there is one")
        if not checksums.candidates(Path(run_dir) / "checkpoints" / "last.ckpt"):
            return without(arguments, "--ckpt_path")
        path = "last"
    if path == "last":
        run_dir = value_of(arguments, "--run_dir")
        last = Path(run_dir) / "checkpoints" / "last.ckpt" if run_dir is not None else last_of_newest_run()
        found, problems = checksums.newest(last) if last is not None else (None, [])
        for problem in problems:
            print(printable(problem), file=sys.stderr)
        if found is None:
            where = run_dir or "runs"
            which = "no undamaged checkpoint" if problems else "no checkpoint"
            fail(f"--ckpt_path last: there is {which} under {where}; give --run_dir, or the path of a .ckpt file")
        path = str(found)
        print(f"checkpoint: {printable(path)}", file=sys.stderr)
    elif not Path(path).is_file():
        fail(f"--ckpt_path {path}: there is no such file; give the path of a .ckpt file, 'last' or 'auto'")
    rest = without(arguments, "--ckpt_path")
    return [rest[0], "--ckpt_path", path, *rest[1:]]


def last_of_newest_run() -> Path | None:
    """``last.ckpt`` of the run under ``runs`` with the newest checkpoint; the file itself may be missing."""
    found = list(Path("runs").glob("*/*/checkpoints/*.ckpt"))
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return newest.with_name("last.ckpt") if newest is not None else None


def resolve_configs(arguments: Sequence[str]) -> list[str]:
    """The arguments with config names replaced by paths: ``--config er`` by ``experiments/**/er.yaml``.

    A value is a name if it has neither a folder nor a suffix, and the working directory has no file of that name. A
    pipe is read, and replaced by its content.
    """
    resolved: list[str] = []
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if equals and option in ("--config", "-c"):
            resolved.append(f"{option}={_config_path(value)}")
        elif index and arguments[index - 1] in ("--config", "-c"):
            resolved.append(_config_path(argument))
        else:
            resolved.append(argument)
    return resolved


def _config_path(value: str) -> str:
    try:
        value = configs.of_pipe(value)
    except ValueError as error:
        fail(str(error))
    if not re.fullmatch(r"[\w-]+", value) or Path(value).exists() or value == "null":
        return value
    files = sorted(experiments(Path("*.yaml")))
    found = [path for path in files if path.stem == value]
    if len(found) == 1:
        return str(found[0])
    if found:
        fail(f"--config {value}: several files have this name; give the path of one: {', '.join(map(str, found))}")
    near = difflib.get_close_matches(value, sorted({path.stem for path in files}), n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    fail(f"--config {value}: no file of this name under experiments{hint}")


def experiments(pattern: Path) -> list[Path]:
    """Configs by a pattern of their file names: of the folder ``experiments`` here, or of the installed package."""
    here = Path("experiments")
    folder = here if here.is_dir() else Path(__file__).resolve().parents[1] / "experiments"
    return [path for path in folder.rglob(str(pattern)) if path.is_file()]


def check_required(arguments: Sequence[str]) -> None:
    """Fail if a required option is missing; nothing is checked if there is a config, which may contain it."""
    command = arguments[0]
    if any(argument.partition("=")[0] in ("--config", "-c") for argument in arguments):
        return
    if command != "fit" and value_of(arguments, "--ckpt_path") is None:
        fail(f"{command}: give --ckpt_path, a checkpoint file or 'last'")
    if command == "predict":
        images = value_of(arguments, "--images")
        if images is None:
            fail("predict: give --images, an image file or a folder of images")
        if not Path(images).exists():
            fail(f"predict: there is nothing at {images}; give an image file or a folder of images")


DEFAULTS = {"model": "ER", "data": "Digits"}
"""Classes that are used if neither an option nor a config names one: the quickstart."""


OF_A_CALL = ("ckpt_path", "config", "images", "output", "skip_unreadable", "task", "run_dir", "trust_checkpoint")
"""Options of one call of the program, which no configuration of a checkpoint contains."""


def complete(arguments: list[str]) -> tuple[list[str], dict[str, Any] | None]:
    """The arguments with the configuration of the checkpoint and the default classes added, and this configuration.

    The configuration is None where it is not used, because there is no checkpoint or the user gives a configuration.
    A default class is added only if no other class is named. As a default of the parser, its arguments would be passed
    on to the class that replaces it, if that class has arguments of the same names.
    """
    command, rest = arguments[0], arguments[1:]
    path = value_of(arguments, "--ckpt_path")
    saved, content = "", None
    for config in configs_of(rest):
        configs.read(config)
    for argument in rest:  # the parser opens a file that is given in place of options
        configs.refuse_pipe(argument.partition("=")[2] or argument)
    if path is not None:
        from cl_lightning.loop import checkpoint as checkpoints  # torch takes seconds to import

        saved = checkpoints.load(path)["cl_lightning"].get("config", "")
    if saved and not configs_of(rest):
        content = _of_checkpoint(saved, str(path))
        if command != "fit" and isinstance(trainer := content.get("trainer"), dict):
            # The hardware of the fit does not matter for evaluation.
            for key in ("accelerator", "devices", "num_nodes", "strategy", "plugins", "logger", "profiler"):
                trainer.pop(key, None)
        rest = [f"--config={json.dumps(content)}", *rest]
    for key, default in DEFAULTS.items():
        if class_of(rest, key) is None:
            rest = [f"--{key}", default, *rest]
    return [command, *with_current_names(rest)], content


SOURCE = "--model.source"
"""Network of test-time adaptation; as the path of a checkpoint it names a run."""
_PIXELS = ("mean", "std", "resize", "center_crop", "interpolation")


def with_source_run(arguments: list[str]) -> tuple[list[str], dict[str, Any] | None]:
    """The arguments with the path of a checkpoint as ``--model.source`` replaced by the strategy of the run.

    The images are normalised and scaled as those of the run, unless options or configs say otherwise. A backbone that a
    config names is left out.

    Returns:
        The arguments, and the configuration of the strategy, ``{"model": ...}``; None without such an option.
    """
    path = value_of(arguments, SOURCE)
    if path is None or not path.endswith(".ckpt"):
        return arguments, None
    if not Path(path).is_file():
        raise ValueError(f"{SOURCE} {printable(path)}: there is no such file; give the path of a .ckpt file")
    from cl_lightning.loop import checkpoint as checkpoints  # torch takes seconds to import

    part = checkpoints.load(path)["cl_lightning"]
    content = _of_checkpoint(config, path) if (config := part.get("config", "")) else {}
    if not isinstance(model := content.get("model"), Mapping) or "class_path" not in model:
        raise ValueError(
            f"{SOURCE} {printable(path)}: the checkpoint has no configuration; a run that was made in Python is "
            "adapted in Python, with SourceRun(strategy, checkpoint)"
        )
    run = {"class_path": "SourceRun", "init_args": {"strategy": model, "checkpoint": path}}
    options = _pixels(content, part.get("normalisation", {}))
    taken = [f"--data.{name}={json.dumps(value)}" for name, value in options.items() if not _is_given(arguments, name)]
    for option in taken:
        print(f"note: of the run of {printable(path)}: {printable(option)}", file=sys.stderr)
    given = {argument.partition("=")[0].split(".")[1] for argument in arguments if argument.startswith("--model.")}
    taken += [f"--model.{part}=null" for part in ("backbone", "head", "source_head") if part not in given]
    return [*without(arguments, SOURCE), f"{SOURCE}={json.dumps(run)}", *taken], {"model": dict(model)}


def _pixels(content: Mapping[str, Any], normalisation: Mapping[str, Any]) -> dict[str, Any]:
    """Options with which the images of a run became inputs of its network."""
    data = content.get("data")
    given = data.get("init_args", {}) if isinstance(data, Mapping) else {}
    found = {name: given.get(name) for name in _PIXELS} | dict(normalisation)
    if found["resize"] is None:
        found["interpolation"] = None
    return {name: value for name, value in found.items() if value is not None}


def _is_given(arguments: Sequence[str], name: str) -> bool:
    """Whether an option or a config sets an option of the data."""
    if value_of(arguments, f"--data.{name}") is not None:
        return True
    contents = [content for config in configs_of(arguments) if isinstance(content := content_of(config), Mapping)]
    data = [content["data"] for content in contents if isinstance(content.get("data"), Mapping)]
    return any(name in part.get("init_args", {}) for part in data if isinstance(part.get("init_args", {}), Mapping))


def _of_checkpoint(text: Any, path: str) -> dict[str, Any]:
    """The configuration of a checkpoint with current names, without options of one call such as files to write."""
    content = renamed.config(
        configs.parse(text if isinstance(text, str) else "", f"configuration in checkpoint {path}")
    )
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint {printable(path)}: give --config; its configuration is not a mapping")
    return {key: value for key, value in content.items() if key not in OF_A_CALL}


def with_current_names(arguments: list[str]) -> list[str]:
    """The arguments with the names of earlier releases replaced by current names; prints a note for each."""

    def note(line: str) -> None:
        print(f"note: {printable(line)}", file=sys.stderr)

    current = list(arguments)
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        follows = index > 0 and arguments[index - 1] in ("--config", "-c")
        if not follows and not (equals and option in ("--config", "-c")):
            continue
        content = content_of(argument if follows else value)
        if isinstance(content, Mapping) and (now := renamed.config(content, note)) is not content:
            current[index] = json.dumps(now) if follows else f"{option}={json.dumps(now)}"
    return list(renamed.arguments(current, class_of(current, "model") or "", note))


def configs_of(arguments: Sequence[str]) -> list[str]:
    """Values of all ``--config`` options."""
    found = [a.partition("=")[2] for a in arguments if a.startswith(("--config=", "-c="))]
    return found + [value for option, value in pairwise(arguments) if option in ("--config", "-c")]


def class_of(arguments: Sequence[str], key: str) -> str | None:
    """Name or path of the class that options or, if there are none, configs give for ``key``; None without one."""
    for option in (f"--{key}", f"--{key}.class_path"):
        if (given := value_of(arguments, option)) is not None:
            return given
        if option in arguments:
            return ""  # without a value; the parser reports it
    found = None
    for config in configs_of(arguments):
        content = content_of(config)
        chosen = content.get(key) if isinstance(content, Mapping) else None
        if isinstance(chosen, str):
            found = chosen
        elif isinstance(chosen, Mapping) and "class_path" in chosen:
            found = str(chosen["class_path"])
    return found


def content_of(config: str) -> Any:
    """Content of a config file, or of YAML given in its place; None if it cannot be read."""
    try:
        return configs.read(config)
    except ValueError:
        return None  # the parser reports it
