"""The command line: ``python -m cl_lightning fit | validate | test | predict | report | study | methods``.

This module does not import torch, so that help, the version and simple errors are printed without delay.
"""

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import metadata

from cl_lightning.cli.arguments import (
    COMMANDS,
    PROGRAM,
    check_required,
    fail,
    resolve_configs,
    resolve_last,
)

HELP = f"""Continual learning on PyTorch Lightning.

usage: {PROGRAM} COMMAND [options]

commands:
{chr(10).join(f"  {name:<9} {text}" for name, text in COMMANDS.items())}

  -h, --help, --version

Options of a command: {PROGRAM} fit --help
Options of a class:   {PROGRAM} fit --model.help LwF
Classes are given by name or import path. Configs are merged, later values override:

  {PROGRAM} fit
  {PROGRAM} fit --model LwF --model.distill_weight 2
  {PROGRAM} fit --model mymethod.MyMethod --data Digits
  {PROGRAM} fit --config data.yaml --config method.yaml
  {PROGRAM} fit --model.backbone ResNet32 --trainer.callbacks+=EMAEnsemble
  {PROGRAM} fit --ckpt_path last
  {PROGRAM} test --ckpt_path runs/LwF/0000/checkpoints/last.ckpt
  {PROGRAM} predict --ckpt_path last --images FOLDER --output FILE.csv
  {PROGRAM} report runs --output report.html
  {PROGRAM} study STUDY.yaml --workers 2

Short forms: --lr --optimizer --backbone --epochs --batch_size --tasks --seed --devices
Errors are printed in one line; CL_LIGHTNING_TRACEBACK=1 adds the traceback."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 if a run fails, 2 for wrong arguments, 128 + n after signal n.

    Args:
        args: Command-line arguments; None for the arguments of the process.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return stopped_at_once(*arguments[:1])
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning converts it to SystemExit
            return stopped_at_once(*arguments[:1])
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
            f"unknown command {command!r}"
            + (f"; did you mean {near[0]!r}?" if near else f"; use {', '.join(COMMANDS)}")
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's classes in the working directory
    if command == "methods":
        from cl_lightning.cli import listing

        return listing.main(rest)
    if command == "report":
        from cl_lightning import report

        return report.main(rest)
    if command == "study":
        return _study(rest)
    arguments = resolve_configs(resolve_last(arguments))
    if not set(rest) & {"-h", "--help"}:
        check_required(arguments)

    from cl_lightning.cli.commands import run

    return run(arguments)


def stopped_at_once(command: str = "fit") -> int:
    """Report that a command was stopped, and what a fit loses; returns the exit code."""
    lost = "; the steps since the last checkpoint are lost" if command == "fit" else ""
    print(f"stopped{lost}", file=sys.stderr)
    return 130


def version() -> str:
    """Version of the package, also in a checkout that is not installed."""
    try:
        return metadata.version("cl-lightning")
    except metadata.PackageNotFoundError:
        from cl_lightning import __version__

        return __version__


def _study(rest: list[str]) -> int:
    from cl_lightning import study

    def describe(arguments: Sequence[str]) -> study.Description:
        from cl_lightning.cli.described import describe

        return describe(arguments)

    return study.main(rest, study.Program(PROGRAM, main, describe))
