"""The file of a study: its streams, methods and seeds, and how hyper-parameters are chosen; read and checked.

    name: digits                         # by default the name of the file
    data: [digits]                       # configs by name or path
    methods:
      - finetune
      - {name: er_small, config: er, options: {model.memory_size: 100}}
    seeds: [0, 1, 2]                     # or their number
    options: {trainer.max_epochs: 2}     # of all runs
    spaces:                              # by method: options to choose, with their values or bounds
      er_small: {model.replay_size: [16, 32], model.optimizer.lr: {low: 0.001, high: 0.1, log: true}}
    select: {data: fashion_mnist_npz, seeds: [0], sampler: tpe, trials: 8}

``docs/studies.md`` describes every key.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

from cl_lightning.checks import above, at_least, one_of, within

Sampler = Literal["random", "tpe", "grid", "plasticity_first"]
Pruner = Literal["median", "hyperband"]
Score = Literal["average_incremental_accuracy", "last_accuracy"]
Protocol = Literal["two_phase", "first_tasks"]
Plain = bool | int | float | str | None

_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
_OF_A_RUN = ("seed_everything", "run_dir", "ckpt_path", "config", "images", "output", "task")
"""Options that a study sets itself, or that have no meaning in it."""


class DefinitionError(ValueError):
    """A study that cannot be run as it is written; the message is one line."""


@dataclass(frozen=True)
class Part:
    """A stream or a method: a config, options, or both.

    Attributes:
        name: Its name in the study.
        config: Config file, by name or path; None if the options name the class.
        options: Options of the command line by key, without dashes.
    """

    name: str
    config: str | None
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "config": self.config, "options": dict(self.options)}


@dataclass(frozen=True)
class Space:
    """The values of an option that a search may choose.

    Attributes:
        key: The option.
        values: The values, for a choice; empty for a range.
        low, high: Bounds of a range, both included; a range of integers if both are.
        log: Whether the logarithm is uniform.
    """

    key: str
    values: tuple[Plain, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    @property
    def extremes(self) -> tuple[Plain, ...]:
        """Values with which the option is tried before anything runs."""
        return self.values or (self.low, self.high)

    def to_dict(self) -> Any:
        return list(self.values) if self.values else {"low": self.low, "high": self.high, "log": self.log}


@dataclass(frozen=True)
class Selection:
    """How hyper-parameters are chosen.

    Attributes:
        protocol: ``two_phase``: on a stream ``data``, whose classes none of the streams of the study has (GTEP, Cha &
            Cho, TMLR 2025, arXiv:2403.09066); ``first_tasks``: on the first ``tasks`` tasks of each stream.
        data: The stream of the first phase; None for ``first_tasks``.
        seeds: Seeds over which a setting is averaged.
        sampler: Sampler of the settings. ``plasticity_first`` chooses all options but ``stability`` by the accuracy on
            each new task alone, then the largest value of ``stability`` that loses at most ``share`` of it (De Lange et
            al., TPAMI 2022, arXiv:1909.08383).
        trials: Number of settings; None for ``grid`` and ``plasticity_first``, which try all.
        pruner: Ends settings early whose accuracy after a task is low, by the median or by successive halving.
        score: Measure on validation samples, mean over the seeds, which is maximised.
        tasks: Number of tasks, the first of the stream, that a search trains on; None for all.
        val_fraction: Share of the training samples that is held out for validation.
        stability: Option that trades plasticity for stability, by method.
        share: Largest share of the plasticity that may be lost for stability.
        seed: Seed of the sampler.
    """

    protocol: Protocol = "two_phase"
    data: Part | None = None
    seeds: tuple[int, ...] = (0,)
    sampler: Sampler = "random"
    trials: int | None = None
    pruner: Pruner | None = None
    score: Score = "average_incremental_accuracy"
    tasks: int | None = None
    val_fraction: float = 0.1
    stability: Mapping[str, str] = field(default_factory=dict)
    share: float = 0.1
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            **{entry.name: getattr(self, entry.name) for entry in fields(self)},
            "data": None if self.data is None else self.data.to_dict(),
            "seeds": list(self.seeds),
            "stability": dict(self.stability),
        }


@dataclass(frozen=True)
class Cell:
    """One run of the second phase, or of a study without a search: a stream, a method and a seed."""

    data: Part
    method: Part
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data.name}/{self.method.name}/seed_{self.seed}"


@dataclass(frozen=True)
class Definition:
    """A study.

    Attributes:
        name: Name in the storage, and group of W&B.
        data, methods, seeds: The cells are all their combinations.
        options: Options of all runs; those of streams override them, and those of methods these.
        spaces: Options to choose, by method.
        select: How they are chosen; None without spaces.
        baseline: Method that the others are compared with; None for the choice of ``report``.
    """

    name: str
    data: tuple[Part, ...]
    methods: tuple[Part, ...]
    seeds: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    spaces: Mapping[str, tuple[Space, ...]] = field(default_factory=dict)
    select: Selection | None = None
    baseline: str | None = None

    @property
    def cells(self) -> list[Cell]:
        """All cells; every method has run with a seed before the next seed begins."""
        return [Cell(data, method, seed) for seed, data, method in product(self.seeds, self.data, self.methods)]

    def searches(self) -> list[tuple[Part, Part]]:
        """Stream and method of each search."""
        if self.select is None:
            return []
        streams = self.data if self.select.data is None else (self.select.data,)
        return [(stream, method) for stream in streams for method in self.methods if method.name in self.spaces]

    def search_of(self, cell: Cell) -> tuple[str, str] | None:
        """Names of stream and method of the search that chooses the options of a cell; None if there is none."""
        if self.select is None or cell.method.name not in self.spaces:
            return None
        return (self.select.data or cell.data).name, cell.method.name

    def arguments(self, data: Part, method: Part, seed: int, chosen: Mapping[str, Any] | None = None) -> list[str]:
        """Arguments of ``python -m cl_lightning`` for a run, without its folder.

        Args:
            data: Stream.
            method: Method.
            seed: Seed.
            chosen: Further options, which override all others.
        """
        configs = [part.config for part in (data, method) if part.config is not None]
        options: dict[str, Any] = {}
        for more in (self.options, data.options, method.options, chosen or {}):
            for key, value in more.items():
                options.pop(key, None)  # the later place counts: a class comes before its options
                options[key] = value
        return [
            "fit",
            *(part for config in configs for part in ("--config", config)),
            *(f"--{key}={as_text(value)}" for key, value in options.items()),
            f"--seed_everything={seed}",
        ]

    def to_dict(self) -> dict[str, Any]:
        """The study as plain values; :func:`parse` reads them."""
        return {
            "name": self.name,
            "data": [part.to_dict() for part in self.data],
            "methods": [part.to_dict() for part in self.methods],
            "seeds": list(self.seeds),
            "options": dict(self.options),
            "spaces": {name: {one.key: one.to_dict() for one in each} for name, each in self.spaces.items()},
            "select": None if self.select is None else self.select.to_dict(),
            "baseline": self.baseline,
        }


def as_text(value: Any) -> str:
    """The value of an option as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def parse(content: Any, where: str) -> Definition:
    """A study from plain values.

    Args:
        content: Content of the file.
        where: The file, for the default name and for messages.

    Raises:
        DefinitionError: If the study cannot be run as it is written.
    """
    try:
        return _parse(content, where)
    except ValueError as error:
        raise DefinitionError(f"{where}: {error}") from None


def _parse(content: Any, where: str) -> Definition:
    top = _mapping(content, "the study", [entry.name for entry in fields(Definition)])
    for key in ("data", "methods"):
        if not top.get(key):
            raise ValueError(f"{key} is missing; list configs by name or path")
    data = _parts(top["data"], "data")
    methods = _parts(top["methods"], "methods")
    spaces = _spaces(top.get("spaces"), methods)
    select = _selection(top.get("select"), methods, spaces)
    name = _name(top.get("name") or Path(where).stem, "name")
    found = Definition(
        name=name,
        data=data,
        methods=methods,
        seeds=_seeds(top.get("seeds", 1), "seeds"),
        options=_options(top.get("options"), "options"),
        spaces=spaces,
        select=select,
        baseline=top.get("baseline"),
    )
    if found.baseline is not None and found.baseline not in [method.name for method in methods]:
        raise ValueError(f"baseline {found.baseline!r} is none of the methods{_near(found.baseline, methods)}")
    _check_overrides(found)
    return found


def _check_overrides(study: Definition) -> None:
    """Refuse options that are both searched and set: the frozen choice would override the others."""
    streams = [*study.data, *([] if study.select is None or study.select.data is None else [study.select.data])]
    for method in study.methods:
        for space in study.spaces.get(method.name, ()):
            for owner, options in (
                ("options", study.options),
                (f"the options of {method.name}", method.options),
                *((f"the options of {stream.name}", stream.options) for stream in streams),
            ):
                if space.key in options:
                    raise ValueError(
                        f"spaces.{method.name}: {space.key} is searched, and set in {owner}; remove one of the two"
                    )


def _mapping(value: Any, what: str, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be keys and values, such as {known[0]}: ...")
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(
                f"{what} has an unknown key {key!r}"
                + (f"; did you mean {near[0]!r}?" if near else f"; use {', '.join(known)}")
            )
    return value


def _name(value: Any, what: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(f"{what} is {value!r}; use letters, digits and . _ + -, since it names a folder")
    return value


def _near(name: str, parts: Sequence[Part]) -> str:
    names = [part.name for part in parts]
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; use {', '.join(names)}"


def _parts(value: Any, what: str) -> tuple[Part, ...]:
    listed = value if isinstance(value, list) else [value]
    parts = tuple(_part(entry, f"{what}[{index}]") for index, entry in enumerate(listed))
    for index, part in enumerate(parts):
        for other in parts[:index]:
            if part.name == other.name:
                raise ValueError(
                    f"{what} has {part.name!r} twice, so that two cells are the same; remove one, or give one another "
                    "name and other options"
                )
            if (part.config, part.options) == (other.config, other.options):
                raise ValueError(f"{what}: {other.name} and {part.name} are the same; remove one")
    return parts


def _part(value: Any, what: str) -> Part:
    if isinstance(value, str):
        return Part(_name(Path(value).stem if value.endswith((".yaml", ".yml")) else value, what), value)
    entry = _mapping(value, what, ("name", "config", "options"))
    config, options = entry.get("config"), _options(entry.get("options"), f"{what}.options")
    if config is None and not options:
        raise ValueError(f"{what}: give config, or options that name a class")
    if config is not None and not isinstance(config, str):
        raise ValueError(f"{what}.config is {config!r}; give the name or path of a config")
    return Part(_name(entry.get("name") or (Path(config).stem if config else None), f"{what}.name"), config, options)


def _options(value: Any, what: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{what} must be options of fit with values, such as trainer.max_epochs: 2")
    for key in value:
        _key(key, what)
    return dict(value)


def _key(key: str, what: str) -> str:
    if key.rstrip("+") in _OF_A_RUN:
        raise ValueError(f"{what}: {key} is set by the study; leave it out")
    if not re.fullmatch(r"[A-Za-z_][\w.]*\+?", key):
        raise ValueError(f"{what}: {key!r} is no option of fit; write it without dashes, such as model.memory_size")
    return key


def _seeds(value: Any, what: str) -> tuple[int, ...]:
    listed = list(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value
    if (
        not isinstance(listed, list)
        or not listed
        or not all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in listed)
    ):
        raise ValueError(f"{what} is {value!r}; give a list of integers of at least 0, or their number")
    if len(set(listed)) < len(listed):
        raise ValueError(f"{what} has a seed twice, so that two cells are the same; remove one")
    return tuple(listed)


def _spaces(value: Any, methods: Sequence[Part]) -> dict[str, tuple[Space, ...]]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError("spaces must be options by the names of methods")
    found = {}
    for name, entries in value.items():
        if name not in [method.name for method in methods]:
            raise ValueError(f"spaces has {name!r}, which is none of the methods{_near(str(name), methods)}")
        if not isinstance(entries, Mapping) or not entries:
            raise ValueError(f"spaces.{name} must be options of fit with their values or bounds")
        found[name] = tuple(_space(key, entry, f"spaces.{name}") for key, entry in entries.items())
    return found


def _space(key: Any, value: Any, where: str) -> Space:
    what = f"{where}.{_key(str(key), where)}"
    if isinstance(value, list):
        if len(value) < 2 or not all(item is None or isinstance(item, bool | int | float | str) for item in value):
            raise ValueError(f"{what}: give at least two numbers, texts, true, false or null")
        if len({json.dumps(item) for item in value}) < len(value):
            raise ValueError(f"{what} has a value twice; remove one")
        return Space(key, tuple(value))
    entry = _mapping(value, what, ("low", "high", "log"))
    low, high = entry.get("low"), entry.get("high")
    if not isinstance(low, int | float) or not isinstance(high, int | float):
        raise ValueError(f"{what}: give a list of values, or the numbers low and high")
    log = entry.get("log", False)
    one_of(what, (True, False), log=log)
    if not low < high or (log and low <= 0):
        raise ValueError(f"{what}: low is {low} and high {high}; low must be below high{', and above 0' * bool(log)}")
    return Space(key, (), low, high, log)


def _selection(value: Any, methods: Sequence[Part], spaces: Mapping[str, tuple[Space, ...]]) -> Selection | None:
    if value is None:
        if spaces:
            raise ValueError("there are spaces, and no select, which says on what data options are chosen; add it")
        return None
    if not spaces:
        raise ValueError("there is a select, and no spaces with options to choose; add them, or remove select")
    if isinstance(value, Mapping) and {"split", "on", "metric"} & set(value):
        raise ValueError("select: options are chosen on validation samples alone, never on test data; remove the key")
    entry = dict(_mapping(value, "select", [entry.name for entry in fields(Selection)]))
    if entry.get("data") is not None:
        (entry["data"],) = _parts(entry["data"], "select.data")
    entry["seeds"] = _seeds(entry.get("seeds", 1), "select.seeds")
    select = Selection(**entry)
    one_of("select", get_args(Protocol), protocol=select.protocol)
    one_of("select", get_args(Sampler), sampler=select.sampler)
    one_of("select", get_args(Pruner), optional=True, pruner=select.pruner)
    if str(select.score).startswith("test"):
        raise ValueError(f"select: score is {select.score!r}; test data select nothing, use {get_args(Score)[0]}")
    one_of("select", get_args(Score), score=select.score)
    at_least("select", 1, optional=True, trials=select.trials, tasks=select.tasks)
    above("select", 0, val_fraction=select.val_fraction)  # without validation samples, test data would have to select
    within("select", "(0, 1)", val_fraction=select.val_fraction)
    within("select", "[0, 1)", share=select.share)
    at_least("select", 0, seed=select.seed)
    if select.protocol == "two_phase" and select.data is None:
        raise ValueError(
            "select: give data, a stream whose classes the other streams do not have, or protocol first_tasks"
        )
    if select.protocol == "first_tasks" and (select.data is not None or select.tasks is None):
        raise ValueError("select: protocol first_tasks takes tasks, their number, and no data")
    _check_sampler(select, methods, spaces)
    return select


def _check_sampler(select: Selection, methods: Sequence[Part], spaces: Mapping[str, tuple[Space, ...]]) -> None:
    counts = select.sampler in ("random", "tpe")
    if counts and select.trials is None:
        raise ValueError(f"select: give trials, the number of settings that {select.sampler} draws")
    if not counts:
        if select.trials is not None:
            raise ValueError(f"select: {select.sampler} tries all values; remove trials")
        for name, each in spaces.items():
            if ranges := [space.key for space in each if not space.values]:
                raise ValueError(f"spaces.{name}: {select.sampler} needs a list of values for {ranges[0]}")
    if select.stability and select.sampler != "plasticity_first":
        raise ValueError("select: stability belongs to sampler plasticity_first; remove it")
    if select.sampler == "plasticity_first" and select.pruner is not None:
        raise ValueError("select: plasticity_first compares all values; remove pruner")
    for name, key in select.stability.items():
        found = {space.key: space for space in spaces.get(name, ())}
        if key not in found:
            raise ValueError(f"select.stability: {name} has no space for {key!r}; add it to spaces.{name}")
        if not all(isinstance(item, int | float) for item in found[key].values):
            raise ValueError(f"spaces.{name}: {key} must have numbers, since it is the stability of {name}")
        if len(found) < 2:
            raise ValueError(
                f"spaces.{name}: plasticity_first needs an option apart from {key}, such as the learning rate"
            )
