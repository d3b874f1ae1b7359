"""Streams with requests to forget, and the test that nothing of the forgotten samples is left."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from cl_lightning.data import TensorSource
from cl_lightning.datamodules.digits import Digits
from cl_lightning.loop import TaskLoop
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.stream import ClassIncremental, Request, Requests, Scenario

THREE = ClassIncremental(sizes=[4, 3, 3])


def requests(*asked: Request, held: tuple[int, ...] = (), base: Scenario = THREE) -> Requests:
    return Requests(base, list(asked), held=list(held))


class Altered(Digits):
    """Digits whose training samples of the given indices are noise, with the same labels.

    Args:
        altered: Indices of training samples; None for no change.
        kwargs: Options of ``Digits``.
    """

    def __init__(self, *, altered: np.ndarray | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.altered = altered

    def source(self, *, train: bool) -> TensorSource:
        source = super().source(train=train)
        if self.altered is None or not train:
            return source
        images = source.take(torch.arange(len(source.labels))).numpy().copy()
        noise = np.random.default_rng(0).integers(0, 256, images[self.altered].shape, dtype=np.uint8)
        images[self.altered] = noise
        return TensorSource(images, source.labels, class_names=list(source.class_names))


def learnt(
    strategy: ContinualStrategy, scenario: Scenario, *, altered: np.ndarray | None = None, **trainer: Any
) -> TaskLoop:
    """A run over a stream of digits."""
    from support import runs

    made = runs.loop(strategy, **{"max_epochs": 2, **trainer})
    made.datamodule = Altered(scenario=scenario, batch_size=64, altered=altered)
    made.fit()
    return made


def assert_forgets_exactly(make: Callable[[], ContinualStrategy], scenario: Requests) -> TaskLoop:
    """The state at the end is the same, to the bit, whatever the forgotten samples are; before the request it is not.

    Returns:
        The run over the samples as they are.
    """
    from support.runs import assert_same

    plain = learnt(make(), scenario)
    gone = plain.stream.forgotten(len(plain.stream) - 1)
    other = learnt(make(), scenario, altered=gone)
    assert_same(dict(plain.strategy.state_dict()), dict(other.strategy.state_dict()))
    kept = [learnt(make(), scenario.base, altered=altered).strategy.state_dict() for altered in (None, gone)]
    assert any(not torch.equal(value, kept[1][name]) for name, value in kept[0].items())
    return plain
