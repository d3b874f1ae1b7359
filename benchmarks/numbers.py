"""Numbers of benchmarks, kept in ``docs/benchmarks/NAME.json``, and tables of them for ``benchmarks.page``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


def stored(name: str) -> dict[str, Any]:
    """Numbers that a benchmark has stored before; empty if there are none."""
    path = DOCS / "benchmarks" / f"{name}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def store(name: str, results: dict[str, Any]) -> None:
    """Store the numbers of a benchmark."""
    path = DOCS / "benchmarks" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: written; python -m benchmarks.page writes the page of all benchmarks")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
