"""Short forms, and options of a class that is the default."""

import pytest
from support.command import config_of

from cl_lightning.cli.shorthand import expanded, with_default_classes


def parsed(run, options):
    return config_of(run(f"fit {options}", "--print_config"))


def test_the_default_optimizer_keeps_its_other_options(run):
    model = parsed(run, "--model.optimizer.lr 0.01")["model"]["init_args"]
    assert model["optimizer"]["class_path"].endswith("SGD")
    assert (model["optimizer"]["init_args"]["lr"], model["optimizer"]["init_args"]["momentum"]) == (0.01, 0.9)
    model = parsed(run, "--model.optimizer.momentum 0.5")["model"]["init_args"]
    assert (model["optimizer"]["init_args"]["lr"], model["optimizer"]["init_args"]["momentum"]) == (0.05, 0.5)


def test_the_class_may_come_after_its_option(run):
    config = parsed(run, "--lr 0.02 --model LwF")
    assert config["model"]["class_path"].endswith("LwF")
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.02


def test_the_default_scenario_keeps_its_number_of_tasks_unless_it_is_given(run):
    def scenario(options):
        return parsed(run, options)["data"]["init_args"]["scenario"]["init_args"]

    assert scenario("--data.scenario.class_order random")["tasks"] == 5
    assert scenario("--data.scenario.tasks 2")["tasks"] == 2
    assert (scenario("--data.scenario.sizes [4,6]")["tasks"], scenario("--data.scenario.sizes [4,6]")["sizes"]) == (
        None,
        [4, 6],
    )


def test_short_forms_stand_for_long_ones(run):
    config = parsed(run, "--epochs 1 --seed 3 --tasks 2 --batch_size 32 --optimizer Adam --lr=0.001 --devices 1")
    assert config["trainer"]["max_epochs"] == 1
    assert config["trainer"]["devices"] in (1, "1")
    assert config["seed_everything"] == 3
    assert config["data"]["init_args"]["batch_size"] == 32
    assert config["model"]["init_args"]["optimizer"]["class_path"].endswith("Adam")
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.001
    assert parsed(run, "--backbone SlimResNet18")["model"]["init_args"]["backbone"]["class_path"].endswith(
        "SlimResNet18"
    )


def test_a_class_that_is_named_stays(run, tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {class_path: ER, init_args: {optimizer: {class_path: Adam}}}")
    config = parsed(run, f"--config {tmp_path / 'mine.yaml'} --lr 0.1")
    assert config["model"]["init_args"]["optimizer"]["class_path"].endswith("Adam")
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.1
    arguments = ["--model.optimizer", "Adam", "--model.optimizer.lr", "0.1"]
    assert with_default_classes(["--model", "ER", *arguments]) == ["--model", "ER", *arguments]


def test_values_that_look_like_short_forms_stay():
    assert expanded(["fit", "--run_dir", "--lr"]) == ["fit", "--run_dir", "--model.optimizer.lr"]
    assert expanded(["fit", "--lrs", "1"]) == ["fit", "--lrs", "1"]
    assert expanded(["fit", "--lr=1", "--seed", "2"]) == ["fit", "--model.optimizer.lr=1", "--seed_everything", "2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--model DKVB --lr 0.1",
            "--model.optimizer.lr: DKVB has an optimizer of its own by default; name the class too",
        ),
        ("--model LwF --model.optimizer.momentum 0.1", "--model.optimizer.momentum: LwF has an optimizer of its own"),
        (
            "--data Table --data.path sklearn:wine --tasks 3",
            "--data.scenario.tasks: Table has a scenario of its own by default",
        ),
    ],
)
def test_a_default_of_its_own_has_to_be_named(run, options, message):
    said = run(f"fit {options}")
    assert said.code == 2
    assert said.err.startswith(f"error: {message}")
