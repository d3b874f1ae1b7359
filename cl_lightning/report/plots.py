"""Plots as inline SVG: labels are text, and colours are CSS variables of the page, light or dark.

Drawn by matplotlib without pyplot and its global state. Each series has its own colour, line and marker. The colours
are distinguishable for colour-blind readers (Okabe & Ito 2008).
"""

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from cl_lightning.report.statistics import Estimate

COLORS = 8
"""Number of series colours; the style sheet of the page defines them."""
_SERIES = [f"#0102{index:02x}" for index in range(COLORS)]  # replaced by var(--series-N)
_INK, _FAINT, _PAPER = "#030101", "#030102", "#030103"
_VARIABLES = {color: f"var(--series-{index})" for index, color in enumerate(_SERIES)}
_VARIABLES |= {_INK: "currentColor", _FAINT: "var(--line)", _PAPER: "var(--paper)"}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d")
_LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1, 1, 1, 1, 1)))
_WIDTH, _HEIGHT = 4.4, 3.1  # inches; at the width of a phone the texts have the size of the page's text
_RC: Any = {
    "svg.fonttype": "none",
    "font.size": 9.0,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.facecolor": "none",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
    "text.parse_math": False,  # a class may be called $x$
    "path.simplify": True,
}


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        label: Label in the legend.
        index: Index of colour, line and marker, the same in all plots of a page.
        x, y: Coordinates of the points; nan is a gap.
        low, high: Limits of the interval around each point; None without intervals.
        line: Whether the points are connected.
    """

    label: str
    index: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    line: bool = True


@dataclass(frozen=True)
class Point:
    """A group in a plot of accuracy against cost.

    Attributes:
        label: Label of the group.
        index: Index of colour and marker.
        cost, gain: Means with intervals.
        runs: The single runs, (cost, gain).
        best: Whether the point is Pareto-optimal.
    """

    label: str
    index: int
    cost: Estimate
    gain: Estimate
    runs: Sequence[tuple[float, float]]
    best: bool


def curves(
    name: str,
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    whole_x: bool = True,
    log_x: bool = False,
    marks: Sequence[float] = (),
) -> Markup:
    """Plot of curves with bands.

    Args:
        name: Id of the plot in the page; letters, digits and ``-``.
        title: Text for screen readers.
        series: The curves.
        x_label, y_label: Labels of the axes.
        y_range: Limits of the y axis; None to fit the data.
        whole_x: Whether x counts tasks.
        log_x: Whether the x axis is logarithmic.
        marks: Positions on the x axis of thin vertical lines.
    """
    with mpl.rc_context(_RC):
        figure, axes = _figure()
        for mark in marks:
            axes.axvline(mark, color=_INK, alpha=0.35, linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
        for entry in series:
            color, line, marker = style(entry.index)
            many = len(entry.x) > 25
            if entry.low is not None and entry.high is not None:
                axes.fill_between(entry.x, entry.low, entry.high, color=color, alpha=0.14, linewidth=0)
            axes.plot(
                entry.x,
                entry.y,
                color=color,
                linestyle=line if entry.line else "none",
                marker=marker,
                markevery=max(1, len(entry.x) // 12) if many else 1,
                markersize=3.5 if many else 5.0,
                linewidth=1.2 if many else 1.6,
            )
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if y_range is not None:
            axes.set_ylim(*y_range)
        bottom, top = axes.get_ylim()
        if axes.dataLim.y1 <= 100 < top:  # space for markers above 100 %, but no tick there
            axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= 100])
            axes.set_ylim(bottom, top)
        if whole_x:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if log_x:
            axes.set_xscale("log")
        return _svg(figure, name, title)


def tradeoff(name: str, title: str, points: Sequence[Point], *, x_label: str, y_label: str, unit: float) -> Markup:
    """Plot of accuracy in % against a cost in ``unit``, with the Pareto front."""
    with mpl.rc_context(_RC):
        figure, axes = _figure()
        front = sorted((p.cost.mean / unit, 100 * p.gain.mean) for p in points if p.best)
        if len(front) > 1:
            axes.step(
                *zip(*front, strict=True), where="post", color=_INK, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1
            )
        for point in points:
            color, _, marker = style(point.index)
            if len(point.runs) > 1:
                x, y = zip(*((cost / unit, 100 * gain) for cost, gain in point.runs), strict=True)
                axes.plot(x, y, linestyle="none", marker=marker, color=color, alpha=0.4, markersize=3, zorder=2)
            cost, gain = point.cost, point.gain
            axes.errorbar(
                cost.mean / unit,
                100 * gain.mean,
                xerr=None if cost.half is None else cost.half / unit,
                yerr=None if gain.half is None else 100 * gain.half,
                color=color,
                marker=marker,
                markersize=8,
                markeredgecolor=_PAPER,
                markeredgewidth=0.8,
                elinewidth=1.1,
                zorder=3,
            )
        _cost_axis(axes, [cost / unit for p in points for cost in (p.cost.mean, *(cost for cost, _ in p.runs))])
        heights = [100 * gain for point in points for gain in (point.gain.mean, *(gain for _, gain in point.runs))]
        pad = max(4.0, 0.15 * (max(heights) - min(heights)))
        axes.set_ylim(max(-3.0, min(heights) - pad), min(103.0, max(heights) + pad))  # intervals may exceed the limits
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        return _svg(figure, name, title)


def ranks(
    name: str,
    title: str,
    labels: Sequence[str],
    places: Sequence[float],
    groups: Sequence[tuple[float, float]],
    difference: float,
) -> Markup:
    """Diagram of mean ranks with the critical difference (Demsar, JMLR 2006); rank 1, the best, is on the left.

    Args:
        name: Id of the plot in the page.
        title: Text for screen readers.
        labels: Names of the methods.
        places: Their mean ranks.
        groups: Smallest and largest rank of groups that do not differ, drawn as bars.
        difference: The critical difference, drawn as a scale.
    """
    count = len(labels)
    with mpl.rc_context({**_RC, "axes.grid": False}):
        figure, axes = _figure(width=1.6 * _WIDTH, height=1.2 + 0.24 * (count + len(groups)))
        axes.set_xlim(0.9, count + 0.1)
        axes.set_ylim(-count - len(groups) - 0.5, 1.6)
        axes.xaxis.set_ticks_position("top")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.spines["bottom"].set_visible(False)
        axes.spines["left"].set_visible(False)
        axes.spines["top"].set_visible(True)
        axes.yaxis.set_visible(False)
        axes.plot([1, min(1 + difference, count)], [1.0, 1.0], color=_INK, linewidth=2.2)
        axes.text(1, 0.75, f"critical difference {difference:.2f}", va="top")
        for level, (low, high) in enumerate(groups):
            axes.plot([low - 0.03, high + 0.03], [-0.8 - level] * 2, color=_INK, linewidth=3.2)
        order = sorted(range(count), key=places.__getitem__)
        for line, index in enumerate(order):
            height = -len(groups) - 1.0 - line
            color, _, marker = style(index)
            axes.plot([places[index]] * 2, [1.6, height], color=_FAINT, linewidth=0.8, zorder=0)
            axes.plot(places[index], height, color=color, marker=marker, markersize=6)
            left = places[index] > (count + 1) / 2
            shift = -0.06 if left else 0.06
            side = "right" if left else "left"
            axes.text(
                places[index] + shift, height, f"{_cut(labels[index], 28)} ({places[index]:.2f})", ha=side, va="center"
            )
        return _svg(figure, name, title)


def _cost_axis(axes: Axes, costs: Sequence[float]) -> None:
    """Limits, scale and ticks of an axis for costs of at least 0; intervals may exceed the limits."""
    positive = [cost for cost in costs if cost > 0]
    high = max(positive, default=1.0)
    low = min(positive, default=1.0)
    if high <= 20 * low:
        axes.set_xlim(-0.05 * high, 1.05 * high)
        return
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [10.0**power for power in range(first, last + 1, max(1, math.ceil((last - first) / 4)))]
    if len(positive) == len(costs):
        axes.set_xscale("log")
        axes.set_xlim(10.0**first, 10.0**last)
    else:
        axes.set_xscale("symlog", linthresh=10.0**first, linscale=0.5)
        axes.set_xlim(-0.2 * 10.0**first, 10.0**last)
        ticks = [0.0, *ticks]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def stacked(
    name: str,
    title: str,
    labels: Sequence[str],
    parts: Sequence[tuple[str, int, Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
) -> Markup:
    """Stacked bars, one per label; ``parts`` are (name, index of the colour, heights)."""
    with mpl.rc_context(_RC):
        figure, axes = _figure()
        bottom = np.zeros(len(labels))
        for _, index, heights in parts:
            axes.bar(range(len(labels)), heights, bottom=bottom, color=style(index)[0], width=0.72)
            bottom += np.asarray(heights)
        axes.grid(visible=False, axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        return _svg(figure, name, title)


def bars(
    name: str, title: str, values: Sequence[float | None], bounds: Sequence[int], *, x_label: str, y_label: str
) -> Markup:
    """One bar per class, in percent; ``bounds`` are the numbers of classes after each task."""
    with mpl.rc_context(_RC):
        figure, axes = _figure(width=2 * _WIDTH, height=2.6)
        heights = [math.nan if value is None else 100 * value for value in values]
        starts = [0, *bounds[:-1]]
        for task, (start, stop) in enumerate(zip(starts, bounds, strict=True)):
            part = range(start, min(stop, len(heights)))
            axes.bar(list(part), [heights[i] for i in part], width=0.8, color=_SERIES[0 if task % 2 == 0 else 1])
        for bound in bounds[:-1]:
            axes.axvline(bound - 0.5, color=_FAINT, linewidth=0.8)
        axes.set_xlim(-0.6, len(heights) - 0.4)
        axes.set_ylim(0, 100)
        axes.grid(visible=False, axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        return _svg(figure, name, title)


def image(
    name: str,
    title: str,
    values: Sequence[Sequence[float]],
    *,
    x_label: str,
    y_label: str,
    bounds: Sequence[int] = (),
    names: Sequence[str] = (),
    label: str = "%",
) -> Markup:
    """A large matrix of values in [0, 1] as an image, with lines at ``bounds``; nan is empty."""
    with mpl.rc_context({**_RC, "axes.grid": False}):
        figure, axes = _figure(height=_WIDTH * 0.88)
        array = 100 * np.asarray(values, dtype=float)
        drawn = axes.imshow(array, cmap="cividis", vmin=0, vmax=100, interpolation="nearest", aspect="equal")
        for bound in bounds[:-1]:
            for draw in (axes.axvline, axes.axhline):
                draw(bound - 0.5, color="#ffffff", linewidth=0.6 if len(bounds) <= 12 else 0.2, alpha=0.8)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if names and len(names) <= 20:
            axes.set_xticks(range(len(names)), [_cut(text, 10) for text in names], rotation=90)
            axes.set_yticks(range(len(names)), [_cut(text, 10) for text in names])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        bar = figure.colorbar(drawn, ax=axes, shrink=0.8, label=label)
        bar.outline.set_visible(False)  # type: ignore[operator]
        return _svg(figure, name, title)


_COLORS_OF_FILES = {
    "var(--series-0)": "#0072b2", "var(--series-1)": "#d55e00", "var(--series-2)": "#009e73",
    "var(--series-3)": "#cc79a7", "var(--series-4)": "#56b4e9", "var(--series-5)": "#e69f00",
    "var(--series-6)": "#15181c", "var(--series-7)": "#8c8200", "var(--line)": "#d9dde3", "var(--paper)": "#ffffff",
    "currentColor": "#15181c",
}  # fmt: skip


def standalone(plot: Markup) -> str:
    """The plot as the content of an SVG file, in the colours of the light page."""
    text = str(plot)
    for variable, color in _COLORS_OF_FILES.items():
        text = text.replace(variable, color)
    start = '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif"'
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text.replace("<svg", start, 1)}\n'


def sign(index: int) -> Markup:
    """The line and marker of a series, for a legend; drawn in ``signs``."""
    return Markup('<svg class="sign" aria-hidden="true"><use href="#sign-{}"></use></svg>').format(index)


def signs(count: int) -> Markup:
    """The symbols that ``sign`` refers to, of the first ``count`` series, in an element without size."""
    drawn = []
    for index in range(count):
        with mpl.rc_context({**_RC, "axes.grid": False}):
            figure = Figure(figsize=(0.42, 0.17))
            axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
            axes.set_axis_off()
            color, dashes, marker = style(index)
            axes.plot([0, 1, 2], [0, 0, 0], color=color, linestyle=dashes, marker=marker, markevery=[1])
            axes.set_xlim(-0.1, 2.1)
            root = _drawing(figure, f"mark-{index}")
        root.tag = "symbol"
        root.set("id", f"sign-{index}")
        drawn.append(_text(root))
    return Markup('<svg class="signs" aria-hidden="true">{}</svg>').format(Markup("").join(drawn))


def box(index: int) -> Markup:
    """The colour of a series as a box, for the legend of bars."""
    return Markup('<span class="box" style="--c:var(--series-{})"></span>').format(index % COLORS)


def style(index: int) -> tuple[str, Any, str]:
    """Colour, line and marker of a series."""
    return (
        _SERIES[index % COLORS],
        _LINES[(index // 2 if index < COLORS else index) % len(_LINES)],
        _MARKERS[index % len(_MARKERS)],
    )


# ---------------------------------------------------------------------- into the page


def _figure(width: float = _WIDTH, height: float = _HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes: Axes = figure.add_subplot()
    return figure, axes


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}"
_DROPPED = ("metadata", "style")


def _svg(figure: Figure, name: str, title: str) -> Markup:
    """The figure as an SVG element of the page, with a title for screen readers."""
    root = _drawing(figure, name)
    for key, value in (("class", "plot"), ("role", "img"), ("aria-labelledby", f"{name}-title")):
        root.set(key, value)
    heading = ElementTree.Element("title", {"id": f"{name}-title"})
    heading.text = title
    root.insert(0, heading)
    return _text(root)


def _text(root: ElementTree.Element) -> Markup:
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))


def _drawing(figure: Figure, name: str) -> ElementTree.Element:
    """The figure as SVG with ids prefixed by ``name``, colours as variables, and no metadata."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the page uses other fonts
        FigureCanvasSVG(figure).print_svg(buffer)  # type: ignore[no-untyped-call]
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in _DROPPED:
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        attributes = {key.removeprefix(_XLINK): _restyled(key, value, name) for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update(attributes)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    return root


def _restyled(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key.endswith("href") and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    value = re.sub(r"url\(#", f"url(#{name}-", value)
    value = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", value)
    value = re.sub(r"font-family:[^;]*; ?", "", value)
    for color, variable in _VARIABLES.items():
        value = value.replace(color, variable)
    return value
