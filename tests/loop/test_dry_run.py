"""A dry run before training: what does not fit is refused before the first step, and a run is the same with it."""

import copy
import random
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from support.runs import NormNet, plain_net
from support.subjects import SUBJECTS
from torch import Tensor, nn

from cl_lightning.batch import Batch, ImageShape
from cl_lightning.callbacks.distillation import Distillation
from cl_lightning.cli import main
from cl_lightning.datamodules.corruptions import CorruptionStream
from cl_lightning.datamodules.digits import Digits
from cl_lightning.datamodules.npz import NpzData
from cl_lightning.loop import TaskLoop
from cl_lightning.loop import dry_run as module
from cl_lightning.loop.dry_run import dry_run
from cl_lightning.models import Backbone, LinearHead, Output
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.l2 import L2
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.strategies.test_time.source import Source
from cl_lightning.strategy import Phase, PhaseOptions
from cl_lightning.stream import Task


class Net(Backbone):
    num_features = 32

    def __init__(self, image_shape: ImageShape) -> None:
        super().__init__(image_shape)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())

    def forward(self, images: Tensor) -> Any:
        return self.net(images)


class WrongWidth(Net):
    num_features = 64


class Pair(Net):
    def forward(self, images: Tensor) -> Any:
        return self.net(images), None


class Mapped(Net):
    def forward(self, images: Tensor) -> Any:
        return {"pooler_output": self.net(images)}


class NotPooled(Net):
    def forward(self, images: Tensor) -> Any:
        return self.net(images).view(len(images), 32, 1, 1)


class Flat(Net):
    def forward(self, images: Tensor) -> Any:
        return self.net(images).flatten()


class Whole(Net):
    def forward(self, images: Tensor) -> Any:
        return self.net(images).argmax(1, keepdim=True).expand(-1, 32)


class OtherChannels(Net):
    def __init__(self, image_shape: ImageShape) -> None:
        super().__init__(image_shape)
        self.net = nn.Sequential(nn.Conv2d(3, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class OneColumn(LinearHead):
    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features)[:, :1]


def trainer(*callbacks: Any, epochs: int = 1) -> Trainer:
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def refused(loop: TaskLoop) -> str:
    """The message with which a run is refused, in one line, before anything is trained or written."""
    before = copy.deepcopy(loop.strategy.state_dict())
    with pytest.raises(ValueError, match=r"needed|fit") as caught:
        loop.fit()
    assert not loop.started
    assert loop.trainer.global_step == 0
    after = loop.strategy.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (WrongWidth, "a tensor of shape (2, 32), and features of shape (2, 64) are needed"),
        (Pair, "tuple of (2, 32), NoneType, and features of shape (2, 32) are needed"),
        (Mapped, "dict of 'pooler_output': (2, 32), and"),
        (NotPooled, "a tensor of shape (2, 32, 1, 1), and"),
        (Flat, "a tensor of shape (64,), and"),
        (Whole, "torch.int64, and"),
        (OtherChannels, "OtherChannels: RuntimeError: Given groups=1"),
    ],
)
def test_a_backbone_without_a_vector_per_image_is_refused_by_class_and_shape(kind, found):
    message = refused(TaskLoop(trainer(), ER(backbone=kind), Digits()))
    assert kind.__name__ in message
    assert "(2, 1, 8, 8)" in message or "(1, 8, 8)" in message
    assert found in message


@pytest.mark.parametrize("method", ["FOSTER", "LAE", "APER"])
def test_a_backbone_inside_another_one_is_checked_too(method):
    class Halved(Backbone):
        def __init__(self, image_shape: ImageShape) -> None:
            super().__init__(image_shape)
            self.inner = plain_net(image_shape)
            self.num_features = self.inner.num_features

        def forward(self, images: Tensor) -> Tensor:
            return self.inner(images)[:, ::2]

    subject = SUBJECTS[method]
    strategy = subject.factory.func(**{**subject.factory.keywords, "backbone": Halved})
    message = refused(TaskLoop(trainer(), strategy, subject.data()))
    assert message.startswith("Halved: return a tensor (images, 16)")
    assert "(2, 8), and features of shape (2, 16)" in message


def test_a_head_without_one_logit_per_class_is_refused():
    message = refused(TaskLoop(trainer(), Finetune(backbone=plain_net, head=OneColumn), Digits()))
    assert message.startswith("OneColumn: return one logit per class")
    assert "(2, 1), and logits of shape (2, 2) are needed" in message


def images(tmp_path, *shape: int) -> NpzData:
    path = tmp_path / "images.npz"
    pixels, labels = np.random.default_rng(0).integers(0, 255, (40, *shape), np.uint8), np.arange(40) % 4
    np.savez(path, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    return NpzData(path=str(path))


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        ("PASS", (16, 25), r"PASS with images of shape \(1, 16, 25\) .* not square; resize them"),
        ("PCR", (16, 16, 4), r"PCR with images of shape \(4, 16, 16\) .* 1 or 3 are allowed"),
    ],
)
def test_views_of_a_method_that_do_not_fit_the_images_are_refused(tmp_path, method, shape, message):
    options = {**SUBJECTS[method].factory.keywords, "backbone": plain_net}
    loop = TaskLoop(trainer(), SUBJECTS[method].factory.func(**options), images(tmp_path, *shape))
    with pytest.raises(ValueError, match=message):
        loop.fit()
    assert not loop.started


def test_a_wrong_option_is_not_said_to_be_a_misfit_of_the_images(tmp_path):
    loop = TaskLoop(trainer(), L2(names=["nosuch"], backbone=plain_net), images(tmp_path, 8, 8))
    with pytest.raises(
        ValueError, match=r"^L2 with images of shape \(1, 8, 8\) \(task 0, begin_task\): .*names has 'nosuch'"
    ):
        loop.fit()


def test_the_command_line_says_it_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images(tmp_path, 16, 25)
    assert main(["fit", "--model", "PASS", "--data", "NpzData", "--data.path", "images.npz"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: PASS with images of shape (1, 16, 25)")
    assert not (tmp_path / "runs").exists()


class SecondTask(Finetune):
    """A loss, a phase and an end of a task that come to something only in the second task."""

    def __init__(self, wrong: str, **options: Any) -> None:
        super().__init__(backbone=plain_net, **options)
        self.wrong = wrong

    def phases(self, task: Task) -> list[Phase]:
        negative = PhaseOptions(optimizer=partial(torch.optim.SGD, lr=-1.0))
        wrong = self.wrong == "optimizer" and not task.is_first
        return [Phase(), Phase("second", negative if wrong else PhaseOptions())]

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.wrong == "loss" and not self.task.is_first:
            return {"ce": output.logits[:, :2] - output.logits}
        return super().losses(batch, output)

    def end_task(self, task: Task) -> None:
        if self.wrong == "end" and not task.is_first:
            torch.zeros(2) + torch.zeros(3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("loss", r"\(task 1, phase 'train'\): SecondTask: RuntimeError: .*\(test_dry_run.py, line \d+\)"),
        ("optimizer", r"SecondTask: task 1, phase 'second': .*Invalid learning rate: -1.0"),
        ("end", r"\(task 1, end_task\): SecondTask: RuntimeError: .*\(test_dry_run.py, line \d+\)"),
    ],
)
def test_what_fails_in_the_second_task_is_said_before_the_first(wrong, message):
    with pytest.raises(ValueError, match=message):
        TaskLoop(trainer(), SecondTask(wrong), Digits()).fit()


def test_the_losses_of_callbacks_take_part():
    class Wrong(Distillation):
        def losses(self, strategy: Any, batch: Batch, output: Output) -> dict[str, Tensor]:
            return {"other": output.features.view(3, -1)} if self.teacher else {}

    message = refused(TaskLoop(trainer(Wrong()), Finetune(backbone=plain_net), Digits()))
    assert "(task 1, phase 'train'): Wrong: RuntimeError" in message


def test_files_of_corrupted_images_are_checked_before_the_source_is_learnt(tmp_path):
    labels = Digits().samples(train=False).labels
    np.save(tmp_path / "labels.npy", np.tile(labels, 5))
    np.save(tmp_path / "fog.npy", np.zeros((5 * len(labels), 8, 8, 1), np.uint8))
    np.save(tmp_path / "snow.npy", np.zeros((5 * len(labels), 1, 8, 8), np.uint8))
    data = CorruptionStream(Digits(), corruptions=["fog", "snow"], folder=str(tmp_path))
    loop = TaskLoop(trainer(), Source(backbone=plain_net), data)
    with pytest.raises(ValueError, match=r"snow\.npy is uint8 \(\d+, 1, 8, 8\); it must be uint8 \(\d+, 8, 8, 1\)"):
        loop.fit()
    assert not loop.started


def frozen_state() -> tuple[Any, ...]:
    arrays = np.random.get_state()
    return torch.get_rng_state().tolist(), arrays[1].tolist(), arrays[2], random.getstate()


@pytest.mark.parametrize("method", ["ER", "L2P", "ICaRL", "CoTTA", "FeTrIL"])
def test_nothing_of_the_run_changes(method):
    subject = SUBJECTS[method]
    strategy = subject.factory()
    loop = TaskLoop(trainer(Distillation()) if method == "ER" else trainer(), strategy, subject.data())
    loop._prepare(None)
    memory = [module for module in strategy.modules() if hasattr(module, "policy")]
    before, attributes = copy.deepcopy(strategy.state_dict()), copy.copy(vars(strategy))
    modes, generators = [module.training for module in strategy.modules()], frozen_state()
    data = copy.copy(vars(loop.datamodule))
    dry_run(strategy, loop.datamodule, loop.trainer, callbacks=loop.trainer.callbacks)
    after = strategy.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert vars(strategy) == attributes
    assert vars(loop.datamodule) == data
    assert frozen_state() == generators
    assert [module.training for module in strategy.modules()] == modes
    assert all(len(module) == 0 for module in memory)
    assert all(parameter.grad is None for parameter in strategy.parameters())


def run(strategy: Callable[[], Finetune], *callbacks: Any) -> Mapping[str, Tensor]:
    loop = TaskLoop(trainer(*callbacks, epochs=1), strategy(), Digits(val_fraction=0.1))
    loop.fit()
    return loop.strategy.state_dict()


def test_a_run_is_the_same_to_the_bit_without_it(monkeypatch):
    def strategy() -> ER:
        return ER(backbone=NormNet, memory_size=30)

    with_it = run(strategy, Distillation())
    monkeypatch.setattr("cl_lightning.loop.task_loop.dry_run", lambda *_, **__: None)
    without = run(strategy, Distillation())
    assert with_it.keys() == without.keys()
    assert all(torch.equal(with_it[name], value) for name, value in without.items())


class Counting(Finetune):
    """Counts images in forward passes of its copies and its own, in one list."""

    def __init__(self, seen: list[int]) -> None:
        super().__init__(backbone=plain_net)
        self.count = partial(_append, seen)

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.network.backbone.register_forward_hook(self.count)


def _append(seen: list[int], module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    seen.append(len(args[0]))


def test_two_images_of_each_task_take_part(monkeypatch):
    monkeypatch.setattr(copy, "deepcopy", partial(_same_list, copy.deepcopy, seen := []))
    loop = TaskLoop(trainer(), Counting(seen), Digits())
    loop._prepare(None)
    dry_run(loop.strategy, loop.datamodule, loop.trainer)
    assert seen == [2, 2, 2, 4]  # a step and the predictions for the first task; the second also predicts the first


def _same_list(deepcopy: Callable[..., Any], seen: list[int], value: Any, memo: dict[int, Any] | None = None) -> Any:
    return deepcopy(value, {**(memo or {}), id(seen): seen})


class Greedy(Finetune):
    """Statistics that two images do not determine."""

    def end_task(self, task: Task) -> None:
        labels = self.passes.all_features()[1]
        if labels.bincount().max() < 2:
            raise ValueError("Greedy: a class needs two images")


def test_what_only_two_images_do_not_allow_is_no_reason_to_refuse():
    TaskLoop(trainer(), Greedy(backbone=plain_net), Digits()).fit()


class Buggy(Finetune):
    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": batch.extra["not there"]}


def test_other_errors_come_with_their_traceback_from_the_first_step():
    loop = TaskLoop(trainer(), Buggy(backbone=plain_net), Digits())
    with pytest.raises(KeyError, match="not there"):
        loop.fit()
    assert loop.started


class NotCopied(Finetune):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot be copied")


def test_a_strategy_that_cannot_be_copied_is_without_one():
    TaskLoop(trainer(), NotCopied(backbone=plain_net), Digits()).fit()


class Chatty(Finetune):
    """Hooks, logging and the Trainer, as methods of users use them."""

    def setup(self, stage: str) -> None:
        self.is_set_up = stage

    def on_fit_start(self) -> None:
        self.started = self.trainer.max_epochs

    def training_step(self, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        assert self.is_set_up == "fit"
        self.log("mine", 1.0)
        self.logger.log_metrics({"more": 1.0}, step=self.trainer.global_step)
        return {"loss": super().training_step(batch, 0) * self.started / self.trainer.world_size}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        total = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total)]


def test_what_methods_of_users_read_of_the_trainer_is_there(monkeypatch):
    loop = TaskLoop(trainer(), Chatty(backbone=plain_net), Digits())
    loop._prepare(None)
    monkeypatch.setattr(module, "_LEFT", ())  # nothing is left to the first step
    dry_run(loop.strategy, loop.datamodule, loop.trainer)


@pytest.mark.parametrize("name", sorted(SUBJECTS))
def test_two_images_pass_through_all_methods(name):
    subject = SUBJECTS[name]
    loop = TaskLoop(trainer(*subject.callbacks()), subject.factory(), subject.data())
    loop._prepare(None)
    copies = module._copies(loop.strategy, subject.callbacks())
    with module._without_trace(torch.device("cpu")):
        module._DryRun(*copies, loop.datamodule, 2, loop.trainer, module._one).run()  # no second attempt


class NoWidth(Backbone):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


class NoShape(Net):
    def __init__(self) -> None:
        super().__init__((1, 8, 8))


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (NoWidth, "NoWidth: set num_features, the size of a feature vector, in the constructor"),
        (NoShape, "NoShape: take image_shape, which is (1, 8, 8) here, as the first argument"),
        (Net((1, 8, 8)), "Net: give the class as backbone, not an object of it"),
        (lambda shape: None, "NoneType: set num_features"),
    ],
)
def test_backbones_that_cannot_be_built_are_refused(backbone, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TaskLoop(trainer(), SUBJECTS["LAE"].factory.func(backbone=backbone), Digits()).fit()
