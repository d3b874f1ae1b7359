"""The command ``report``."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from cl_lightning.files import replaced
from cl_lightning.report import comparison, tables
from cl_lightning.report.comparison import Comparison
from cl_lightning.report.runs import load

FORMATS = ("table", "markdown", "latex", "csv")
_LISTED = 20  # problems that are printed in the terminal


class _Parser(argparse.ArgumentParser):
    """Argument parser whose errors are a ValueError."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parser() -> argparse.ArgumentParser:
    """Parser of the arguments after ``report``."""
    result = _Parser(
        prog="python -m cl_lightning report",
        description="Compare runs: print a table, and write one self-contained HTML page.",
        allow_abbrev=False,
    )
    result.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a folder that contains runs")
    result.add_argument("--output", default="report.html", help="HTML file to write (default: %(default)s)")
    result.add_argument(
        "--format",
        default="table",
        choices=FORMATS,
        help="format of the table on standard output (default: %(default)s)",
    )
    result.add_argument(
        "--baseline",
        metavar="METHOD",
        help="method to compare the others with, or its name in the table (default: Finetune, or the first)",
    )
    return result


def main(args: Sequence[str]) -> int:
    """Compare runs; returns the exit code: 0, or 2 after an error, which is printed in one line.

    The comparison is printed to standard output, everything else to standard error.

    Args:
        args: Arguments after ``report``.
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
    except BrokenPipeError:  # a pager or head has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for text in compared.streams:
        print(f"different streams: {text}", file=sys.stderr)
    for problem in compared.problems[:_LISTED]:
        print(problem, file=sys.stderr)
    if len(compared.problems) > _LISTED:
        print(f"and {len(compared.problems) - _LISTED} more; the page lists all", file=sys.stderr)
    print(f"report: {path}", file=sys.stderr)
    return 0


def write(runs: Sequence[str | Path], output: str | Path, baseline: str | None = None) -> Path:
    """Write the page that compares runs, and return its path.

    Args:
        runs: Folders of runs, or folders that contain runs.
        output: The file; its folder is created.
        baseline: Method to compare the others with; None for fine-tuning, or the first.

    Raises:
        ValueError: If no run can be used, the baseline is not among the runs, or the file cannot be written.
    """
    return save(read([str(run) for run in runs], baseline), output)


def read(paths: Sequence[str], baseline: str | None = None) -> Comparison:
    """Compare the runs at and below the given paths.

    Raises:
        ValueError: If no run can be used, or the baseline is not among the runs.
    """
    found, problems = load(paths)
    if not found:
        reasons = "; ".join(map(str, problems[:3])) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise ValueError(f"there is no run to report: {reasons}")
    return comparison.compare(found, problems, baseline)


def save(compared: Comparison, output: str | Path) -> Path:
    """Write the page; an existing file is replaced atomically.

    Raises:
        ValueError: If the file cannot be written.
    """
    from cl_lightning.report import page

    path = Path(output)
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder; give the name of a file")
    html = page.render(compared)
    try:
        with replaced(path) as file:
            file.write(html)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from error
    return path


def show(compared: Comparison, form: str = "table") -> None:
    """Print the comparison in one of ``FORMATS``."""
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
