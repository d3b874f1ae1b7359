"""The command line: ``python -m cl_lightning fit | validate | test | predict | report | methods``.

Only what needs no torch is here, so that help, the version and simple mistakes are told at once.
"""

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from cl_lightning import sealed

PROGRAM = "python -m cl_lightning"
COMMANDS = {
    "fit": "learn a stream of tasks; by default experience replay on Split-Digits",
    "test": "accuracies of a checkpoint on the test data of its tasks",
    "validate": "accuracy and loss on the samples held out by data.val_fraction",
    "predict": "classify a folder of images with a checkpoint, into a CSV file",
    "report": "compare runs: a table, and one HTML page",
    "methods": "list the strategies and callbacks",
}
HELP = f"""Continual learning on PyTorch Lightning.

usage: {PROGRAM} COMMAND [options]

commands:
{chr(10).join(f"  {name:<9} {text}" for name, text in COMMANDS.items())}

  -h, --help, --version

Options of a command: {PROGRAM} fit --help
Options of a class:   {PROGRAM} fit --model.help LwF
Classes go by their name or import path; configs merge, and what comes later wins:

  {PROGRAM} fit
  {PROGRAM} fit --model LwF --model.distill_weight 2
  {PROGRAM} fit --model mymethod.MyMethod --data Digits
  {PROGRAM} fit --config data.yaml --config method.yaml
  {PROGRAM} fit --model.backbone ResNet32 --trainer.callbacks+=EMAEnsemble
  {PROGRAM} fit --ckpt_path last
  {PROGRAM} test --ckpt_path runs/LwF/0000/checkpoints/last.ckpt
  {PROGRAM} predict --ckpt_path last --images FOLDER --output FILE.csv
  {PROGRAM} report runs --output report.html

Mistakes are told in one line; CL_LIGHTNING_TRACEBACK=1 shows where they come from."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 if a run fails, 2 after a mistake, 128 + n after signal n.

    Args:
        args: Command line arguments; None for those of the process.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return stopped_at_once()
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning makes an exit of it
            return stopped_at_once()
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def _run(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in ("-h", "--help"):
        print(HELP)
        return 0
    if command == "--version":
        print(f"cl_lightning {version()}")
        return 0
    if not command:
        print(HELP, file=sys.stderr)
        return 2
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        fail(
            f"there is no command {command!r}"
            + (f"; did you mean {near[0]!r}?" if near else f"; use {', '.join(COMMANDS)}")
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's classes in the working directory
    if command == "methods":
        return _methods(rest)
    if command == "report":
        from cl_lightning import report

        return report.main(rest)
    arguments = resolve_last(arguments)
    if not set(rest) & {"-h", "--help"}:
        check_required(arguments)

    from cl_lightning.commands import run  # torch and Lightning take seconds to import

    return run(arguments)


def stopped_at_once() -> int:
    """Say that nothing was saved; returns the exit code."""
    print("stopped; what was done since the last checkpoint is lost", file=sys.stderr)
    return 130


def fail(message: str) -> NoReturn:
    """End with one line on standard error and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def version() -> str:
    """Version of the package, installed or as a bare checkout."""
    try:
        return metadata.version("cl-lightning")
    except metadata.PackageNotFoundError:
        from cl_lightning import __version__

        return __version__


def value_of(arguments: Sequence[str], option: str) -> str | None:
    """Value of an option, the last one if it is given more than once."""
    found = None
    for index, argument in enumerate(arguments):
        if argument == option and index + 1 < len(arguments):
            found = arguments[index + 1]
        elif argument.startswith(f"{option}="):
            found = argument.partition("=")[2]
    return found


def without(arguments: Sequence[str], option: str) -> list[str]:
    """The arguments but for an option and its value."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != option and not argument.startswith(f"{option}="):
            kept.append(argument)
        skip = not skip and argument == option
    return kept


def resolve_last(arguments: list[str]) -> list[str]:
    """The arguments with the path of the checkpoint in place of ``--ckpt_path last`` or ``auto``."""
    path = value_of(arguments, "--ckpt_path")
    if path is None:
        return arguments
    if path == "auto":
        run_dir = value_of(arguments, "--run_dir")
        if run_dir is None:
            fail("--ckpt_path auto: give --run_dir, the folder whose last checkpoint is gone on from if there is one")
        if not sealed.candidates(Path(run_dir) / "checkpoints" / "last.ckpt"):
            return without(arguments, "--ckpt_path")
        path = "last"
    if path == "last":
        run_dir = value_of(arguments, "--run_dir")
        last = Path(run_dir) / "checkpoints" / "last.ckpt" if run_dir is not None else last_of_newest_run()
        found, problems = sealed.newest(last) if last is not None else (None, [])
        for problem in problems:
            print(problem, file=sys.stderr)
        if found is None:
            where = run_dir or "runs"
            which = "no whole checkpoint" if problems else "no checkpoint"
            fail(f"--ckpt_path last: there is {which} under {where}; give --run_dir, or the path of a .ckpt file")
        path = str(found)
        print(f"checkpoint: {path}", file=sys.stderr)
    elif not Path(path).is_file():
        fail(f"--ckpt_path {path}: there is no such file; give the path of a .ckpt file, 'last' or 'auto'")
    rest = without(arguments, "--ckpt_path")
    return [rest[0], "--ckpt_path", path, *rest[1:]]


def last_of_newest_run() -> Path | None:
    """``last.ckpt`` of the run under ``runs`` that wrote a checkpoint last; the file may be missing, with others."""
    found = list(Path("runs").glob("*/*/checkpoints/*.ckpt"))
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return newest.with_name("last.ckpt") if newest is not None else None


def check_required(arguments: Sequence[str]) -> None:
    """Tell of what a command cannot do without; a config may have it."""
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


def _methods(options: list[str]) -> int:
    form = value_of(options, "--format") or "table"
    if set(options) & {"-h", "--help"}:
        print(f"usage: {PROGRAM} methods [--format table|markdown|json]\n\nList the strategies and callbacks.")
        return 0
    if (rest := without(options, "--format")) or form not in ("table", "markdown", "json"):
        fail(f"methods: {' '.join(rest or [form])!r} is not known; use --format table, markdown or json")

    from cl_lightning import discovery

    discovery.show(form)
    return 0
