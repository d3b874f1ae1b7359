"""The table of methods, the configs of the project and the commands in their heads."""

import json
import re
from pathlib import Path

import pytest
from support import ROOT, selection
from support.command import SHORT, config_of

from cl_lightning.loop import TaskLoop

METHODS = sorted((ROOT / "experiments" / "methods").rglob("*.yaml"))


def test_methods_are_listed_as_a_table_as_markdown_and_as_json(run):
    lines = json.loads(run("methods --format json").out)
    found = {line["name"]: line for line in lines}
    assert {"Finetune", "Joint", "LwF", "EWC", "ER", "Distillation", "EMAEnsemble", "StreamProgress"} <= found.keys()
    assert found["ER"]["family"] == "rehearsal"
    assert found["ER"]["exemplars"] is True
    assert found["Joint"]["all_data"] is True
    assert found["ER"]["inputs"] == ["image", "vector", "sequence", "tokens"]
    assert found["PASS"]["inputs"] == ["image"]
    assert found["ER"]["targets"] == ["class", "labels", "number", "pixels"]
    assert found["ICaRL"]["targets"] == ["class"]
    assert found["EMAEnsemble"]["inputs"] == []
    assert "arXiv:1606.09282" in found["LwF"]["paper"]
    table = run("methods").out
    assert max(map(len, table.splitlines())) <= 80
    markdown = run("methods --format markdown").out.splitlines()
    assert len(markdown) == 2 + len(lines)
    assert len({line.count(" | ") for line in markdown[2:]}) == 1
    for name in found:
        assert re.search(rf"^{name} ", table, re.MULTILINE)
        assert f"`{name}`" in "\n".join(markdown)


def on_digits(command: str) -> bool:
    """Whether a command runs on the digits of scikit-learn, which need no download."""
    return re.search(r"--config digits(_\w+)? ", command) is not None


def commands_of(path: Path) -> list[str]:
    """The commands in the head of a method file."""
    lines = path.read_text().splitlines()
    assert re.match(r"# \w", lines[0]), "what the method is"
    start = "#   python -m cl_lightning "
    commands = [line.removeprefix(start) for line in lines if line.startswith(start)]
    assert commands, "a command that runs it"
    assert all(f"--config {path.stem}" in command for command in commands)
    return commands


@pytest.mark.rotating(70, of=selection.files_of_config)
@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_the_command_in_the_head_of_a_method_file_is_right(run, monkeypatch, path):
    """It is parsed, and all that it names is built, where that needs no download."""

    class BuiltError(Exception):
        pass

    def fit(loop: TaskLoop, ckpt_path: str | None = None) -> None:
        loop.strategy.build(loop.datamodule.image_shape)
        raise BuiltError

    monkeypatch.setattr(TaskLoop, "fit", fit)
    Path("experiments").symlink_to(ROOT / "experiments")
    for number, command in enumerate(commands_of(path)):
        if on_digits(command):
            with pytest.raises(BuiltError):
                run(f"{command} --run_dir run_{number}")
        else:
            config_of(run(command, "--print_config"))


@pytest.mark.rotating(1, each=lambda path: path.parent.name, of=selection.files_of_config)
@pytest.mark.parametrize(
    "path", [path for path in METHODS if any(map(on_digits, commands_of(path)))], ids=lambda path: path.stem
)
def test_the_command_in_the_head_of_a_method_file_fits_and_tests(run, path):
    """For one method of each family: one that depends on what has changed, otherwise another one each day."""
    Path("experiments").symlink_to(ROOT / "experiments")
    for number, command in enumerate(filter(on_digits, commands_of(path))):
        brief = "--trainer.limit_train_batches 1 --trainer.limit_test_batches 1 --loop.stop_after_task 0"
        said = run(f"{command} {brief} --run_dir run_{number}", "--trainer.max_epochs", "1")
        assert said.code == 0, said.err
        assert run(f"test --ckpt_path run_{number}/checkpoints/last.ckpt").code == 0


def test_the_method_files_of_a_mechanism_and_of_its_strategy_give_the_same_run(run):
    Path("experiments").symlink_to(ROOT / "experiments")
    for one, other in (("lwf", "finetune_distillation"), ("ewc", "finetune_ewc")):
        for name in (one, other):
            assert run(f"fit --config {name} --run_dir {name}", *SHORT).code == 0
        found, expected = (json.loads(Path(name, "results.json").read_text())["matrix"] for name in (one, other))
        assert found == expected


def test_a_config_is_found_by_its_name_where_that_is_unique(run):
    Path("experiments/methods/a/published").mkdir(parents=True)
    Path("experiments/methods/a/mine.yaml").write_text("model: LwF\n")
    assert config_of(run("fit --config mine", "--print_config"))["model"]["class_path"].endswith(".LwF")
    assert config_of(run("fit --config=mine", "--print_config"))["model"]["class_path"].endswith(".LwF")
    said = run("fit --config mien")
    assert (said.code, said.err) == (
        2,
        "error: --config mien: no file of this name under experiments; did you mean 'mine'?\n",
    )
    Path("experiments/methods/a/published/mine.yaml").write_text("model: ER\n")
    said = run("fit --config mine")
    assert said.code == 2
    assert "several files have this name; give the path of one: experiments/methods/a/mine.yaml, " in said.err
    Path("mine").write_text("model: EWC\n")  # a file of that very name comes first
    assert config_of(run("fit --config mine", "--print_config"))["model"]["class_path"].endswith(".EWC")


def test_without_a_folder_of_experiments_the_configs_of_the_package_are_found(run):
    assert config_of(run("fit --config er", "--print_config"))["model"]["class_path"].endswith(".ER")
    said = run("fit --config err")
    assert said.code == 2
    assert said.err.startswith("error: --config err: no file of this name under experiments; did you mean ")


def test_names_of_the_configs_of_the_project_are_unique():
    stems = [path.stem for path in (ROOT / "experiments").rglob("*.yaml")]
    assert len(stems) == len(set(stems))
