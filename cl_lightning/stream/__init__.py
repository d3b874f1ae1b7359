"""Streams: which classes, samples and domains arrive in which task. Pure numpy.

A scenario is called with a ``DatasetInfo`` (the labels of a data set) and a seed, and returns a stream: the tasks, and
the indices of the training, validation and test samples of each task. The same info, options and seed give the same
stream on every rank, machine and Python.

    stream = ClassIncremental(first=50, increment=5, class_order=1993)(info, seed=0, val_fraction=0.1)
    stream.save("stream.json")
"""

from cl_lightning.hashing import IntArray
from cl_lightning.stream.core import DatasetInfo, Stream
from cl_lightning.stream.dealing import Scenario, Split, Splitter
from cl_lightning.stream.domains import DomainIncremental, PermutedDomains, RotatedDomains
from cl_lightning.stream.label_sets import LabelSets
from cl_lightning.stream.levels import LabelExpansion
from cl_lightning.stream.modifiers import (
    Discovery,
    LabelFraction,
    LongTailed,
    Modifier,
    NoisyLabels,
    Online,
    Subsampling,
    Subset,
)
from cl_lightning.stream.rehearsal import PowerLawRehearsal
from cl_lightning.stream.requests import Request, Requests
from cl_lightning.stream.scenarios import Blurry, ClassIncremental, FewShot, FromManifest, Rounds, SingleTask
from cl_lightning.stream.tasks import RequestKind, Segment, Shift, Task

__all__ = [
    "Blurry",
    "ClassIncremental",
    "DatasetInfo",
    "Discovery",
    "DomainIncremental",
    "FewShot",
    "FromManifest",
    "IntArray",
    "LabelExpansion",
    "LabelFraction",
    "LabelSets",
    "LongTailed",
    "Modifier",
    "NoisyLabels",
    "Online",
    "PermutedDomains",
    "PowerLawRehearsal",
    "Request",
    "RequestKind",
    "Requests",
    "RotatedDomains",
    "Rounds",
    "Scenario",
    "Segment",
    "Shift",
    "SingleTask",
    "Split",
    "Splitter",
    "Stream",
    "Subsampling",
    "Subset",
    "Task",
]
