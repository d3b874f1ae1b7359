"""The report as one self-contained HTML page."""

import re
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from cl_lightning.report import plots, several, single
from cl_lightning.report.comparison import Comparison, shown
from cl_lightning.report.parts import Section, counted


def render(comparison: Comparison) -> str:
    """The HTML of the page."""
    runs = comparison.runs
    sections = single.sections(comparison.groups[0]) if len(runs) == 1 else several.sections(comparison)
    title = ", ".join(dict.fromkeys(group.method for group in comparison.groups))
    return fill(title, _summary(comparison), comparison, sections)


def fill(title: str, summary: str, comparison: Comparison, sections: Sequence[Section]) -> str:
    """The HTML of a page with given sections.

    Args:
        title: Heading of the page.
        summary: Line below it.
        comparison: Groups whose signs the tables and legends show, problems, and differences of streams.
        sections: Sections; empty ones are left out.
    """
    environment = Environment(
        loader=PackageLoader("cl_lightning.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(unit=_unit, half=_half, option=shown, safe_title=_bold_start)
    groups = comparison.groups
    several_groups = len(groups) > 1
    return environment.get_template("page.html").render(
        title=title,
        summary=summary,
        comparison=comparison,
        sections=[section for section in sections if not section.empty],
        sign_of={group.label: plots.sign(index) for index, group in enumerate(groups)} if several_groups else {},
        signs=plots.signs(max(len(groups), plots.COLORS)),
    )


def _summary(comparison: Comparison) -> str:
    runs, groups = comparison.runs, comparison.groups
    tasks = sorted({len(run.tasks) for run in runs})
    classes = sorted({len(run.class_names) for run in runs})
    parts = [f"{len(groups)} configurations, {len(runs)} runs"] if len(groups) > 1 else [counted(len(runs), "run")]
    parts.append(f"{' or '.join(map(str, tasks))} tasks, {' or '.join(map(str, classes))} classes")
    data = {(run.config or {}).get("data.class_path", "").rpartition(".")[2] for run in runs} - {""}
    return "; ".join([*parts, *sorted(data)])


def _unit(head: str) -> Markup:
    """A column head with its unit, the brackets at the end, in an element of its own."""
    found = re.fullmatch(r"(.*) (\([^()]+\))", head)
    return Markup('{} <span class="unit">{}</span>').format(*found.groups()) if found else escape(head)


def _half(cell: str) -> Markup:
    """A cell with the half-width of its interval in an element of its own."""
    mean, sign, rest = cell.partition(" ± ")
    return Markup('{} <span class="half">± {}</span>').format(mean, rest) if sign else escape(cell)


def _bold_start(title: str) -> Markup:
    head, sign, rest = title.partition(": ")
    return Markup("<b>{}</b>{}").format(head, f" {rest}" if sign else "")
