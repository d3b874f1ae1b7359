"""Configs that say that they have published numbers are held to the numbers of their sources.

The numbers are in ``PUBLISHED`` of the test file of the method: for each config a ``source``, where they were read, and
every option that the config and the command in its head set.
"""

from pathlib import Path

import pytest
from support.published import EXPERIMENTS, claims, described, facts, merged, numbers, option

CLAIMING = {path.stem: path for path in sorted((EXPERIMENTS / "methods").rglob("*.yaml")) if claims(path)}
NUMBERS = numbers()


def test_every_config_that_says_so_has_numbers_and_no_other() -> None:
    assert CLAIMING.keys() == NUMBERS.keys(), "add the numbers and their source to PUBLISHED in the method's test file"


@pytest.mark.parametrize("name", sorted(CLAIMING.keys() & NUMBERS.keys()))
def test_a_config_has_the_numbers_of_its_source(name: str) -> None:
    expected = dict(NUMBERS[name])
    assert len(expected.pop("source")) > 10
    assert facts(CLAIMING[name], whole=CLAIMING[name].parent.name == "published") == expected


def test_another_number_class_or_option_is_noticed(tmp_path: Path) -> None:
    config = CLAIMING["wa_cifar100"]
    text = config.read_text(encoding="utf-8")
    for old, new in (
        ("weight_decay: 0.0002", "weight_decay: 0.0005"),
        ("torch.optim.SGD", "torch.optim.Adam"),
        ("padding: 4", "padding: 2"),
        ("max_epochs: 170", "max_epochs: 200"),
        ("--config cifar100_10x10", "--config cifar100_b50_inc10"),
        ("--config wa_cifar100", "--config wa_cifar100 --data.batch_size 64"),
        ("    clip_weights: false\n", ""),
    ):
        assert old in text
        (tmp_path / "wa_cifar100.yaml").write_text(text.replace(old, new), encoding="utf-8")
        assert facts(tmp_path / "wa_cifar100.yaml", whole=True) != facts(config, whole=True)


def test_options_of_a_command_are_merged_into_its_configs() -> None:
    config = {"data": {"class_path": "A", "init_args": {"scenario": {"class_path": "B", "init_args": {"tasks": 10}}}}}
    more = merged(config, option("data.scenario.tasks", "20"))
    assert described(more["data"]) == "A(scenario=B(tasks=20))"
    other = merged(merged(config, option("data.scenario", "C")), option("data.scenario.tasks", "5"))
    assert described(other["data"]) == "A(scenario=C(tasks=5))"
    assert option("trainer.max_epochs", "5") == {"trainer": {"max_epochs": 5}}
    assert option("data.mean", "[0]") == {"data": {"init_args": {"mean": [0]}}}
