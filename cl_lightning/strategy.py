"""The one door for authors of methods: the base class, and what its hooks are given and return."""

from cl_lightning.batch import Batch
from cl_lightning.models import Output
from cl_lightning.strategies.base import (
    BackboneFactory,
    ContinualStrategy,
    ExemplarReplay,
    HeadFactory,
    Phase,
    PhaseOptions,
    Replay,
    Traits,
)
from cl_lightning.stream import Task

__all__ = [
    "BackboneFactory",
    "Batch",
    "ContinualStrategy",
    "ExemplarReplay",
    "HeadFactory",
    "Output",
    "Phase",
    "PhaseOptions",
    "Replay",
    "Task",
    "Traits",
]
