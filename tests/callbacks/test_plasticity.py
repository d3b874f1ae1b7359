"""Measures of plasticity after each task: against plain loops, and in a run, its results and its logger."""

import json
from functools import partial

import pytest
import torch
from support.runs import NormNet, assert_resumes, assert_same_run, plain_net, run, sgd
from torch.nn import functional as F

from cl_lightning.callback import ContinualCallback
from cl_lightning.callbacks.plasticity import Plasticity
from cl_lightning.measures import PLASTICITY
from cl_lightning.models import MLP
from cl_lightning.report.runs import read
from cl_lightning.report.single import _run_plasticity
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.testing import check_strategy, small


class Plain(ContinualCallback):
    """The measures by plain loops over single samples."""

    def __init__(self):
        self.rows, self.right, self.seen = [], 0, 0

    def losses(self, strategy, batch, output):
        for label, task, logits in zip(batch.labels, batch.tasks, output.logits, strict=True):
            if task == strategy.task.index:
                self.right += int(logits.argmax() == label)
                self.seen += 1
        return {}

    def on_task_end(self, trainer, strategy, task):
        network, activity, right, features, loss = strategy.network, [0, 0], 0, [], 0
        samples = [
            (image[None], label)
            for batch in strategy.passes.batches()
            for image, label in zip(batch.images, batch.labels, strict=True)
        ]
        with torch.enable_grad():
            for image, label in samples:
                first = network.backbone.layers[:3](image)
                second = network.backbone.layers[3:](first)
                logits = network.head(second)
                loss = loss + F.cross_entropy(logits, label[None])
                right += int(logits.argmax() == label)
                activity = [a + h.detach().abs()[0] for a, h in zip(activity, (first, second), strict=True)]
                features.append(second.detach()[0])
            gradient = torch.autograd.grad(loss / len(samples), list(network.backbone.parameters()))
        s = torch.linalg.svdvals(torch.stack(features).double())
        p = (s / s.sum()).clamp(min=1e-300)
        dormant = sum(int((a <= 0.5 * a.mean()).sum()) for a in activity)
        weights = sum(float(w.detach().square().sum()) for w in network.backbone.parameters())
        self.rows.append(
            [
                self.right / self.seen,
                right / len(samples),
                dormant / (12 + 6),
                float((-(p * p.log()).sum()).exp()),
                weights**0.5,
                sum(float(g.square().sum()) for g in gradient) ** 0.5,
            ]
        )
        self.right = self.seen = 0


@pytest.mark.parametrize("host", [partial(Finetune), partial(ER, memory_size=40)], ids=["finetune", "er"])
def test_the_measures_are_those_of_plain_loops(host):
    measured, plain = Plasticity(samples=None, threshold=0.5), Plain()
    run(host(backbone=partial(MLP, hidden=(12, 6)), optimizer=sgd), measured, plain, max_epochs=1)
    assert measured.table.shape == (3, len(PLASTICITY))
    torch.testing.assert_close(measured.table, torch.tensor(plain.rows, dtype=torch.float64), rtol=1e-4, atol=1e-6)


def test_it_changes_nothing_and_resumes(tmp_path):
    host = partial(Finetune, backbone=NormNet, optimizer=sgd)
    assert_same_run(run(host(), Plasticity(), max_epochs=1), run(host(), max_epochs=1))
    assert_resumes(lambda: (host(), [Plasticity(samples=50)]), tmp_path)


def test_results_and_logs_have_all_measures_per_task(tmp_path):
    logged = []

    class Look(ContinualCallback):
        def on_task_end(self, trainer, strategy, task):
            logged.append(task.index)

    callback = Plasticity(samples=30)
    run(Finetune(backbone=plain_net, optimizer=sgd), callback, Look(), max_epochs=1, folder=tmp_path)
    saved = json.loads((tmp_path / "results.json").read_text())["plasticity"]
    assert saved["samples"] == 30
    assert saved["threshold"] == 0.025
    for name in PLASTICITY:
        assert len(saved[name]) == 3
    assert saved == callback.results()
    found = read(tmp_path)
    assert dict(found.plasticity) == {name: tuple(saved[name]) for name in PLASTICITY}
    assert [plot.title for plot in _run_plasticity(found).plots][:2] == ["Online accuracy.", "Task accuracy."]


def test_a_network_that_never_fires_is_dormant_and_learns_nothing():
    class Kill(ContinualCallback):
        @torch.no_grad()
        def on_task_learnt(self, trainer, strategy, task):
            strategy.network.backbone.layers[1].weight.zero_()
            strategy.network.backbone.layers[1].bias.fill_(-1.0)

    callback = Plasticity()
    run(Finetune(backbone=plain_net, optimizer=sgd), Kill(), callback, max_epochs=1)
    last = dict(zip(PLASTICITY, callback.table[-1].tolist(), strict=True))
    assert last["dormant_units"] == 1
    assert last["effective_rank"] == 0
    assert last["gradient_norm"] == 0


def observed():
    return [Plasticity(samples=40)]


@pytest.mark.slow
def test_two_processes_give_what_one_gives():
    check_strategy(small(Finetune), callbacks=observed, checks=["processes"])


@pytest.mark.parametrize("options", [{"samples": 0}, {"threshold": -1}])
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match="Plasticity"):
        Plasticity(**options)
