"""The strategies under test, each with one reference run for all its checks, and one pair of processes for all."""

import atexit
from functools import lru_cache

from cl_lightning.testing import Case, Pair, Subject
from support import costs
from support.subjects import SUBJECTS


class _Pair(Pair):
    """Two processes whose processor time counts for the test that asks."""

    def report(self, subject: Subject):
        before = self.seconds
        found = super().report(subject)
        costs.spent_elsewhere(self.seconds - before)
        return found

    def close(self) -> None:
        with costs.not_counted():  # with their end, the time of processes is added to the time of this one
            super().close()


PAIR = _Pair()
atexit.register(PAIR.close)


@lru_cache(maxsize=6)  # tests of one method follow one another
def case(name: str) -> Case:
    return Case(SUBJECTS[name], pair=PAIR)
