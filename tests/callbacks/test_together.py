"""The callbacks with one another: killed and resumed at any place, and on two processes."""

import pytest
from support.together import all_callbacks, with_callbacks

from cl_lightning.testing import check_strategy


@pytest.mark.parametrize("check", ["seed", "resume", "restores", "bytes"])
def test_together_they_keep_the_contract_of_a_strategy(check):
    check_strategy(with_callbacks, callbacks=all_callbacks, checks=[check], name="all callbacks")


@pytest.mark.slow
def test_two_processes_give_what_one_gives():
    check_strategy(with_callbacks, callbacks=all_callbacks, checks=["processes"], name="all callbacks")
