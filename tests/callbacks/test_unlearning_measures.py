"""Measures after requests to forget: against plain loops, and their differences from a retrained network."""

import json

import numpy as np
import pytest
import torch
from support.runs import plain_net, run
from support.unlearning import requests
from torch.nn import functional as F

from cl_lightning.callback import ContinualCallback
from cl_lightning.callbacks.unlearning_measures import UnlearningMeasures
from cl_lightning.data.labels import training_labels
from cl_lightning.measures import UNLEARNING, membership
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.unlearning.retrain import Retrain
from cl_lightning.stream import Request

SCENARIO = requests(Request(classes=["3"], after=1), Request(fraction=0.2, after=1))


class Plain(ContinualCallback):
    """The measures of one sample at a time."""

    def __init__(self):
        self.rows = {}

    def on_task_end(self, trainer, strategy, task):
        data = trainer.datamodule
        stream, labels = data.stream, training_labels(data)
        gone = set(stream.forgotten(task.index).tolist())
        if not gone:
            return

        def scored(source, indices, labels):
            images = (source.take(torch.as_tensor(indices)).float() / 255 - data.mean[0]) / data.std[0]
            scores = strategy.predict(images.to(strategy.device)).double()
            columns = torch.as_tensor(stream.columns_of(labels[indices]))
            return F.cross_entropy(scores, columns, reduction="none"), scores.argmax(1) == columns

        learnt = [t.index for t in stream.tasks[: task.index + 1] if t.learns]
        train = sorted({i for t in learnt for i in stream.train[t].tolist()})
        test = sorted({i for t in learnt for i in stream.test[t].tolist()})
        left = [i for i in train if i not in gone]
        source, tests = data.samples(train=True), data.samples(train=False)
        classes = set(labels[left].tolist())
        groups = [
            scored(source, left, labels),
            scored(source, [i for i in train if i in gone], labels),
            scored(tests, [i for i in test if tests.labels[i] in classes], np.asarray(tests.labels)),
            scored(tests, [i for i in test if tests.labels[i] not in classes], np.asarray(tests.labels)),
        ]
        share = membership(groups[1][0], groups[0][0], groups[2][0])
        self.rows[task.index] = [*(float(right.double().mean()) for _, right in groups), share]


def test_the_measures_are_of_the_samples_that_they_name(tmp_path):
    plain, callback = Plain(), UnlearningMeasures(samples=None)
    made = run(Retrain(backbone=plain_net), plain, callback, data={"scenario": SCENARIO}, folder=tmp_path)
    assert callback.table[:2].isnan().all()  # before the first request
    assert set(plain.rows) == {2, 3, 4}
    for task, row in plain.rows.items():
        assert callback.table[task].tolist() == pytest.approx(row, abs=1e-6, nan_ok=True)
    assert callback.table[4, 0] > 0.8
    assert callback.table[4, 3] == 0.0  # class 3 is not predicted any more
    results = json.loads((tmp_path / "results.json").read_text())["unlearning_measures"]
    assert set(results) == {"samples", *UNLEARNING}
    assert results["kept_accuracy"][:2] == [None, None]
    again = UnlearningMeasures(reference=str(tmp_path / "results.json"))
    again.load_state_dict(callback.state_dict())
    found = again.results()["difference"]
    assert [value for values in found.values() for value in values[2:]] == [0.0] * 15
    again.table = callback.table + 0.25
    assert again.results()["difference"]["membership"][2:] == pytest.approx([0.25] * 3)
    assert (
        made.results()["protocol"]["test_data_use"][1] == "accuracy and membership inference after requests to forget"
    )


def test_a_stream_without_requests_has_no_measures_and_a_sample_of_each_kind_is_drawn():
    callback = UnlearningMeasures()
    run(Finetune(backbone=plain_net), callback, max_epochs=1)
    assert callback.results() == {}
    few = UnlearningMeasures(samples=10)
    run(Retrain(backbone=plain_net), few, data={"scenario": SCENARIO}, max_epochs=1)
    shares = few.table[4, [0, 1]] * torch.tensor([30, 20])  # 10 samples of each task that has some
    torch.testing.assert_close(shares.round(), shares)


def test_options_out_of_range_and_other_results_are_refused(tmp_path):
    with pytest.raises(ValueError, match="UnlearningMeasures: samples is 0; it must be at least 1"):
        UnlearningMeasures(samples=0)
    (tmp_path / "results.json").write_text("{}")
    for path in (tmp_path / "results.json", tmp_path / "none.json"):
        with pytest.raises(ValueError, match="has no measures of unlearning") as caught:
            UnlearningMeasures(reference=str(path))
        assert "\n" not in str(caught.value)
