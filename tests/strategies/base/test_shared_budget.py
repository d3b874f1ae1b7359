"""Exemplars and new data that share a storage, in any method with herded exemplars."""

import pytest
import torch
from lightning.pytorch import Callback
from support.runs import assert_same_run, plain_net, run

from cl_lightning.memory import SharedBudget
from cl_lightning.strategies.rehearsal.foster import FOSTER
from cl_lightning.strategies.rehearsal.icarl import ICaRL
from cl_lightning.strategies.rehearsal.wa import WA
from cl_lightning.strategy import ExemplarReplay
from cl_lightning.testing import check_strategy, small

PUBLISHED = {
    "rmm_icarl_cifar100": {
        "source": "LAMDA-CL/PyCIL: exps/rmm-icarl.json (rates of the new data, those of the first task left out), "
        "models/rmm.py, models/icarl.py, utils/data.py (jitter 63/255)",
        "memory_size": 2000,
        "form": "softmax",
        "budget": "SharedBudget(class_rates=[0.0, 0.0, 0.1, 0.1, 0.1, 0.0], memory_rates=[0.8, 0.6, 0.6, 0.6, 0.6])",
        "backbone": "ResNet32",
        "first_optimizer": "SGD(lr=0.1, momentum=0.9, weight_decay=0.0005)",
        "first_scheduler": "MultiStepLR(gamma=0.1, milestones=[60, 120, 170])",
        "optimizer": "SGD(lr=0.1, momentum=0.9, weight_decay=0.0002)",
        "scheduler": "MultiStepLR(gamma=0.1, milestones=[80, 120])",
        "data.scenario": "ClassIncremental(class_order=1993, first=50, increment=10)",
        "data.batch_size": 128,
        "data.transforms": ["RandomCrop(padding=4)", "RandomHorizontalFlip()", "ColorJitter(brightness=0.247)"],
        "loop.first_task_epochs": 200,
        "trainer.max_epochs": 170,
    },
}


class Plain(ExemplarReplay):
    def losses(self, batch, output):
        return {"ce": self.classification_loss(output, batch)}


class Looks(Callback):
    """Notes what each phase trains on, and the exemplars after each task."""

    def __init__(self):
        self.new, self.exemplars, self.lists, self.sizes, self.raw = {}, {}, [], [], []

    def on_train_batch_start(self, trainer, strategy, batch, batch_idx):
        place = strategy.task.index, strategy.phase.name
        if strategy.epoch == 0:
            self.new.setdefault(place, []).append(batch.indices[batch.indices >= 0])
            self.exemplars[place] = self.exemplars.get(place, 0) + int((batch.indices < 0).sum())

    def on_test_end(self, trainer, strategy):
        memory = strategy.memory
        self.lists.append(memory.counts().tolist())
        self.sizes.append(memory.size)
        self.raw.append((memory.images.clone(), memory.tasks.clone()))


def counts(made, task, indices):
    columns = torch.as_tensor(made.stream.columns_of(made.datamodule.samples(train=True).labels))
    return columns[indices].bincount()[list(made.stream.tasks[task].columns)]


@pytest.mark.parametrize("rates", [[0.4], [0.4, 0.15]])
def test_exemplars_and_new_samples_together_fill_the_same_storage(rates):
    looks = Looks()
    made = run(Plain(backbone=plain_net, memory_size=63, budget=SharedBudget(rates)), looks, max_epochs=1)
    everything = [torch.as_tensor(part.copy()) for part in made.stream.train]
    assert len(torch.cat(looks.new[0, "train"])) == len(everything[0])
    for task, classes in ((1, 4), (2, 7)):
        whole, used = counts(made, task, everything[task]), torch.cat(looks.new[task, "train"])
        dropped = (rates[min(task, len(rates)) - 1] * whole.double()).floor().long()
        assert counts(made, task, used).tolist() == (whole - dropped).tolist()
        assert len(used.unique()) == len(used)
        size = 63 + int(dropped.sum())
        assert looks.sizes[task - 1] == size
        assert looks.lists[task - 1] == [size // classes] * classes
        assert looks.exemplars[task, "train"] == size // classes * classes
        stored = looks.exemplars[task, "train"] + len(used)
        assert 63 + len(everything[task]) - classes < stored <= 63 + len(everything[task])
    assert looks.sizes[-1] == 63
    assert looks.lists[-1] == [6] * 10


def test_exemplars_are_chosen_among_the_samples_that_are_not_left_out():
    looks = Looks()
    made = run(Plain(backbone=plain_net, memory_size=500, budget=SharedBudget([0.6])), looks, max_epochs=1)
    source = made.datamodule.samples(train=True)
    for task in (1, 2):
        images, tasks = looks.raw[task]
        used = {bytes(image.numpy().tobytes()) for image in source.images[torch.cat(looks.new[task, "train"])]}
        chosen = [bytes(image.numpy().tobytes()) for image in images[tasks == task]]
        assert chosen
        assert used.issuperset(chosen)


def test_every_phase_of_a_task_leaves_out_the_same_samples():
    looks = Looks()
    run(FOSTER(backbone=plain_net, memory_size=60, budget=SharedBudget([0.5])), looks, max_epochs=1)
    for task in (1, 2):
        boost, compress = (torch.cat(looks.new[task, phase]).sort().values for phase in ("boost", "compress"))
        assert torch.equal(boost, compress)


def test_the_seed_decides_which_samples_are_left_out():
    used = []
    for seed in (0, 0, 1):
        looks = Looks()
        options = {"data": {"seed": seed}, "options": {"stop_after_task": 1}, "max_epochs": 1}
        run(Plain(backbone=plain_net, memory_size=60, budget=SharedBudget([0.5])), looks, **options)
        used.append(torch.cat(looks.new[1, "train"]).sort().values)
    assert torch.equal(used[0], used[1])
    assert not torch.equal(used[0], used[2])


def test_classes_of_large_loss_have_fewer_exemplars():
    noted = []

    class Notes(Plain):
        def end_task(self, task):
            features, labels, _ = self.passes.all_indexed_features()
            each = torch.nn.functional.cross_entropy(self.network.head.classify(features), labels, reduction="none")
            noted.append([float(each[labels == column].mean()) for column in task.columns])
            super().end_task(task)

    looks = Looks()
    budget = SharedBudget([0.0], [0.5, 0.0])
    run(Notes(backbone=plain_net, memory_size=80, budget=budget), looks, max_epochs=1)
    above = torch.tensor(noted[0]) > torch.tensor(noted[0]).quantile(0.5)
    assert looks.lists[0] == [10 if high else 30 for high in above.tolist()]
    assert looks.lists[1] == [*(min(11, length) for length in looks.lists[0]), 11, 11, 11]  # 80 // 7


@pytest.mark.parametrize("method", [ICaRL, WA])
def test_with_rates_of_0_the_method_is_unchanged_to_the_bit(method):
    plain = run(method(backbone=plain_net, memory_size=60), max_epochs=1)
    shared = run(method(backbone=plain_net, memory_size=60, budget=SharedBudget([0.0], [0.0])), max_epochs=1)
    assert_same_run(plain, shared)


def test_a_method_with_a_shared_storage_conforms():
    options = {"memory_size": 40, "form": "softmax", "budget": SharedBudget([0.3], [0.2])}
    check_strategy(small(ICaRL, **options), checks=("trains", "resume", "data"), first_task_is_finetuning=True)
