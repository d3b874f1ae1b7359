"""Passes over data, and long computations at the end of a task."""

import pytest
import torch

from cl_lightning.strategies.base.passes import Passes
from cl_lightning.testing.bench import TinyDigits


class StoppedError(Exception):
    pass


def watched(passes, stop_before=None):
    """Note what is called before each step."""
    seen = []

    def watch(count):
        seen.append(("begin", count))

        def before(number):
            seen.append(("watch", number))
            if number == stop_before:
                raise StoppedError

        return before

    passes.watch = watch
    passes.on_batch = [lambda number, count: seen.append(("report", number, count))]
    return seen


def test_steps_are_reported_and_may_be_stopped():
    passes = Passes(None)
    assert list(passes.steps(3)) == [0, 1, 2]
    seen = watched(passes)
    for number in passes.steps(2):
        seen.append(("step", number))
    assert seen == [
        ("begin", 2),
        *(("watch", 0), ("report", 0, 2), ("step", 0)),
        *(("watch", 1), ("report", 1, 2), ("step", 1)),
    ]
    seen, steps = watched(passes, stop_before=1), passes.steps(3)
    assert next(steps) == 0
    with pytest.raises(StoppedError):
        next(steps)


def test_a_dry_run_has_one_step():
    passes = Passes(None)
    passes.brief = True
    assert list(passes.steps(1000)) == [0]
    assert list(passes.steps(0)) == []


def test_batches_of_a_pass_are_reported_and_may_be_stopped():
    class Owner:
        class data:  # noqa: N801
            module = TinyDigits()

        class trainer:  # noqa: N801
            class strategy:  # noqa: N801
                root_device = torch.device("cpu")

    module = Owner.data.module
    module.make_stream(0)
    module.begin(module.stream.tasks[0])
    passes = Passes(Owner)
    seen = watched(passes)
    count = len(list(passes.batches()))
    assert count == len(module.statistics_dataloader()) > 1
    assert seen == [("begin", count), *(e for n in range(count) for e in (("watch", n), ("report", n, count)))]
    watched(passes, stop_before=1)
    batches = passes.batches()
    next(batches)
    with pytest.raises(StoppedError):
        next(batches)
