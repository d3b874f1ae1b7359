"""Parsers of untrusted values of results.json, field by field."""

import json
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

FILE = "results.json"
_LONGEST = 300  # characters of a text
_DEEPEST = 40  # levels of a configuration
T = TypeVar("T")
D = TypeVar("D")
Parser = Callable[[Any], T]


class UnusableRunError(ValueError):
    """A folder without a usable run; the message is the reason, in one line, without the folder."""


class _MalformedError(ValueError):
    """A value of the wrong type or range; the message names what is expected."""


def clean(value: str) -> str:
    """The text in one line, encodable as UTF-8, and cut to ``_LONGEST`` characters."""
    plain = value.encode("utf-8", "replace").decode("utf-8")
    plain = "".join(" " if unicodedata.category(mark) in ("Cc", "Zl", "Zp") else mark for mark in plain)
    return plain if len(plain) <= _LONGEST else f"{plain[: _LONGEST - 1]}…"


def text(value: Any) -> str:
    if not isinstance(value, str):
        _refuse("a text", value)
    return clean(value)


def number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _refuse("a number", value)
    if not abs(value) < 1e18:  # nan too; an integer may be beyond the range of floats
        _refuse("a finite number", value)
    return float(value)


def fraction(value: Any) -> float:
    if not 0 <= number(value) <= 1:
        _refuse("a number in [0, 1]", value)
    return float(value)


def at_most_one(value: Any) -> float:
    if number(value) > 1:
        _refuse("a number of at most 1", value)
    return float(value)


def non_negative(value: Any) -> float:
    if number(value) < 0:
        _refuse("a number of at least 0", value)
    return float(value)


def natural(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        _refuse("an integer of at least 0", value)
    return value


def integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**64:
        _refuse("an integer", value)
    return value


def nullable(item: Parser[T]) -> Parser[T | None]:
    return lambda value: None if value is None else item(value)


def list_of(item: Parser[T]) -> Parser[tuple[T, ...]]:
    def parse(value: Any) -> tuple[T, ...]:
        if not isinstance(value, list):
            _refuse("a list", value)
        return tuple(_inside(str(index), item, entry) for index, entry in enumerate(value))

    return parse


def dict_of(item: Parser[T]) -> Parser[dict[str, T]]:
    def parse(value: Any) -> dict[str, T]:
        return {clean(key): _inside(clean(key), item, entry) for key, entry in _object(value).items()}

    return parse


def matrix_of(item: Parser[T], size: int) -> Parser[tuple[tuple[T, ...], ...]]:
    """The first ``size`` rows and columns of a matrix of at least this size."""

    def parse(value: Any) -> tuple[tuple[T, ...], ...]:
        if not isinstance(value, list) or any(not isinstance(row, list) or len(row) < size for row in value[:size]):
            _refuse(f"a matrix of at least {size} rows and columns", value)
        if len(value) < size:
            _refuse(f"a matrix of at least {size} rows and columns", value)
        return list_of(list_of(item))([row[:size] for row in value[:size]])

    return parse


def flattened(value: Any) -> dict[str, str]:
    """A configuration as text by dotted key; a list of plain values is one text."""
    entries = dict(_leaves(_object(value), "", 0))
    return {clean(key): clean(entry) for key, entry in entries.items()}


def _leaves(value: Any, key: str, depth: int) -> Iterator[tuple[str, str]]:
    if depth > _DEEPEST:
        raise _MalformedError(f"must not be nested deeper than {_DEEPEST} levels")
    start = f"{key}." if key else ""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _leaves(entry, f"{start}{name}", depth + 1)
    elif isinstance(value, list) and any(isinstance(entry, (dict, list)) for entry in value):
        for index, entry in enumerate(value):
            yield from _leaves(entry, f"{start}{index}", depth + 1)
    elif value is not None:  # a saved configuration has no keys that are not set
        yield key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse("an object", value)
    return value


def _inside(name: str, item: Parser[T], value: Any) -> T:
    try:
        return item(value)
    except _MalformedError as error:
        inner = str(error)
        raise _MalformedError(f"{name}.{inner}" if not inner.startswith("must") else f"{name} {inner}") from None


def _refuse(expected: str, value: Any) -> NoReturn:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        raise _MalformedError(f"must be {expected}, is {value:.6g}" if abs(value) < 1e18 else f"must be {expected}")
    raise _MalformedError(f"must be {expected}, is {kinds.get(type(value), type(value).__name__)}")


class _Object:
    """A JSON object with checked access to its fields."""

    def __init__(self, data: dict[str, Any], where: str, notes: list[str]) -> None:
        self.data, self.where, self.notes = data, where, notes

    def required(self, name: str, item: Parser[T]) -> T:
        """A required field."""
        if name not in self.data:
            raise UnusableRunError(f"{FILE} has no field {self.where}{name}")
        try:
            return _inside(f"{self.where}{name}", item, self.data[name])
        except _MalformedError as error:
            raise UnusableRunError(f"{FILE}: {error}") from None

    def optional(self, name: str, item: Parser[T], default: D) -> T | D:
        """An optional field; a malformed one is noted, and counts as missing."""
        if self.data.get(name) is None:
            return default
        try:
            return _inside(f"{self.where}{name}", item, self.data[name])
        except _MalformedError as error:
            self.notes.append(f"{FILE}: {error}; left out")
            return default

    def part(self, name: str) -> "_Object":
        """A nested object; empty if it is missing."""
        return _Object(self.optional(name, _object, {}), f"{self.where}{name}.", self.notes)
