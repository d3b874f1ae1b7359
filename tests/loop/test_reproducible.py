import os
import subprocess
import sys

import pytest
from support import ROOT, kills
from support.runs import assert_same


@pytest.mark.rotating(1)
@pytest.mark.parametrize("method", ["er_ema", "pass"])
def test_the_same_command_gives_the_same_bits_in_another_interpreter_with_other_hashes(method, tmp_path):
    (config,) = (ROOT / "experiments" / "methods").rglob(f"{method}.yaml")
    arguments = f"fit --config {config} {kills.DATA} {kills.TRAINER} {kills.SAVING}".split()
    found = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-m", "cl_lightning", *arguments, "--run_dir", "run"],
            cwd=folder,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found.append(kills.left(folder / "run"))
        found[-1]["manifest"] = (folder / "run" / "manifest.json").read_text()
    assert_same(*found)
