"""Finds the strategies, callbacks and other classes that a config can name, without a list kept by hand."""

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from lightning.pytorch import Callback

import cl_lightning.callbacks
import cl_lightning.datamodules
import cl_lightning.strategies
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.strategy import ContinualStrategy


@dataclass(frozen=True)
class Method:
    """A line of the table of methods.

    Attributes:
        name, path: Of the class, and its import path.
        kind: ``strategy`` or ``callback``.
        family: Folder of the strategy, as a word of the field.
        paper: Where it comes from.
        exemplars: Whether raw samples of earlier tasks are kept.
        task_ids: Whether predictions need the task.
        pretrained: Whether it needs a pretrained backbone.
        summary: First sentence of the docstring.
    """

    name: str
    path: str
    kind: str
    family: str
    paper: str
    exemplars: bool
    task_ids: bool
    pretrained: bool
    summary: str


def _modules(package: ModuleType) -> list[ModuleType]:
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    return [
        importlib.import_module(module.name) for module in found if not module.name.rpartition(".")[2].startswith("_")
    ]


def _classes(package: ModuleType, base: type) -> list[type]:
    classes = {
        member
        for module in _modules(package)
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, base) and member.__module__ == module.__name__ and not member.__name__.startswith("_")
    }
    return sorted(classes, key=lambda member: (member.__module__, member.__name__))


@cache
def strategies() -> tuple[type[ContinualStrategy], ...]:
    """All strategies in the package."""
    return tuple(_classes(cl_lightning.strategies, ContinualStrategy))


@cache
def callbacks() -> tuple[type[Callback], ...]:
    """All callbacks in the package."""
    return tuple(_classes(cl_lightning.callbacks, Callback))


@cache
def datamodules() -> tuple[type[ContinualDataModule], ...]:
    """All data modules in the package but the base."""
    found = _classes(cl_lightning.datamodules, ContinualDataModule)
    return tuple(member for member in found if member is not ContinualDataModule)


def methods() -> list[Method]:
    """Every strategy and callback, as told by the classes themselves."""
    lines = [
        Method(
            name=member.__name__,
            path=f"{member.__module__}.{member.__qualname__}",
            kind="strategy",
            family=member.family,
            paper=member.paper,
            exemplars=member.keeps_exemplars,
            task_ids=member.needs_task_ids,
            pretrained=member.needs_pretrained,
            summary=_first_sentence(member),
        )
        for member in strategies()
    ]
    lines += [
        Method(
            name=member.__name__,
            path=f"{member.__module__}.{member.__qualname__}",
            kind="callback",
            family="callback",
            paper=getattr(member, "paper", ""),
            exemplars=False,
            task_ids=False,
            pretrained=False,
            summary=_first_sentence(member),
        )
        for member in callbacks()
    ]
    return lines


def _first_sentence(member: type) -> str:
    first, dot, _ = " ".join((member.__doc__ or "").split("\n\n")[0].split()).partition(". ")
    return first.rstrip(".") + ("." if first else "")


def markdown() -> str:
    """The table of methods for the documentation."""
    lines = [
        "| name | kind | family | paper | exemplars | task ids | pretrained | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in methods():
        marks = ("yes" if mark else "" for mark in (method.exemplars, method.task_ids, method.pretrained))
        cells = (f"`{method.name}`", method.kind, method.family, method.paper, *marks, method.summary)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
