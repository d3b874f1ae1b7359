from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from support.runs import NormNet, assert_same, loop, plain_net, run, sgd

from cl_lightning.batch import Draw
from cl_lightning.models import CosineHead, LinearHead
from cl_lightning.strategies.base import (
    BALANCED,
    BalancedSet,
    CosineExemplars,
    NearestExemplars,
    balanced_phase,
    end_balanced,
)
from cl_lightning.strategy import ExemplarReplay, PhaseOptions
from cl_lightning.stream import RotatedDomains

SHORT = PhaseOptions(epochs=1)


class Plain(ExemplarReplay):
    def losses(self, batch, output):
        return {"ce": self.classification_loss(output, batch)}


class TwoPhases(Plain):
    """Training, then a balanced phase of the whole network."""

    def __init__(self, **options):
        super().__init__(**options)
        self.balanced = BalancedSet()

    def phases(self, task):
        return [*super().phases(task), *balanced_phase(self, task, self.balanced, SHORT, head_only=False)]

    def end_phase(self, phase):
        super().end_phase(phase)
        end_balanced(self, self.balanced, phase)


class Cosine(CosineExemplars):
    def losses(self, batch, output):
        return {"ce": self.classification_loss(output, batch)}


class Looks(Callback):
    """Notes the samples of each phase, and the state at its first and last step."""

    def __init__(self):
        self.labels, self.indices, self.raw, self.first, self.last = {}, {}, {}, {}, {}

    def on_train_batch_start(self, trainer, strategy, batch, batch_idx):
        place = strategy.task.index, strategy.phase.name
        if place not in self.first:
            self.first[place] = {name: value.clone() for name, value in strategy.state_dict().items()}
        if strategy.epoch == 0:
            for kept, value in ((self.labels, batch.labels), (self.indices, batch.indices), (self.raw, batch.raw)):
                kept.setdefault(place, []).append(value)

    def on_train_end(self, trainer, strategy):
        place = strategy.task.index, strategy.phase.name
        self.last[place] = {name: value.clone() for name, value in strategy.state_dict().items()}


@pytest.mark.parametrize(("memory", "limit", "held"), [(200, 20, [20, 20, 20]), (60, 10, [10, 8, 6]), (60, None, None)])
def test_lists_have_at_most_the_given_number_of_exemplars(memory, limit, held):
    noted = []

    class Counts(Callback):
        def on_test_end(self, trainer, strategy):
            noted.append(strategy.memory.counts().tolist())

    run(Plain(backbone=plain_net, memory_size=memory, exemplars_per_class=limit), Counts(), max_epochs=1)
    expected = held or [60 // classes for classes in (4, 7, 10)]
    assert noted == [[count] * classes for count, classes in zip(expected, (4, 7, 10), strict=True)]


def test_a_number_of_exemplars_below_one_is_an_error():
    with pytest.raises(ValueError, match="Plain: exemplars_per_class is 0"):
        Plain(exemplars_per_class=0)


def test_a_balanced_phase_has_equally_many_samples_of_each_class_and_the_herded_ones_of_new_classes():
    looks = Looks()
    made = run(TwoPhases(backbone=plain_net, optimizer=sgd, memory_size=60), looks, max_epochs=1)
    assert {phase for task, phase in looks.labels if task == 0} == {"train"}
    for task, old, quota in ((1, 4, 15), (2, 7, 8)):  # 60 // 4 and 60 // 7
        labels = torch.cat(looks.labels[task, BALANCED])
        indices = torch.cat(looks.indices[task, BALANCED])
        assert labels.bincount().tolist() == [quota] * (old + 3)
        assert torch.equal(indices >= 0, labels >= old)
        assert len(indices[indices >= 0].unique()) == 3 * quota
        assert len(torch.cat(looks.labels[task, "train"])) == len(made.stream.train[task]) + old * quota
        assert len(looks.first[task, "train"]["balanced.chosen"]) == 0
        assert int(looks.first[task, BALANCED]["balanced.chosen"].sum()) == 3 * quota
        # The images are those of the data set.
        source = made.datamodule.samples(train=True)
        rows = indices >= 0
        assert torch.equal(torch.cat(looks.raw[task, BALANCED])[rows], source.images[indices[rows]])
    assert len(made.strategy.balanced.chosen) == 0


def test_the_chosen_samples_are_herded_on_the_features_of_the_network_after_the_first_phase():
    looks = Looks()

    class Chooses(TwoPhases):
        def end_task(self, task):  # with a second phase that changes nothing, the exemplars are chosen by it
            super().end_task(task)
            self.kept = self.memory.images[self.memory.labels >= task.num_seen - task.num_new].clone()

    still = PhaseOptions(epochs=1, optimizer=partial(torch.optim.SGD, lr=0.0))

    class Still(Chooses):
        def phases(self, task):
            return [*Plain.phases(self, task), *balanced_phase(self, task, self.balanced, still, head_only=True)]

    options = {"options": {"stop_after_task": 1}, "max_epochs": 1}
    strategy = run(Still(backbone=NormNet, memory_size=1000, exemplars_per_class=9), looks, **options).strategy
    rows = torch.cat(looks.indices[1, BALANCED]) >= 0
    used = torch.cat(looks.raw[1, BALANCED])[rows].flatten(1)
    kept = strategy.kept.flatten(1)
    assert len(used) == len(kept) == 27
    assert torch.equal(used.unique(dim=0), kept.unique(dim=0))


def test_longer_lists_of_exemplars_are_cut_to_their_first_samples():
    strategy = Plain(memory_size=20)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    images = torch.zeros(7, 1, 8, 8, dtype=torch.uint8)
    strategy.memory.add(images, labels, torch.zeros_like(labels), Draw.of(7, 0))
    subset = BalancedSet()
    subset.chosen = torch.tensor([False, True, True, False, True, True])  # 2 each of two classes of three samples
    available = torch.cat([torch.tensor([2, 2, 2, 3, 3, 3]), strategy.memory.labels])
    mask = subset.samples(available, torch.arange(13) >= 6, strategy=strategy)
    assert mask.int().tolist() == [0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0]


def test_a_class_of_several_tasks_has_equally_many_samples_of_each():
    looks = Looks()
    data = {"scenario": RotatedDomains(tasks=3)}
    run(TwoPhases(backbone=plain_net, memory_size=100), looks, data=data, max_epochs=1)
    labels = torch.cat(looks.labels[2, BALANCED])
    assert labels.bincount().tolist() == [15] * 10  # 5 of each of three tasks: 100 // (2 * 10)


@pytest.mark.filterwarnings("ignore:give --model.memory_size")
def test_without_exemplars_there_is_no_balanced_phase():
    looks = Looks()
    run(TwoPhases(backbone=plain_net, memory_size=0), looks, max_epochs=1)
    assert {phase for _, phase in looks.labels} == {"train"}


def test_rows_of_new_classes_are_imprinted_once_and_rows_of_old_classes_are_frozen():
    looks = Looks()
    made = run(Cosine(backbone=plain_net, optimizer=sgd, memory_size=60, balanced_options=SHORT), looks, max_epochs=1)
    name = "network.head.blocks.{}.weight"
    for task in (1, 2):
        begin, end = looks.first[task, "train"], looks.last[task, "train"]
        for block in range(task):
            assert torch.equal(begin[name.format(block)], end[name.format(block)])
            assert not torch.equal(end[name.format(block)], looks.last[task, BALANCED][name.format(block)])
        assert not torch.equal(begin[name.format(task)], end[name.format(task)])
        # Imprinted with the features of the network before the task, at the mean norm of the old rows.
        data = made.datamodule
        data.begin(made.stream.tasks[task])
        earlier = Cosine(backbone=plain_net)
        earlier.build((1, 8, 8))
        earlier.network.load_state_dict(
            {key.removeprefix("network."): value for key, value in begin.items() if key.startswith("network.")}
        )
        indices = torch.as_tensor(made.stream.train[task].copy())
        source = data.samples(train=True)
        images = data.normalize(source.images[indices], Draw.of(len(indices), 0))
        with torch.no_grad():
            phi = torch.nn.functional.normalize(earlier.network.backbone(images), dim=1)
        columns = torch.as_tensor(made.stream.columns_of(source.labels[indices]))
        norm = torch.cat([begin[name.format(block)] for block in range(task)]).norm(dim=1).mean()
        for place, column in enumerate(made.stream.tasks[task].columns):
            mean = phi[columns == column].mean(0)
            torch.testing.assert_close(begin[name.format(task)][place], norm * mean / mean.norm())
        # The second phase trains the head alone, from where the first one ended.
        for key, value in looks.last[task, "train"].items():
            assert not key.startswith("network.") or torch.equal(value, looks.first[task, BALANCED][key])
        before, after = looks.first[task, BALANCED], looks.last[task, BALANCED]
        changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
        assert {key for key in changed if key.startswith("network.")} == {name.format(x) for x in range(task + 1)}


def test_rows_are_random_without_imprinting_and_in_the_first_task():
    looks, plain = Looks(), Looks()
    run(Cosine(backbone=plain_net, imprint=False), looks, max_epochs=1)
    run(Cosine(backbone=plain_net), plain, max_epochs=1)
    assert_same(looks.first[0, "train"], plain.first[0, "train"])
    new = looks.first[1, "train"]["network.head.blocks.1.weight"]
    assert new.norm(dim=1).std() > 1e-3
    assert new.abs().max() <= 1 / 4  # of 16 features
    assert plain.first[1, "train"]["network.head.blocks.1.weight"].norm(dim=1).std() < 1e-5


def test_a_head_whose_rows_cannot_be_imprinted_is_reported():
    with pytest.raises(ValueError, match="Cosine: head is LinearHead; use a CosineHead"):
        loop(Cosine(backbone=plain_net, head=LinearHead)).fit()
    strategy = Cosine(backbone=plain_net)
    strategy.build((1, 8, 8))
    assert isinstance(strategy.network.head, CosineHead)
    assert float(strategy.network.head.scale) == 1
    assert strategy.network.head.scale.requires_grad


def test_the_nearest_mean_needs_exemplars_and_a_name():
    class Nearest(NearestExemplars):
        pass

    with pytest.raises(ValueError, match="Nearest: memory_size is 0, but classifier 'nme' needs"):
        Nearest(memory_size=0)
    with pytest.raises(ValueError, match="Nearest: classifier is 'svm'; use 'nme' or 'head'"):
        Nearest(classifier="svm")
