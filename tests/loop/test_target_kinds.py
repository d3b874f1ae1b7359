"""Methods on several labels, numbers and classes of pixels: they learn, are resumed, and say what they do not take."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from cl_lightning.data import Targets, TensorSource
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.datamodules.npz import NpzData
from cl_lightning.measures import SCORES
from cl_lightning.models import ConvPixels, PixelHead
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.baselines.joint import Joint
from cl_lightning.strategies.exemplar_free.ewc import EWC
from cl_lightning.strategies.exemplar_free.lwf import LwF
from cl_lightning.strategies.exemplar_free.mas import MAS
from cl_lightning.strategies.exemplar_free.si import SI
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.stream import DomainIncremental, LabelSets
from cl_lightning.testing import Subject, TinyMasks, check_strategy, run, small


class TinyLabels(ContinualDataModule):
    """Images of 4 x 4 pixels, with a label for each row that is bright; 4 labels in two tasks."""

    mean, std = (0.5,), (0.3,)

    def __init__(self, **options):
        super().__init__(**{"scenario": LabelSets(tasks=2), "batch_size": 16, "eval_batch_size": 9, **options})

    def source(self, *, train):
        random = np.random.default_rng(int(train))
        sets = random.random((90 if train else 37, 4)) < 0.4
        sets[np.arange(len(sets)), random.integers(0, 4, len(sets))] = True
        grey = 60 + 120 * np.repeat(sets[:, :, None], 4, axis=2) + random.normal(0, 20, (len(sets), 4, 4))
        targets = Targets("labels", sets, 4)
        images = grey.clip(0, 255).astype(np.uint8)
        return TensorSource(images, targets.labels(), class_names=list("abcd"), targets=targets)


class TinyNumbers(ContinualDataModule):
    """Images of 4 x 4 pixels whose number is a sum of pixels, with other weights in the second of two domains."""

    mean, std = (0.5,), (0.3,)

    def __init__(self, **options):
        super().__init__(**{"scenario": DomainIncremental(), "batch_size": 16, "eval_batch_size": 9, **options})

    def source(self, *, train):
        random = np.random.default_rng(int(train))
        count = 90 if train else 37
        pixels, domains = random.integers(0, 256, (count, 4, 4)), np.arange(count) % 2
        weights = np.stack([np.ones((4, 4)), np.repeat([[1.0], [1.0], [0.0], [0.0]], 4, axis=1)])
        numbers = 5 + (pixels * weights[domains]).sum((1, 2)) / 500
        targets = Targets("number", numbers, 1)
        return TensorSource(
            pixels.astype(np.uint8),
            targets.labels(),
            class_names=("sum",),
            domains=domains,
            domain_names=("all", "upper"),
            targets=targets,
        )


DATA = {"labels": TinyLabels, "number": TinyNumbers, "pixels": TinyMasks}
NETWORK = {"pixels": {"backbone": partial(ConvPixels, channels=(6, 8), norm="group"), "head": PixelHead}}
METHODS = {
    "Finetune": (Finetune, {}, DATA),
    "Joint": (Joint, {}, DATA),
    "ER": (ER, {}, DATA),
    "ER by the loader": (ER, {"replay_by": "loader"}, DATA),
    "LwF": (LwF, {}, DATA),
    "EWC": (EWC, {"penalty_weight": 1.0}, ("labels", "number")),
    "MAS": (MAS, {"penalty_weight": 0.1}, DATA),
    "SI": (SI, {}, DATA),
}
CASES = [(name, kind) for name, (_, _, kinds) in METHODS.items() for kind in kinds]


def subject(name, kind, **options):
    cls, chosen, _ = METHODS[name]
    rate = {"optimizer": partial(torch.optim.SGD, lr=0.01, momentum=0.9)} if kind == "number" else {}
    return Subject(small(cls, **NETWORK.get(kind, {}), **chosen, **rate), name=name, data=DATA[kind], **options)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_method_takes_the_target_and_is_resumed_to_the_bit(name, kind):
    check_strategy(subject(name, kind), checks=("trains", "resume", "restores", "data", "bytes"))


@pytest.mark.parametrize("kind", DATA)
def test_two_processes_give_what_one_gives(kind):
    check_strategy(subject("ER", kind), checks=("processes",))


@pytest.mark.parametrize(("kind", "least"), [("labels", 0.9), ("number", 0.7), ("pixels", 0.4)])
def test_the_first_task_is_learnt(kind, least):
    """Measured: mAP .99, R2 .93, mIoU .62."""
    network = {"pixels": {"backbone": partial(ConvPixels, channels=(16, 16), norm="group")}}
    factory = small(Finetune, **{**NETWORK.get(kind, {}), **network.get(kind, {})}, **_rate(kind))
    epochs = {"labels": 10, "number": 30, "pixels": 40}[kind]
    outcome = run(Subject(factory, data=DATA[kind], epochs=epochs), last_task=0)
    assert float(outcome.matrix["R_ci"][0, 0]) > least


def _rate(kind):
    return {"optimizer": partial(torch.optim.SGD, lr=0.01, momentum=0.9)} if kind == "number" else {}


def test_joint_training_has_all_classes_so_far_of_each_sample():
    seen = []

    class Watching(Joint):
        def losses(self, batch, output):
            seen.append((self.task.index, batch.indices, batch.extra["targets"]))
            return super().losses(batch, output)

    run(Subject(small(Watching), data=TinyLabels, epochs=1))
    data = TinyLabels()
    data.make_stream(0)
    values = data.samples(train=True).targets.values
    for task, indices, targets in seen:
        columns = 2 * (task + 1)
        assert torch.equal(targets[:, :columns], values[indices][:, :columns].to(torch.int8))
        assert (targets[:, columns:] == -1).all()
    last = torch.cat([indices for task, indices, _ in seen if task == 1])
    assert len(last.unique()) == len(last)


def test_classes_of_other_tasks_are_not_seen_in_training():
    seen = []

    class Watching(Finetune):
        def losses(self, batch, output):
            seen.append((self.task.index, batch.extra["targets"]))
            return super().losses(batch, output)

    run(Subject(small(Watching, **NETWORK["pixels"]), data=TinyMasks, epochs=1))
    for task, masks in seen:
        assert set(masks.unique().tolist()) <= {0, 2 * task + 1, 2 * task + 2, 255}


@pytest.mark.parametrize("kind", ["labels", "number", "pixels"])
def test_an_archive_has_these_targets_and_the_results_name_the_score(kind, tmp_path, monkeypatch):
    from cl_lightning.cli.main import main

    monkeypatch.chdir(tmp_path)
    arrays, options = {}, {"labels": "LabelSets --data.scenario.tasks 2", "number": "DomainIncremental"}
    for part, train in (("train", True), ("test", False)):
        source = DATA[kind]().source(train=train)
        arrays[f"x_{part}"], arrays[f"y_{part}"] = source.images[:, 0].numpy(), source.targets.values.numpy()
        if source.domains is not None:
            arrays[f"d_{part}"] = source.domains
    np.savez("data.npz", **arrays)
    options["pixels"] = "LabelSets --data.scenario.tasks 2 --data.scenario.background '0'"
    command = f"fit --data NpzData --data.path data.npz --data.targets {kind} --data.batch_size 32"
    command += f" --data.scenario {options[kind]} --model Finetune --trainer.max_epochs 1 --run_dir run"
    command += " --data.domains d" if kind == "number" else ""
    command += " --model.backbone ConvPixels --model.head PixelHead" if kind == "pixels" else ""
    command += " --model.backbone.channels [4]" if kind == "pixels" else ""
    assert main(command.replace("'", "").split()) in (0, None)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["score"] == SCORES[kind]._asdict()
    page = (tmp_path / "run" / "report.html").read_text()
    assert SCORES[kind].title in page


def test_what_does_not_fit_is_said_before_training():
    from cl_lightning.strategies.rehearsal.icarl import ICaRL

    cases = [
        (small(ICaRL), TinyLabels, "ICaRL takes targets of the kind class, TinyLabels gives labels"),
        (small(Finetune), TinyMasks, "MLP is not made for classes of pixels"),
        (small(Finetune, **NETWORK["pixels"]), TinyLabels, "ConvPixels is made for classes of pixels"),
        (small(EWC), TinyMasks, "EWC takes targets of the kind class or labels or number"),
        (small(EWC, labels="predicted"), TinyNumbers, "EWC takes targets of the kind class,"),
        (small(LwF, form="sigmoid"), TinyLabels, "LwF takes targets of the kind class,"),
    ]
    for factory, data, message in cases:
        with pytest.raises(ValueError, match=message):
            run(Subject(factory, data=data))
    with pytest.raises(ValueError, match="targets is 'masks'; use"):
        NpzData("x.npz", targets="masks")
