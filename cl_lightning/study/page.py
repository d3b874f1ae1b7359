"""The page of a study."""

from pathlib import Path

from cl_lightning import report
from cl_lightning.study.definition import Definition
from cl_lightning.study.storage import Trials


def write(trials: Trials, definition: Definition, folder: Path, program: str) -> Path:
    """Write the page that compares the runs of a study."""
    return report.write([folder / "runs"], folder / "report.html", None)
