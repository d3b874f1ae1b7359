"""Compares runs: tables for the terminal and for papers, and one HTML page that needs nothing else.

    python -m cl_lightning report RUN [RUN ...] [--output report.html] [--format table] [--baseline METHOD]

``main`` is the command, ``write`` makes the page from Python. ``runs`` reads, ``comparison`` compares, ``tables`` and
``page`` show.
"""

from cl_lightning.report.command import main, write

__all__ = ["main", "write"]
