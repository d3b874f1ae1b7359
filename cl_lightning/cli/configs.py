"""Reading of configuration files before the parser: size, nesting, repeated keys; errors are one line with the file."""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cl_lightning.escape_control import printable
from cl_lightning.files import read_pipe, read_text

_DEEPEST = 100
_MOST = 100_000
"""Most values of a configuration, where an alias counts as all that it stands for."""


def read(config: str) -> Any:
    """Content of a configuration file, or of YAML given in its place.

    Raises:
        ValueError: If there is a file that is not a regular file or cannot be read, or as :func:`parse`.
    """
    name = "" if "\n" in config or "{" in config else config
    try:
        kind = os.stat(config).st_mode if name else None
    except (OSError, ValueError):
        kind = None  # no such file: YAML, or the parser reports it
    if kind is None:
        return parse(config, f"--config {name}" if len(name) < 100 else "--config")
    where = f"config {name}"
    if not stat.S_ISREG(kind):
        raise ValueError(f"{printable(where)}: not a regular file; give the path of a YAML file")
    try:
        text = read_text(config)
    except (OSError, ValueError) as error:
        raise ValueError(f"{printable(where)}: give a YAML file in UTF-8; this one cannot be read ({error})") from error
    content = parse(text, where)
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, str) and value.endswith((".yaml", ".yml")) and key in ("model", "data", "trainer", "loop"):
            inner = str(Path(config).parent / value)  # the parser reads a part of the configuration from this file
            if inner != config and os.path.exists(inner):
                parse(_text(inner), f"config {inner}")
    return content


def plain_text(path: Path) -> str:
    """Text of a config of the project."""
    return read_text(path, errors="replace")


def of_pipe(config: str) -> str:
    """A configuration in place of the pipe that is given for it, such as ``<(command)`` of a shell; else as given.

    A pipe can be read once, by one process: its content takes its place on the command line.

    Raises:
        ValueError: If it is too large, is not YAML, or nobody writes into the pipe.
    """
    if not _is_pipe(config):
        return config
    where = f"--config {config}"
    try:
        text = read_pipe(config).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(f"{printable(where)}: give YAML in UTF-8; {error}") from error
    return json.dumps(parse(text, where) or {}, default=str)


def _is_pipe(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False  # no path


def refuse_pipe(value: str) -> None:
    """Raise if there is a named pipe at a path, because reading it would wait for ever."""
    if _is_pipe(value):
        raise ValueError(f"{printable(value)} is a named pipe; give a file")


def _text(path: str) -> str:
    if not os.path.isfile(path):
        raise ValueError(f"config {printable(path)}: not a regular file; give the path of a YAML file")
    return read_text(path, errors="replace")


def parse(text: str, where: str) -> Any:
    """Content of YAML text.

    Args:
        text: The text.
        where: Name of the file in messages.

    Raises:
        ValueError: If it is not YAML, uses tags such as ``!!python``, has a key twice, is nested too deeply, contains
            itself, or is too large with its aliases replaced.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _measure(node, where)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError as error:
        raise ValueError(f"{printable(where)}: flatten it; it is nested deeper than {_DEEPEST} levels") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or str(error)
        raise ValueError(
            f"{printable(where)}{place}: correct the YAML: {printable(' '.join(reason.split()))}"
        ) from error


def _measure(root: yaml.Node, where: str) -> None:
    """Check number of values, depth and keys. A node with several aliases is visited once."""
    sizes: dict[int, int] = {}
    heights: dict[int, int] = {}
    open_nodes: set[int] = set()

    def visit(node: yaml.Node) -> None:
        key = id(node)
        if key in sizes:
            return
        line = f"{printable(where)}, line {node.start_mark.line + 1}"
        if key in open_nodes:
            raise ValueError(f"{line}: remove the alias; the value contains itself")
        open_nodes.add(key)
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            _check_keys(node, where)
            inner = [part for pair in node.value for part in pair]
        for part in inner:
            visit(part)
        open_nodes.discard(key)
        sizes[key] = 1 + sum(sizes[id(part)] for part in inner)
        heights[key] = 1 + max((heights[id(part)] for part in inner), default=0)
        if heights[key] > _DEEPEST:
            raise ValueError(f"{line}: flatten it; it is nested deeper than {_DEEPEST} levels")
        if sizes[key] > _MOST:
            raise ValueError(
                f"{line}: remove aliases or values; with every alias replaced there are more than {_MOST} values"
            )

    visit(root)


def _check_keys(node: yaml.MappingNode, where: str) -> None:
    seen: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
            continue
        if key.value in seen:
            line = key.start_mark.line + 1
            raise ValueError(
                f"{printable(where)}, line {line}: remove one of the two values of the key {printable(key.value)!r}"
            )
        seen.add(key.value)
