"""Options that may be given without the class that is the default, and short forms of the options used most."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from cl_lightning import catalogue
from cl_lightning.cli.arguments import class_of, configs_of, content_of

SHORT = {
    "--lr": "--model.optimizer.lr",
    "--optimizer": "--model.optimizer",
    "--backbone": "--model.backbone",
    "--epochs": "--trainer.max_epochs",
    "--devices": "--trainer.devices",
    "--seed": "--seed_everything",
    "--batch_size": "--data.batch_size",
    "--tasks": "--data.scenario.tasks",
}
"""Short forms, and the options for which they stand."""
_OPTIMIZER = {"lr": "0.05", "momentum": "0.9"}
_COUNTS = ("tasks", "first", "increment", "sizes")


def expanded(arguments: Sequence[str]) -> list[str]:
    """The arguments with long options in place of short forms."""
    found = []
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        follows = place > 0 and arguments[place - 1].startswith("--") and "=" not in arguments[place - 1]
        if option in SHORT and not (follows and not argument.startswith("--")):
            argument = f"{SHORT[option]}{equals}{value}"
        found.append(argument)
    return found


def with_default_classes(arguments: Sequence[str]) -> list[str]:
    """The arguments with the class that is the default where options of it are given without it.

    Before ``--model.optimizer.lr 0.01`` come ``--model.optimizer=SGD --model.optimizer.lr=0.05`` and the momentum: the
    other options of the default stay. Options of the scenario likewise, for data whose default scenario is
    ``ClassIncremental``.

    Raises:
        ValueError: If the strategy or the data have a default of their own.
    """
    found = list(arguments)
    if given := _options(found, "model", "optimizer"):
        if not _has_usual_optimizer(found) and ("lr" not in given or not _is_momentum(found)):
            raise ValueError(_refusal(found, "model", "optimizer", "SGD", given[0]))
        found = _named(found, "model", "optimizer", "SGD", _OPTIMIZER)
    if given := _options(found, "data", "scenario"):
        if not _splits_classes(found):
            raise ValueError(_refusal(found, "data", "scenario", "ClassIncremental", given[0]))
        tasks = {} if set(given) & set(_COUNTS) else {"tasks": "5"}
        found = _named(found, "data", "scenario", "ClassIncremental", tasks)
    return found


def _refusal(arguments: Sequence[str], part: str, name: str, usual: str, option: str) -> str:
    key, article = f"--{part}.{name}", "an" if name[0] in "aeiou" else "a"
    return (
        f"{key}.{option}: {_name(arguments, part)} has {article} {name} of its own by default; name the class too, "
        f"such as {key} {usual} {key}.{option} ..."
    )


def _named(arguments: Sequence[str], part: str, name: str, usual: str, options: Mapping[str, str]) -> list[str]:
    """The arguments with a class and its default options before the first option of it."""
    found, key = list(arguments), f"--{part}.{name}"
    first = next(place for place, argument in enumerate(found) if argument.startswith(f"{key}."))
    owner = next((p for p, a in enumerate(found) if p > first and a.partition("=")[0] == f"--{part}"), None)
    if owner is not None:  # an option of a class has to follow the class
        moved = found[owner : owner + (1 if "=" in found[owner] else 2)]
        del found[owner : owner + len(moved)]
        found[first:first] = moved
        first += len(moved)
    found[first:first] = [f"{key}={usual}", *(f"{key}.{option}={value}" for option, value in options.items())]
    return found


def _optimizer_of(arguments: Sequence[str]) -> tuple[str, str]:
    """Text of the option ``optimizer`` of the strategy, and the base that has it; empty for a class of the user."""
    entry = catalogue.entry_of(_name(arguments, "model"))
    for option, base in catalogue.options_of(entry) if entry else ():
        if option["name"] == "optimizer":
            return option["text"], base
    return "", "ContinualStrategy"


def _has_usual_optimizer(arguments: Sequence[str]) -> bool:
    """Whether the strategy takes the default optimizer of the base class."""
    return _optimizer_of(arguments)[1] == "ContinualStrategy"


def _is_momentum(arguments: Sequence[str]) -> bool:
    """Whether the default optimizer of the strategy differs from the usual one by its learning rate alone."""
    return "SGD with momentum 0.9" in _optimizer_of(arguments)[0]


def _splits_classes(arguments: Sequence[str]) -> bool:
    """Whether the scenario of the data is the one of the base class by default."""
    from cl_lightning.datamodules.base import ContinualDataModule

    entry = catalogue.entry_of(_name(arguments, "data"))
    if entry is None:
        return True
    module, _, name = entry["path"].rpartition(".")
    found: Any = getattr(import_module(module), name)
    return found.default_scenario is ContinualDataModule.default_scenario


def _name(arguments: Sequence[str], key: str) -> str:
    return (class_of(arguments, key) or "").rpartition(".")[2]


def _set(prefix: str, options: Mapping[str, str]) -> list[str]:
    return [f"{prefix}{name}={value}" for name, value in options.items()]


def _options(arguments: Sequence[str], part: str, name: str) -> list[str]:
    """Options of a nested class that are given, if neither an argument nor a config names the class."""
    key = f"--{part}.{name}"
    given = [argument.partition("=")[0] for argument in arguments]
    if key in given or f"{key}.class_path" in given:
        return []
    for config in configs_of(arguments):
        content = content_of(config)
        inner = content.get(part) if isinstance(content, Mapping) else None
        options = inner.get("init_args") if isinstance(inner, Mapping) else None
        if isinstance(options, Mapping) and options.get(name) is not None:
            return []
    start = f"{key}."
    return [option[len(start) :] for option in given if option.startswith(start) and "help" not in option]
