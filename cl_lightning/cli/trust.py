"""Configurations inside checkpoints: which classes and functions they may name, without the user's consent.

A class or a function that a configuration names can do anything when it is imported or called. The user's own
configuration is trusted like code. The configuration inside a checkpoint may come from somebody else. It is checked
before the parser reads it, by the type of each option; jsonargparse then refuses all other imports as well.
"""

import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from functools import cache
from importlib import import_module
from os import PathLike
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import LayerSync, Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from cl_lightning.escape_control import printable
from cl_lightning.parser_private import actions, settings_restored, type_hint

FLAG = "--trust_checkpoint"
PACKAGES = ("cl_lightning", "torch", "torchvision", "timm", "lightning", "torchmetrics")
"""Packages whose classes a checkpoint may name."""

_OWN = "cl_lightning"
# Parts of these packages whose classes start processes, load code or run a command line.
_EXCLUDED = (
    *(f"{_OWN}.{room}" for room in ("cli", "testing", "report", "loop")),
    *(f"torch.{part}" for part in ("distributed", "fx", "hub", "jit", "multiprocessing", "package", "utils")),
    *(f"lightning.pytorch.{part}" for part in ("cli", "demos")),
    *("lightning.fabric.cli", "torchvision.datasets"),
)
_KINDS = (
    *(nn.Module, Optimizer, LRScheduler, Metric, Callback, LightningDataModule, Logger, Profiler, Strategy),
    *(Accelerator, Precision, ClusterEnvironment, CheckpointIO, LayerSync),
)
"""A class of another package than this one is a subclass of one of these."""

_PLAIN = (str, int, float, complex, bytes, timedelta, PathLike, Enum, type(None))
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_WORD = re.compile(r"[\w-]*")


class _RefusedError(Exception):
    """A reason against a name, without its place."""


@dataclass(frozen=True)
class _Wanted:
    """What an option takes.

    Attributes:
        bases: The values are instances of these classes, or results of callables that return them.
        callables: Whether any callable is taken.
        anything: Whether the type is not known.
        mapping: Whether the keys of a mapping are free.
    """

    bases: tuple[type, ...] = ()
    callables: bool = False
    anything: bool = False
    mapping: bool = False

    @property
    def names(self) -> bool:
        """Whether a text is the name of a class or a function."""
        return bool(self.bases) or self.callables


def wanted(hint: Any) -> _Wanted:
    """What an option with this type takes; all alternatives and items of the type together."""
    found = _Wanted()
    stack = [hint]
    while stack:
        part = stack.pop()
        origin, inner = typing.get_origin(part) or part, typing.get_args(part)
        if origin is typing.Literal or part is None:
            continue
        if origin is typing.Annotated:
            stack.append(inner[0])
        elif origin in (type, typing.Type):  # noqa: UP006
            found = _joined(found, bases=tuple(base for base in inner if inspect.isclass(base)), callables=not inner)
        elif origin in (Callable, typing.Callable):
            result = wanted(inner[-1]) if len(inner) > 1 and not inspect.isclass(inner[-1]) else None
            bases = result.bases if result else tuple(base for base in inner[1:] if not issubclass(base, _PLAIN))
            found = _joined(found, bases=bases, callables=not bases)
        elif isinstance(origin, type) and issubclass(origin, Mapping):
            found = _joined(found, mapping=True, anything=not inner)
            stack += inner[1:]
        elif isinstance(origin, type) and (issubclass(origin, (list, tuple, set, frozenset)) or inner):
            found = _joined(found, anything=not inner)
            stack += [entry for entry in inner if entry is not Ellipsis]
        elif inner:  # unions
            stack += inner
        elif not isinstance(origin, type) or origin is object:
            found = _joined(found, anything=True)
        elif not issubclass(origin, _PLAIN):
            found = _joined(found, bases=(origin,))
    return found


def _joined(one: _Wanted, *, bases: tuple[type, ...] = (), **flags: bool) -> _Wanted:
    merged = {name: getattr(one, name) or flag for name, flag in flags.items()}
    return _Wanted(
        (*one.bases, *bases),
        **{name: merged.get(name, getattr(one, name)) for name in ("callables", "anything", "mapping")},
    )


_ANYTHING = _Wanted(anything=True)


@dataclass
class _Check:
    """Walks over a configuration and raises at the first name that is not allowed."""

    named: Mapping[str, set[str]] = field(default_factory=dict)

    def options(self, content: Any, types: Mapping[str, Any], place: str, prefix: str = "") -> None:
        """Check keys and values for a class or a group of options, whose types are given by key."""
        if content is None:
            return
        if not isinstance(content, Mapping):
            raise _RefusedError(f"{place or 'it'} is not a mapping of options")
        for key, value in content.items():
            if not isinstance(key, str) or not key.isidentifier():
                raise _RefusedError(f"the key {key!r} at {place or 'the top'} is not the name of an option")
            name, inner = prefix + key, f"{place}.{key}" if place else key
            if (hint := types.get(name)) is not None:
                self.value(value, wanted(hint), inner)
            elif any(other.startswith(f"{name}.") for other in types):
                self.options(value, types, inner, f"{name}.")
            else:
                self.value(value, _ANYTHING, inner)

    def value(self, value: Any, takes: _Wanted, place: str) -> None:
        if isinstance(value, str):
            self.text(value, takes, place)
        elif isinstance(value, Sequence):
            for index, item in enumerate(value):
                self.value(item, takes, f"{place}[{index}]")
        elif isinstance(value, Mapping):
            self.mapping(value, takes, place)

    def mapping(self, value: Mapping[Any, Any], takes: _Wanted, place: str) -> None:
        keys = value.keys()
        for key in keys:
            if isinstance(key, str):
                self.reference(key, place)
        if "class_path" in keys:
            types = types_of(self.name(value["class_path"], takes, place, called=True))
            self.options(value.get("init_args"), types, place)
            self.options(value.get("dict_kwargs"), types, place)
            for key in keys - {"class_path", "init_args", "dict_kwargs"}:
                self.value(value[key], _ANYTHING, f"{place}.{key}")
            return
        if {"init_args", "dict_kwargs"} & keys:  # for the class that a default or the user names
            raise _RefusedError(f"{place} has options, but no class")
        of_bases = {key: hint for base in takes.bases for key, hint in types_of(base).items()}
        if of_bases and not takes.mapping:
            self.options(value, of_bases, place)
            return
        for key, item in value.items():
            self.value(item, takes if takes.mapping else _ANYTHING, f"{place}.{key}")

    def text(self, value: str, takes: _Wanted, place: str) -> None:
        self.reference(value, place)
        if any(mark in value for mark in ":[{-\n&*!"):  # the parser reads YAML inside a text
            try:
                inner = yaml.safe_load(value)
            except (yaml.YAMLError, ValueError, RecursionError):
                inner = None
            if isinstance(inner, (Mapping, list)):
                self.value(inner, takes, place)
        if not takes.names:
            return
        known = any(member.__name__ == value for member in _members(takes))
        if _NAME.fullmatch(value) or known:
            self.name(value, takes, place)
        elif not _WORD.fullmatch(value) or not value or Path(value).exists():
            raise _RefusedError(f"{place} is {value!r}, which is not the import path of a class")

    def reference(self, value: str, place: str) -> None:
        if "${" in value:
            raise _RefusedError(f"{place} contains the reference {value!r}, which is replaced when it is read")

    def short(self, name: str, takes: _Wanted, place: str) -> type:
        """The allowed class of this name, among the imported subclasses of what the option takes."""
        found = {member for member in _members(takes) if member.__name__ == name}
        if len(found) != 1 or Path(name).exists():
            raise _RefusedError(f"{place} names {name!r}, which is not an import path")
        member = found.pop()
        self.name(f"{member.__module__}.{member.__qualname__}", takes, place)
        return member

    def name(self, path: Any, takes: _Wanted, place: str, *, called: bool = False) -> Any:
        """The allowed object of this import path; None for the short name of a class."""
        if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")):
            raise _RefusedError(f"{place} names {path!r}, which is not an import path")
        if path in self.named.get(_plain_place(place), ()):
            return _import(path)
        if "." not in path:
            return self.short(path, takes, place)
        try:
            return allowed(path, takes, called=called)
        except _RefusedError as error:
            raise _RefusedError(f"{place} names {path!r}, {error}") from None


def _members(takes: _Wanted) -> set[type]:
    """All imported classes that an option takes."""
    found: set[type] = set()
    stack = list(takes.bases)
    while stack:
        if (base := stack.pop()) not in found:
            found.add(base)
            stack += type.__subclasses__(base)
    return found


def allowed(path: str, takes: _Wanted, *, called: bool = False) -> Any:
    """The class or function of an import path, if a checkpoint may name it for such an option.

    A function that is called with arguments of the configuration returns what the option takes.

    Nothing outside of ``PACKAGES`` is imported, and no private module that is not imported already.

    Raises:
        _RefusedError: If it may not, with the reason.
    """
    if path.partition(".")[0] not in PACKAGES:
        raise _RefusedError("which is in none of the packages that a checkpoint may name")
    found = _import(path)
    if found is None:
        raise _RefusedError("which is not there")
    if not isinstance(found, type) and not callable(found):
        raise _RefusedError("which is not a class")
    home = str(getattr(found, "__module__", ""))
    full = f"{home}.{getattr(found, '__qualname__', '')}"
    if home.partition(".")[0] not in PACKAGES or _import(full) is not found:
        raise _RefusedError(f"which is {full}")
    if any(f"{full}.".startswith(f"{part}.") for part in _EXCLUDED):
        raise _RefusedError("which may start processes or load code")
    own = home == _OWN or home.startswith(f"{_OWN}.")
    if isinstance(found, type):
        if not own and not issubclass(found, _KINDS):
            raise _RefusedError("which is not a kind of module, optimizer, scheduler, callback, logger or plugin")
        if takes.bases and not takes.callables and not takes.anything and not issubclass(found, takes.bases):
            kinds = " or ".join(sorted({base.__name__ for base in takes.bases}))
            raise _RefusedError(f"which is not a kind of {kinds}")
        return found
    if not own or not isinstance(found, FunctionType) or "." in found.__qualname__:
        raise _RefusedError("which is not a class" if own else f"which is not a class; of functions, only {_OWN}'s are")
    if called or not takes.callables:
        result = typing.get_type_hints(found).get("return")
        if not isinstance(result, type) or not issubclass(result, takes.bases):
            raise _RefusedError("which is a function that does not return what the option takes")
    return found


def _import(path: str) -> Any:
    """The object that the parser would import, or None; a private module is found only if it is imported already."""
    *parents, last = path.split(".")
    found: Any = None
    for index, part in enumerate(parents, start=1):
        module = ".".join(parents[:index])
        inner = sys.modules.get(module)
        if inner is None and (index == 1 or isinstance(found, ModuleType)) and not part.startswith("_"):
            inner = _try(module)
        if inner is None:
            inner = _attribute(found, part)
        if inner is None or (isinstance(inner, ModuleType) and inner.__name__ != module):
            return None  # nothing, or a module that another one has imported
        found = inner
    return _attribute(found, last)


def _attribute(owner: Any, name: str) -> Any:
    if isinstance(owner, ModuleType):
        return getattr(owner, name, None)
    return inspect.getattr_static(owner, name, None) if isinstance(owner, type) else None


def _try(module: str) -> Any:
    try:
        return import_module(module)
    except Exception:  # modules of optional packages fail in many ways; the parser reports the path
        return None


@cache
def types_of(found: Any) -> dict[str, Any]:
    """Types of the arguments of a class or function by name, as the parser sees them; nested groups have dots."""
    if found is None:
        return {}
    parser = ArgumentParser(exit_on_error=False)
    try:
        add = parser.add_class_arguments if isinstance(found, type) else parser.add_function_arguments
        add(found, fail_untyped=False)
    except Exception:  # no signature: every argument is checked as one of unknown type
        return {}
    return option_types(parser)


def option_types(parser: Any) -> dict[str, Any]:
    """Types of the options of a parser by key, as far as they have one."""
    hints = ((action.dest, type_hint(action)) for action in actions(parser))
    return {key: hint for key, hint in hints if hint is not None and not key.endswith(".help")}


def _plain_place(place: str) -> str:
    """A place without positions in lists, as options of the command line name it."""
    return re.sub(r"\[\d+\]", "", place.replace(".init_args", ""))


def named_by(arguments: Sequence[str]) -> dict[str, set[str]]:
    """Import paths that the user gives on the command line, by option."""
    found: dict[str, set[str]] = {}
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if not option.startswith("--"):
            continue
        if not equals:
            value = arguments[index + 1] if index + 1 < len(arguments) else ""
        if _NAME.fullmatch(value):
            key = option[2:].rstrip("+").removesuffix(".class_path")
            found.setdefault(_plain_place(key), set()).add(value)
    return found


def problem(content: Any, types: Mapping[str, Any], arguments: Sequence[str] = ()) -> str | None:
    """Why a configuration may not be used without the user's consent; None if it may.

    Args:
        content: The configuration, as plain values.
        types: Types of all options, of :func:`option_types`.
        arguments: The user's own arguments. What they name for an option is allowed for this option.
    """
    try:
        _Check(named_by(arguments)).options(content, types, "")
    except _RefusedError as error:
        return printable(str(error))
    except RecursionError:
        return "it is nested too deeply"
    return None


def check(content: Any, types: Mapping[str, Any], path: str, arguments: Sequence[str] = ()) -> None:
    """Raise if the configuration of a checkpoint may not be used without the user's consent; see :func:`problem`.

    Raises:
        ValueError: With what to do, the file, the place in its configuration, and the name.
    """
    if (reason := problem(content, types, arguments)) is not None:
        raise ValueError(
            f"checkpoint {printable(path)}: its configuration could run code; give {FLAG} if you trust its author, or "
            f"your own --config, or name the class yourself; {reason}"
        )


@contextmanager
def only_allowed_imports(arguments: Sequence[str]) -> Iterator[None]:
    """Let the parser import nothing but ``PACKAGES`` without their excluded parts, and what the arguments name."""
    roots = {value.partition(".")[0] for values in named_by(arguments).values() for value in values}
    with settings_restored():
        set_parsing_settings(
            import_path_denylist=["*", *_EXCLUDED], import_path_allowlist=[*PACKAGES, *sorted(roots - {"jsonargparse"})]
        )
        yield
