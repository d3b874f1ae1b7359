import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# HYPOTHESIS_PROFILE=stress, or --hypothesis-profile stress: twenty times as many examples of tests/fuzzing.py.
settings.register_profile("stress", max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
if profile := os.environ.get("HYPOTHESIS_PROFILE"):
    settings.load_profile(profile)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets and weights beside the checkout; tests that use it skip where it is absent."""
    folder = Path(os.environ.get("CL_LIGHTNING_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data and weights are not at {folder}; set CL_LIGHTNING_DATA to their folder")
    return folder
