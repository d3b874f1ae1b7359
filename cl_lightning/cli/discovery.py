"""Finds the strategies, callbacks and data modules of the package by import, without a hand-written list."""

import importlib
import inspect
import pkgutil
import re
from dataclasses import asdict, dataclass
from functools import cache
from types import ModuleType
from typing import Any

from lightning.pytorch import Callback

import cl_lightning.callbacks
import cl_lightning.datamodules
import cl_lightning.models
import cl_lightning.strategies
import cl_lightning.stream
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.models import AdaptedBackbone, Backbone, Head
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.stream import Scenario


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


def catalogue() -> dict[str, Any]:
    """All strategies, callbacks, data modules, scenarios, backbones and heads, as plain values for a file.

    Returns:
        ``entries``, each with its own ``options`` and the names of its ``bases``; and the options of ``bases`` by name.
    """
    described = {method.name: asdict(method) | {"needs": method.needs} for method in methods()}
    members: list[tuple[dict[str, Any], type]] = [
        (described[member.__name__], member) for member in (*strategies(), *callbacks())
    ]
    others = {
        "data": datamodules(),
        "scenario": _classes(cl_lightning.stream, Scenario),
        "backbone": _classes(cl_lightning.models, Backbone),
        "head": _classes(cl_lightning.models, Head),
    }
    for kind, found in others.items():
        for member in found:
            if not inspect.isabstract(member) and member not in (Backbone, Head, AdaptedBackbone):
                path = f"{member.__module__}.{member.__qualname__}"
                facts = {"name": member.__name__, "path": path, "kind": kind, "summary": _first_sentence(member)}
                members.append((facts, member))
    bases: dict[str, list[dict[str, str]]] = {}
    entries = []
    for facts, member in members:
        above = [base for base in member.__mro__[1:] if base.__module__.partition(".")[0] == "cl_lightning"]
        above = [base for base in above if "__init__" in vars(base)]
        bases |= {base.__name__: options(base) for base in above if base.__name__ not in bases}
        entries.append({**facts, "options": options(member), "bases": [base.__name__ for base in above]})
    return {"entries": entries, "bases": bases}


def options(cls: type) -> list[dict[str, str]]:
    """Options that the constructor of a class names: name, type, default, text of the docstring."""
    if "__init__" not in vars(cls):
        return []
    texts, found = _arguments_in(cls), []
    for name, parameter in list(inspect.signature(cls).parameters.items()):
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = "" if parameter.default is parameter.empty else _plain_default(parameter.default)
        kind = _type_name(parameter.annotation)
        found.append({"name": name, "type": kind, "default": default, "text": texts.get(name, "")})
    return found


def _plain_default(value: Any) -> str:
    return value.__name__ if isinstance(value, type) or callable(value) else repr(value)


def _type_name(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return re.sub(r"\b(?:[a-z_]\w*\.)+", "", text)


def _arguments_in(cls: type) -> dict[str, str]:
    """Texts of the arguments in the docstring of a class, by name."""
    part = (inspect.getdoc(cls) or "").partition("\nArgs:\n")[2]
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in part.splitlines():
        if line and not line.startswith("    "):
            break
        if (match := re.match(r"    ([\w, ]+): (.*)", line)) is not None:
            names = match[1].split(", ")
            texts |= dict.fromkeys(names, match[2])
        elif line.strip():
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
    return texts


def _first_sentence(member: type) -> str:
    first = " ".join((member.__doc__ or "").split("\n\n")[0].split()).partition(". ")[0]
    return first.rstrip(".") + ("." if first else "")
