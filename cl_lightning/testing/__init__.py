"""Conformance tests for strategies, of users and of the package.

    def test_my_method():
        check_strategy(partial(MyMethod, backbone=partial(MLP, hidden=(16,))))

runs the strategy on a small stream (121 digits, three tasks; a run takes seconds) and compares runs that must agree:
killed and resumed with uninterrupted, two processes with one, the same seed twice, the first task with fine-tuning.
``CHECKS`` lists all checks.
"""

from cl_lightning.testing.bench import Factory, Outcome, SavePoint, Subject, TinyDigits, places, run
from cl_lightning.testing.checks import CHECKS, Case, check_limit, check_strategy, small
from cl_lightning.testing.compare import difference
from cl_lightning.testing.pair import Pair
from cl_lightning.testing.targets import TinyMasks, data_for

__all__ = [
    "CHECKS",
    "Case",
    "Factory",
    "Outcome",
    "Pair",
    "SavePoint",
    "Subject",
    "TinyDigits",
    "TinyMasks",
    "check_limit",
    "check_strategy",
    "data_for",
    "difference",
    "places",
    "run",
    "small",
]
