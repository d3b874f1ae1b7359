"""Orders of the images in a stream for test-time adaptation, and the corruptions that they have one after another."""

from typing import Literal

import numpy as np

from cl_lightning.stream import IntArray

Order = Literal["given", "shuffled", "sorted", "dirichlet", "label_shift"]
Variant = tuple[tuple[str, int], ...]
"""Corruptions of an image with their severities, in the order in which they are applied."""


def arranged(
    labels: IntArray, order: Order, chance: np.random.Generator, *, delta: float = 0.1, imbalance: float = 10.0
) -> IntArray:
    """Order of the samples of a domain in the stream.

    Args:
        labels: Raw labels of the samples, ``(n,)``.
        order: ``given``; ``shuffled``; ``sorted`` by class; or a division into as many slots as there are classes,
            which are shuffled within and follow each other. ``dirichlet``: the samples of each class are split over
            the slots in shares drawn from Dirichlet(delta) (as in NOTE, Gong et al., NeurIPS 2022, arXiv:2208.05117;
            the number of slots is our choice). ``label_shift``: in each slot one class, another one in each, is more
            frequent than each other class (the online imbalanced label shift of SAR, Niu et al., ICLR 2023,
            arXiv:2302.12400, without replacement).
        chance: Random generator.
        delta: Concentration of ``dirichlet``, positive. With a small delta each class is in few slots; with a large
            delta all slots have nearly the same classes.
        imbalance: Ratio of ``label_shift``, at least 1: the frequent class to another one, for classes of one size.

    Returns:
        Indices of the samples in the order of the stream, ``(n,)``.
    """
    if order == "given":
        return np.arange(len(labels))
    if order == "shuffled":
        return chance.permutation(len(labels))
    if order == "sorted":
        return np.argsort(labels, kind="stable").astype(np.int64)
    classes = np.unique(labels)
    slots: list[list[IntArray]] = [[] for _ in classes]
    frequent = chance.permutation(len(classes)) if order == "label_shift" else np.arange(0)
    for place, label in enumerate(classes):
        members = chance.permutation(np.flatnonzero(labels == label))
        if order == "label_shift":
            shares = np.where(frequent == place, imbalance, 1.0) / (imbalance + len(classes) - 1)
        else:
            shares = chance.dirichlet(np.full(len(classes), delta))
        cuts = np.round(shares.cumsum()[:-1] * len(members)).astype(np.int64)
        for slot, part in zip(slots, np.split(members, cuts), strict=True):
            slot.append(part)
    return np.concatenate([chance.permutation(np.concatenate(slot)) for slot in slots])


def interleaved(*sizes: int) -> IntArray:
    """Indices of several groups of samples, one group after another, in an order that spreads each group evenly.

    For sizes 2 and 4 the indices are ``[2, 0, 3, 4, 1, 5]``.
    """
    places = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes if size])
    return np.argsort(places, kind="stable").astype(np.int64)


def walk(first: str, second: str, severity: int) -> list[Variant]:
    """Corruptions on the way from one corruption to another one, of which one severity changes by 1 at each step.

    The sum of both severities is ``severity`` or 1 more: first of ``severity`` and second of 0, then second of 1, then
    first of ``severity`` - 1, and so on. CCC (Press et al., NeurIPS 2023, arXiv:2306.05401) takes the way on which a
    fixed network keeps its accuracy; this one needs no network.

    Returns:
        The 2 ``severity`` + 1 variants, both ends included.
    """
    steps = [(severity - step // 2, (step + 1) // 2) for step in range(2 * severity + 1)]
    pairs = [((first, one), (second, two)) for one, two in steps]
    return [tuple((name, level) for name, level in pair if level) for pair in pairs]
