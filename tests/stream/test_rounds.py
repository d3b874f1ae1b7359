"""Rounds over one pool of samples."""

import numpy as np
import pytest
from support.streams import data

from cl_lightning.stream import Rounds, Stream


def test_every_round_has_the_pool_and_the_first_one_the_test_samples():
    info = data(classes=4, per_class=10)
    stream = Rounds(3)(info, seed=0, val_fraction=0.2)
    assert [len(part) for part in stream.train] == [32, 32, 32]
    assert all(np.array_equal(part, stream.train[0]) for part in stream.train)
    assert all(np.array_equal(part, stream.val[0]) for part in stream.val)
    assert [len(part) for part in stream.test] == [16, 0, 0]
    assert [len(task.new_classes) for task in stream.tasks] == [4, 0, 0]
    assert [task.classes for task in stream.tasks] == [(0, 1, 2, 3)] * 3
    assert Stream.from_dict(stream.to_dict()) == stream


def test_no_rounds_and_further_ones_are_refused():
    with pytest.raises(ValueError, match="Rounds: rounds must be at least 1"):
        Rounds(0)
    with pytest.raises(ValueError, match="Rounds: the pool of the earlier rounds would change"):
        Rounds(2).extend(Rounds(2)(data(classes=4), seed=0), data(classes=5), seed=1)
