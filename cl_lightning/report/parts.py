"""Parts of the pages on one run and on several runs: plots, matrices, sections."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from cl_lightning.report import cards, plots
from cl_lightning.report.comparison import Difference
from cl_lightning.report.runs import Matrix, Run
from cl_lightning.report.statistics import estimate
from cl_lightning.report.tables import Sheet

NUMBERED = 24
"""Largest number of rows of a matrix that is displayed with its numbers; a larger matrix is an image."""


@dataclass(frozen=True)
class Plot:
    """A plot with its heading; ``legend`` are pairs of a symbol and a text."""

    title: str
    svg: Markup
    text: str = ""
    legend: Sequence[tuple[Markup, str]] = ()
    full: bool = False


@dataclass(frozen=True)
class Heat:
    """A matrix of values in [0, 1], or an image of it: rows are (name, cells, total), cells are (value, text)."""

    title: str
    corner: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[tuple[str, Sequence[tuple[float | None, str]], str | None]] = ()
    small: bool = False
    tiny: bool = False
    image: Markup | None = None


@dataclass(frozen=True)
class Section:
    """A section of the page; empty parts are left out."""

    title: str = ""
    text: str = ""
    tiles: Sequence[tuple[str, str, str]] = ()
    card: cards.Card = field(default_factory=list)
    sheets: Sequence[tuple[Sheet, bool]] = ()
    differences: Sequence[tuple[str, Sequence[Difference]]] = ()
    legend: bool = False
    plots: Sequence[Plot] = ()
    matrices: Sequence[Heat] = ()
    classes: Sequence[tuple[str, Sequence[tuple[str, float, str]]]] = ()
    wide: Sequence[Plot] = ()
    notes: Sequence[str] = ()

    @property
    def empty(self) -> bool:
        parts = (
            self.tiles,
            self.card,
            self.sheets,
            self.differences,
            self.plots,
            self.matrices,
            self.classes,
            self.wide,
        )
        return not any(parts)


def axis_range(values: Sequence[float], *, whole: bool) -> tuple[float, float]:
    """Limits of an axis in percent: from 0 for ``whole`` unless all values are at least 50, else around the values."""
    known = [value for value in values if value == value]
    low, high = min(known, default=0.0), max(known, default=100.0)
    if whole:
        return (0.0, 103.0) if low < 50 else (max(0.0, 10 * math.floor(low / 10) - 2), 103.0)
    pad = max(2.0, 0.05 * (high - low))
    return max(-103.0, min(0.0, low) - pad), min(103.0, max(0.0, high) + pad)


def capital(text: str) -> str:
    """The text with a capital first letter, unless it is a name such as mIoU."""
    return text if any(letter.isupper() for letter in text) else text.capitalize()


def counted(number: int, noun: str) -> str:
    """A number with its noun in singular or plural."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def short(number: int) -> str:
    """A number to three digits, with a prefix such as M from 1000 on."""
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return str(number)


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are not None."""
    found = estimate(values)
    return None if found is None else found.mean


COUNTS: tuple[tuple[str, Callable[[Run], int | None]], ...] = (
    ("weights", lambda run: run.parameters),
    ("trained last", lambda run: run.trainable),
    ("FLOPs per image", lambda run: run.flops),
)

COST_NOTE = (
    "Peak memory is the memory of the GPU if there was one, otherwise of the process. FLOPs are the operations of one "
    "prediction, a multiplication and an addition counted as two; images/s counts images of the stream in training."
)


def spent(kind: str) -> Callable[[Run], float | None]:
    def of(run: Run) -> float | None:
        found = [task[kind] for task in run.seconds if kind in task]
        return math.fsum(found) if found else None

    return of


def rate(run: Run) -> float | None:
    return mean_of(run.images_per_second)


def heat(
    name: str, title: str, run: Run, values: Matrix, totals: Sequence[float | None], *, brief: bool = False
) -> Heat:
    """An accuracy matrix with the average after each task; with ``brief``, above 8 tasks, in colours only."""
    size = len(values)
    if size > NUMBERED:
        array = [[math.nan if value is None else value for value in row] for row in values]
        svg = plots.image(name, title, array, x_label="on task", y_label="after task")
        return Heat(title, image=svg)
    if brief and size > 8:
        heads = [str(i) if i % 5 == 0 else "" for i in range(size)]
        cells = [(heads[t], [(value, "") for value in row], None) for t, row in enumerate(values)]
        return Heat(title, "", heads, cells, tiny=True)
    small = size > 8

    def text(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.{0 if small else 1}f}"

    rows = [
        (
            f"{t} {run.tasks[t].name}" if not is_plain(run, t) else str(t),
            [(value, text(value)) for value in row],
            text(totals[t]),
        )
        for t, row in enumerate(values)
    ]
    return Heat(title, "after", [*map(str, range(size)), "all"], rows, small)


def is_plain(run: Run, task: int) -> bool:
    """Whether the name of a task is only its number."""
    return run.tasks[task].name in (f"task {task}", str(task))


def percent(value: float | None) -> float:
    return math.nan if value is None else 100 * value


_GAP_NAMES = {
    "min_accuracy": "min-ACC",
    "worst_case_accuracy": "WC-ACC",
    "average_anytime_accuracy": "AAA",
    "learning_curve_area": "LCA",
    "area_under_accuracy": "A_AUC",
}

GAP_NOTE = (
    "min-ACC: mean over old tasks of the lowest accuracy after they ended; WC-ACC: worst-case accuracy; WF and WP: "
    "largest drop and rise within that many evaluations (De Lange et al., arXiv:2205.13452); AAA: average anytime "
    "accuracy; A_AUC: mean accuracy on the classes of which a sample has arrived (Koh et al., arXiv:2110.10031)."
)


def gap_name(name: str) -> str:
    window = re.fullmatch(r"windowed_(f|p)\w+_(\d+)", name)
    return f"W{window[1].upper()}^{window[2]}" if window else _GAP_NAMES.get(name, name.replace("_", " "))
