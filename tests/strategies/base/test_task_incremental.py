from types import SimpleNamespace

import pytest
import torch
from support.fakes import normal
from support.runs import NormNet, run, sgd

from cl_lightning.callback import ContinualCallback
from cl_lightning.strategies.base import SharesWeights, TaskIncremental, Traits
from cl_lightning.strategies.base.task_incremental import by_task, routed


def test_scores_keep_the_order_of_the_images():
    images, tasks, calls = normal(7, 2), torch.tensor([2, 0, 2, 1, 0, 2, 2]), []

    def predict(rows, task):
        calls.append((task, len(rows)))
        return rows * (10.0**task)

    scores = by_task(images, tasks, predict)
    torch.testing.assert_close(scores, images * 10.0 ** tasks[:, None])
    assert calls == [(0, 2), (1, 1), (2, 4)]


def test_a_prediction_without_tasks_is_refused():
    with pytest.raises(ValueError, match="TaskIncremental: predictions need the task of each image; give tasks"):
        TaskIncremental().predict(torch.zeros(1, 1, 2, 2))


def test_what_is_no_weight_is_trained_in_the_first_task_only():
    class Sharing(SharesWeights):
        traits = Traits(task_ids="needed")

        def losses(self, batch, output):
            return {"ce": self.classification_loss(output, batch)}

        def predict_task(self, images, task):
            return self.network.classify(images)

    class Look(ContinualCallback):
        def __init__(self):
            self.states = []

        def on_task_start(self, trainer, strategy, task):
            self.states.append({name: value.clone() for name, value in strategy.network.backbone.state_dict().items()})

    look = Look()
    made = run(Sharing(backbone=NormNet, optimizer=sgd), look, max_epochs=1)
    assert list(made.strategy.weights()) == ["layers.1.weight"]
    untrained, first, second = look.states
    last = made.strategy.network.backbone.state_dict()
    assert all((untrained[name] != first[name]).any() for name in untrained)
    assert {name for name in first if not torch.equal(first[name], last[name])} == {"layers.1.weight"}
    assert not torch.equal(first["layers.1.weight"], second["layers.1.weight"])


def test_a_network_uses_another_task_for_a_while():
    network = SimpleNamespace(task=3)
    with routed(network, 1):
        assert network.task == 1
    assert network.task == 3
    with pytest.raises(RuntimeError), routed(network, 0):
        raise RuntimeError
    assert network.task == 3
