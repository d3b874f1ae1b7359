"""Continual learning on PyTorch Lightning.

Classes and functions are imported when they are first used: ``from cl_lightning import ER, Digits, fit``.
"""

import sys
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "Batch": "cl_lightning.batch",
    "ContinualDataModule": "cl_lightning.datamodules.base",
    "ContinualStrategy": "cl_lightning.strategy",
    "LoopOptions": "cl_lightning.loop",
    "Model": "cl_lightning.api",
    "Phase": "cl_lightning.strategy",
    "PhaseOptions": "cl_lightning.strategy",
    "Run": "cl_lightning.api",
    "Stream": "cl_lightning.stream",
    "Task": "cl_lightning.stream",
    "TaskLoop": "cl_lightning.loop",
    "Traits": "cl_lightning.strategy",
    "fit": "cl_lightning.api",
    "load": "cl_lightning.api",
}
"""Names apart from the strategies, data modules, scenarios, backbones, heads and callbacks, and their modules."""


def __getattr__(name: str) -> Any:
    folder = Path(__file__).parent
    if name.startswith("_") or (folder / name).is_dir() or (folder / f"{name}.py").is_file():
        raise AttributeError(name)  # a module, which the import finds next
    if sys._getframe(1).f_code.co_name == "get_import_path":
        raise AttributeError(
            name
        )  # jsonargparse looks for the shortest path; configs and checkpoints have the full one
    module = _NAMES.get(name)
    if module is None:
        catalogue = import_module("cl_lightning.catalogue")
        entry = catalogue.entry_of(name)
        if entry is None:
            near = get_close_matches(name, [*_NAMES, *catalogue.names()], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise AttributeError(f"module 'cl_lightning' has no attribute {name!r}{hint}")
        module = entry["path"].rpartition(".")[0]
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *import_module("cl_lightning.catalogue").names()})
