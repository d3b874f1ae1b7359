"""The command of memory-aligned comparisons."""

import json
from types import SimpleNamespace

import pytest
from support import ROOT

from cl_lightning.cli import main

SIZE = (1, 8, 8)


@pytest.fixture
def budgets(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import budgets

    def launch(arguments, seed, target, data):
        return main(["fit", *arguments, "--seed_everything", str(seed), "--run_dir", str(target)])

    monkeypatch.setattr(budgets, "launch", launch)
    monkeypatch.setattr(budgets, "SHAPE", SIZE)
    small = "--data Digits --data.scenario ClassIncremental --data.scenario.tasks 2 --model.backbone MLP "
    options = "--model.backbone.hidden [8] --trainer.max_epochs 1 --trainer.enable_progress_bar false"
    monkeypatch.setattr(budgets, "OPTIONS", f"{small}{options} --trainer.limit_train_batches 2")
    return budgets


def test_a_larger_network_gets_as_many_exemplars_fewer(budgets, tmp_path, capsys):
    budgets.run(("ER by the loader", "DERExpand"), (0.003, 0.008), (0,), "none", tmp_path)
    found = {}
    for file in tmp_path.glob("*/*/0/results.json"):
        cost = json.loads(file.read_text(encoding="utf-8"))["cost"]
        found[file.parts[-4], file.parts[-3]] = cost["parameters"], cost["memory_mb"]
    one, two = 8 * 64 + 8 + 10 * 8 + 10, 2 * (8 * 64 + 8) + 10 * 16 + 10
    assert {key: count for key, (count, _) in found.items()} == {
        ("er_by_the_loader", "one_step"): one,
        ("er_by_the_loader", "0.003_mb"): one,
        ("er_by_the_loader", "0.008_mb"): one,
        ("derexpand", "one_step"): two,
        ("derexpand", "0.008_mb"): two,
    }
    assert "DERExpand: 0.003 MB are less than its network, 0.00 MB" in capsys.readouterr().out
    for (_, size), (_, megabytes) in found.items():
        if size != "one_step":
            budget = 2**20 * float(size.removesuffix("_mb"))
            # lists of equal length, so that up to 9 exemplars of 64 bytes remain
            assert budget - 10 * 64 < 2**20 * megabytes <= budget


def test_the_page_has_accuracies_exemplars_and_areas(budgets):
    def of(budget, *accuracies):
        last = {"average_accuracy": accuracies[0], "average_incremental_accuracy": accuracies[1]}
        return [SimpleNamespace(budget=budget, parameters=2**17, seed=0, last=last)]

    found = {("ER", 0.6): of(0.6, 0.5, 0.6), ("ER", 1.0): of(1.0, 0.8, 0.6), ("MEMO", 1.0): of(1.0, 0.75, 0.8)}
    text = budgets.page(found, (0.6, 1.0))
    lines = text.splitlines()
    assert "| ER | 50.0, 1638 | 80.0, 8192 |" in lines  # (0.6 - 0.5) 2^20 / 64
    assert "| MEMO | – | 75.0, 8192 |" in lines  # noqa: RUF001
    assert "| ER | 60.0, 1638 | 60.0, 8192 |" in lines
    assert "| ER | 0.6 to 1 MB | 0.240 | 0.260 |" in lines  # 0.6 * 0.4, and (0.5 + 0.8) / 2 * 0.4
    assert "| MEMO | 1 to 1 MB | – | – |" in lines  # noqa: RUF001
