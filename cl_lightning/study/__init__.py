"""Studies: many methods, streams and seeds in one command, on an Optuna storage that any number of workers share.

    python -m cl_lightning study STUDY.yaml [--workers N] [--storage URL]
    python -m cl_lightning study join FOLDER|URL

``definition`` reads the file, ``storage`` holds cells and trials, ``worker`` carries them out in processes of ``warm``,
``selection`` chooses hyper-parameters, ``page`` compares the runs.
"""

from cl_lightning.study.command import main
from cl_lightning.study.program import Description, Program

__all__ = ["Description", "Program", "main"]
