"""The strategies under test, each with one reference run for all its checks, and one pair of processes for all."""

import atexit
from collections.abc import Sequence
from functools import lru_cache

from cl_lightning.testing import Case, Pair, SavePoint, Subject
from support import costs
from support.subjects import SUBJECTS


class _Pair(Pair):
    """Two processes whose processor time counts for the test that asks."""

    def report(self, subject: Subject, points: Sequence[SavePoint]):
        before = self.seconds
        with costs.children_not_counted():
            found = super().report(subject, points)
        costs.spent_elsewhere(self.seconds - before)
        return found

    def close(self) -> None:
        with costs.children_not_counted():  # with their end, their time is added to the time of this process
            super().close()


PAIR = _Pair()
atexit.register(PAIR.close)


@lru_cache(maxsize=6)  # tests of one method follow one another
def case(name: str) -> Case:
    return Case(SUBJECTS[name], pair=PAIR)
