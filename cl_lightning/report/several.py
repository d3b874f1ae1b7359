"""The page on several runs: comparison of methods."""

from collections.abc import Sequence

from cl_lightning.report import cards, plots
from cl_lightning.report.comparison import (
    BYTES,
    FORGETTING,
    INCREMENTAL,
    KNOWN,
    LAST,
    MEASURES,
    SECONDS,
    Comparison,
    Difference,
    Group,
    Measure,
    pareto,
)
from cl_lightning.report.parts import (
    COST_NOTE,
    COUNTS,
    GAP_NOTE,
    Plot,
    Section,
    axis_range,
    capital,
    counted,
    gap_name,
    heat,
    mean_of,
    percent,
    rate,
    short,
    spent,
)
from cl_lightning.report.runs import KINDS, SAVING
from cl_lightning.report.statistics import estimate
from cl_lightning.report.tables import MISSING, Sheet, column, differences, outcome, scale_of


def sections(comparison: Comparison) -> list[Section]:
    groups = comparison.groups
    return [
        _results(comparison),
        over_tasks(comparison),
        tradeoffs(comparison),
        _budget_section(comparison),
        _matrices(groups),
        _stability(comparison),
        protocol(comparison),
        _cost_of_groups(groups),
        _runs(comparison),
    ]


def _results(comparison: Comparison) -> Section:
    sheets = [(outcome(comparison, (LAST, INCREMENTAL, KNOWN, *MEASURES[2:])), True)]
    sheets[0] = (_untitled(sheets[0][0]), True)
    notes = []
    if (compared := differences(comparison, (LAST, INCREMENTAL, KNOWN, *MEASURES[2:]))) is not None:
        sheets.append((compared, True))
        notes.append(
            "Differences are between runs of the same seed on the same data. If an interval does not contain 0, the "
            "sign of the difference is significant at 95 %, without correction for multiple comparisons."
        )
    return Section("Results", sheets=sheets, notes=notes)


def _untitled(sheet: Sheet) -> Sheet:
    return Sheet("", sheet.columns, sheet.rows, sheet.notes)


def over_tasks(comparison: Comparison, prefix: str = "") -> Section:
    """Accuracy and forgetting after each task; ``prefix`` makes the ids of the plots unique in a page."""
    drawn = []
    score = comparison.groups[0].first.score
    for name, title, key in (
        ("accuracy", f"Average {score} over all classes so far (%)", "average_accuracy"),
        ("known", "The same with the task known (%)", "task_aware/average_accuracy"),
        ("forgetting", "Forgetting (%)", "forgetting"),
    ):
        series = [
            _measured(group, index, key, band=_banded(comparison)) for index, group in enumerate(comparison.groups)
        ]
        series = [entry for entry in series if len(entry.x)]
        if series:
            values = [v for entry in series for v in (*entry.y, *(entry.high or ()), *(entry.low or ()))]
            svg = plots.curves(
                f"{prefix}over-{name}",
                f"{title} after each task",
                series,
                x_label="after task",
                y_label="",
                y_range=axis_range(values, whole=name != "forgetting"),
            )
            drawn.append(Plot(title, svg))
    return Section("Over the tasks", legend=len(comparison.groups) > 1, plots=drawn, notes=_band_note(comparison))


def _band_note(comparison: Comparison) -> list[str]:
    if all(len(group.runs) == 1 for group in comparison.groups):
        return []
    return ["Bands are 95 % intervals over runs." if _banded(comparison) else "Means over runs; too many for bands."]


def _banded(comparison: Comparison) -> bool:
    """Whether a plot has few enough curves to show their intervals."""
    return len(comparison.groups) <= 6


def _measured(group: Group, index: int, key: str, *, band: bool) -> plots.Series:
    """Mean of a measure over the runs of a group after each task, in percent."""
    found = [estimate(run.measures[t].get(key) for run in group.runs) for t in range(group.finished)]
    known = [(t, entry) for t, entry in enumerate(found) if entry is not None]
    band = band and any(entry.half is not None for _, entry in known)
    return plots.Series(
        group.label,
        index,
        [t for t, _ in known],
        [100 * entry.mean for _, entry in known],
        low=[max(-100.0, 100 * entry.low) for _, entry in known] if band else None,
        high=[min(100.0, 100 * entry.high) for _, entry in known] if band else None,
    )


def tradeoffs(comparison: Comparison, prefix: str = "") -> Section:
    """Accuracy against memory and time; ``prefix`` makes the ids of the plots unique in a page."""
    if len(comparison.groups) < 2:
        return Section()
    drawn = []
    for cost, name in ((BYTES, "Kept between tasks"), (SECONDS, "Time")):
        found = []
        for index, group in enumerate(comparison.groups):
            spent, gained = group.estimate(cost), group.estimate(LAST)
            if group.complete and spent is not None and gained is not None:
                pairs = [(cost.of(run), LAST.of(run)) for run in group.runs]
                found.append(
                    (index, group.label, spent, gained, [(c, g) for c, g in pairs if c is not None and g is not None])
                )
        if len(found) < 2:
            continue
        best = pareto([(entry[2].mean, entry[3].mean) for entry in found])
        points = [
            plots.Point(label, index, spent, gained, runs, place in best)
            for place, (index, label, spent, gained, runs) in enumerate(found)
        ]
        unit, unit_name = scale_of([point.cost.mean for point in points], cost.unit)
        svg = plots.tradeoff(
            f"{prefix}cost-{cost.name.replace('_', '-')}",
            f"Last accuracy against {name.lower()}",
            points,
            x_label=f"{name.lower()} ({unit_name})",
            y_label="last accuracy (%)",
            unit=unit,
        )
        text = f"Pareto-optimal: {', '.join(point.label for point in points if point.best)}."
        drawn.append(Plot(f"Last accuracy against {name.lower()}.", svg, text))
    return Section(
        "Accuracy against cost",
        legend=True,
        plots=drawn,
        notes=[
            "Higher and further left is better. The dashed line is the Pareto front; small markers are runs, bars "
            "95 % intervals. Time is the sum of training, statistics and evaluation."
        ],
    )


def _budget_section(comparison: Comparison) -> Section:
    budgets = comparison.budgets
    if not budgets:
        return Section()
    rows = []
    for budget in budgets:
        sizes = f"{budget.megabytes[0]:.2f} to {budget.megabytes[-1]:.2f}"
        cells = ["–" if a is None else estimated_area(a.mean, a.half) for a in (budget.average, budget.last)]  # noqa: RUF001
        rows.append((budget.label, str(len(budget.groups)), sizes, *cells))
    drawn = []
    for measure, name in ((INCREMENTAL, "AUC-A"), (LAST, "AUC-L")):
        series = []
        for index, budget in enumerate(budgets):
            found = [
                (megabytes, value)
                for megabytes, group in zip(budget.megabytes, budget.groups, strict=True)
                if (value := group.estimate(measure)) is not None
            ]
            band = any(value.half is not None for _, value in found)
            series.append(
                plots.Series(
                    budget.label,
                    index,
                    [megabytes for megabytes, _ in found],
                    [100 * value.mean for _, value in found],
                    low=[max(0.0, 100 * value.low) for _, value in found] if band else None,
                    high=[min(100.0, 100 * value.high) for _, value in found] if band else None,
                )
            )
        svg = plots.curves(
            f"budget-{name.lower()}",
            f"{measure.title} against the memory budget",
            series,
            x_label="network and exemplars (MB)",
            y_label=f"{measure.title} (%)",
            whole_x=False,
        )
        legend = [(plots.sign(i), b.label) for i, b in enumerate(budgets)]
        drawn.append(Plot(f"{name}:", svg, f"area under {measure.title} accuracy", legend))
    return Section(
        "Memory budgets",
        sheets=[(Sheet("", ("method", "sizes", "budget (MB)", "AUC-A", "AUC-L"), tuple(rows)), False)],
        plots=drawn,
        notes=[
            "Area under accuracy in [0, 1] over the size of network and exemplars in MB of 2^20 bytes, 4 bytes per "
            "weight (Zhou et al., arXiv:2302.03648). Areas over different ranges of budgets are not comparable."
        ],
    )


def estimated_area(mean: float, half: float | None) -> str:
    """An area with the half-width of its interval, to four digits."""
    return f"{mean:.4g}" if half is None else f"{mean:.4g} ± {half:.2g}"


def _matrices(groups: Sequence[Group]) -> Section:
    found = []
    for index, group in enumerate(groups):
        if not group.finished:
            continue
        totals = [
            mean_of([run.measures[t].get("average_accuracy") for run in group.runs]) for t in range(group.finished)
        ]
        mean = tuple(
            tuple(mean_of([run.accuracy[t][i] for run in group.runs]) for i in range(group.finished))
            for t in range(group.finished)
        )
        title = f"{group.label}: mean of {counted(len(group.runs), 'run')}" if len(group.runs) > 1 else group.label
        found.append(heat(f"matrix-{index}", title, group.first, mean, totals, brief=True))
    title = f"{capital(groups[0].first.score)} on each task after each task" if groups else ""
    return Section(title, text="In %, of all classes seen so far.", matrices=found)


def _stability(comparison: Comparison) -> Section:
    measured = [group for group in comparison.groups if any(run.curves is not None for run in group.runs)]
    names = list(dict.fromkeys(n for g in measured for r in g.runs if r.curves is not None for n in r.curves.measures))
    names = [name for name in names if "/" not in name]
    if not names:
        return Section()
    columns = []
    for name in names:
        values = [
            estimate(run.curves.measures.get(name) for run in group.runs if run.curves is not None)
            for group in measured
        ]
        columns.append(column(values, "percent")[1])
    rows = zip((group.label for group in measured), *columns, strict=True)
    heads = ("method", *(f"{gap_name(name)} (%)" for name in names))
    return Section(
        "During training: the stability gap",
        sheets=[(Sheet("", heads, tuple(rows)), True)],
        plots=_anytime(comparison),
        notes=[GAP_NOTE],
    )


def _anytime(comparison: Comparison) -> list[Plot]:
    """Accuracy on all classes seen by then, mean over the runs of a group if all were evaluated at the same steps."""
    series, starts = [], []
    for index, group in enumerate(comparison.groups):
        found = [run.curves for run in group.runs if run.curves is not None and run.curves.steps]
        if found and all(curves.steps == found[0].steps for curves in found):
            averages = [curves.average() for curves in found]
            points = [mean_of([average[place] for average in averages]) for place in range(len(found[0].steps))]
            series.append(plots.Series(group.label, index, found[0].steps, [percent(value) for value in points]))
            starts = found[0].starts()
    if not series:
        return []
    svg = plots.curves(
        "anytime",
        "Accuracy on all classes seen so far, during training",
        series,
        x_label="optimizer step",
        y_label="accuracy (%)",
        y_range=(0.0, 103.0),
        whole_x=False,
        marks=starts,
    )
    legend = [(plots.sign(entry.index), entry.label) for entry in series]
    text = "Vertical lines mark the first step of a task."
    return [Plot("Accuracy on all classes seen so far.", svg, text, legend)]


def protocol(comparison: Comparison) -> Section:
    """What the runs share, with what differs between them first."""
    found: list[tuple[str, Sequence[Difference]]] = []
    if comparison.protocol:
        found.append(("Fields of the protocol that differ", comparison.protocol))
    if comparison.options:
        found.append(("Options of the methods that differ", comparison.options))
    if comparison.software:
        found.append(("Software and hardware that differ", comparison.software))
    notes = ["Seeds, logging, checkpoints and file locations are not compared."]
    if len(comparison.groups) > 1 and not comparison.protocol:
        notes.insert(0, "No field of the protocol differs between the configurations.")
    card = [*cards.protocol(comparison.groups), *cards.software(comparison.groups)]
    return Section("Protocol", card=card, differences=found, notes=notes)


def _cost_of_groups(groups: Sequence[Group]) -> Section:
    measures = [
        *(Measure(kind, kind, "seconds", False, spent(kind)) for kind in (*KINDS, SAVING)),
        Measure("rate", "images/s", "percent", True, lambda run: rate(run)),
        Measure("peak", "peak", "bytes", False, lambda run: run.peak_memory),
    ]
    heads, columns = [], []
    for measure in measures:
        values = [group.estimate(measure) for group in groups]
        if all(value is None for value in values):
            continue
        if measure.name == "rate":
            heads.append(measure.title)
            columns.append([MISSING if value is None else f"{value.mean:,.0f}" for value in values])
            continue
        unit, cells = column(values, measure.unit)
        heads.append(f"{measure.title} ({unit})")
        columns.append(cells)
    for title, of in COUNTS:
        found = [of(group.first) for group in groups]
        if any(value is not None for value in found):
            heads.append(title)
            columns.append([MISSING if value is None else short(value) for value in found])
    if not heads:
        return Section()
    rows = zip((group.label for group in groups), *columns, strict=True)
    return Section("Cost", sheets=[(Sheet("", ("method", *heads), tuple(rows)), len(groups) > 1)], notes=[COST_NOTE])


def _runs(comparison: Comparison) -> Section:
    measures = (LAST, INCREMENTAL, FORGETTING, SECONDS, BYTES)
    runs = [(group.label, run) for group in comparison.groups for run in group.runs]
    columns = [column([estimate([measure.of(run)]) for _, run in runs], measure.unit) for measure in measures]
    heads = (
        "run",
        "method",
        "seed",
        "tasks",
        *(f"{m.title} ({unit})" for m, (unit, _) in zip(measures, columns, strict=True)),
    )
    rows = [
        (run.name, label, cards.seeds(run), f"{run.finished} of {len(run.tasks)}", *cells)
        for (label, run), *cells in zip(runs, *(cells for _, cells in columns), strict=True)
    ]
    note = "Classes, confusion and calibration are in the report of a single run."
    return Section("Runs", sheets=[(Sheet("", heads, tuple(rows)), False)], notes=[note])
