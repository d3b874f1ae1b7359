"""The command ``study``: checks a study, starts its workers, shows their progress, and writes the page.

This module does not import torch or Optuna, so that help and simple errors are printed without delay.
"""

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import yaml

from cl_lightning.checks import at_least
from cl_lightning.escape_control import printable
from cl_lightning.files import read_text, replaced
from cl_lightning.study.definition import Definition, DefinitionError, parse
from cl_lightning.study.program import Program

if TYPE_CHECKING:
    from cl_lightning.study.progress import Progress

FILE = "study.yaml"
_LOOK = 0.5  # seconds between two looks at the storage


class _Parser(argparse.ArgumentParser):
    """Argument parser whose errors are a ValueError."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=int, default=None, help="number of workers on this machine (default: one per GPU, else one)"
    )
    parser.add_argument(
        "--heartbeat",
        type=int,
        default=20,
        metavar="SECONDS",
        help="a worker that gives no sign of life for three times as long counts as dead (default: %(default)s)",
    )


def parser_of_study() -> argparse.ArgumentParser:
    """Parser of the arguments after ``study``."""
    result = _Parser(
        prog="python -m cl_lightning study",
        description="Run many methods on many streams with many seeds, and compare them on one page.",
        epilog="python -m cl_lightning study join FOLDER|URL adds workers, also on other machines.",
        allow_abbrev=False,
    )
    result.add_argument("file", metavar="STUDY.yaml", help="the study, see docs/studies.md; or join")
    result.add_argument("--output", default=None, metavar="FOLDER", help="folder to write (default: studies/NAME)")
    result.add_argument(
        "--storage",
        default=None,
        metavar="URL",
        help="database that the workers share, postgresql+psycopg://user@host/name (default: SQLite in the folder)",
    )
    _common(result)
    return result


def parser_of_join() -> argparse.ArgumentParser:
    """Parser of the arguments after ``study join``."""
    result = _Parser(
        prog="python -m cl_lightning study join", description="Add workers to a study.", allow_abbrev=False
    )
    result.add_argument("place", metavar="FOLDER|URL", help="folder of the study, or URL of its storage")
    result.add_argument("--name", default=None, help="name of the study, if the storage has several")
    _common(result)
    return result


def main(args: Sequence[str], program: Program) -> int:
    """Run a study, or join one.

    Args:
        args: Arguments after ``study``.
        program: The command line.

    Returns:
        Exit code: 0, 1 if a cell has failed, 2 for a mistake, which is printed in one line, 130 after Ctrl-C.
    """
    try:
        join = bool(args) and args[0] == "join"
        options = parser_of_join().parse_args(args[1:]) if join else parser_of_study().parse_args(list(args))
        if find_spec("optuna") is None:
            raise DefinitionError("install Optuna, the engine of studies: pip install 'cl-lightning[study]'")
        at_least("--workers", 0, optional=True, workers=options.workers)
        at_least("--heartbeat", 1, heartbeat=options.heartbeat)
        return _join(options, program) if join else _start(options, program)
    except ValueError as error:
        if os.environ.get("CL_LIGHTNING_TRACEBACK"):
            raise
        print(f"error: study: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2


def _start(options: argparse.Namespace, program: Program) -> int:
    definition, written, saved = read(options.file)
    folder = Path(options.file).parent if written else Path("studies") / definition.name
    folder = folder if options.output is None else Path(options.output)

    from cl_lightning.data.shared import sharing_sources
    from cl_lightning.study import storage
    from cl_lightning.study.checking import check

    storage.quiet_optuna()
    with sharing_sources():
        check(definition, program)
        folder.mkdir(parents=True, exist_ok=True)
        url = options.storage or saved or storage.url_of(folder)
        trials = storage.Trials(storage.connect(url, options.heartbeat), definition.name)
        storage.begin(trials, definition, folder)
        with replaced(folder / FILE) as file:
            file.write(f"# {program.name} study {folder / FILE}\n")
            own = None if url == storage.url_of(folder) else storage.without_password(url)
            yaml.safe_dump({**definition.to_dict(), "storage": own}, file, sort_keys=False)
        trials.storage.engine.dispose()  # a connection must not be shared with a forked process
        return _carry_out(definition, folder, url, options, program)


def _join(options: argparse.Namespace, program: Program) -> int:
    from cl_lightning.data.shared import sharing_sources
    from cl_lightning.study import storage
    from cl_lightning.study.checking import check_streams

    storage.quiet_optuna()
    folder = Path(options.place)
    if "://" not in options.place:
        saved = _stored(folder)
        options.place, options.name = saved.get("storage") or storage.url_of(folder), saved.get("name")
    trials, definition, recorded = storage.joined(options.place, options.heartbeat, options.name)
    folder = recorded if "://" in str(folder) or not folder.is_dir() else folder
    trials.storage.engine.dispose()
    with sharing_sources():
        check_streams(definition, program)
        return _carry_out(definition, folder, options.place, options, program)


def _stored(folder: Path) -> dict[str, str]:
    try:
        content = yaml.safe_load(read_text(folder / FILE))
    except (OSError, ValueError, yaml.YAMLError):
        raise DefinitionError(
            f"{folder} has no {FILE}; give the folder of a study, or the URL of its storage"
        ) from None
    return content if isinstance(content, dict) else {}


def read(path: str) -> tuple[Definition, bool, str | None]:
    """The study in a file.

    Returns:
        The study, whether the file is that in the folder of a study, and its storage, if that is not in the folder too.

    Raises:
        DefinitionError: If the file cannot be read, or the study cannot be run as it is written.
    """
    try:
        content = yaml.safe_load(read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DefinitionError(f"{path}: {getattr(error, 'strerror', None) or error}; give a YAML file") from None
    except yaml.YAMLError as error:
        raise DefinitionError(f"{path}: correct the YAML: {error}") from None
    written = isinstance(content, dict) and "storage" in content
    saved = content.pop("storage") if written else None
    return parse(content, path), written, saved


def _carry_out(definition: Definition, folder: Path, url: str, options: argparse.Namespace, program: Program) -> int:
    """Start the workers of this machine, show the progress until they end, and write the page."""
    import torch

    from cl_lightning.study import page, storage
    from cl_lightning.study.progress import Progress
    from cl_lightning.study.warm import FORK, end_with_parent, start_quietly
    from cl_lightning.study.worker import run_worker

    gpus = torch.cuda.device_count()
    count = max(gpus, 1) if options.workers is None else options.workers

    def work(place: object) -> None:
        os.setsid()
        end_with_parent()
        run_worker(definition, place, program)  # type: ignore[arg-type]

    workers: list[BaseProcess] = []
    for place in places(folder, url, options.heartbeat, count, gpus):
        workers.append(FORK.Process(target=work, args=(place,), name="worker"))
        start_quietly(workers[-1])
    trials = storage.Trials(storage.connect(url, options.heartbeat, checked=True), definition.name)
    with Progress(trials, definition) as progress, _passing_on(workers, progress) as stops:
        while any(worker.is_alive() for worker in workers):
            progress.show()
            wait([worker.sentinel for worker in workers if worker.is_alive()], _LOOK)
        progress.show()
    failed = progress.failed()
    for name, reason in failed:
        print(f"failed: {name}: {printable(reason)}", file=sys.stderr)
    done = progress.done()
    if done:
        print(f"report: {page.write(trials, definition, folder, program.name)}")
    missing = len(definition.cells) - done - len(failed)
    if missing:
        again = f"{program.name} study {folder / FILE}"
        print(f"{missing} of {len(definition.cells)} cells are missing; go on with: {again}", file=sys.stderr)
    if stops:
        return 128 + stops[0]
    return int((missing > 0 and any(worker.exitcode for worker in workers)) or bool(failed))


@contextmanager
def _passing_on(workers: Sequence[BaseProcess], progress: "Progress") -> Iterator[list[int]]:
    """Pass Ctrl-C and SIGTERM on to the workers inside the context; gives the list of signals that came.

    At the first signal the runs write their checkpoints and end, at the second they end at once.
    """
    signals: list[int] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        signals.append(signum)
        progress.note("stopping: the runs write their checkpoints" if len(signals) == 1 else "stopping at once")
        for worker in workers:
            if worker.pid is not None and worker.is_alive():
                os.kill(worker.pid, signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def places(folder: Path, url: str, heartbeat: int, count: int, gpus: int) -> list[object]:
    """Where each of ``count`` workers works: a GPU each, and its share of the cores."""
    from cl_lightning.study.worker import Place

    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    found: list[object] = []
    for index in range(count):
        share = usable[index * len(usable) // count : (index + 1) * len(usable) // count] if count > 1 else []
        if count > 1 and usable and not share:
            share = [usable[index % len(usable)]]
        found.append(Place(folder, url, heartbeat, tuple(share), index % gpus if gpus and count > 1 else None))
    return found
