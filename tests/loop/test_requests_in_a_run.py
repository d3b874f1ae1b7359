"""Requests to forget in a run: who refuses them, which samples are served, the dry run and the protocol."""

from functools import partial

import numpy as np
import pytest
import torch
from support.runs import loop, plain_net, run
from support.unlearning import requests

from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.strategies.unlearning.retrain import Retrain
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.stream import Request

CLASS = requests(Request(classes=["3"], after=1))
SMALL = partial(Retrain, backbone=plain_net)


@pytest.mark.parametrize("strategy", [Finetune, ER])
@pytest.mark.parametrize("scenario", [CLASS, requests(held=(1,))], ids=["forget", "hold"])
def test_a_strategy_that_cannot_forget_is_refused_in_one_line_before_training(strategy, scenario):
    made = loop(strategy(backbone=plain_net), data={"scenario": scenario})
    with pytest.raises(ValueError, match=f"{strategy.__name__} cannot forget, and task") as caught:
        made.fit()
    assert "\n" not in str(caught.value)
    assert not made.started
    assert made.trainer.global_step == 0


class Watching(Retrain):
    """Records the samples that it is given."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.trained, self.passed = {}, {}

    def losses(self, batch, output):
        self.trained.setdefault(self.task.index, set()).update(batch.indices.tolist())
        return super().losses(batch, output)

    def end_task(self, task):
        super().end_task(task)
        self.passed[task.index] = {i for batch in self.passes.batches() for i in batch.indices.tolist()}


def test_forgotten_samples_are_never_served_again_and_a_pass_has_the_samples_of_the_request():
    scenario = requests(Request(classes=["3"], after=1), Request(fraction=0.5), Request(tasks=[0]))
    made = run(Watching(backbone=plain_net), data={"scenario": scenario}, max_epochs=1)
    stream, strategy = made.stream, made.strategy
    for task in stream.tasks:
        learnt = np.concatenate([stream.train[t.index] for t in stream.tasks[: task.index + 1] if t.learns])
        assert strategy.trained[task.index] == set(learnt.tolist()) - set(stream.forgotten(task.index).tolist())
        assert strategy.passed[task.index] == set(stream.train[task.index].tolist())
    assert made.results()["protocol"]["requests"] == [
        "learn",
        "learn",
        f"forget class 3 ({len(stream.train[2])} samples)",
        "learn",
        f"forget 0.5 of the samples ({len(stream.train[4])} samples)",
        f"forget task 0 ({len(stream.train[5])} samples)",
    ]
    assert torch.equal(made.matrix.totals.bool(), torch.tensor([True, True, False, True, False, False]))
    assert "requests" not in run(SMALL(), max_epochs=1).results()["protocol"]


def test_batches_of_a_strategy_without_all_data_have_the_samples_of_the_request():
    class Alone(Watching):
        traits = Retrain.traits.but(needs_all_data=False)

    made = run(Alone(backbone=plain_net), data={"scenario": CLASS}, max_epochs=1)
    for task in made.stream.tasks:
        assert made.strategy.trained[task.index] == set(made.stream.train[task.index].tolist())


@pytest.mark.parametrize("asked", [Request(classes=["3"], after=0), Request(fraction=0.3, after=0)])
def test_the_dry_run_changes_nothing_and_serves_requests_for_samples_that_it_has(asked):
    scenario = requests(asked)
    plain, dry = (
        run(SMALL(), data={"scenario": scenario}, options={"dry_run": is_dry}, max_epochs=1) for is_dry in (False, True)
    )
    for name, value in plain.strategy.state_dict().items():
        assert torch.equal(value, dry.strategy.state_dict()[name])


def test_a_request_is_no_domain_incremental_task():
    class ByClass(Retrain):
        traits = Retrain.traits.but(scenarios=("class-incremental",))

    run(ByClass(backbone=plain_net), data={"scenario": CLASS}, max_epochs=1)


def test_the_mixin_has_facts_and_no_hooks():
    from cl_lightning.strategies.base import Unlearns

    assert {name for name in vars(Unlearns) if not name.startswith("_")} == {"forgets", "forgets_held", "is_exact"}
    assert not issubclass(Unlearns, ContinualStrategy)
