"""Parsing of the command line and of configs; errors are one line, with the nearest known name."""

import argparse
import difflib
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from omegaconf.errors import OmegaConfBaseException

from cl_lightning.escape_control import printable
from cl_lightning.parser_private import actions, commands


class Parser(LightningArgumentParser):
    """Parser whose errors are a ValueError with a message of one line."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is not None and len(args[0]) == 1 and re.fullmatch(r"--[\w.]+=None", args[0][0]):
            # jsonargparse writes a null for an option of a nested class like this, and would read a text
            args = [args[0][0].removesuffix("None") + "null"], *args[1:]
        try:
            config = super().parse_args(*args, **kwargs)
        except RecursionError as error:
            raise ValueError("the configuration is nested too deeply, or contains itself; flatten it") from error
        except OmegaConfBaseException as error:
            key = (error.full_key or "").partition(".")[2] or "the configuration"
            reason = (str(error.msg or error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{key}: {reason}; refer to another key by its full name, such as ${{loop.keep_tasks}}"
            ) from error
        if chosen := config.get("subcommand"):
            groups = {name.partition(".")[0] for name in option_names(self) if "." in name}
            for group in groups & set(vars(config[chosen])):
                if not isinstance(value := config[chosen][group], Namespace):
                    raise ValueError(f"{group}: {value!r} is not allowed; give keys and values, or remove it")
        return config

    def dump(self, cfg: Namespace, *args: Any, **kwargs: Any) -> str:
        text: str = super().dump(_without_enums(cfg.clone()), *args, **kwargs)
        return text

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # jsonargparse tries several types for a value, and catches the errors
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        raise ValueError(explain(message, known=option_names(parser)))


def _without_enums(value: Any) -> Any:
    """A configuration in which members of enumerations of texts are texts: a default of Lightning's Timer is one."""
    if isinstance(value, Namespace):
        for key, item in vars(value).items():
            setattr(value, key, _without_enums(item))
    elif isinstance(value, dict):
        return {key: _without_enums(item) for key, item in value.items()}
    elif isinstance(value, list):
        return [_without_enums(item) for item in value]
    return value.value if isinstance(value, Enum) and isinstance(value, str) else value


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    """Keys of a parser and its sub-parsers, without leading dashes."""
    names: set[str] = set()
    for action in actions(parser):
        names.update(option.lstrip("-") for option in action.option_strings if option.startswith("--"))
        for inner in commands(action):
            names.update(option_names(inner))
    return sorted(name for name in names if not name.endswith((".help", "+")))


@dataclass(frozen=True)
class Problem:
    """Error of one attempt to parse a value.

    Attributes:
        path: Keys from the outside in.
        kind: ``key`` (unknown key), ``class`` (unknown class name), ``type`` (not of the type) or ``text`` (all else).
        subject: The key, the name, the expected type, or the text.
        owner: Import path of the class that has no such key.
        types: Types whose subclasses were searched, as jsonargparse prints them.
        depth: Nesting depth at which the attempt failed; the deepest attempt is reported.
    """

    path: tuple[str, ...]
    kind: str
    subject: str
    owner: str = ""
    types: str = ""
    depth: int = 0


_RANK = {"key": 3, "class": 2, "text": 1, "type": 0}
_NONE = "<class 'NoneType'>"


def explain(message: str, known: Sequence[str] = ()) -> str:
    """Summarise an error message of jsonargparse in one line.

    Args:
        message: The message: an indented tree of all attempts to parse a value.
        known: Keys of the parser.

    Returns:
        One line. What to do stands before a list of names.
    """
    text = message.strip("\n")
    if match := re.match(r"unrecognized arguments: (.+)", text, re.DOTALL):
        return unknown_option(match.group(1).split()[0], known)
    if match := re.match(
        r"(?:Subcommand '\w+' does not accept o|Group '(\w+)' does not accept o|O)ption '([^']+)'", text
    ):
        group = f"{match.group(1)}." if match.group(1) else ""
        return unknown_option(group + match.group(2), known)
    problems = _problems(text, (), "", "", 0)
    top = max(problems, key=lambda problem: (problem.depth, _RANK[problem.kind]))
    where = ".".join(top.path)
    value = _given(text)
    if top.kind == "key":
        names = arguments_of(top.owner)
        taker = top.owner.rpartition(".")[2]
        line = f"{where}: " if where else ""
        if top.subject in names:  # an option of a base class that the class sets
            line += f"{taker} sets {top.subject!r} itself; leave it out"
        else:
            line += f"{taker} takes no {top.subject!r}" + _nearest(
                top.subject.partition(".")[0], names, "leave it out, or use"
            )
    elif top.kind == "class":
        line = f"{where}: there is no class {top.subject!r}" + _nearest(
            top.subject, class_names(top.types), "give an import path, or one of"
        )
    elif top.kind == "type":
        same = [problem for problem in problems if (problem.kind, problem.depth) == (top.kind, top.depth)]
        wanted = " or ".join(dict.fromkeys(_readable(problem.subject) for problem in same))
        line = (
            f"{where}: {value!r} is not allowed; give {wanted}" if value is not None else f"{where}: expected {wanted}"
        )
    else:
        line = f"{where}: {top.subject}" if where else top.subject
    return single_line(line)


def single_line(text: str) -> str:
    """The text without line breaks and control characters; nothing is cut."""
    return printable(" ".join(text.split()))


def unknown_option(option: str, known: Sequence[str]) -> str:
    """Message for a key that the parser does not have."""
    option = option.partition("=")[0]
    dashes = "--" if option.startswith("-") else ""
    key = option.lstrip("-").rstrip("+")
    first, _, last = key.rpartition(".")
    near = _close(key, known)
    if not near and first:  # a misspelt group
        near = _close(key.partition(".")[0], [name for name in known if "." not in name])
    if not near:  # a missing or wrong group
        near = [
            name for name in known if name.rpartition(".")[2] in _close(last, {n.rpartition(".")[2] for n in known})
        ]
    hint = f"; did you mean {_alternatives([dashes + name for name in near[:3]])}?" if near else ""
    return single_line(f"unknown {'option' if dashes else 'key or argument'} {option!r}{hint}")


def _close(name: str, names: Iterable[str]) -> list[str]:
    """The nearest name, and names with a similarity within 0.03 of it; case is ignored."""
    folded = {known.lower(): known for known in names if known != name}
    near = difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.6)
    ratios = [difflib.SequenceMatcher(None, known, name.lower()).ratio() for known in near]
    return [folded[known] for known, ratio in zip(near, ratios, strict=True) if ratio > ratios[0] - 0.03]


def _alternatives(names: Sequence[str]) -> str:
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " or " + quoted[-1]


def _nearest(name: str, names: Sequence[str], introduction: str) -> str:
    """End of a message: the nearest known names, or all known names if none is near."""
    if near := _close(name, names):
        return f"; did you mean {_alternatives(near)}?"
    return f"; {introduction} {', '.join(names)}" if names else ""


def _problems(text: str, path: tuple[str, ...], owner: str, types: str, depth: int) -> list[Problem]:
    text = textwrap.dedent(text).strip("\n")
    if match := re.match(r'Parser key "([^"]+)":[ \n]?(.*)', text, re.DOTALL):
        return _problems(match.group(2), (*path, match.group(1)), owner, types, depth + bool(path))
    if match := re.match(r"Problem with given class_path '([^']+)':\n(.*)", text, re.DOTALL):
        return _problems(match.group(2), path, match.group(1), types, depth + 1)
    if match := re.match(r"Type .*? expects a function or a callable class: (.*)", text, re.DOTALL):
        inner = re.search(r"Namespace\(class_path='([^']+)'", text)
        rest = re.sub(r"\.? ?Got value: .*", "", match.group(1), flags=re.DOTALL)
        return _problems(rest, path, inner.group(1) if inner else "", types, depth + bool(inner))
    if match := re.match(r"Does not validate against any of the Union subtypes\n(.*)", text, re.DOTALL):
        text = textwrap.dedent(match.group(1))  # in a list the errors are indented further than the heading
    if match := re.search(r"^Subtypes: (.*)\nErrors:\n(.*?)\nGiven value type: ", text, re.MULTILINE | re.DOTALL):
        items = re.split(r"^- ", textwrap.dedent(match.group(2)), flags=re.MULTILINE)[1:]
        found = [
            problem
            for item in items
            # The lines after the first are indented by the width of the bullet.
            for problem in _problems(_hanging(item), path, owner, match.group(1), depth)
        ]
        return found or [Problem(path, "text", text, depth=depth)]
    if match := re.match(r"Option '([^']+)' is not accepted", text):
        return [Problem(path, "key", match.group(1), owner, depth=depth)]
    if match := re.match(r"unrecognized arguments: --([^\s=]+)", text):
        return [Problem(path, "key", match.group(1), owner, depth=depth)]
    if match := re.match(r"Expected a dot import path string: (\S+)", text):
        return [Problem(path, "class", match.group(1), types=types, depth=depth)]
    if text.startswith("Not a valid subclass of"):
        return []
    if match := re.match(r"Expected an? (.*?)\.? ?(?:Got value: .*)?$", text, re.DOTALL):
        return [Problem(path, "type", match.group(1), depth=depth)]
    text = re.sub(r"\.? ?Got value: Namespace\(.*", "", text, flags=re.DOTALL)
    text = re.sub(r"<class '([^']+)'>", r"\1", text)
    if re.match(r"module '[^']+' has no attribute|No module named", text):
        text = f"cannot import {owner or 'it'}: {text}"
    if match := re.match(r"the following arguments are required: (.*)", text):
        names = [f"'{name.strip().lstrip('-')}'" for name in match.group(1).split(",")]
        text = f"{owner.rpartition('.')[2] or 'it'} needs {', '.join(names)}"
    return [Problem(path, "text", text, owner, types, depth)]


def _hanging(item: str) -> str:
    """An item of a list with the lines after the first indented by two spaces."""
    first, newline, rest = item.partition("\n")
    return first + newline + textwrap.indent(textwrap.dedent(rest), "  ")


def _given(text: str) -> str | None:
    """The innermost value in the message, if any."""
    plain = re.findall(r"Got value: (.*)$", text, re.MULTILINE)
    if plain:
        return str(plain[0])
    given = re.findall(r"Given value: (.*)$", text, re.MULTILINE)
    if not given:
        return None
    nested = re.match(r"NestedArg\(key='[^']*', val=(.*)\)$", given[0])
    value = nested.group(1).strip("'") if nested else str(given[0])
    return value if len(value) <= 80 else value[:77] + "..."


def _readable(type_: str) -> str:
    """A type in the words of a user: ``null``, ``int``, ``'all' or 'task'``."""
    if type_ == _NONE:
        return "null"
    if match := re.fullmatch(r"<class '([\w.]+)'>", type_):
        return match.group(1).rpartition(".")[2]
    if match := re.fullmatch(r"typing\.Literal\[(.*)\]", type_):
        return match.group(1).replace(", ", " or ")
    if match := re.fullmatch(r"instantiatable class, but .*?(\w+)(?:'>)? is abstract.*", type_):
        return f"the name of a kind of {match.group(1)} (before its options)"
    return re.sub(r"(?:\w+\.)+(\w+)", r"\1", type_)


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None) if module else None
    except ImportError:
        return None


def arguments_of(path: str) -> list[str]:
    """Names of the arguments of a class, including arguments that it passes on to its base classes."""
    owner = _import(path)
    if not isinstance(owner, type):
        return []
    names: list[str] = []
    for base in owner.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        named = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name != "self"]
        names += [name for name in named if name not in names]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def class_names(types: str) -> list[str]:
    """Names of the imported classes that match the types in a message of jsonargparse."""
    # In Callable[[arguments], result] the class is the result.
    results = re.sub(r"[\w.]*Callable\[\[.*?\], (.*?)\](?=[,\]]|$)", r"\1", types)
    names: dict[str, None] = {}
    for path in re.findall(r"[A-Za-z_][\w]*(?:\.\w+)+", results):
        base = _import(path)
        if isinstance(base, type) and base.__module__ != "collections.abc":  # the list, not its items
            names |= dict.fromkeys(member.__name__ for member in _subclasses(base) or [base])
    return sorted(names)


def _subclasses(base: type) -> list[type]:
    """All concrete subclasses of a class."""
    found: list[type] = []
    member: type
    for member in base.__subclasses__():
        found += [] if inspect.isabstract(member) else [member]
        found += _subclasses(member)
    # A strategy without a family is a base class.
    found = [member for member in found if getattr(getattr(member, "traits", None), "family", None) != ""]
    return [m for m in found if not m.__name__.startswith("_") and "<locals>" not in m.__qualname__]
