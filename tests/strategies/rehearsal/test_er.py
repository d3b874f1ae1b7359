from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.fakes import batch_of
from support.runs import assert_same_run, plain_net, run, sgd
from support.watching import watching

from cl_lightning.batch import join
from cl_lightning.memory import ClassBalanced
from cl_lightning.models import Output
from cl_lightning.optim import GSAM
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.baselines.joint import Joint
from cl_lightning.strategies.online.pcr import PCR
from cl_lightning.strategies.rehearsal.derpp import DERpp
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.strategies.rehearsal.gem import AGEM
from cl_lightning.stream import ClassIncremental, Online
from cl_lightning.testing import Subject, small

SLOW = "four configurations pass the suite"

SUBJECTS = {
    "ER": Subject(small(ER), first_task_is_finetuning=False, reason="the memory is replayed from the second step on"),
    "ER(replay_by=loader)": Subject(small(ER, replay_by="loader")),
    "ER(reduction=sum)": Subject(
        small(ER, reduction="sum", replay_size=7),
        first_task_is_finetuning=False,
        reason="the memory is replayed from the second step on",
    ),
    "ER(optimizer=GSAM)": Subject(
        small(ER, optimizer=partial(GSAM, base=partial(torch.optim.SGD, lr=0.05, momentum=0.9))),
        first_task_is_finetuning=False,
        reason="the second gradient of each step is on the same replayed samples",
    ),
}

ER_SMALL = partial(ER, backbone=plain_net, optimizer=sgd)


@pytest.mark.parametrize("replay_by", ["step", "loader"])
def test_without_memory_it_is_finetuning_to_the_bit(replay_by):
    assert_same_run(run(ER_SMALL(memory_size=0, replay_by=replay_by)), run(Finetune(backbone=plain_net, optimizer=sgd)))


@pytest.mark.parametrize("options", [{}, {"replay_by": "loader"}, {"reduction": "sum"}, {"policy": ClassBalanced()}])
def test_it_is_far_above_finetuning(options):
    er = run(ER(backbone=plain_net, memory_size=200, **options), max_epochs=4)
    finetune = finetuning({"backbone": plain_net}, max_epochs=4)
    # Measured: .90 to .92 against .25.
    assert er.matrix.measures()["average_accuracy"] > finetune.measures()["average_accuracy"] + 0.25


def test_a_memory_of_everything_mixed_by_the_loader_comes_near_joint_training():
    er = run(ER(backbone=plain_net, memory_size=2000, replay_by="loader"), max_epochs=6)
    joint = run(Joint(backbone=plain_net), max_epochs=6)
    assert len(er.strategy.memory) == sum(len(part) for part in er.stream.train)
    assert abs(er.matrix.measures()["average_accuracy"] - joint.matrix.measures()["average_accuracy"]) < 0.05


def test_a_memory_that_the_loader_mixes_in_keeps_samples_of_each_task_independently():
    memory = run(ER_SMALL(memory_size=60, replay_by="loader"), max_epochs=1).strategy.memory
    assert len(memory.keys.unique()) == 60  # equal keys: the samples at the same places of each task


def test_several_epochs_offer_each_sample_once():
    made = run(ER_SMALL(memory_size=50), max_epochs=3)
    assert int(made.strategy.memory.num_seen) == sum(len(part) for part in made.stream.train)


def test_the_memory_holds_the_raw_images_of_the_stream_with_their_columns():
    made = run(ER_SMALL(memory_size=80, policy=ClassBalanced()), max_epochs=1)
    memory, source = made.strategy.memory, made.datamodule.samples(train=True)
    assert memory.counts(10).tolist() == [8] * 10
    for image, label, task in zip(memory.images, memory.labels, memory.tasks, strict=True):
        found = (source.images == image).flatten(1).all(1).nonzero().flatten()
        raw = {int(source.labels[index]) for index in found}
        assert made.stream.order[int(label)] in raw
        assert int(label) in made.stream.tasks[int(task)].columns


def test_a_sample_is_not_replayed_in_its_own_first_step():
    def rows(strategy, batch, *_):
        return int((batch.indices >= 0).sum()), int((batch.indices < 0).sum())

    strategy = watching(ER, rows, backbone=plain_net, replay_size=10)
    run(strategy, options={"stop_after_task": 0}, max_epochs=1)
    seen = strategy.recorded[0]
    assert seen[0] == (64, 0)
    assert seen[1] == (64, 10)


def test_an_online_stream_is_seen_once_in_small_batches():
    data = {"scenario": Online(ClassIncremental(sizes=[4, 3, 3]), batch_size=10)}
    made = run(ER(backbone=plain_net, memory_size=100), data=data, max_epochs=7)
    batches = sum(-(-len(part) // 10) for part in made.stream.train)
    assert made.trainer.global_step == batches
    assert made.matrix.measures()["average_accuracy"] > 0.6


def test_an_online_stream_can_take_several_steps_on_each_batch():
    data = {"scenario": Online(ClassIncremental(sizes=[4, 3, 3]), batch_size=20, passes=3)}
    made = run(ER_SMALL(memory_size=60), data=data)
    assert made.trainer.global_step == 3 * sum(-(-len(part) // 20) for part in made.stream.train)


@pytest.mark.parametrize("strategy", [ER, PCR, AGEM, partial(DERpp, update_memory="first")])
def test_several_steps_on_a_batch_offer_its_samples_once(strategy):
    scenario = Online(ClassIncremental(sizes=[4, 3, 3]), batch_size=20, passes=3)
    options = {"backbone": plain_net, "optimizer": sgd, "memory_size": 30}
    made = run(strategy(**options), data={"scenario": scenario}, limit_train_batches=9)
    assert int(made.strategy.memory.num_seen) == 3 * 3 * 20


def test_the_joint_mean_and_the_sum_of_means_differ_as_documented():
    logits = torch.randn(6, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    stream, replay = batch_of(labels[:4], indices=torch.arange(4)), batch_of(labels[4:], indices=torch.full((2,), -1))
    batch, output = join({"stream": stream, "replay": replay}), Output(logits, logits)
    per_row = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    joint = ER().losses(batch, output)
    apart = ER(reduction="sum").losses(batch, output)
    torch.testing.assert_close(joint["ce"], per_row.mean())
    torch.testing.assert_close(apart["ce"], per_row[:4].mean())
    torch.testing.assert_close(apart["replay"], per_row[4:].mean())
    mixed = ER(reduction="sum", replay_by="loader").losses(batch, output)  # exemplars have no place in the data set
    assert mixed == apart


@pytest.mark.parametrize(
    "options",
    [
        {"loss_classes": "current"},
        {"replay_by": "epoch"},
        {"reduction": "max"},
        {"replay_size": 0},
        {"replay_by": "loader", "replay_size": 5},
        {"replay_by": "loader", "update_memory": "every"},
        {"memory_size": -1},
    ],
)
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match=r"ER|Memory"):
        ER(**options)
