"""Finds the strategies, callbacks and other classes that a config can name, without a list kept by hand."""

import importlib
import inspect
import json
import pkgutil
from dataclasses import asdict, dataclass
from functools import cache
from types import ModuleType

from lightning.pytorch import Callback
from rich import box
from rich.console import Console
from rich.table import Table

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
        all_data: Whether every task is trained on the data of all tasks so far.
        task_ids: Whether predictions need the task.
        pretrained: Whether it needs a pretrained backbone.
        test_batch: Whether a prediction depends on the other samples of its test batch.
        summary: First sentence of the docstring.
    """

    name: str
    path: str
    kind: str
    family: str
    paper: str
    exemplars: bool
    all_data: bool
    task_ids: bool
    pretrained: bool
    test_batch: bool
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
    """All strategies in the package; a class without a family is a base of others."""
    found = _classes(cl_lightning.strategies, ContinualStrategy)
    return tuple(member for member in found if issubclass(member, ContinualStrategy) and member.family)


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
            all_data=member.needs_all_data,
            task_ids=member.needs_task_ids,
            pretrained=member.needs_pretrained,
            test_batch=member.uses_test_batch,
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
            all_data=False,
            task_ids=False,
            pretrained=False,
            test_batch=False,
            summary=_first_sentence(member),
        )
        for member in callbacks()
    ]
    return lines


def _first_sentence(member: type) -> str:
    first = " ".join((member.__doc__ or "").split("\n\n")[0].split()).partition(". ")[0]
    return first.rstrip(".") + ("." if first else "")


def _needs(method: Method) -> str:
    """What a strategy keeps or asks for, in words."""
    marks = {
        "exemplars": method.exemplars,
        "all data": method.all_data,
        "task ids": method.task_ids,
        "pretrained": method.pretrained,
        "whole test batches": method.test_batch,
    }
    return ", ".join(name for name, mark in marks.items() if mark)


def show(form: str = "table", console: Console | None = None) -> None:
    """Print every strategy and callback.

    Args:
        form: A ``table`` for the terminal, which leaves out the summaries where it is narrow; a ``markdown`` table for
            the documentation; or a ``json`` list with all fields.
        console: Where to print; None for standard output.
    """
    console = console or Console()
    if form == "json":
        text = json.dumps([asdict(method) for method in methods()], indent=1, ensure_ascii=False)
    elif form == "markdown":
        text = markdown()
    else:
        _show_table(console)
        return
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _show_table(console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    wide = console.width >= 130
    table.add_column("name", no_wrap=True)
    table.add_column("family", no_wrap=True)
    table.add_column("keeps or needs", ratio=1)
    table.add_column("paper", ratio=3)
    if wide:
        table.add_column("what it does", ratio=4)
    family = ""
    for method in methods():
        if family and method.family != family:
            table.add_section()
        family = method.family
        cells = [method.name, method.family, _needs(method), method.paper]
        table.add_row(*cells, *([method.summary] if wide else []))
    console.print(table)


def markdown() -> str:
    """The table of methods for the documentation."""
    lines = ["| name | family | keeps or needs | paper | what it does |", "|---|---|---|---|---|"]
    for method in methods():
        cells = (f"`{method.name}`", method.family, _needs(method), method.paper, method.summary)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
