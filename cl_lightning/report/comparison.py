"""Comparison of runs: grouping over seeds, differences in results, and differences in everything else."""

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cl_lightning.report.runs import Problem, Run, gathered
from cl_lightning.report.statistics import Estimate, estimate, paired_difference

Unit = Literal["percent", "seconds", "bytes"]

_SEEDS = ("seed_everything", "data.init_args.seed")
_BOOKKEEPING = re.compile(  # options that cannot change a result
    r"trainer\.(logger|profiler|enable_progress_bar|enable_model_summary|enable_checkpointing|default_root_dir"
    r"|log_every_n_steps|num_sanity_val_steps|enable_autolog_hparams|barebones)(\.|$)"
    r"|loop\.(save_every_n_steps|save_every_seconds|keep_last|keep_tasks|stop_after_task|feature_cache|feature_cache_gb)$"
    r"|data\.init_args\.(root|workers|in_memory)$"
)
_UNUSED = {("loop.nan_loss", "stop")}  # without effect on a run that continued
_MEMORY = re.compile(r"(^|[._])(memory_size|buffer_size|exemplars_per_class|memory_per_class)$")
_SHARED_OPTIONS = re.compile(  # options of every strategy, which are not part of a method
    r"model\.init_args\.(backbone|optimizer|scheduler|first_optimizer|first_scheduler|freeze_backbone)(\.|$)"
)


@dataclass(frozen=True)
class Measure:
    """A measure of runs.

    Attributes:
        name: Name in CSV files.
        title: Title in tables.
        unit: ``percent`` for fractions in [-1, 1], ``seconds`` or ``bytes``.
        more: Whether larger is better.
        of: Function from a run to its value; None if the run does not have it.
    """

    name: str
    title: str
    unit: Unit
    more: bool
    of: Callable[[Run], float | None]


LAST = Measure("last_accuracy", "last accuracy", "percent", True, lambda run: run.last.get("average_accuracy"))
INCREMENTAL = Measure(
    "average_incremental_accuracy",
    "average incremental",
    "percent",
    True,
    lambda run: run.last.get("average_incremental_accuracy"),
)
FORGETTING = Measure("forgetting", "forgetting", "percent", False, lambda run: run.last.get("forgetting"))
TRANSFER = Measure("backward_transfer", "BWT", "percent", True, lambda run: run.last.get("backward_transfer"))
KNOWN = Measure(
    "task_known_last_accuracy",
    "last, task known",
    "percent",
    True,
    lambda run: run.last.get("task_aware/average_accuracy"),
)
ONLINE = Measure(
    "mean_online_error", "online error", "percent", False, lambda run: run.last.get("mean_online_error")
)  # of test-time streams
SECONDS = Measure("seconds", "time", "seconds", False, lambda run: run.total_seconds)
BYTES = Measure("bytes_kept", "kept", "bytes", False, lambda run: run.total_bytes)
MEASURES = (LAST, INCREMENTAL, FORGETTING, TRANSFER, SECONDS, BYTES)


@dataclass(frozen=True)
class Group:
    """Runs of one method with one configuration, which differ only in their seeds.

    Attributes:
        label: Name of the method, with the options that distinguish it from other groups of the same method.
        runs: At least one, each with a seed of its own.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def method(self) -> str:
        return self.first.method

    @property
    def finished(self) -> int:
        return self.first.finished

    @property
    def complete(self) -> bool:
        return self.first.complete

    @property
    def config(self) -> Mapping[str, str]:
        """The configuration without the fields in which runs of a group may differ."""
        return comparable(self.first.config or {})

    def values(self, measure: Measure) -> dict[Hashable, float]:
        """Value per run, by the key for pairing the runs of two groups: seed and data."""
        found = {(run.draw, run.fingerprints): measure.of(run) for run in self.runs}
        return {key: value for key, value in found.items() if value is not None}

    def estimate(self, measure: Measure) -> Estimate | None:
        """Mean over the runs, with its interval."""
        return estimate(measure.of(run) for run in self.runs)


@dataclass(frozen=True)
class Difference:
    """A field in which groups differ: each value with the labels of its groups; None if the field is not set."""

    field: str
    values: tuple[tuple[str | None, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Budget:
    """One method at several memory sizes.

    Attributes:
        label: Label of the method.
        megabytes: Mean size of network and exemplars per group, in 2^20 bytes, ascending.
        groups: The groups.
        average, last: Area under average incremental and last accuracy over the size, mean over seeds.
    """

    label: str
    megabytes: tuple[float, ...]
    groups: tuple[Group, ...]
    average: Estimate | None
    last: Estimate | None


@dataclass(frozen=True)
class Comparison:
    """The numbers and differences of a report on several runs.

    Attributes:
        groups: Groups, in the order in which the runs were given.
        baseline: Group that the others are compared with; None for a single group.
        problems: Problems with runs.
        streams: Differences between the streams of the runs; empty if all runs have the same stream.
        protocol, options, software: Fields in which groups differ: of the protocol, of the methods themselves, of
            software and hardware.
        budgets: Methods with several memory sizes.
    """

    groups: tuple[Group, ...]
    baseline: Group | None
    problems: tuple[Problem, ...]
    streams: tuple[str, ...]
    protocol: tuple[Difference, ...]
    options: tuple[Difference, ...]
    software: tuple[Difference, ...]
    budgets: tuple[Budget, ...]

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    def difference(self, group: Group, measure: Measure) -> Estimate | None:
        """Mean and interval of group - baseline, over the common seeds and data; None without a comparison."""
        base = self.baseline
        if base is None or group is base or group.finished != base.finished:
            return None
        return paired_difference(group.values(measure), base.values(measure))


def compare(runs: Sequence[Run], problems: Sequence[Problem] = (), baseline: str | None = None) -> Comparison:
    """Group runs by method and configuration, and compare the groups.

    Args:
        runs: At least one run.
        problems: Problems with other runs, passed on.
        baseline: Label, method or import path of the group to compare the others with; None for fine-tuning if it is
            among the groups, otherwise for the first group.

    Raises:
        ValueError: If the baseline is not among the groups, or several groups match it.
    """
    found, repeated = _grouped(runs)
    groups = _labelled(found)
    chosen = _baseline(groups, baseline)
    unfinished = [
        Problem(
            run.name,
            f"is unfinished: {run.finished} of {len(run.tasks)} tasks are done; the report uses these",
        )
        for group in groups
        for run in group.runs
        if not run.complete
    ]
    return of_groups(groups, chosen, (*problems, *repeated, *unfinished))


def of_groups(groups: tuple[Group, ...], baseline: Group, problems: Sequence[Problem] = ()) -> Comparison:
    """The comparison of given groups.

    Args:
        groups: At least one.
        baseline: One of them.
        problems: Problems with runs, passed on.
    """
    differences = _differences(groups, lambda group: group.config)
    options = [entry for entry in differences if _is_option(entry.field)]
    return Comparison(
        groups=groups,
        baseline=baseline if len(groups) > 1 else None,
        problems=tuple(gathered(problems)),
        streams=tuple(_streams(groups)),
        protocol=tuple(entry for entry in differences if entry not in options and entry.field != "model.class_path"),
        options=tuple(options),
        software=tuple(_software(groups)),
        budgets=tuple(_budgets(groups)),
    )


def comparable(config: Mapping[str, str]) -> dict[str, str]:
    """The fields of a configuration that can change results, without the seed."""
    return {
        key: value
        for key, value in config.items()
        if key not in _SEEDS and not _BOOKKEEPING.match(key) and (key, value) not in _UNUSED
    }


def shown(field: str) -> str:
    """A key of the configuration in the form of the command line."""
    return field.replace(".init_args", "").removesuffix(".class_path")


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the Pareto-optimal points (cost, gain): no other point has at most the cost and more gain, or less
    cost and at least the gain."""
    front: list[int] = []
    best = float("-inf")
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        cost, gain = points[index]
        if gain > best or (front and points[front[-1]] == (cost, gain)):
            front.append(index)
            best = gain
    return front


# ---------------------------------------------------------------------- groups


def _grouped(runs: Sequence[Run]) -> tuple[list[tuple[Run, ...]], list[Problem]]:
    by_key: dict[Hashable, dict[Hashable, Run]] = {}
    repeated = []
    unrecorded: dict[Hashable, list[Run]] = {}
    for run in runs:
        config = None if run.config is None else frozenset(comparable(run.config).items())
        key: tuple[Hashable, ...] = (run.strategy, config, run.finished, _size(run))
        if config is None:  # what is known of the options is the protocol
            known = {name: text for name, text in run.protocol.texts.items() if name not in ("mean", "std")}
            key = (
                *key,
                frozenset(known.items()),
            )  # mean and std may be those of the first task, which depend on the seed
            unrecorded.setdefault(key, []).append(run)
        # Runs of one seed are separate groups unless they are known to have the same options and data.
        while (other := by_key.get(key, {}).get(run.draw)) is not None and (
            config is None or other.fingerprints != run.fingerprints
        ):
            key = (*key, "again")
        members = by_key.setdefault(key, {})
        if (other := members.get(run.draw)) is not None:
            kept, left = (run, other) if run.written >= other.written else (other, run)
            repeated.append(Problem(left.name, f"has the same configuration and seed as {kept.name}; left out"))
            members[run.draw] = kept
        else:
            members[run.draw] = run
    repeated += [
        Problem(run.name, f"has no recorded options; it is grouped with {_some(others)}, which may have other options")
        for alike in unrecorded.values()
        for run in alike
        if (others := [other.name for other in alike if other is not run])
    ]
    return [tuple(members.values()) for members in by_key.values()], repeated


def _labelled(found: Sequence[tuple[Run, ...]]) -> tuple[Group, ...]:
    groups: list[Group] = []
    taken: dict[str, int] = {}
    bare = [Group("", runs) for runs in found]
    for group in bare:
        label = _label(group, bare)
        if not group.complete:
            label += f" ({group.finished} of {len(group.first.tasks)} tasks)"
        taken[label] = taken.get(label, 0) + 1
        groups.append(replace(group, label=label if taken[label] == 1 else f"{label} #{taken[label]}"))
    return tuple(groups)


def _label(group: Group, among: Sequence[Group], skip: re.Pattern[str] | None = None) -> str:
    """Name of the method, with up to three options that distinguish the group from others of the same method."""
    namesakes = {other.first.strategy for other in among if other.method == group.method}
    name = group.method if len(namesakes) == 1 else group.first.strategy
    same_method = [other for other in among if other.first.strategy == group.first.strategy]
    fields = [entry.field for entry in _differences(same_method, lambda member: member.config)]
    distinct = [field for field in fields if field in group.config and not (skip and skip.search(field))][:3]
    return f"{name} {', '.join(f'{_leaf(field)}={_short(group.config[field])}' for field in distinct)}".rstrip()


def _leaf(field: str) -> str:
    return shown(field).rpartition(".")[2]


def _short(value: str) -> str:
    last = value.rpartition(".")[2] if re.fullmatch(r"[A-Za-z_][\w.]*", value) else value
    return last if len(last) <= 30 else f"{last[:29]}…"


def _baseline(groups: Sequence[Group], wanted: str | None) -> Group:
    if wanted is None:
        plain = [group for group in groups if group.method == "Finetune" and group.complete]
        return plain[0] if len(plain) == 1 else groups[0]
    for names in ([g.label for g in groups], [g.method for g in groups], [g.first.strategy for g in groups]):
        found = [group for group, name in zip(groups, names, strict=True) if name.casefold() == wanted.casefold()]
        if len(found) == 1:
            return found[0]
        if found:
            labels = ", ".join(repr(group.label) for group in found)
            raise ValueError(f"--baseline {wanted!r} matches {len(found)} groups; use one of {labels}")
    labels = ", ".join(repr(group.label) for group in groups)
    raise ValueError(f"--baseline {wanted!r} is not among the methods; use one of {labels}")


# ---------------------------------------------------------------------- what else differs


def _differences(groups: Sequence[Group], fields: Callable[[Group], Mapping[str, str]]) -> list[Difference]:
    by_group = [(group.label, fields(group)) for group in groups]
    keys = dict.fromkeys(key for _, entries in by_group for key in entries)
    differing = []
    for key in keys:
        values: dict[str | None, list[str]] = {}
        for label, entries in by_group:
            values.setdefault(entries.get(key), []).append(label)
        if len(values) > 1:
            differing.append(Difference(key, tuple((value, tuple(labels)) for value, labels in values.items())))
    return differing


def _is_option(field: str) -> bool:
    of_method = field.startswith(("model.init_args.", "trainer.callbacks"))
    return of_method and not _SHARED_OPTIONS.match(field) and not _MEMORY.search(field)


def _software(groups: Sequence[Group]) -> list[Difference]:
    """Differences in software and hardware; the runs of a group may differ too: a label stands for some of them."""
    values: dict[str, dict[str | None, list[str]]] = {}
    runs = [(group.label, run) for group in groups for run in group.runs]
    entries = [{**run.versions, **{f"hardware {key}": value for key, value in run.hardware.items()}} for _, run in runs]
    for key in dict.fromkeys(key for fields in entries for key in fields):
        for (label, _), fields in zip(runs, entries, strict=True):
            labels = values.setdefault(key, {}).setdefault(fields.get(key), [])
            if label not in labels:
                labels.append(label)
    return [
        Difference(key, tuple((value, tuple(labels)) for value, labels in found.items()))
        for key, found in values.items()
        if len(found) > 1
    ]


def _streams(groups: Sequence[Group]) -> list[str]:
    """Sentences about the differences between the streams of the runs."""
    runs = [(group.label, run) for group in groups for run in group.runs]
    notices = []
    sizes: dict[str, list[str]] = {}
    classes: dict[frozenset[str], list[str]] = {}
    for label, run in runs:
        names = frozenset(name for task in run.tasks for name in task.classes)
        size = _size(run)
        _note(sizes.setdefault(size, []), label)
        _note(classes.setdefault(names, []), label)
    if len(sizes) > 1:
        notices.append(_listing(sizes.items()))
    elif len(classes) > 1:
        named = ((_some(sorted(names)), labels) for names, labels in classes.items())
        notices.append(f"The classes differ. {_listing(named)}")
    by_draw: dict[tuple[str, str], dict[tuple[str, ...], list[str]]] = {}
    for label, run in runs:
        if run.fingerprints:
            seen = run.fingerprints[: min(len(other.fingerprints) for _, other in runs if other.fingerprints)]
            _note(by_draw.setdefault(run.draw, {}).setdefault(seen, []), label)
    for (seed, own), found in by_draw.items():
        if len(found) > 1 and not notices:
            parts = "; ".join(f"{_some(labels)} ({seen[0][:8]}…)" for seen, labels in found.items())
            which = f"seed {seed}" + (f", data seed {own}" if own else "")
            notices.append(f"With {which}, the tasks differ in their samples or in their order: {parts}.")
    unknown = [run.name for _, run in runs if not run.fingerprints]
    if unknown and len(runs) > 1:
        notices.append(
            f"It is not known whether these runs have the same data, because their files lack hashes: {_some(unknown)}."
        )
    return notices


def _size(run: Run) -> str:
    tests = sum(task.test for task in run.tasks)
    return f"{len(run.tasks)} tasks, {len(run.class_names)} classes, {tests} test samples"


def _note(labels: list[str], label: str) -> None:
    if label not in labels:
        labels.append(label)


def _listing(entries: Iterable[tuple[str, Sequence[str]]]) -> str:
    return " ".join(f"{_some(labels)}: {value}." for value, labels in entries)


def _some(names: Sequence[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# ---------------------------------------------------------------------- memory budgets


def _budgets(groups: Sequence[Group]) -> list[Budget]:
    """Budget curves, each of groups that differ only in their memory size."""
    families: dict[Hashable, list[Group]] = {}
    for group in groups:
        if group.complete and group.config and all(run.budget is not None for run in group.runs):
            rest = frozenset((key, value) for key, value in group.config.items() if not _MEMORY.search(key))
            families.setdefault((group.first.strategy, rest), []).append(group)
    curves = [members for members in families.values() if len(members) > 1]
    firsts = [members[0] for members in curves]
    return [_budget(_label(members[0], firsts, skip=_MEMORY), members) for members in curves]


def _budget(label: str, members: Sequence[Group]) -> Budget:
    import torch  # takes seconds, and few reports need it

    from cl_lightning.measures import area_under_budget

    def size(run: Run) -> float:
        return run.budget or 0.0

    sizes = [(sum(map(size, group.runs)) / len(group.runs), group) for group in members]
    ordered = sorted(sizes, key=lambda entry: entry[0])
    areas = []
    for measure in (INCREMENTAL, LAST):
        runs = [{run.draw: run for run in group.runs if measure.of(run) is not None} for group in members]
        draws = [draw for draw in runs[0] if all(draw in found for found in runs)]
        areas.append(
            estimate(
                area_under_budget(
                    torch.tensor([size(found[draw]) for found in runs], dtype=torch.float64),
                    torch.tensor([measure.of(found[draw]) for found in runs], dtype=torch.float64),
                )
                for draw in draws
            )
        )
    return Budget(
        label=label,
        megabytes=tuple(megabytes for megabytes, _ in ordered),
        groups=tuple(group for _, group in ordered),
        average=areas[0],
        last=areas[1],
    )
