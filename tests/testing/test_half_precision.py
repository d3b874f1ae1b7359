"""Every strategy in half precision under a gradient scaler, as on a GPU with ``--trainer.precision 16-mixed``."""

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from support.subjects import SUBJECTS

from cl_lightning.testing import run

HIGH = 2.0**40
"""A scale under which the first gradients overflow, so that steps are skipped."""


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_stream_is_learnt_in_half_precision_though_steps_are_skipped(name):
    scaler = torch.amp.GradScaler("cpu", init_scale=HIGH, growth_interval=3)
    outcome = run(SUBJECTS[name], plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], max_epochs=4)
    assert outcome.matrix["R_ti"].diag().isfinite().all()
    wrong = [key for key, value in outcome.state.items() if value.is_floating_point() and value.isnan().any()]
    assert set(wrong) <= {"memory.logits"}  # of columns that a stored row does not have
    if any(step.loss for step in outcome.steps):  # where nothing is minimised, no gradient overflows
        assert scaler.get_scale() < HIGH
