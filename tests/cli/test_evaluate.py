"""Test and validate a checkpoint."""

import json
import re
import shutil
from pathlib import Path

from support.command import is_one_line


def test_a_checkpoint_is_tested_without_naming_its_data(run, finished):
    said = run(f"test --ckpt_path {finished}/checkpoints/last.ckpt")
    assert said.code == 0
    assert said.err == ""
    found = json.loads((finished / "results.json").read_text())
    for task, accuracy in enumerate(found["matrix"]["R_ci"][1][:2]):
        names = ", ".join(found["tasks"][task]["classes"])
        assert re.search(rf"^{task} +{names} +71 +{100 * accuracy:.1f} ", said.out, re.MULTILINE), said.out
    assert f"average accuracy {100 * found['measures']['average_accuracy']:.1f} %" in said.out


def test_a_checkpoint_is_validated_on_what_was_held_out(run, finished):
    said = run(f"validate --ckpt_path {finished}/checkpoints/last.ckpt")
    assert said.code == 0
    assert re.fullmatch(r"val/accuracy: 0\.\d+\nval/loss: \d+\.\d+\n", said.out)
    without = run(f"validate --ckpt_path {finished}/checkpoints/last.ckpt --data.val_fraction 0")
    assert is_one_line(without)


def test_callbacks_that_change_what_is_evaluated_do_so_when_a_checkpoint_is_tested(run):
    run("fit --run_dir r --trainer.callbacks+=EMAEnsemble --trainer.max_epochs 2 --loop.stop_after_task 1")
    accuracy = json.loads(Path("r/results.json").read_text())["measures"]["average_accuracy"]
    assert f"average accuracy {100 * accuracy:.1f} %" in run("test --ckpt_path r/checkpoints/last.ckpt").out


def test_what_a_command_needs_may_stand_in_a_config(run, finished):
    shutil.copy(finished / "config.yaml", "config.yaml")
    said = run("test --config config.yaml")
    assert is_one_line(said)
    assert said.err == "error: give --ckpt_path\n"
    with open("config.yaml", "a", encoding="utf-8") as file:
        file.write(f"ckpt_path: {finished}/checkpoints/last.ckpt\n")
    assert "average accuracy" in run("test --config config.yaml").out
