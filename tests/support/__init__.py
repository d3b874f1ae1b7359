"""What tests share: small runs, processes, damaged files, a device written in Python."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""
