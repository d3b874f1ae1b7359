"""Speed-up at equal accuracy."""

import math

import pytest

from cl_lightning.measures import speed_up


def test_it_is_the_ratio_of_the_costs_up_to_the_first_round_that_reaches_the_accuracy():
    fast, slow = ([0.5, 0.7, 0.65, 0.8], [1.0, 1.0, 1.0, 1.0]), ([0.6, 0.75, 0.9], [1.0, 4.0, 9.0])
    assert speed_up(*fast, *slow) == pytest.approx(14 / 4)  # 0.8, which the reference first has after round 2
    assert speed_up(*fast, *slow, accuracy=0.7) == pytest.approx(5 / 2)
    assert speed_up(*slow, *fast, accuracy=0.7) == pytest.approx(2 / 5)
    assert speed_up(*fast, *fast) == 1.0
    assert math.isnan(speed_up(*fast, *slow, accuracy=0.85))
