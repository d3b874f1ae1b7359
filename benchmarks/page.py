"""``docs/benchmarks.md``, from the numbers that each benchmark keeps in ``docs/benchmarks/NAME.json``.

python -m benchmarks.page    writes the page, without measuring
"""

from benchmarks import avalanche, data_path, feature_store, goals, gpu, scaling, steps
from benchmarks.numbers import DOCS, stored

BENCHMARKS = (steps, avalanche, data_path, feature_store, scaling, gpu)
"""In the order of the page. Each is a module with NAME and section(results), text that begins with a heading."""


def text() -> str:
    """The page."""
    found = {benchmark.NAME: stored(benchmark.NAME) for benchmark in BENCHMARKS}
    parts = ["# Benchmarks"]
    parts += [benchmark.section(found[benchmark.NAME]).strip() for benchmark in BENCHMARKS if found[benchmark.NAME]]
    parts.append(goals.section(found).strip())
    if missing := [f"`python -m benchmarks.{name}`" for name, part in found.items() if not part]:
        parts.append(f"Not measured yet, because no such machine was available: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (DOCS / "benchmarks.md").write_text(text(), encoding="utf-8")
