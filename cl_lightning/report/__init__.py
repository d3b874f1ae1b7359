"""Comparison of runs: tables for the terminal and for papers, and one self-contained HTML page.

    python -m cl_lightning report RUN [RUN ...] [--output report.html] [--format table] [--baseline METHOD]

``main`` is the command, ``write`` writes the page from Python. ``runs`` reads results, ``comparison`` compares them,
``tables`` and ``page`` render the comparison.
"""

from cl_lightning.report.command import main, write

__all__ = ["main", "write"]
