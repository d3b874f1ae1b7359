"""Data sets and streams of a few samples, for tests of streams."""

import numpy as np

from cl_lightning.stream import (
    DatasetInfo,
    Stream,
)
from cl_lightning.stream.draws import rank_in_group

# CIFAR-100, 5-way 5-shot: the first two of the index lists that few-shot tables are made with (TOPIC split).
FEW_SHOT_LISTS = [
    [int(index) for index in session.split()]
    for session in (
        "29774 33344 4815 6772 48317 29918 33262 5138 7342 47874 28864 32471 4316 6436 47498 "
        "29802 33159 3730 5093 47740 30548 34549 2845 4996 47866",
        "28855 32834 4603 6914 48126 29932 33300 3860 5424 47055 29434 32604 4609 6380 47844 "
        "30456 34217 4361 6550 46896 29664 32857 4923 7502 47270",
    )
]


def data(
    classes: int = 10, per_class: int = 20, test: int = 4, names: str = "class {}", shuffle: int = 0
) -> DatasetInfo:
    """A balanced data set in shuffled order."""
    labels = np.random.default_rng(shuffle).permutation(np.repeat(np.arange(classes), per_class))
    return DatasetInfo(labels, np.repeat(np.arange(classes), test), tuple(names.format(c) for c in range(classes)))


def folders(sizes: dict[str, int], test: int = 2) -> DatasetInfo:
    """A data set of one folder per class, in the order of their names, as image folders come."""
    names, counts = tuple(sorted(sizes)), [sizes[name] for name in sorted(sizes)]
    return DatasetInfo(np.repeat(np.arange(len(names)), counts), np.repeat(np.arange(len(names)), test), names)


def domains(*names: str, classes: int = 3, per_group: int = 4) -> DatasetInfo:
    grid = np.array([(d, c) for d in range(len(names)) for c in range(classes) for _ in range(per_group)])
    return DatasetInfo(
        grid[:, 1], grid[::2, 1], tuple(f"c{c}" for c in range(classes)), grid[:, 0], grid[::2, 0], tuple(names)
    )


def images(stream: Stream, info: DatasetInfo, task: int, which: str = "train") -> set[tuple[str, int]]:
    """Samples by class name and place in their class: what stays the same when labels and indices shift."""
    place, _ = rank_in_group(info.train_labels)
    rows = getattr(stream, which)[task]
    return {(info.class_names[info.train_labels[row]], int(place[row])) for row in rows}


def all_of(*arrays: tuple[np.ndarray, ...]) -> list[int]:
    return sorted(int(index) for group in arrays for array in group for index in array)
