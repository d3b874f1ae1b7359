"""Names of all strategies, callbacks and parts of the package, from a generated table that needs no import.

``catalogue.json`` is written by ``make docs``; ``make check`` and a test compare it with the code.
"""

import json
from functools import cache
from importlib.resources import files
from typing import Any

KINDS = {
    "strategy": "strategies",
    "callback": "callbacks",
    "data": "data modules",
    "scenario": "scenarios",
    "backbone": "backbones",
    "head": "heads",
}
"""Kinds of entries and their names in the plural."""


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(files("cl_lightning").joinpath("catalogue.json").read_text(encoding="utf-8"))
    return content


def entries(kind: str | None = None) -> list[dict[str, Any]]:
    """All entries, or those of a kind: ``name``, ``path`` (import path), ``kind``, ``summary``, facts of methods."""
    return [entry for entry in _content()["entries"] if kind in (None, entry["kind"])]


def options_of(entry: dict[str, Any]) -> list[tuple[dict[str, str], str]]:
    """Options of a class, its own first, each with the name of the base that has it; empty for its own."""
    found = {option["name"]: (option, "") for option in entry["options"]}
    for base in entry["bases"]:
        for option in _content()["bases"][base]:
            found.setdefault(option["name"], (option, base))
    return list(found.values())


@cache
def _by_name() -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in _content()["entries"]}


def entry_of(name: str) -> dict[str, Any] | None:
    """The entry of a class by its name; None for another name."""
    return _by_name().get(name)


def names() -> tuple[str, ...]:
    """Names of all entries."""
    return tuple(_by_name())
