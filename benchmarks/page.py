"""docs/benchmarks.md, of what the benchmarks have measured: each keeps its numbers in docs/benchmarks/NAME.json.

python -m benchmarks.page    writes the page anew, without measuring
"""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
# In the order of the page. Each is a module with NAME and section(results), text that begins with a heading.
BENCHMARKS = ("steps", "avalanche", "data_path", "feature_store", "scaling", "gpu")


def stored(name: str) -> dict[str, Any]:
    """What a benchmark has measured before; empty where it has not."""
    path = DOCS / "benchmarks" / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def write(name: str | None = None, results: dict[str, Any] | None = None) -> None:
    """Keep what a benchmark has measured, if any is given, and write the page."""
    if name is not None:
        (DOCS / "benchmarks").mkdir(exist_ok=True)
        (DOCS / "benchmarks" / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (DOCS / "benchmarks.md").write_text(text(), encoding="utf-8")


def text() -> str:
    """The page."""
    found = {each: stored(each) for each in BENCHMARKS}
    parts = ["# Benchmarks"]
    parts += [
        importlib.import_module(f"benchmarks.{each}").section(part).strip() for each, part in found.items() if part
    ]
    parts.append(importlib.import_module("benchmarks.goals").section(found).strip())
    if missing := [f"`python -m benchmarks.{each}`" for each, part in found.items() if not part]:
        parts.append(f"Not measured yet, for want of the machine: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Of Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    write()
