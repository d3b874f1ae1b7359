"""CLPU-DER++: tasks that are remembered, held, kept and forgotten."""

from functools import partial

import pytest
import torch
from support.runs import assert_same, loop, plain_net, run, sgd
from support.unlearning import assert_forgets_exactly, learnt, requests
from torch.nn import functional as F

from cl_lightning.memory import TaskMemories
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.unlearning.clpu_derpp import CLPUDERpp
from cl_lightning.stream import ClassIncremental, PermutedDomains, Request
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "CLPUDERpp": Subject(
        small(CLPUDERpp),
        first_task_is_finetuning=False,
        reason="the parameters belong to the main network, under another name, with weights drawn by seed and task",
    )
}

PUBLISHED = {
    "clpu_derpp": {
        "source": "Liu et al., CoLLAs 2022: SGD .01, weight decay 5e-4, 10 epochs, batches of 32, alpha .5, beta 1",
        "memory_size": 200,
        "logit_weight": 0.5,
        "label_weight": 1.0,
        "replay_size": 32,
        "optimizer": "SGD(lr=0.01, weight_decay=0.0005)",
        "trainer.max_epochs": 10,
        "trainer.callbacks": ["UnlearningMeasures()"],
    },
}

SMALL = partial(CLPUDERpp, backbone=plain_net, optimizer=sgd, memory_size=30)
FIVE = ClassIncremental(tasks=5)
SEQUENCE = requests(
    Request(after=3, kind="keep", tasks=[1]),
    Request(after=3, tasks=[2]),
    Request(tasks=[4]),
    held=(1, 2, 4),
    base=FIVE,
)


def main_of(strategy):
    return dict(strategy.nets.nets["main"].state_dict())


class Checked(CLPUDERpp):
    """Compares the terms of each step with plain loops over single samples."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = {}

    def losses(self, batch, output):
        found = super().losses(batch, output)
        stream, columns = self.data.stream, {t.index: list(t.columns) for t in self.data.stream.tasks}
        expected = dict.fromkeys(found, 0.0)
        if "stream" in batch.parts:
            rows, samples = batch.parts["stream"]
            for label, logits in zip(samples.labels, output.logits[rows], strict=True):
                own = columns[self.task.index]
                expected["ce"] += F.cross_entropy(logits[own][None], torch.tensor([own.index(label)])) / len(samples)
        names = [name for name in batch.parts if name != "stream"]
        kept = ["1"] if self.task.request == "keep" else []
        for name in names:
            rows, samples = batch.parts[name]
            groups = 1 if name in kept else len(set(names) - set(kept))
            own = columns[int(name)]
            block = self.rows.blocks[[t.index for t in stream.tasks if t.learns].index(int(name))]
            for feature, label, stored in zip(
                output.features[rows], samples.labels, samples.extra["logits"], strict=True
            ):
                z = block(feature)
                error = (z - stored[own]).square().mean()
                ce = F.cross_entropy(z[None], torch.tensor([own.index(label)]))
                expected["dark"] += self.logit_weight * error / len(samples) / groups
                expected["replay"] += self.label_weight * ce / len(samples) / groups
        for name, value in found.items():
            torch.testing.assert_close(value, torch.as_tensor(expected[name]), rtol=1e-4, atol=1e-6)
        self.seen.setdefault(self.task.index, {})[tuple(sorted(batch.parts))] = {
            name: len(part[1]) for name, part in batch.parts.items()
        }
        return found


def test_each_request_has_the_terms_of_plain_loops():
    strategy = Checked(
        backbone=plain_net, optimizer=sgd, memory_size=30, replay_size=21, logit_weight=0.7, label_weight=0.3
    )
    learnt(strategy, SEQUENCE, max_epochs=1)
    # remember 0; hold 1 and 2; remember 3, with replay of 0; keep 1, with replay of 0 and 3; forget 2; hold 4; forget 4
    parts = {index: set(found) for index, found in strategy.seen.items()}
    assert parts == {
        0: {("stream",)},
        1: {("stream",)},
        2: {("stream",)},
        3: {("0", "stream")},
        4: {("0", "1", "3")},
        6: {("stream",)},
    }
    assert strategy.seen[4][("0", "1", "3")] == {"1": 21, "0": 10, "3": 10}
    assert strategy.seen[3][("0", "stream")]["0"] == 21


def test_nothing_of_a_held_task_is_left_after_it_is_forgotten():
    for copies in (False, True):
        made = assert_forgets_exactly(partial(SMALL, copy_main=copies), requests(Request(tasks=[1]), held=(1,)))
        assert list(made.strategy.nets.nets) == ["main"]
        assert made.strategy.memories.tasks() == [0, 2]


def test_the_main_network_never_sees_a_held_task_until_it_is_kept():
    scenario = requests(held=(1,), base=ClassIncremental(sizes=[5, 5]))
    after = learnt(SMALL(), scenario)
    first = loop(SMALL(), data={"scenario": scenario}, options={"stop_after_task": 0})
    first.fit()
    assert_same(main_of(after.strategy), main_of(first.strategy))

    class NoSteps(CLPUDERpp):
        def phases(self, task):
            return [] if task.request == "keep" else super().phases(task)

    kept = requests(Request(tasks=[1], kind="keep"), held=(1,), base=ClassIncremental(sizes=[5, 5]))
    still = learnt(NoSteps(backbone=plain_net, optimizer=sgd, memory_size=30), kept)
    assert_same(main_of(still.strategy), main_of(first.strategy))
    assert list(still.strategy.nets.nets) == ["main"]
    moved = learnt(SMALL(), kept, max_epochs=4)
    assert moved.strategy.memories.tasks() == [0, 1]
    assert moved.matrix.R_ti[2, 1] > still.matrix.R_ti[2, 1] + 0.3
    assert moved.matrix.R_ti[2, 0] > 0.8
    steps = [cost.steps for cost in moved.meter.tasks]
    assert steps[2] == steps[1]


def test_a_copy_of_the_main_network_is_where_a_held_task_starts():
    scenario = requests(held=(1,), base=ClassIncremental(sizes=[5, 5]))
    starts = []

    class Watched(CLPUDERpp):
        def begin_task(self, task):
            super().begin_task(task)
            if task.index:
                nets = self.nets.nets
                starts.append(torch.equal(nets["1"].layers[1].weight, nets["main"].layers[1].weight))

    for copies in (True, False):
        learnt(Watched(backbone=plain_net, copy_main=copies), scenario, max_epochs=1)
    assert starts == [True, False]


def test_a_reservoir_is_offered_each_batch_of_each_epoch_and_is_of_its_task():
    made = run(SMALL())
    memories, stream = made.strategy.memories, made.stream
    for task in stream.tasks:
        memory = memories[task.index]
        assert len(memory) == 30
        assert int(memory.num_seen) == 2 * len(stream.train[task.index])
        assert set(memory.tasks.tolist()) == {task.index}
        assert set(memory.labels.tolist()) <= set(task.columns)
        stored = memory.fields["logits"]
        own = torch.zeros(stored.shape[1], dtype=torch.bool)
        own[list(task.columns)] = True
        assert not stored[:, ~own].any()
        assert stored[:, own].any()


def test_a_task_is_predicted_among_its_classes_by_its_network():
    strategy = run(SMALL(), data={"scenario": requests(held=(1,))}, max_epochs=1).strategy.eval()
    images = torch.rand(4, 1, 8, 8)
    nets, rows = strategy.nets.nets, strategy.rows.blocks
    for task, name, own in ((0, "main", slice(0, 4)), (1, "1", slice(4, 7)), (2, "main", slice(7, 10))):
        scores = strategy.predict(images, torch.full((4,), task))
        torch.testing.assert_close(scores[:, own], rows[task](nets[name](images)))
        others = torch.cat([scores[:, : own.start], scores[:, own.stop :]], dim=1)
        assert (others == -1e11).all()


def test_a_stream_of_requests_ends_with_the_networks_and_memories_that_it_may_have():
    made = run(SMALL(), data={"scenario": SEQUENCE}, max_epochs=4)
    assert list(made.strategy.nets.nets) == ["main"]
    assert made.strategy.memories.tasks() == [0, 1, 3]
    last = made.matrix.R_ti[-1]
    assert last[[0, 1, 3]].min() > 0.85
    domains = run(SMALL(), data={"scenario": PermutedDomains(2)}, max_epochs=1)
    assert domains.strategy.rows.block_sizes() == [10, 10]


def test_remembered_tasks_are_forgotten_less_than_by_finetuning():
    options = {"data": {"scenario": FIVE}, "max_epochs": 6}
    mine = run(CLPUDERpp(backbone=plain_net, optimizer=sgd), **options).matrix.R_ti[-1].mean()
    plain = run(Finetune(backbone=plain_net, optimizer=sgd, loss_classes="current"), **options).matrix.R_ti[-1].mean()
    assert mine > plain + 0.03
    assert mine > 0.95


def test_tasks_that_are_not_held_cannot_be_forgotten_and_a_task_is_kept_from_its_memory():
    with pytest.raises(ValueError, match=r"CLPUDERpp forgets tasks that are held, .* asks for task 1; add it"):
        loop(SMALL(), data={"scenario": requests(Request(tasks=[1]))}).fit()
    kept_first = requests(Request(tasks=[1], kind="keep"), Request(tasks=[1]), held=(1,))
    with pytest.raises(ValueError, match="asks for samples that were kept before"):
        loop(SMALL(), data={"scenario": kept_first}).fit()
    none = CLPUDERpp(backbone=plain_net, memory_size=0)
    with pytest.raises(ValueError, match=r"memory_size is 0, and task 4 .* is learnt from the memory"):
        loop(none, data={"scenario": SEQUENCE}).fit()
    for wrong in ({"logit_weight": -1.0}, {"label_weight": -1.0}, {"replay_size": 0}, {"memory_size": -1}):
        with pytest.raises(ValueError, match=f"CLPUDERpp: {next(iter(wrong))} is"):
            CLPUDERpp(**wrong)


def test_memories_take_their_tasks_from_the_state_that_they_load():
    first, other = TaskMemories(4), TaskMemories(4)
    for task in (0, 2):
        first.add(task)
    from cl_lightning.batch import Draw

    images, labels = torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    first[2].add(images, labels, labels + 2, Draw.of(3, 0), gathered=True)
    other.add(1)
    other.load_state_dict(first.state_dict())
    assert list(other.memories) == ["0", "2"]
    assert other.tasks() == [2]
    assert torch.equal(other[2].tasks, first[2].tasks)
    first.drop(2)
    assert first.tasks() == []
