"""Streams with wrong labels: training sees the given labels, and evaluation the labels of the data."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support import ROOT
from support.runs import assert_resumes, assert_same_run, plain_net, run

from cl_lightning.data import TensorSource
from cl_lightning.data.labels import training_labels
from cl_lightning.datamodules.digits import Digits
from cl_lightning.loop.dry_run import _few
from cl_lightning.loop.results import protocol
from cl_lightning.memory import SharedBudget
from cl_lightning.strategies.baselines.joint import Joint
from cl_lightning.strategies.pretrained.simplecil import SimpleCIL
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.strategies.rehearsal.icarl import ICaRL
from cl_lightning.stream import ClassIncremental, LabelFraction, NoisyLabels, Stream, Subset

BASE = Subset(ClassIncremental(sizes=[4, 3, 3], class_order="random"), per_class=25)
NOISY = NoisyLabels(BASE, rate=0.4)


class Noisy(Digits):
    """Digits with noisy labels."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"scenario": NOISY, "val_fraction": 0.2, **options})


class Twin(Noisy):
    """Digits whose labels are the given labels of the noisy stream, in a stream without noise.

    Training must not be able to distinguish it from the noisy stream.
    """

    def source(self, *, train: bool) -> TensorSource:
        source = super().source(train=train)
        if not train:
            return source
        data = Noisy(seed=self.seed)
        labels = data.make_stream(0).given_labels(source.labels)
        return TensorSource(source.take(torch.arange(len(labels))), labels, class_names=list(source.class_names))

    def make_stream(self, seed: int, earlier: Stream | None = None) -> Stream:
        super().make_stream(seed, earlier)  # of other labels
        self.stream = replace(Noisy(seed=self.seed).make_stream(seed), noisy=(), given=())
        return self.stream


def begun(data: Digits, task: int, **options: Any) -> Digits:
    if not hasattr(data, "stream"):
        data.make_stream(0)
    data.begin(data.stream.tasks[task], **options)
    data.begin_phase(0, None, 0)
    return data


METHODS = {
    "class weights and a balanced order": (
        lambda: ER(memory_size=20, backbone=plain_net),
        {"sampler": "balanced", "class_weights": "balanced"},
    ),
    "exemplars, and samples that are left out": (
        lambda: ICaRL(
            memory_size=20,
            backbone=plain_net,
            budget=SharedBudget(class_rates=[0.2, 0.2, 0.2], memory_rates=[0.8, 0.6]),
        ),
        {},
    ),
    "all tasks at once": (lambda: Joint(backbone=plain_net), {}),
    "stored features": (lambda: SimpleCIL(backbone=plain_net), {}),
}


@pytest.mark.parametrize("name", METHODS)
def test_no_path_leads_from_the_labels_of_the_data_to_training(name, monkeypatch):
    make, options = METHODS[name]
    made = {}
    for kind in (Noisy, Twin):
        monkeypatch.setattr("support.runs.Digits", kind)
        made[kind] = run(make(), data={"scenario": NOISY, "seed": 0, **options}, max_epochs=1)
    assert any(len(part) for part in made[Noisy].stream.noisy)
    assert not any(len(part) for part in made[Twin].stream.noisy)
    assert_same_run(made[Noisy], made[Twin])
    assert protocol(made[Noisy])["wrong_labels"] == [40, 30, 30]  # 0.4 of 25 samples of each class
    assert "wrong_labels" not in protocol(made[Twin])


def test_no_other_code_reads_the_labels_of_the_training_data():
    """``training_labels`` is the one place; the length of the labels is no label."""
    reads = re.compile(r"(?<!len\(self)(?<!len\(data)[.]samples\(train=True\)\.labels")
    found = {
        path.relative_to(ROOT).as_posix(): lines
        for folder in ("cl_lightning", "callbacks", "datamodules")
        for path in (ROOT / folder).rglob("*.py")
        if (lines := reads.findall(path.read_text()))
    }
    assert found == {"cl_lightning/data/labels.py": [".samples(train=True).labels"]}


def test_training_and_statistics_have_the_given_labels_and_evaluation_the_labels_of_the_data():
    data = begun(Noisy(batch_size=1000), 1)
    true = torch.as_tensor(data.samples(train=True).labels)
    given = torch.as_tensor(data.stream.given_labels(true.numpy()))
    columns = torch.as_tensor(data.stream.column_table.copy())
    for loader in (data.train_dataloader(), data.statistics_dataloader()):
        (batch,) = loader
        assert batch.labels.equal(columns[given[batch.indices]])
        assert (batch.labels != columns[true[batch.indices]]).sum() == 30
    (held,) = data.val_dataloader()
    assert held.labels.equal(columns[true[held.indices]])
    (test,) = data.test_dataloader()
    assert test.labels.equal(columns[torch.as_tensor(data.samples(train=False).labels)[test.indices]])


def test_hidden_labels_stay_hidden():
    scenario = NoisyLabels(LabelFraction(BASE, fraction=0.5), rate=0.4)
    data = begun(Noisy(scenario=scenario, batch_size=1000), 0, with_unlabelled=True)
    (batch,) = data.train_dataloader()
    assert (batch.labels == -1).sum() == 4 * 12
    wrong = batch.labels != torch.as_tensor(data.stream.columns_of(data.samples(train=True).labels))[batch.indices]
    assert (wrong & (batch.labels >= 0)).sum() == 4 * 5  # 0.4 of the 13 samples of each class with a label


def test_the_fingerprint_of_a_task_depends_on_its_given_labels():
    first, again, twin = Noisy(), Noisy(), Twin()
    plain = Noisy(scenario=BASE)
    for data in (first, again, twin, plain):
        data.make_stream(0)
    for task in range(3):
        assert first.fingerprint(task) == again.fingerprint(task) != plain.fingerprint(task)


def test_the_dry_run_has_the_given_labels_of_as_many_classes_as_possible():
    data = Noisy()
    data.make_stream(0)
    few = _few(data, 4)
    labels = training_labels(few)
    for task in few.stream.tasks:
        chosen = few.stream.train[task.index]
        assert len(chosen) == 4
        assert set(labels[chosen].tolist()) == set(task.classes)
        assert np.array_equal(labels[chosen], training_labels(data)[chosen])
        assert np.array_equal(
            np.sort(few.stream.noisy[task.index]), np.intersect1d(chosen, data.stream.noisy[task.index])
        )
    assert any(len(part) for part in few.stream.noisy)


def test_a_resumed_run_has_the_same_noise(tmp_path):
    def make():
        return ER(memory_size=20, backbone=plain_net), []

    assert_resumes(make, tmp_path, data={"scenario": NOISY, "batch_size": 16})
