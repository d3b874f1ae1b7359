"""Labels of two levels: each image once with its class and once with the superclass of its class."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cl_lightning.batch import ImageShape
from cl_lightning.data.labels import HasStream
from cl_lightning.data.sources import SampleSource


def parents_of(class_names: Sequence[str], superclasses: Mapping[str, Sequence[str]], owner: str) -> tuple[int, ...]:
    """Raw label of the superclass of each class: superclasses are numbered after the classes, in the given order.

    Args:
        class_names: Names of the classes.
        superclasses: Names of the classes of each superclass, by the name of the superclass.
        owner: Name of the data in errors.

    Returns:
        One number for each class, and -1 for each superclass.

    Raises:
        ValueError: If a superclass has no classes or the name of a class, or a class has not one superclass.
    """
    number = {name: label for label, name in enumerate(class_names)}
    parents = [-1] * len(number)
    for place, (name, members) in enumerate(superclasses.items()):
        if name in number:
            raise ValueError(f"{owner}: superclasses has {name!r}, which is the name of a class; give it another name")
        if not members:
            raise ValueError(f"{owner}: superclass {name!r} has no classes; give it some, or leave it out")
        for member in members:
            if member not in number:
                raise ValueError(f"{owner}: superclass {name!r} has {member!r}, which is no class of the data")
            if parents[number[member]] >= 0:
                raise ValueError(f"{owner}: class {member!r} is given to a superclass twice; give it one superclass")
            parents[number[member]] = len(number) + place
    if -1 in parents:
        raise ValueError(f"{owner}: class {class_names[parents.index(-1)]!r} has no superclass; give each class one")
    return (*parents, *[-1] * len(superclasses))


class TwoLevelSource:
    """The samples of a source twice: N samples with the labels of their classes, then N with their superclasses.

    Args:
        base: Source of the samples.
        superclasses: Names of the classes of each superclass, by the name of the superclass; see :func:`parents_of`.
        owner: Name of the data in errors.

    Attributes:
        parents: Raw label of the superclass of each class, -1 for each superclass.
    """

    def __init__(self, base: SampleSource, superclasses: Mapping[str, Sequence[str]], owner: str = "data") -> None:
        self.base = base
        self.parents = parents_of(base.class_names, superclasses, owner)
        self.class_names = (*base.class_names, *superclasses)
        self.labels = np.concatenate([base.labels, np.array(self.parents, np.int64)[base.labels]])
        self.domains = None if base.domains is None else np.tile(base.domains, 2)
        self.domain_names, self.in_memory, self.kind = base.domain_names, base.in_memory, base.kind

    @property
    def image_shape(self) -> ImageShape:
        return self.base.image_shape

    def take(self, indices: Tensor) -> Tensor:
        return self.base.take(indices % len(self.base.labels))

    def digest(self, indices: np.ndarray) -> bytes:
        return self.base.digest(indices % len(self.base.labels))


def column_levels(module: HasStream) -> Tensor | None:
    """Level of each column of a data module's stream, int64 ``(columns,)``: 0 for superclasses, 1 for their classes.

    None for labels of one level.
    """
    parents = getattr(module.samples(train=True), "parents", ())
    return (torch.tensor(parents)[list(module.stream.order)] >= 0).long() if parents else None
