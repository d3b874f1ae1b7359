"""The page on one run: protocol, accuracy, forgetting and cost."""

import math
from collections.abc import Sequence

from cl_lightning.report import cards, plots
from cl_lightning.report.comparison import INCREMENTAL, KNOWN, LAST, MEASURES, ONLINE, Group
from cl_lightning.report.parts import (
    COST_NOTE,
    COUNTS,
    GAP_NOTE,
    NUMBERED,
    Heat,
    Plot,
    Section,
    axis_range,
    capital,
    gap_name,
    heat,
    is_plain,
    percent,
    rate,
    spent,
)
from cl_lightning.report.runs import KINDS, SAVING, Matrix, Run
from cl_lightning.report.tables import MISSING, Sheet, digits, scale_of

_NAMED = 40  # at most so many classes are listed by name


def sections(group: Group) -> list[Section]:
    run = group.first
    return [
        _headline(group),
        Section("Protocol", card=cards.protocol([group])),
        _run_matrices(run),
        _run_curves(run),
        _run_classes(run),
        _run_confusion(run),
        _run_calibration(run),
        _run_stability(run),
        _run_plasticity(run),
        _run_measures(run),
        _run_cost(run),
        Section("Software and hardware", card=cards.software([group])),
    ]


def _headline(group: Group) -> Section:
    tiles = []
    for measure in (LAST, INCREMENTAL, KNOWN, *MEASURES[2:], ONLINE):
        value = group.estimate(measure)
        if value is not None:
            divisor, unit = scale_of([value.mean], measure.unit)
            tiles.append(
                (measure.title.replace("accuracy", group.first.score), digits(value.mean, divisor, measure.unit), unit)
            )
    return Section(tiles=tiles)


def _run_matrices(run: Run) -> Section:
    if not run.finished:
        return Section()
    totals = [values.get("average_accuracy") for values in run.measures]
    matrices = [heat("matrix", "Among all classes seen so far", run, run.accuracy, totals)]
    if run.accuracy_known is not None:
        known = [values.get("task_aware/average_accuracy") for values in run.measures]
        matrices.append(heat("matrix-known", "With the task known", run, run.accuracy_known, known))
    title = f"{capital(run.score)} on each task after each task"
    return Section(title, text="In %; columns are tasks.", matrices=matrices)


def _run_curves(run: Run) -> Section:
    if run.finished < 2:
        return Section()
    after = list(range(run.finished))

    def series(label: str, index: int, key: str) -> plots.Series:
        return plots.Series(label, index, after, [100 * values.get(key, math.nan) for values in run.measures])

    averages = [
        series("all classes so far", 0, "average_accuracy"),
        series("task known", 1, "task_aware/average_accuracy"),
        series("average incremental", 2, "average_incremental_accuracy"),
    ]
    losses = [series("all classes so far", 0, "forgetting"), series("task known", 1, "task_aware/forgetting")]
    drawn = [
        _curve_plot("average", f"Average {run.score} (%)", averages, whole=True),
        _curve_plot("forgetting", "Forgetting (%)", losses, whole=False),
    ]
    if run.finished <= plots.COLORS:
        tasks = [
            plots.Series(f"task {i}", i, after[i:], [percent(run.accuracy[t][i]) for t in after[i:]]) for i in after
        ]
        drawn.append(_curve_plot("tasks", f"{capital(run.score)} on each task (%)", tasks, whole=True))
    return Section("Over the tasks", plots=drawn)


def _curve_plot(name: str, title: str, series: Sequence[plots.Series], *, whole: bool) -> Plot:
    drawn = [entry for entry in series if any(value == value for value in entry.y)]
    limits = axis_range([value for entry in drawn for value in entry.y], whole=whole)
    svg = plots.curves(name, f"{title} after each task", drawn, x_label="after task", y_label="", y_range=limits)
    legend = [(plots.sign(entry.index), entry.label) for entry in drawn]
    return Plot(title, svg, legend=legend)


def _run_classes(run: Run) -> Section:
    names, values = run.class_names, run.per_class
    title = f"Accuracy on each class after task {run.finished - 1}"
    if not run.finished or not values or not run.bounds or len(values) > min(len(names), run.bounds[-1]):
        return Section()
    if len(values) > _NAMED:
        svg = plots.bars("classes", title, values, run.bounds, x_label="class, in order of arrival", y_label="")
        return Section(title, wide=[Plot("Colours change with the task.", svg, full=True)])
    starts = [0, *run.bounds[:-1]]
    groups = []
    for task, (start, stop) in enumerate(zip(starts, run.bounds, strict=True)):
        rows = [(names[i], values[i]) for i in range(start, min(stop, len(values)))]
        if rows:
            head = f"task {task}" if is_plain(run, task) else f"task {task}: {run.tasks[task].name}"
            cells = [(n, v or 0.0, MISSING if v is None else f"{100 * v:.1f} %") for n, v in rows]
            groups.append((head, cells))
    return Section(title, classes=groups)


def _run_confusion(run: Run) -> Section:
    counts, bounds = run.confusion, run.bounds
    if not counts or not bounds or len(counts) > min(len(run.class_names), bounds[-1]):
        return Section()
    size = len(counts)
    owner = [next(task for task, bound in enumerate(bounds) if column_ < bound) for column_ in range(size)]
    tasks = max(owner) + 1
    grouped = [[0] * tasks for _ in range(tasks)]
    for true, row in enumerate(counts):
        for predicted, count in enumerate(row):
            grouped[owner[true]][owner[predicted]] += count
    matrices = []
    if tasks > 1:
        shares = tuple(_shares(row) for row in grouped)
        heading = "By task: fraction of the test images of a task (rows) predicted as a class of each task (columns)"
        matrices.append(_confusion_heat("confusion-tasks", heading, shares, [str(task) for task in range(tasks)]))
    heading = "By class: fraction of the test images of a class (rows) predicted as each class (columns)"
    names = run.class_names[:size]
    shares = tuple(_shares(row) for row in counts)
    if size > NUMBERED:
        array = [[math.nan if value is None else value for value in row] for row in shares]
        steps = sorted({bound for bound in bounds if bound <= size})
        svg = plots.image("confusion", heading, array, x_label="predicted", y_label="class", bounds=steps)
        matrices.append(Heat(heading, image=svg))
    else:
        matrices.append(_confusion_heat("confusion-classes", heading, shares, names))
    return Section(f"Confusion after task {run.finished - 1}", text="In %; an empty field is 0.", matrices=matrices)


def _shares(row: Sequence[int]) -> tuple[float | None, ...]:
    total = sum(row)
    return tuple(None if total == 0 else value / total for value in row)


def _confusion_heat(name: str, title: str, shares: Matrix, names: Sequence[str]) -> Heat:
    if len(shares) > NUMBERED:
        array = [[math.nan if value is None else value for value in row] for row in shares]
        svg = plots.image(name, title, array, x_label="predicted", y_label="true")
        return Heat(title, image=svg)
    rows = [
        (label, [(value, f"{100 * value:.0f}" if value else "") for value in row], None)
        for label, row in zip(names, shares, strict=True)
    ]
    short = [label if len(label) <= 6 else f"{label[:5]}…" for label in names]
    return Heat(title, "true", short, rows, small=len(rows) > 8)


def _run_calibration(run: Run) -> Section:
    matrix = run.calibration
    if matrix is None or all(value is None for row in matrix for value in row):
        return Section()
    note = "Expected calibration error of each task: mean difference of confidence and accuracy over 15 bins."
    if run.finished > 10:
        values = [percent(value) for value in matrix[-1]]
        series = [plots.Series("ECE", 0, list(range(run.finished)), values)]
        svg = plots.curves("calibration", "Calibration error of each task", series, x_label="task", y_label="ECE (%)")
        return Section(f"Calibration after task {run.finished - 1}", plots=[Plot("", svg)], notes=[note])
    last = [(run.tasks[i].name, value) for i, value in enumerate(matrix[-1]) if value is not None]
    sheets = [
        (
            Sheet(
                "",
                ("", *(f"task {i}" if is_plain(run, i) else name for i, (name, _) in enumerate(last))),
                (("ECE (%)", *(f"{100 * value:.1f}" for _, value in last)),),
            ),
            False,
        )
    ]
    return Section(
        f"Calibration after task {run.finished - 1}",
        sheets=sheets,
        notes=[note],
    )


def _run_stability(run: Run) -> Section:
    curves = run.curves
    if curves is None or not curves.steps:
        return Section()
    tasks = len(curves.samples)
    series = [plots.Series("all seen classes", 6, curves.steps, [percent(value) for value in curves.average()])]
    for task in range(min(tasks, 6)):
        values = [percent(row[task]) for row in curves.accuracy]
        series.append(plots.Series(f"task {task}", task, curves.steps, values))
    svg = plots.curves(
        "stability",
        "Accuracy during training",
        series,
        x_label="optimizer step",
        y_label="accuracy (%)",
        y_range=(0.0, 103.0),
        whole_x=False,
        marks=curves.starts(),
    )
    legend = [(plots.sign(entry.index), entry.label) for entry in series]
    first = " of the first six tasks" if tasks > 6 else ""
    text = f"On a fixed subset of {curves.split or 'test'} data{first}; vertical lines mark the first step of a task."
    tiles = [(gap_name(name), f"{100 * value:.1f}", "%") for name, value in curves.measures.items() if "/" not in name]
    plot = Plot("Accuracy during training.", svg, text, legend)
    return Section("During training: the stability gap", tiles=tiles, plots=[plot], notes=[GAP_NOTE])


def _run_plasticity(run: Run) -> Section:
    shown = []
    for name, values in run.plasticity.items():
        is_share = name.endswith("accuracy") or name == "dormant_units"
        points = [percent(value) if is_share else math.nan if value is None else value for value in values]
        label = name.replace("_", " ")
        svg = plots.curves(
            f"plasticity-{name.replace('_', '-')}",
            f"{label.capitalize()} after each task",
            [plots.Series(label, 0, range(len(points)), points)],
            x_label="task",
            y_label=f"{label} (%)" if is_share else label,
        )
        shown.append(Plot(f"{label.capitalize()}.", svg, "", []))
    return Section("Plasticity", plots=shown)


def _run_measures(run: Run) -> Section:
    names = dict.fromkeys(name.rpartition("/")[2] for name in run.last)
    rows = []
    for name in names:
        values = (run.last.get(name), run.last.get(f"task_aware/{name}"))
        cells = (MISSING if value is None else digits(value, 0.01, "percent") for value in values)
        rows.append((name.replace("_", " "), *cells))
    sheet = Sheet("", ("measure", "all classes (%)", "task known (%)"), tuple(rows))
    return Section(f"Measures after task {run.finished - 1}", sheets=[(sheet, False)] if rows else [])


def _run_cost(run: Run) -> Section:
    sheets: list[tuple[Sheet, bool]] = []
    drawn = []
    facts: cards.Card = []
    for title, of in COUNTS:
        if (value := of(run)) is not None:
            facts.append((title, [(f"{value:,}", ())]))
    if run.peak_memory is not None:
        facts.append(("peak memory", [(_size(run.peak_memory), ())]))
    if run.budget is not None:
        facts.append(("network and exemplars", [(f"{run.budget:.2f} MB", ())]))
    if (speed := rate(run)) is not None:
        facts.append(("images/s in training", [(f"{speed:,.0f}", ())]))
    if (total := run.total_seconds) is not None:
        divisor, unit = scale_of([total], "seconds")
        parts = [f"{kind} {digits(spent(kind)(run) or 0.0, divisor, 'seconds')}" for kind in KINDS]
        facts.append((f"time ({unit})", [(f"{digits(total, divisor, 'seconds')}: {', '.join(parts)}", ())]))
        unit_s, name = scale_of([max(sum(task.values()) for task in run.seconds)], "seconds")
        kinds = [kind for kind in (*KINDS, SAVING) if any(kind in task for task in run.seconds)]
        bars = [(kind, i, [task.get(kind, 0.0) / unit_s for task in run.seconds]) for i, kind in enumerate(kinds)]
        labels = [str(t) for t in range(run.finished)]
        svg = plots.stacked("seconds", "Time of each task", labels, bars, x_label="task", y_label=name)
        legend = [(plots.box(i), kind) for i, kind in enumerate(kinds)]
        drawn.append(Plot(f"Time of each task ({name})", svg, legend=legend))
    kept = {kind: size for kind, size in run.bytes_kept.items() if size}
    if kept:
        divisor, unit = scale_of(list(kept.values()), "bytes")
        rows: list[tuple[str, ...]] = [(kind, digits(size, divisor, "bytes")) for kind, size in kept.items()]
        head: tuple[str, ...] = ("kept between tasks", f"size ({unit})")
        if len(run.bytes_per_process) > 1:
            head = (*head, *(f"process {rank} ({unit})" for rank in range(len(run.bytes_per_process))))
            rows = [
                (*row, *(digits(part.get(row[0], 0), divisor, "bytes") for part in run.bytes_per_process))
                for row in rows
            ]
        sheets.append((Sheet("", head, tuple(rows)), False))
    return Section("Cost", card=facts, sheets=sheets, plots=drawn, notes=[COST_NOTE] if facts else [])


def _size(value: int) -> str:
    divisor, unit = scale_of([value], "bytes")
    return f"{digits(value, divisor, 'bytes')} {unit}"
