"""The command ``methods``: what the package has, from the generated table of names, without torch."""

import difflib
import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from cl_lightning import catalogue
from cl_lightning.cli import configs
from cl_lightning.cli.arguments import PROGRAM, experiments, fail, value_of, without

FORMATS = ("table", "markdown", "json")
_PARTS = {
    "--data": "data",
    "--scenarios": "scenario",
    "--backbones": "backbone",
    "--heads": "head",
    "--callbacks": "callback",
}
_KEEPS = {
    "exemplars": "exemplars",
    "all_data": "all_data",
    "task_ids": "task_ids",
    "pretrained": "pretrained",
    "test_batch": "test_batch",
}
_PREFIX = {
    "strategy": "--model.",
    "callback": "--trainer.callbacks.",
    "data": "--data.",
    "scenario": "--data.scenario.",
    "backbone": "--model.backbone.",
    "head": "--model.head.",
}
USAGE = f"""usage: {PROGRAM} methods [NAME] [options]

List the strategies and callbacks, or describe one of them, or another class of the package.

  --family NAME     those of a family, such as online
  --keeps WHAT      those that keep or need WHAT: {", ".join(_KEEPS)}; no-WHAT for the others
  --inputs KIND     those that take samples of a kind: image, vector, sequence, tokens
  --targets KIND    those that take targets of a kind: class, labels, number, pixels
  {", ".join(_PARTS)}
                    the other parts, in place of the methods
  --format FORMAT   table, markdown or json"""


def main(arguments: Sequence[str]) -> int:
    """Run the command with the arguments after ``methods``; returns the exit code."""
    rest = list(arguments)
    if set(rest) & {"-h", "--help"}:
        print(USAGE)
        return 0
    given = {}
    for option in ("--family", "--keeps", "--inputs", "--targets", "--format"):
        if (value := value_of(rest, option)) is not None:
            given[option], rest = value, without(rest, option)
    parts = [part for part in rest if part in _PARTS]
    rest = [part for part in rest if part not in _PARTS]
    form = given.pop("--format", "table")
    if form not in FORMATS:
        fail(f"methods: --format {form!r} is not known; use {', '.join(FORMATS)}")
    if len(parts) > 1 or (parts and given):
        fail(f"methods: {parts[-1]} lists parts; give it alone")
    if any(part.startswith("-") for part in rest) or len(rest) > 1:
        fail(f"methods: {' '.join(rest)!r} is not known; see {PROGRAM} methods --help")
    if rest:
        print("\n".join(described(_entry(rest[0]))))
        return 0
    if parts:
        found = catalogue.entries(_PARTS[parts[0]])
    else:
        found = [*catalogue.entries("strategy"), *catalogue.entries("callback")]
        found = list(_chosen(found, given))
    print({"table": table, "markdown": markdown, "json": _json}[form](found))
    return 0


def _entry(name: str) -> dict[str, Any]:
    entry = catalogue.entry_of(name)
    if entry is None:
        names = {known.lower(): known for known in catalogue.names()}
        near = difflib.get_close_matches(name.lower(), names, n=3)
        hint = f"; did you mean {' or '.join(names[each] for each in near)}?" if near else ""
        fail(f"methods: there is no class {name!r}{hint}")
    return entry


def _chosen(found: list[dict[str, Any]], given: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Entries that fit the filters."""
    families = sorted({entry["family"] for entry in found})
    family = given.get("--family", "").replace("_", "-")
    if family and family not in families:
        fail(f"methods: --family {family!r} is not known; use {', '.join(families)}")
    keeps = given.get("--keeps", "")
    without_it, key = keeps.startswith("no-"), keeps.removeprefix("no-").replace("-", "_")
    if keeps and key not in _KEEPS:
        fail(f"methods: --keeps {keeps!r} is not known; use {', '.join(_KEEPS)}, or no- before one of them")
    for option in ("--inputs", "--targets"):
        kinds = sorted({kind for entry in found for kind in entry[option[2:]]})
        if (kind := given.get(option)) is not None and kind not in kinds:
            fail(f"methods: {option} {kind!r} is not known; use {', '.join(kinds)}")
    for entry in found:
        if family and entry["family"] != family:
            continue
        if keeps and (entry["kind"] != "strategy" or entry[_KEEPS[key]] == without_it):
            continue
        if all(given.get(option) in (None, *entry[option[2:]]) for option in ("--inputs", "--targets")):
            yield entry


def table(found: Sequence[dict[str, Any]], width: int | None = None) -> str:
    """One line for each entry under the heading of its family: name, and what it does as far as the line goes."""
    width = width or min(shutil.get_terminal_size((80, 24)).columns, 160)
    lines: list[str] = []
    for family, group in groupby(found, key=lambda entry: entry.get("family", catalogue.KINDS[entry["kind"]])):
        members = list(group)
        room = max(len(entry["name"]) for entry in members) + 2
        lines += ([""] if lines else []) + [family, "-" * len(family)]
        for entry in members:
            text = f"{entry['name']:<{room}}{entry['summary']}"
            lines.append(text if len(text) <= width else f"{text[: width - 3].rstrip()}...")
    if found and "family" in found[0]:
        lines += ["", f"{len(found)} methods; describe one: {PROGRAM} methods NAME"]
    return "\n".join(lines) or "none"


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """The entries as a table in Markdown."""
    lines = ["| name | family | keeps or needs | paper | what it does |", "|---|---|---|---|---|"]
    for entry in found:
        cells = (
            f"`{entry['name']}`",
            entry.get("family", entry["kind"]),
            entry.get("needs", ""),
            entry.get("paper", ""),
            entry["summary"],
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _json(found: Sequence[dict[str, Any]]) -> str:
    left_out = ("options", "bases", "needs")
    plain = [{key: value for key, value in entry.items() if key not in left_out} for entry in found]
    return json.dumps(plain, indent=1, ensure_ascii=False)


def described(entry: dict[str, Any], width: int | None = None) -> Iterator[str]:
    """Lines that describe a class: what it does, paper, facts, configs, options with their defaults."""
    width = width or min(shutil.get_terminal_size((80, 24)).columns, 100)
    yield entry["name"]
    yield from textwrap.wrap(entry["summary"], width)
    yield ""
    facts = {
        "class": entry["path"],
        "family": entry.get("family", ""),
        "paper": entry.get("paper", ""),
        "keeps or needs": entry.get("needs", ""),
        "inputs": ", ".join(entry.get("inputs", ())),
        "targets": ", ".join(entry.get("targets", ())),
        "configs": ", ".join(_configs(entry)),
    }
    for name, text in facts.items():
        if text:
            yield from textwrap.wrap(f"{name + ':':<16}{text}", width, subsequent_indent=" " * 16)
    prefix = _PREFIX[entry["kind"]]
    shown = [option for option, base in catalogue.options_of(entry) if not base]
    if shown:
        yield ""
        yield "options:"
    for option in shown:
        default = f" = {option['default']}" if option["default"] else ""
        yield from textwrap.wrap(f"  {prefix}{option['name']}{default}", width, subsequent_indent=" " * 8)
        text = re.sub(r"``|:\w+:", "", option["text"]).replace("`", "")
        yield from textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    of_bases = [option["name"] for option, base in catalogue.options_of(entry) if base]
    if of_bases:
        yield ""
        yield from textwrap.wrap(f"and those of its bases: {', '.join(of_bases)}", width)


def _configs(entry: dict[str, Any]) -> Iterator[str]:
    """Names of the configs of the project that use a class as strategy, data or callback."""
    pattern = re.compile(rf"(?:^|[\s.\[,]){re.escape(entry['name'])}(?:$|[\s,\]}}])", re.MULTILINE)
    for path in sorted(experiments(Path("*.yaml"))):
        text = configs.plain_text(path)
        if pattern.search("\n".join(line for line in text.splitlines() if not line.startswith("#"))):
            yield path.stem if path.parent.name != "published" else f"published/{path.stem}"
