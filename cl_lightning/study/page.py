"""The page of a study, and its tables and plots as files."""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from cl_lightning.files import replaced
from cl_lightning.report import page, plots, several, tables
from cl_lightning.report.cards import Card
from cl_lightning.report.comparison import KNOWN, LAST, Comparison, Group, Measure, of_groups
from cl_lightning.report.fields import UnusableRunError
from cl_lightning.report.parts import Plot, Section, counted
from cl_lightning.report.runs import Problem, Run, read
from cl_lightning.report.statistics import (
    cliques,
    critical_difference,
    holm,
    mean_ranks,
    paired_difference,
    permutation_test,
)
from cl_lightning.report.tables import MISSING, Sheet
from cl_lightning.study.definition import Definition, DefinitionError
from cl_lightning.study.selection import frozen_file, read_frozen
from cl_lightning.study.storage import CELL, ERROR, SETTING, Trials

_SMALL = 0.001  # smallest p-value that is written with its digits


def write(trials: Trials, definition: Definition, folder: Path, program: str) -> Path:
    """Write ``report.html``, ``tables/`` and ``plots/`` of a study from its finished cells.

    Args:
        trials: Trials of the study.
        definition: The study.
        folder: Its folder.
        program: The command of the command line.

    Returns:
        Path of the page.

    Raises:
        ValueError: If no cell has finished.
    """
    streams, problems = _comparisons(trials, definition, folder)
    if not streams:
        raise ValueError("no cell has finished, so that there is nothing to compare")
    first = max(streams.values(), key=lambda comparison: len(comparison.groups))
    sections = [
        *_results(streams),
        _ranks(definition, streams),
        *_selections(trials, definition, folder, streams),
        *(_named(several.over_tasks(each, f"{_id(name)}-"), name, streams) for name, each in streams.items()),
        *(_named(several.tradeoffs(each, f"{_id(name)}-"), name, streams) for name, each in streams.items()),
        *(_named(several.protocol(each), name, streams) for name, each in streams.items()),
        _commands(trials, definition, program),
    ]
    cells = sum(len(group.runs) for each in streams.values() for group in each.groups)
    summary = "; ".join(
        (counted(len(definition.methods), "method"), counted(len(definition.data), "stream"),
         counted(len(definition.seeds), "seed"), f"{cells} of {len(definition.cells)} runs are complete")
    )  # fmt: skip
    shown = Comparison(first.groups, first.baseline, tuple(problems), (), (), (), (), ())
    path = folder / "report.html"
    with replaced(path) as file:
        file.write(page.fill(definition.name, summary, shown, sections))
    _write_files(folder, sections, streams)
    return path


def _id(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", name)


def _named(section: Section, stream: str, streams: Mapping[str, Comparison]) -> Section:
    """The section with the name of its stream, if there are several."""
    if len(streams) == 1:
        return section
    return Section(**{**vars(section), "title": f"{section.title}: {stream}"})


def _comparisons(trials: Trials, definition: Definition, folder: Path) -> tuple[dict[str, Comparison], list[Problem]]:
    """The comparison on each stream with finished cells, and problems with cells."""
    done = {trial.user_attrs[CELL] for trial in trials.of(states=[TrialState.COMPLETE])}
    failed = {
        str(trial.user_attrs[CELL]): str(trial.user_attrs[ERROR])
        for trial in trials.of(states=[TrialState.FAIL])
        if trial.user_attrs.get(ERROR)
    }
    runs: dict[str, dict[str, list[Run]]] = {}
    problems = []
    for cell in definition.cells:
        if cell.name not in done:
            problems.append(
                Problem(cell.name, f"has failed: {failed[cell.name]}" if cell.name in failed else "is missing")
            )
            continue
        try:
            run = read(folder / "runs" / cell.name)
        except UnusableRunError as error:
            problems.append(Problem(cell.name, str(error)))
            continue
        runs.setdefault(cell.data.name, {}).setdefault(cell.method.name, []).append(run)
    found = {}
    for stream, by_method in runs.items():
        groups = tuple(Group(name, tuple(members)) for name, members in by_method.items())
        wanted = definition.baseline or next((g.label for g in groups if g.method == "Finetune"), groups[0].label)
        baseline = next((group for group in groups if group.label == wanted), groups[0])
        found[stream] = of_groups(groups, baseline)
    return found, problems


def measure_of(comparison: Comparison) -> Measure:
    """The last accuracy; with the task known, if a method has no other."""
    return LAST if all(group.estimate(LAST) is not None for group in comparison.groups) else KNOWN


# ---------------------------------------------------------------------- results


def _results(streams: Mapping[str, Comparison]) -> list[Section]:
    found = []
    for name, comparison in streams.items():
        sheet = tables.outcome(comparison)
        sheets = [(Sheet(f"Results on {name}", sheet.columns, sheet.rows, sheet.notes), True)]
        if (differences := difference_sheet(comparison, name)) is not None:
            sheets.append((differences, True))
        notes = []
        if (pairs := max((len(group.runs) for group in comparison.groups), default=0)) and differences is not None:
            notes.append(
                "Differences are between runs of the same seed. p is of the exact paired permutation test over seeds, "
                "and is corrected for the number of methods by Holm's method. With "
                f"{counted(pairs, 'seed')} it cannot be below {2.0 ** (1 - pairs):.3g}."
            )
        found.append(Section(name if len(streams) > 1 else "Results", sheets=sheets, notes=notes))
    return found


def difference_sheet(comparison: Comparison, stream: str) -> Sheet | None:
    """Paired differences from the baseline with p-values; None without another method."""
    base, measure = comparison.baseline, measure_of(comparison)
    if base is None:
        return None
    rows, p_values = [], []
    for group in comparison.groups:
        if group is base:
            continue
        mine, theirs = group.values(measure), base.values(measure)
        pairs = [mine[key] - theirs[key] for key in mine if key in theirs]
        cell = tables.estimated(paired_difference(mine, theirs), 0.01, "percent", signed=True)
        p_values.append(permutation_test(pairs) if pairs else None)
        rows.append((group.label, str(len(pairs)), cell))
    known = iter(holm([p for p in p_values if p is not None]))
    cells = [(p_text(p), p_text(next(known))) if p is not None else (MISSING, MISSING) for p in p_values]
    return Sheet(
        f"Difference from {base.label} on {stream}, {measure.title}",
        ("method", "pairs", "difference (%)", "p", "p, corrected"),
        tuple((*row, *cell) for row, cell in zip(rows, cells, strict=True)),
    )


def p_text(p: float) -> str:
    return f"< {_SMALL}" if p < _SMALL else f"{p:.3f}"


def _ranks(definition: Definition, streams: Mapping[str, Comparison]) -> Section:
    """Mean ranks over streams of the methods that have finished on all of them."""
    if len(streams) < 2:
        return Section()
    means = [
        {group.label: value.mean for group in each.groups if (value := group.estimate(measure_of(each))) is not None}
        for each in streams.values()
    ]
    labels = [method.name for method in definition.methods if all(method.name in each for each in means)]
    if len(labels) < 2:
        return Section()
    ranks = mean_ranks([[each[label] for label in labels] for each in means])
    difference = critical_difference(len(labels), len(means))
    order = sorted(range(len(labels)), key=ranks.__getitem__)
    sheet = Sheet(
        "Mean ranks", ("method", "mean rank"), tuple((labels[index], f"{ranks[index]:.2f}") for index in order)
    )
    svg = plots.ranks("mean-ranks", "Mean ranks", labels, ranks, cliques(ranks, difference), difference)
    return Section(
        "Mean ranks over streams",
        sheets=[(sheet, True)],
        wide=[Plot("Mean ranks.", svg, "Bars join methods that do not differ.", full=True)],
        notes=[
            f"Ranks of the mean {LAST.title} over seeds on {len(means)} streams; 1 is the best. Two methods differ at "
            f"95 % if their mean ranks are {difference:.2f} or more apart (Nemenyi test; Demsar, JMLR 2006)."
        ],
    )


# ---------------------------------------------------------------------- the choice


def _selections(
    trials: Trials, definition: Definition, folder: Path, streams: Mapping[str, Comparison]
) -> list[Section]:
    select = definition.select
    if select is None:
        return []
    rows, sensitivity, drawn = [], [], []
    for stream, method in definition.searches():
        path = frozen_file(folder, stream.name, method.name)
        known = trials.of(stream.name, method.name, states=[TrialState.COMPLETE])
        if path.exists():
            rows.append((f"{method.name} on {stream.name}", *_chosen(path, method.name, streams)))
        if len(known) > 1:
            scores = [float(trial.user_attrs["score"]) for trial in known]
            middle = sorted(scores)[len(scores) // 2]
            numbers = [f"{100 * value:.1f}" for value in (max(scores), middle, min(scores))]
            sensitivity.append((f"{method.name} on {stream.name}", str(len(scores)), *numbers))
            settings = [(trial.user_attrs[SETTING], score) for trial, score in zip(known, scores, strict=True)]
            index = [each.name for each in definition.methods].index(method.name)
            drawn += _sensitivity_plots(f"{method.name} on {stream.name}", settings, index)
    columns = ("search", "options", "score (%)", "result (%)", "settings", "runs", "time (s)", "hash")
    sheets = [(Sheet("Chosen options", columns, tuple(rows)), False)] if rows else []
    if sensitivity:
        heads = ("search", "settings", "best (%)", "median (%)", "worst (%)")
        sheets.append((Sheet("Sensitivity to the options", heads, tuple(sensitivity)), False))
    text = (
        f"Chosen by the {select.score.replace('_', ' ')} on validation samples, mean over "
        f"{counted(len(select.seeds), 'seed')}, with {select.sampler.replace('_', ' ')}"
        + (f", on the first {counted(select.tasks, 'task')}" if select.tasks else "")
        + "; then frozen. Test samples took no part."
    )
    note = "score: of the chosen options in the search; result: last accuracy on test samples, mean over the streams."
    return [Section("Choice of options", text=text, sheets=sheets, plots=drawn, notes=[note])]


def _chosen(path: Path, method: str, streams: Mapping[str, Comparison]) -> tuple[str, ...]:
    try:
        content = read_frozen(path).content
    except DefinitionError as error:
        return str(error), *[MISSING] * 6
    found = [
        value.mean
        for name, each in streams.items()
        for group in each.groups
        if group.label == method and (value := group.estimate(measure_of(each))) is not None
        if name == content["stream"] or content["stream"] not in streams
    ]
    result = f"{100 * math.fsum(found) / len(found):.1f}" if found else MISSING
    options = ", ".join(f"{key}={_short(value)}" for key, value in content["options"].items())
    cost = content["cost"]
    settings = str(cost["settings"]) + (f" + {cost['pruned']} pruned" if cost["pruned"] else "")
    seconds = f"{cost['seconds']:.0f}"
    return (
        options,
        f"{100 * content['result']['score']:.1f}",
        result,
        settings,
        str(cost["runs"]),
        seconds,
        content["hash"][7:19],
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sensitivity_plots(label: str, settings: Sequence[tuple[Mapping[str, Any], float]], index: int) -> list[Plot]:
    """Score against each numeric option."""
    drawn = []
    for key in settings[0][0]:
        pairs = [(setting[key], 100 * score) for setting, score in settings]
        numbers = [(float(x), y) for x, y in pairs if isinstance(x, int | float) and not isinstance(x, bool)]
        if len(numbers) < len(pairs) or len({x for x, _ in numbers}) < 2:
            continue
        x, y = zip(*sorted(numbers), strict=True)
        log = min(x) > 0 and max(x) > 8 * min(x)
        series = [plots.Series(label, index, x, y, line=False)]
        svg = plots.curves(
            f"sensitivity-{_id(label)}-{_id(key)}", f"{label}: score by {key}", series,
            x_label=key, y_label="score (%)", whole_x=False, log_x=log,
        )  # fmt: skip
        drawn.append(Plot(f"{label}:", svg, f"score of each setting by {key}"))
    return drawn


# ---------------------------------------------------------------------- commands and files


def _commands(trials: Trials, definition: Definition, program: str) -> Section:
    known = {
        str(trial.user_attrs[CELL]): trial.user_attrs["arguments"]
        for trial in trials.of(states=[TrialState.COMPLETE])
        if "arguments" in trial.user_attrs
    }
    card: Card = [
        (cell.name, [(f"{program} {shlex.join(known[cell.name])}", ())])
        for cell in definition.cells
        if cell.name in known
    ]
    return Section("Commands", text="Each cell is a run that can be started by hand.", card=card)


def _write_files(folder: Path, sections: Sequence[Section], streams: Mapping[str, Comparison]) -> None:
    """Each table as LaTeX and CSV, the numbers of each stream with all digits, and each plot as SVG."""
    files: dict[str, str] = {
        f"tables/{_id(name)}-all-digits.csv": tables.comma_separated(each) for name, each in streams.items()
    }
    for section in sections:
        for sheet, _ in section.sheets:
            name = re.sub(r"-+", "-", _id((sheet.title or section.title).lower())).strip("-")
            files[f"tables/{name}.tex"] = tables.latex(sheet) + "\n"
            files[f"tables/{name}.csv"] = tables.sheet_csv(sheet)
        for plot in (*section.plots, *section.wide):
            found = re.search(r'aria-labelledby="([^"]+)-title"', str(plot.svg))
            if found is not None:
                files[f"plots/{found[1]}.svg"] = plots.standalone(plot.svg)
    for name, text in files.items():
        with replaced(folder / name) as file:
            file.write(text)
