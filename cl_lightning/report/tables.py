"""Tables of a comparison: for the terminal, in Markdown and LaTeX, and as CSV with all digits."""

import csv
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cl_lightning.escape_control import spreadsheet_cell
from cl_lightning.report.comparison import KNOWN, MEASURES, ONLINE, Comparison, Group, Measure, Unit
from cl_lightning.report.runs import Run
from cl_lightning.report.statistics import Estimate

MISSING = "–"  # noqa: RUF001  # an en dash, as usual in tables
_MINUS = "−"  # noqa: RUF001


@dataclass(frozen=True)
class Sheet:
    """A table of texts; all columns except the first contain numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


# ---------------------------------------------------------------------- numbers as text


_SCALES: dict[Unit, tuple[tuple[float, str], ...]] = {
    "percent": ((0.01, "%"),),
    "seconds": ((1.0, "s"), (60.0, "min"), (3600.0, "h")),
    "bytes": ((1.0, "B"), (2.0**10, "KiB"), (2.0**20, "MiB"), (2.0**30, "GiB")),
}


def scale_of(values: Sequence[float], unit: Unit, name: str | None = None) -> tuple[float, str]:
    """Divisor and name of the unit for a column of values, chosen by the largest value unless ``name`` is given."""
    if name is not None:
        return next(scale for scale in _SCALES[unit] if scale[1] == name)
    largest, factor = max((abs(value) for value in values), default=0.0), 2 if unit == "seconds" else 1
    scales = _SCALES[unit]
    return next((scale for scale in reversed(scales) if largest >= factor * scale[0]), scales[0])


def digits(value: float, divisor: float, unit: Unit, *, signed: bool = False) -> str:
    """A value in the unit of its column, with a real minus sign."""
    scaled = value / divisor
    places = 1 if unit == "percent" or abs(scaled) < 100 else 0
    if unit != "percent" and abs(scaled) < 10:
        places = 2
    if unit == "bytes" and divisor == 1:
        places = 0
    plain = f"{scaled:+.{places}f}" if signed else f"{scaled:.{places}f}"
    if float(plain) == 0:
        plain = plain.lstrip("+-")
    return plain.replace("-", _MINUS)


def estimated(value: Estimate | None, divisor: float, unit: Unit, *, signed: bool = False) -> str:
    """A mean, with the half-width of its interval if there is one."""
    if value is None:
        return MISSING
    mean = digits(value.mean, divisor, unit, signed=signed)
    if value.half is None or (
        unit == "bytes" and value.half == 0
    ):  # most runs of a method keep the same number of bytes
        return mean
    return f"{mean} ± {digits(value.half, divisor, unit)}"


def column(
    values: Sequence[Estimate | None], unit: Unit, *, name: str | None = None, signed: bool = False
) -> tuple[str, list[str]]:
    """Name of the unit, chosen by the values unless it is given, and the cells of a column."""
    divisor, name = scale_of([value.mean for value in values if value is not None], unit, name)
    return name, [estimated(value, divisor, unit, signed=signed) for value in values]


# ---------------------------------------------------------------------- what the tables hold


def _with_online(comparison: Comparison, measures: Sequence[Measure]) -> tuple[Measure, ...]:
    """The measures, and the online error if a run has one."""
    streamed = any(group.estimate(ONLINE) is not None for group in comparison.groups)
    return (*measures, ONLINE) if streamed else tuple(measures)


def outcome(comparison: Comparison, measures: Sequence[Measure] = MEASURES) -> Sheet:
    """One row per group: number of runs, and each measure."""
    groups, measures = comparison.groups, _with_online(comparison, measures)
    heads, columns = ["runs"], [[str(len(group.runs)) for group in groups]]
    for measure in measures:
        name, cells = column([group.estimate(measure) for group in groups], measure.unit)
        heads.append(f"{measure.title} ({name})")
        columns.append(cells)
    several = any(len(group.runs) > 1 for group in groups)
    return Sheet(
        title="Comparison" if len(groups) > 1 else "Result",
        columns=("method", *heads),
        rows=tuple(zip((group.label for group in groups), *columns, strict=True)),
        notes=("mean ± half of the 95 % interval (Student's t) over runs with different seeds",) if several else (),
    )


def differences(comparison: Comparison, measures: Sequence[Measure] = MEASURES) -> Sheet | None:
    """One row per group except the baseline: differences from the baseline; None if there is nothing to compare."""
    base = comparison.baseline
    others = [group for group in comparison.groups if group is not base]
    if base is None or all(comparison.difference(group, measures[0]) is None for group in others):
        return None
    measures = _with_online(comparison, measures)
    heads, columns = ["pairs"], [[pairs(comparison, group) for group in others]]
    for measure in measures:
        name, cells = column([comparison.difference(group, measure) for group in others], measure.unit, signed=True)
        heads.append(f"{measure.title} ({name})")
        columns.append(cells)
    return Sheet(
        title=f"Difference from {base.label}, paired over seeds",
        columns=("method", *heads),
        rows=tuple(zip((group.label for group in others), *columns, strict=True)),
    )


def pairs(comparison: Comparison, group: Group) -> str:
    """Number of runs that are paired with a run of the baseline by seed and data."""
    counts = [found.count for measure in MEASURES if (found := comparison.difference(group, measure)) is not None]
    return str(max(counts, default=0))


def matrix(run: Run) -> Sheet:
    """The accuracy matrix of a run, in percent."""

    def cell(value: float | None) -> str:
        return "" if value is None else digits(value, 0.01, "percent")

    rows = [(run.tasks[t].name, *map(cell, row), cell(run.measures[t].get("average_accuracy")))
            for t, row in enumerate(run.accuracy)]  # fmt: skip
    return Sheet(
        title=f"{run.method}: {run.score} (%) on each task (columns) after each task (rows)",
        columns=("after", *map(str, range(run.finished)), "all classes"),
        rows=tuple(rows),
    )


# ---------------------------------------------------------------------- formats


def rich_table(sheet: Sheet) -> Table:
    """The table for the terminal."""
    caption = Text("; ".join(sheet.notes)) if sheet.notes else None
    table = Table(title=Text(sheet.title), caption=caption, box=box.SIMPLE_HEAD, pad_edge=False)
    for index, head in enumerate(sheet.columns):
        table.add_column(Text(head), justify="right" if index else "left", overflow="fold")
    for row in sheet.rows:
        table.add_row(*map(Text, row))  # Text, because a name may look like markup
    return table


def print_rich(sheets: Sequence[Sheet], console: Console | None = None) -> None:
    """Print tables; in a pipe at full width, in a narrow terminal transposed if that is narrower."""
    console = console or Console(file=sys.stdout)
    for sheet in sheets:
        table, alternative = rich_table(sheet), rich_table(transposed(sheet))
        unbounded = console.options.update(max_width=100_000)
        width, transposed_width = (Measurement.get(console, unbounded, one).maximum for one in (table, alternative))
        if not console.is_terminal:
            console.width = max(80, width)
        elif width > console.width and transposed_width < width:
            table = alternative
        console.print(table)


def transposed(sheet: Sheet) -> Sheet:
    """The table with rows and columns exchanged."""
    columns = ("", *(row[0] for row in sheet.rows))
    rows = tuple((head, *(row[index] for row in sheet.rows)) for index, head in enumerate(sheet.columns) if index)
    return Sheet(sheet.title, columns, rows, sheet.notes)


def markdown(sheet: Sheet) -> str:
    """The table in GitHub's Markdown."""
    rows = [sheet.columns, *sheet.rows]
    cells = [[_markdown(entry) for entry in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    lines.insert(1, f"|{'|'.join([' --- ', *(' ---: ' for _ in sheet.columns[1:])])}|")
    return "\n".join([f"**{_markdown(sheet.title)}**", "", *lines, *(f"\n{_markdown(note)}" for note in sheet.notes)])


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]|#])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "±": r"$\pm$", _MINUS: "$-$", MISSING: "--", "…": r"\dots{}",
}  # fmt: skip


def latex(sheet: Sheet) -> str:
    """The table in LaTeX, with the package booktabs."""

    def escape(text: str) -> str:
        return "".join(_LATEX.get(mark, mark) for mark in text)

    rows = [" & ".join(map(escape, row)) + r" \\" for row in (sheet.columns, *sheet.rows)]
    caption = ". ".join([sheet.title, *(note[:1].upper() + note[1:] for note in sheet.notes)])
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escape(caption)}.}}",
            rf"\begin{{tabular}}{{l{'r' * (len(sheet.columns) - 1)}}}",
            r"\toprule",
            rows[0],
            r"\midrule",
            *rows[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def sheet_csv(sheet: Sheet) -> str:
    """A table as CSV, with its texts; those that a spreadsheet would evaluate get a leading apostrophe."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(sheet.columns)
    writer.writerows([spreadsheet_cell(row[0]), *row[1:]] for row in sheet.rows)
    return buffer.getvalue()


def comma_separated(comparison: Comparison) -> str:
    """One row per group, with fractions in [0, 1], seconds and bytes, with all digits; an empty cell is unknown.

    The columns of a measure are its mean over the runs, the half-width of the 95 % interval (``..._ci95``), and the
    mean difference from the baseline with its half-width (``..._difference``, ``..._difference_ci95``). A text that a
    spreadsheet would evaluate as a formula gets a leading apostrophe.
    """
    measures = _with_online(comparison, (*MEASURES, KNOWN))
    head = ["method", "strategy", "runs", "tasks", "finished", "seeds", "baseline", "pairs"]
    for measure in measures:
        head += [measure.name, f"{measure.name}_ci95", f"{measure.name}_difference", f"{measure.name}_difference_ci95"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    for group in comparison.groups:
        base = comparison.baseline
        row: list[object] = [
            spreadsheet_cell(group.label),
            spreadsheet_cell(group.first.strategy),
            len(group.runs),
            len(group.first.tasks),
            group.finished,
            " ".join(run.draw[0] for run in group.runs),
            "" if base is None else spreadsheet_cell(base.label),
            pairs(comparison, group),
        ]
        for measure in measures:
            for value in (group.estimate(measure), comparison.difference(group, measure)):
                row += ["", ""] if value is None else [value.mean, "" if value.half is None else value.half]
        writer.writerow(row)
    return buffer.getvalue()
