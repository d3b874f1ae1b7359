"""Streams: which classes, samples and domains come when. Pure numpy.

A scenario is called with a catalogue (the labels of a data set) and a seed, and gives a stream: the tasks and, for
each, the indices of its training, validation and test samples. The same catalogue, options and seed give the same
stream on every rank, machine and Python.

    stream = ClassIncremental(first=50, increment=5, class_order=1993)(catalogue, seed=0, val_fraction=0.1)
    stream.save("stream.json")
"""

from cl_lightning.stream.core import Catalogue, Part, Shift, Stream, Task
from cl_lightning.stream.dealing import Deal, Dealer, Scenario
from cl_lightning.stream.domains import DomainIncremental, PermutedDomains, RotatedDomains
from cl_lightning.stream.draws import IntArray
from cl_lightning.stream.modifiers import LabelFraction, LongTailed, Modifier, Online, Subset, Thinning
from cl_lightning.stream.scenarios import Blurry, ClassIncremental, FewShot, FromManifest, SingleTask

__all__ = [
    "Blurry",
    "Catalogue",
    "ClassIncremental",
    "Deal",
    "Dealer",
    "DomainIncremental",
    "FewShot",
    "FromManifest",
    "IntArray",
    "LabelFraction",
    "LongTailed",
    "Modifier",
    "Online",
    "Part",
    "PermutedDomains",
    "RotatedDomains",
    "Scenario",
    "Shift",
    "SingleTask",
    "Stream",
    "Subset",
    "Task",
    "Thinning",
]
