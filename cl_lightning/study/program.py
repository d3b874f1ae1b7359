"""What a study needs of the command line, which is above it: it is handed over by the command ``study``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Description:
    """A run as its arguments describe it, before it begins.

    Attributes:
        config: The resolved configuration as YAML, without the seed.
        classes: Names of the classes of the stream.
        tasks: Number of tasks.
        validation: Number of validation samples of each task.
    """

    config: str
    classes: tuple[str, ...]
    tasks: int
    validation: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """The command line.

    Attributes:
        name: The command without arguments, such as ``python -m cl_lightning``.
        run: Carries out a command with its arguments; returns the exit code. It may end the process.
        describe: Describes a run without starting it; a ValueError with one line if it could not start.
    """

    name: str
    run: Callable[[list[str]], int]
    describe: Callable[[Sequence[str]], Description]
