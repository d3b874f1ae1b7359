"""The callbacks with one another: killed and resumed at any place, and on two processes."""

import pytest
from support.together import all_callbacks, plasticity_callbacks, with_callbacks

from cl_lightning.testing import check_strategy

CALLBACKS = pytest.mark.parametrize("callbacks", [all_callbacks, plasticity_callbacks])


@CALLBACKS
@pytest.mark.parametrize("check", ["seed", "resume", "restores", "bytes"])
def test_together_they_keep_the_contract_of_a_strategy(check, callbacks):
    check_strategy(with_callbacks, callbacks=callbacks, checks=[check], name=callbacks.__name__)


@pytest.mark.slow
@CALLBACKS
def test_two_processes_give_what_one_gives(callbacks):
    check_strategy(with_callbacks, callbacks=callbacks, checks=["processes"], name=callbacks.__name__)
