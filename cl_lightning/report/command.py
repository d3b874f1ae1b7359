"""The command ``report``."""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cl_lightning.report import comparison, tables
from cl_lightning.report.comparison import Comparison
from cl_lightning.report.runs import load

FORMATS = ("table", "markdown", "latex", "csv")
_LISTED = 20  # problems that are told in the terminal


class _Parser(argparse.ArgumentParser):
    """Puts a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parser() -> argparse.ArgumentParser:
    """Of the arguments after the word ``report``."""
    result = _Parser(
        prog="python -m cl_lightning report",
        description="Compare runs: print a table, and write one HTML page that needs nothing else.",
        allow_abbrev=False,
    )
    result.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or one that holds runs")
    result.add_argument("--output", default="report.html", help="the page that is written (default: %(default)s)")
    result.add_argument(
        "--format",
        default="table",
        choices=FORMATS,
        help="of what is printed to standard output (default: %(default)s)",
    )
    result.add_argument(
        "--baseline",
        metavar="METHOD",
        help="what the others are compared with: a method, or its name in the table (default: Finetune, or the first)",
    )
    return result


def main(args: Sequence[str]) -> int:
    """Compare runs; returns the exit code, 0, or 2 after a mistake, which is told in one line.

    The comparison goes to standard output, all else to standard error.

    Args:
        args: Arguments after the word ``report``.
    """
    try:
        options = parser().parse_args(list(args))
        compared = read(options.runs, options.baseline)
        path = save(compared, options.output)
    except ValueError as error:
        print(f"error: report: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    try:
        show(compared, options.format)
        sys.stdout.flush()
    except BrokenPipeError:  # a pager or head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for text in compared.streams:
        print(f"different streams: {text}", file=sys.stderr)
    for problem in compared.problems[:_LISTED]:
        print(problem, file=sys.stderr)
    if len(compared.problems) > _LISTED:
        print(f"and {len(compared.problems) - _LISTED} more, all in the page", file=sys.stderr)
    print(f"report: {path}", file=sys.stderr)
    return 0


def write(runs: Sequence[str | Path], output: str | Path, baseline: str | None = None) -> Path:
    """Write the page on some runs, and return its path.

    Args:
        runs: Folders of runs, or folders that hold runs.
        output: The file; its folder is made.
        baseline: What the other methods are compared with; None for fine-tuning, or the first.

    Raises:
        ValueError: None of the runs can be used, the baseline is not among them, or the file cannot be written.
    """
    return save(read([str(run) for run in runs], baseline), output)


def read(paths: Sequence[str], baseline: str | None = None) -> Comparison:
    """Compare the runs at and below some paths.

    Raises:
        ValueError: None of them can be used, or the baseline is not among them.
    """
    found, problems = load(paths)
    if not found:
        reasons = "; ".join(map(str, problems[:3])) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise ValueError(f"there is no run to report: {reasons}")
    return comparison.compare(found, problems, baseline)


def save(compared: Comparison, output: str | Path) -> Path:
    """Write the page, whole or not at all.

    Raises:
        ValueError: The file cannot be written.
    """
    from cl_lightning.report import page  # matplotlib takes a while to import

    path = Path(output)
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder; give the name of a file")
    html = page.render(compared)
    draft = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(html)
        os.chmod(draft, 0o666 & ~_umask())
        os.replace(draft, path)
    except OSError as error:
        if draft is not None:
            Path(draft).unlink(missing_ok=True)
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def show(compared: Comparison, form: str = "table") -> None:
    """Print the comparison in one of the formats."""
    if form == "csv":
        print(tables.comma_separated(compared), end="")
        return
    sheets = [tables.outcome(compared)]
    if (differences := tables.differences(compared)) is not None:
        sheets.append(differences)
    if len(compared.runs) == 1 and compared.runs[0].finished:
        sheets.insert(0, tables.matrix(compared.runs[0]))
    if form == "table":
        tables.print_rich(sheets)
        return
    print("\n\n".join(map(tables.markdown if form == "markdown" else tables.latex, sheets)))
