"""Conformance tests: what must hold for every strategy, for one's own as for those of the package.

    def test_my_method():
        check_strategy(partial(MyMethod, backbone=partial(MLP, hidden=(16,))))

runs it on a stream of seconds (121 digits, three tasks) and compares runs that must agree: killed and resumed against
uninterrupted, two processes against one, the same seed twice, one task against fine-tuning. ``CHECKS`` says what there
is.
"""

from cl_lightning.testing.bench import Factory, Outcome, SavePoint, Subject, TinyDigits, run
from cl_lightning.testing.checks import CHECKS, Case, check_limit, check_strategy, places, small
from cl_lightning.testing.compare import difference
from cl_lightning.testing.pair import Pair

__all__ = [
    "CHECKS",
    "Case",
    "Factory",
    "Outcome",
    "Pair",
    "SavePoint",
    "Subject",
    "TinyDigits",
    "check_limit",
    "check_strategy",
    "difference",
    "places",
    "run",
    "small",
]
