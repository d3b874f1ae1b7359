"""What must hold for every strategy of the package: one reference run serves all tests of a strategy.

The tests on two processes, in half precision and on a device depend on what has changed: an ordinary run makes them for
the strategies whose code depends on a changed file, and for a rotating tenth of the others (``support/selection.py``).
"""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from support import remote_device
from support.cases import case
from support.remote_device import MAY_WAIT, assert_like, running, trainer_options, waits
from support.subjects import SUBJECTS, WAITS

from cl_lightning.strategy import ContinualStrategy
from cl_lightning.testing import CHECKS, run

HIGH = 2.0**40
"""A scale under which the first gradients overflow, so that steps are skipped."""


def computes_in_half(strategy: ContinualStrategy) -> bool:
    """Whether gradients are in half precision: a head in float32 on a frozen backbone has none that overflow."""
    if not strategy.freeze_backbone:
        return True
    head = strategy.network.head
    with torch.autocast("cpu", dtype=torch.float16):
        return head(torch.zeros(2, head.num_features)).dtype == torch.float16


@pytest.mark.parametrize("check", [check for check in CHECKS if check != "processes"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_strategy_passes(name: str, check: str) -> None:
    case(name).check(check)


@pytest.mark.dependent
@pytest.mark.parametrize("name", SUBJECTS)
def test_two_processes_give_what_one_gives_and_are_resumed(name: str) -> None:
    case(name).check("processes")


@pytest.mark.dependent
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_stream_is_learnt_in_half_precision_though_steps_are_skipped(name: str) -> None:
    """Under a gradient scaler, as on a GPU with ``--trainer.precision 16-mixed``."""
    scaler = torch.amp.GradScaler("cpu", init_scale=HIGH, growth_interval=3)
    outcome = run(SUBJECTS[name], plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], max_epochs=4)
    kind = "R_ti" if outcome.target_kind == "class" else "R_ci"
    assert outcome.matrix[kind].diag().isfinite().all()
    wrong = [key for key, value in outcome.state.items() if value.is_floating_point() and value.isnan().any()]
    assert set(wrong) <= {"memory.logits"}  # of columns that a stored row does not have
    if any(step.loss for step in outcome.steps):  # where nothing is minimised, no gradient overflows
        assert scaler.get_scale() < HIGH or not computes_in_half(outcome.strategy)


@pytest.mark.dependent
@pytest.mark.skipif(not remote_device.AVAILABLE, reason="this torch has no devices written in Python")
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_run_on_a_device_is_that_on_the_cpu_and_no_step_waits_for_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = case(name).reference
    with running(monkeypatch):
        assert_like(expected, run(SUBJECTS[name], **trainer_options()))
    assert set(waits) - MAY_WAIT == WAITS.get(name, set())
