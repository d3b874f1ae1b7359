"""Options of objects made in Python: equal for equal objects, different for different ones."""

import functools
import json

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.trainer.states import TrainerFn
from support.runs import loop, plain_net, run, sgd
from torch import nn

from cl_lightning.datamodules.digits import Digits
from cl_lightning.recorded import described
from cl_lightning.report import comparison, runs
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.stream import ClassIncremental


class Own(ER):
    def __init__(self, *, scale: float = 2.0, **kwargs):
        super().__init__(backbone=plain_net, **kwargs)
        self.scale = scale


def rate(lr):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


class Opaque:
    __slots__ = ()


def test_arguments_and_defaults_of_a_class_and_its_bases_are_recorded():
    found = described(Own(scale=3.0, memory_size=7))
    assert found["class_path"].startswith(f"{__name__}.Own ")
    options = found["init_args"]
    assert (options["scale"], options["memory_size"], options["loss_classes"]) == (3.0, 7, "all")
    assert options["backbone"]["class_path"] == "support.runs.plain_net"
    assert json.loads(json.dumps(found)) == found
    data = described(Digits(scenario=ClassIncremental(sizes=[4, 3, 3]), batch_size=8))["init_args"]
    assert (data["batch_size"], data["val_fraction"]) == (8, 0.0)
    assert data["scenario"]["init_args"]["sizes"] == [4, 3, 3]


@pytest.mark.parametrize(
    ("same", "other"),
    [
        (lambda: rate(0.1), lambda: rate(0.2)),  # equal code, other values
        (lambda: lambda x: x + 1, lambda: lambda x: x + 2),
        (lambda: functools.partial(sgd, lr=1), lambda: functools.partial(sgd, lr=2)),
        (lambda: torch.arange(5), lambda: torch.arange(1, 6)),
        (lambda: np.zeros((2, 3)), lambda: np.zeros((3, 2))),
        (lambda: np.float64(1.0), lambda: float("nan")),
        (lambda: nn.Linear(3, 4), lambda: nn.Linear(3, 5)),
        (lambda: list(range(1000)), lambda: list(range(1001))),
        (lambda: {1, 2}, lambda: {1, 3}),
        (lambda: Own(memory_size=5), lambda: Own(memory_size=6)),
        (lambda: type("A", (), {"f": lambda self: 1}), lambda: type("A", (), {"f": lambda self: 2})),
        (lambda: TrainerFn.FITTING, lambda: TrainerFn.TESTING),
        (lambda: torch.optim.SGD, lambda: torch.optim.Adam),
    ],
)
def test_equal_objects_are_described_alike_and_others_are_not(same, other):
    first, second, third = described(same()), described(same()), described(other())
    assert first == second
    assert first != third
    assert yaml.safe_load(yaml.safe_dump(first)) == first


def test_what_cannot_be_read_is_never_equal():
    assert described(Opaque()) != described(Opaque())
    ring: list = []
    ring.append(ring)
    assert described(ring) != described(ring)


def test_runs_from_python_with_other_options_are_not_pooled(tmp_path):
    for name, seed, size in (("a", 0, 20), ("b", 1, 20), ("c", 2, 30)):
        made = loop(ER(backbone=plain_net, optimizer=sgd, memory_size=size), folder=tmp_path / name, max_epochs=1)
        made.seed = seed
        made.recorded = made.recorded.replace("seed_everything: 0", f"seed_everything: {seed}")
        made.fit()
    found, problems = runs.load([str(tmp_path)])
    assert not problems
    groups = comparison.compare(found).groups
    assert [[run.folder.name for run in group.runs] for group in groups] == [["a", "b"], ["c"]]
    assert groups[1].label == "ER memory_size=30"


def test_runs_without_recorded_options_are_not_pooled_silently(tmp_path):
    made = run(ER(backbone=plain_net, optimizer=sgd, memory_size=20), folder=tmp_path / "a", max_epochs=1)
    content = {**made.results(), "config": None}
    found = [runs.parse({**content, "seed": seed}, tmp_path / f"{seed}") for seed in range(2)]
    found.append(
        runs.parse({**content, "seed": 2, "protocol": {**content["protocol"], "batch_size": 7}}, tmp_path / "2")
    )
    compared = comparison.compare(found)
    assert [len(group.runs) for group in compared.groups] == [2, 1]
    told = [problem.text for problem in compared.problems]
    assert len(told) == 2
    assert all("has no recorded options; it is grouped with" in text for text in told)
