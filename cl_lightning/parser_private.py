"""All private names of jsonargparse and argparse that the package uses; a test checks that each exists.

If a new release renames something, only this file has to change.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jsonargparse._common import parsing_settings


@contextmanager
def settings_restored() -> Iterator[None]:
    """Restore the parsing settings of jsonargparse at the end; they are global and have no public reader."""
    before = dict(parsing_settings)
    try:
        yield
    finally:
        parsing_settings.clear()
        parsing_settings.update(before)


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options of a parser."""
    return list(parser._actions)


def commands(action: argparse.Action) -> list[argparse.ArgumentParser]:
    """Parsers of the subcommands that an option of a parser stands for; empty for any other option."""
    return list(action._name_parser_map.values()) if isinstance(action, argparse._SubParsersAction) else []


def type_hint(action: argparse.Action) -> Any:
    """Type of an option of jsonargparse; None if it has none."""
    return getattr(action, "_typehint", None)
