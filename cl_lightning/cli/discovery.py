"""Finds the strategies, callbacks and data modules of the package by import, without a hand-written list."""

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
    """A row of the table of methods.

    Attributes:
        name, path: Name of the class, and its import path.
        kind: ``strategy`` or ``callback``.
        family: Family of methods, such as ``rehearsal``; ``callback`` for callbacks.
        paper: Authors, venue, year, arXiv id.
        exemplars: Whether raw samples of earlier tasks are kept.
        all_data: Whether every task is trained on the data of all tasks so far.
        task_ids: Whether predictions need the task id.
        pretrained: Whether it needs a pretrained backbone.
        test_batch: Whether a prediction depends on the other samples of its test batch.
        inputs: Kinds of samples that the method takes; its backbone must take them too. Empty for a callback.
        targets: Kinds of targets that the method takes, likewise.
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
    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    summary: str

    @property
    def needs(self) -> str:
        """What the method keeps or needs, in words."""
        marks = {
            "exemplars": self.exemplars,
            "all data": self.all_data,
            "task ids": self.task_ids,
            "pretrained": self.pretrained,
            "whole test batches": self.test_batch,
            "images": self.inputs == ("image",),
        }
        return ", ".join(name for name, mark in marks.items() if mark)


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
    """All strategies in the package; a class without a family is a base class."""
    found = _classes(cl_lightning.strategies, ContinualStrategy)
    return tuple(member for member in found if issubclass(member, ContinualStrategy) and member.traits.family)


@cache
def callbacks() -> tuple[type[Callback], ...]:
    """All callbacks in the package."""
    return tuple(_classes(cl_lightning.callbacks, Callback))


@cache
def datamodules() -> tuple[type[ContinualDataModule], ...]:
    """All data modules in the package, without the base class."""
    found = _classes(cl_lightning.datamodules, ContinualDataModule)
    return tuple(member for member in found if member is not ContinualDataModule)


def methods() -> list[Method]:
    """Every strategy and callback, described by the attributes of its class."""
    lines = [
        Method(
            name=member.__name__,
            path=f"{member.__module__}.{member.__qualname__}",
            kind="strategy",
            family=member.traits.family,
            paper=member.traits.paper,
            exemplars=member.traits.keeps_exemplars,
            all_data=member.traits.needs_all_data,
            task_ids=member.traits.task_ids != "unused",
            pretrained=member.traits.needs_pretrained,
            test_batch=member.traits.transductive,
            inputs=member.traits.inputs,
            targets=member.traits.targets,
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
            inputs=(),
            targets=(),
            summary=_first_sentence(member),
        )
        for member in callbacks()
    ]
    return lines


def _first_sentence(member: type) -> str:
    first = " ".join((member.__doc__ or "").split("\n\n")[0].split()).partition(". ")[0]
    return first.rstrip(".") + ("." if first else "")


def show(form: str = "table", console: Console | None = None) -> None:
    """Print every strategy and callback.

    Args:
        form: ``table`` for the terminal (without summaries below 130 columns), ``markdown``, or ``json``, a list with
            all fields.
        console: Console to print to; None for standard output.
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
        cells = [method.name, method.family, method.needs, method.paper]
        table.add_row(*cells, *([method.summary] if wide else []))
    console.print(table)


def markdown() -> str:
    """The table of methods in Markdown."""
    lines = ["| name | family | keeps or needs | paper | what it does |", "|---|---|---|---|---|"]
    for method in methods():
        cells = (f"`{method.name}`", method.family, method.needs, method.paper, method.summary)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
