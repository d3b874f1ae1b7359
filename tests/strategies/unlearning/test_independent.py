"""A network for each task, which is reset when the task is forgotten."""

from functools import partial

import pytest
import torch
from support.runs import assert_same, loop, plain_net, run, sgd
from support.unlearning import assert_forgets_exactly, learnt, requests

from cl_lightning.batch import mix
from cl_lightning.callbacks.unlearning_measures import UnlearningMeasures
from cl_lightning.models import MLP, LinearHead, TaskNetworks, drawn
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.unlearning.independent import Independent
from cl_lightning.stream import PermutedDomains, Request
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "Independent": Subject(
        small(Independent),
        first_task_is_finetuning=False,
        reason="the parameters belong to the network of a task, under another name, with weights drawn by its index",
    )
}

SMALL = partial(Independent, backbone=plain_net, optimizer=sgd)
TASK_1 = requests(Request(tasks=[1]))


def networks(strategy, task):
    """Weights of the network of a task: backbone and rows of the head."""
    return {
        **strategy.nets.nets[str(task)].state_dict(),
        **{f"rows.{name}": value for name, value in strategy.rows.blocks[strategy.block_of(task)].state_dict().items()},
    }


def test_forgetting_a_task_leaves_its_initial_weights_and_no_trace_elsewhere():
    made = assert_forgets_exactly(SMALL, TASK_1)
    never = learnt(SMALL(), TASK_1.base)
    for task in (0, 2):
        assert_same(networks(made.strategy, task), networks(never.strategy, task))
    initial = drawn(lambda: MLP((1, 8, 8), hidden=(16,)), mix(made.seed, 0xBA5E, 2))
    rows = drawn(lambda: torch.nn.Linear(16, 3), mix(made.seed, 0x4EAD, 1))
    expected = {**initial.state_dict(), **{f"rows.{name}": value for name, value in rows.state_dict().items()}}
    assert_same(networks(made.strategy, 1), expected)
    with pytest.raises(AssertionError):
        assert_same(networks(never.strategy, 1), expected)


def test_a_request_takes_no_step_and_later_tasks_keep_their_rows():
    early = requests(Request(tasks=[0], after=1))
    made = run(SMALL(), data={"scenario": early})
    assert [cost.steps for cost in made.meter.tasks][2] == 0
    last = made.matrix.R_ti[3]
    assert last[0] < 0.6  # of 4 classes, by initial weights
    assert last[[1, 3]].min() > 0.8
    assert made.strategy.rows.position.shape == (4, 10)
    assert made.strategy.rows.block_sizes() == [4, 3, 3]
    assert sorted(made.strategy.nets.nets) == ["0", "1", "3"]


def test_tasks_do_not_depend_on_each_other():
    made = run(SMALL())
    alone = run(Finetune(backbone=plain_net, optimizer=sgd, loss_classes="current"))
    assert made.matrix.R_ti[2].min() > 0.85
    assert torch.equal(made.matrix.R_ti[2], made.matrix.R_ti.diagonal())
    assert made.matrix.R_ti[2].mean() > alone.matrix.R_ti[2].mean()
    weights = [made.strategy.nets.nets[name].layers[1].weight for name in "012"]
    assert not torch.equal(weights[0], weights[1])


def test_a_stream_of_domains_has_rows_for_each_task():
    made = run(SMALL(), data={"scenario": PermutedDomains(2)}, max_epochs=1)
    assert made.strategy.rows.block_sizes() == [10, 10]


def test_a_class_is_too_little_to_forget_and_a_head_needs_rows_for_each_task():
    for asked in (Request(classes=["3"]), Request(fraction=0.1)):
        with pytest.raises(ValueError, match=r"Independent forgets whole tasks, and task 3 .* ask for tasks"):
            loop(SMALL(), data={"scenario": requests(asked)}).fit()
    with pytest.raises(ValueError, match="Independent: head is LinearHead, which has no rows for each task"):
        loop(SMALL(head=LinearHead)).fit()
    classes = requests(Request(classes=["4", "5", "6"]))  # all of task 1
    assert loop(SMALL(), data={"scenario": classes}, max_epochs=1).fit().R_ti[3, 1] < 0.7


def test_what_is_forgotten_is_not_known_any_more_and_the_rest_is():
    callback = UnlearningMeasures()
    run(SMALL(), callback, data={"scenario": TASK_1}, max_epochs=4)
    kept, forgotten, kept_test, forgotten_test, _ = callback.table[-1].tolist()
    assert min(kept, kept_test) > 0.9
    assert max(forgotten, forgotten_test) < 0.7


def test_networks_take_their_names_from_the_state_that_they_load():
    torch.manual_seed(0)
    first, other = (TaskNetworks((1, 8, 8), plain_net, plain_net((1, 8, 8))) for _ in range(2))
    first.add("0", 5)
    first.add("3", 7)
    first.remove("main")
    state = {f"b.{name}": value for name, value in first.state_dict().items()}
    other.add("1", 5)
    other.restore_network(None, state, "b.")  # type: ignore[arg-type]
    other.load_state_dict(first.state_dict())
    assert list(other.nets) == ["0", "3"]
    images = torch.rand(2, 1, 8, 8)
    for task in (0, 3):
        first.task = other.task = task
        assert torch.equal(first(images), other(images))
    weight = first.nets["0"].layers[1].weight
    assert not torch.equal(weight, first.nets["3"].layers[1].weight)
    before = weight.clone()
    with torch.no_grad():
        weight += 1
    first.add("0", 5)
    assert first.nets["0"].layers[1].weight is weight  # reset in place
    assert torch.equal(weight, before)
