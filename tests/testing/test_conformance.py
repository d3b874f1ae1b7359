"""Proof that the checks of the conformance suite can fail, and what passes them apart from the strategies."""

import contextlib
import importlib
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar
from support import ROOT
from support.cases import PAIR, case
from support.runs import NormNet
from torch import Tensor

from cl_lightning.batch import Batch
from cl_lightning.cli import discovery
from cl_lightning.distributed import rank
from cl_lightning.memory import PrototypeHead
from cl_lightning.models import MLP, Output
from cl_lightning.strategies.base import AddsLosses
from cl_lightning.strategies.base.schedules import CosineOverPhase
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.ewc import EWC
from cl_lightning.strategies.exemplar_free.lwf import LwF
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.strategy import ContinualStrategy, Phase, Traits
from cl_lightning.stream import Task
from cl_lightning.testing import (
    CHECKS,
    Case,
    Subject,
    TinyDigits,
    check_limit,
    check_strategy,
    difference,
    places,
    run,
    small,
)

ALONE = [check for check in CHECKS if check != "processes"]


class DependsOnRank(Finetune):
    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": (1 + rank()) * self.classification_loss(output, batch)}


class MeansOfParts(Finetune):
    """The mean over the rows of one class is not weighted by how many of them a process has."""

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        part = batch.replace(labels=batch.labels.masked_fill(batch.labels != 0, -1))
        return {"ce": self.classification_loss(output, batch), "part": self.classification_loss(output, part)}


class DrawsPerProcess(Finetune):
    """Draws from the global generator of torch: seeded at each step, but not alike on all processes."""

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": (1 + 0.1 * torch.rand(())) * self.classification_loss(output, batch)}


class FailsOnOneRank(Finetune):
    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if rank() == 1 and not self.task.is_first:
            raise RuntimeError("the second process alone")
        return super().losses(batch, output)


class DrawsBetweenSteps(Finetune):
    """Draws from the global generator of torch; sound, since the loop seeds it before it asks."""

    def begin_phase(self, phase: Phase, origin: int, sources: Sequence[AddsLosses] = ()) -> None:
        super().begin_phase(phase, origin, sources)
        self.factor = 1 + float(torch.rand(()))

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.factor * self.classification_loss(output, batch)}

    def end_phase(self, phase: Phase) -> None:
        self._move()

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self._move()

    @torch.no_grad()
    def _move(self) -> None:
        self.network.backbone.layers[1].weight += 0.01 * torch.randn(16, 64)  # type: ignore


class CountsSteps(Finetune):
    steps = 0

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        self.steps += 1
        return {"ce": self.classification_loss(output, batch) * (1 + 0.1 * self.steps)}


OTHERS = {
    cls.__name__: Subject(small(cls), cls.__name__)
    for cls in (DrawsBetweenSteps, CountsSteps, DependsOnRank, MeansOfParts, DrawsPerProcess, FailsOnOneRank)
}


@pytest.mark.parametrize(
    ("limit", "first", "second"),
    [
        ("no distillation", small(LwF, distill_weight=0.0), small(Finetune, loss_classes="current")),
        ("no penalty", small(EWC, penalty_weight=0.0), small(Finetune)),
        ("no memory", small(ER, memory_size=0), small(Finetune)),
        ("no memory to mix", small(ER, memory_size=0, replay_by="loader"), small(Finetune)),
    ],
)
def test_a_method_without_its_own_term_is_finetuning(limit: str, first: Any, second: Any) -> None:
    check_strategy(first, checks=(), limits={limit: (first, second)})


def test_all_that_has_a_state_of_its_own_is_resumed() -> None:
    options = {"optimizer": partial(torch.optim.AdamW, lr=0.01), "scheduler": CosineOverPhase, "backbone": NormNet}
    data = partial(TinyDigits, drop_last=True)  # batch normalisation takes no batch of one sample
    check_strategy(small(Finetune, **options), checks=("seed", "resume"), every_place=True, data=data)


def host(callback: type[Callback]) -> Subject:
    """A strategy that the callback can run with: one with class means, a teacher, or a memory."""
    subjects = [
        Subject(small(cls, **options), f"{cls.__name__} with {callback.__name__}", callbacks=lambda: [callback()])
        for cls, options in ((Finetune, {"head": PrototypeHead}), (LwF, {}), (ER, {}))
    ]
    for subject in subjects[:-1]:
        with contextlib.suppress(ValueError):
            run(subject, last_task=0)
            return subject
    return subjects[-1]


@pytest.mark.parametrize("callback", [cls for cls in discovery.callbacks() if not issubclass(cls, ProgressBar)])
def test_every_callback_is_resumed(callback: type[Callback]) -> None:
    check_strategy(host(callback), checks=("seed", "resume"))


# ---------------------------------------------------------------------- the checks can fail


class KeepsHiddenState(Finetune):
    """Weights of the task before, in an attribute that no checkpoint holds."""

    old: Tensor | None = None

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms = {"ce": self.classification_loss(output, batch)}
        if self.old is not None:
            terms["pull"] = (self.network.backbone.layers[1].weight - self.old).square().mean()  # type: ignore
        return terms

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.old = self.network.backbone.layers[1].weight.detach().clone()  # type: ignore


class KeepsAGenerator(Finetune):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.generator = torch.Generator().manual_seed(0)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        noise = torch.rand(output.logits.shape, generator=self.generator)
        return {"ce": self.classification_loss(output._replace(logits=output.logits + noise), batch)}


class DrawsFromNowhere(Finetune):
    """Draws from the global generator of NumPy."""

    def prepare_batch(self, batch: Batch) -> Batch:
        return batch.replace(images=batch.images * np.random.rand())


class DrawsAtTheStartOfATask(Finetune):
    """Draws from the global generator of Python."""

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.scale = random.random()

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.scale * self.classification_loss(output, batch)}


class Peeks(Finetune):
    """Looks at samples of the task before, in the data set."""

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if not task.is_first:
            data = self.trainer.datamodule  # type: ignore
            data.samples(train=True).take(torch.as_tensor(data.stream.train[task.index - 1][:3].copy()))


class PeeksAtTheTest(Finetune):
    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.trainer.datamodule.samples(train=False).take(torch.arange(3))  # type: ignore


class HoardsInABuffer(Finetune):
    """Raw samples that no count of bytes includes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("hoard", torch.zeros(40, 64, dtype=torch.uint8))


class SaysItKeepsExemplars(Finetune):
    traits = Traits(keeps_exemplars=True)


class GrowsTooMuch(Finetune):
    def begin_task(self, task: Task) -> None:
        self.network.head.grow(task.num_new + 1)


class Explodes(Finetune):
    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch) * (float("inf") if self.task.index == 2 else 1.0)}


class MixesTheBatchUp(Finetune):
    def predict(self, images: Tensor) -> Tensor:
        return self.network.classify(images - images.mean(0))


class PredictsFromAnAttribute(Finetune):
    scale: float = 1.0

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.scale = 2.0 + task.index

    def predict(self, images: Tensor) -> Tensor:
        return self.scale * super().predict(images)


class LooksAtTheTask(Finetune):
    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        scores = super().predict(images)
        return scores if tasks is None else scores + tasks[:, None]


class SaysItNeedsTheTask(Finetune):
    traits = Finetune.traits.but(task_ids="needed")


class InfersWhatItSaysItNeeds(LooksAtTheTask):
    traits = Finetune.traits.but(task_ids="needed")


class TaskSpecific(Finetune):
    """Sound: the columns of the task alone, or an error without it."""

    traits = Finetune.traits.but(task_ids="needed")

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        if tasks is None:
            raise ValueError("TaskSpecific: predictions need the task of each image")
        return super().predict(images).masked_fill(~self.task_columns[tasks], -1e9)


class StartsDifferently(Finetune):
    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch) * (2.0 if self.task.is_first else 1.0)}


@pytest.mark.parametrize(
    ("broken", "check", "words"),
    [
        (KeepsHiddenState, "resume", "steps differ from task 1"),
        (CountsSteps, "resume", "killed and resumed in the middle of an epoch"),
        (KeepsAGenerator, "resume", "loss"),
        (DrawsFromNowhere, "seed", "steps differ from task 0, phase 0, epoch 0, batch 0"),
        (DrawsAtTheStartOfATask, "seed", "steps differ from task 0"),
        (Peeks, "data", r"training samples of tasks \[0\] are taken in task 1"),
        (PeeksAtTheTest, "data", "test samples"),
        (HoardsInABuffer, "bytes", "2560 of them in hoard"),
        (SaysItKeepsExemplars, "bytes", "keeps_exemplars is True"),
        (GrowsTooMuch, "trains", r"scores \(4, 5\)"),
        (Explodes, "trains", "not finite"),
        (MixesTheBatchUp, "trains", "alone and among others"),
        (LooksAtTheTask, "task_ids", "'unused', but scores depend on the task"),
        (SaysItNeedsTheTask, "task_ids", "scores are the same for every task"),
        (InfersWhatItSaysItNeeds, "task_ids", "predict without tasks gives scores; state 'inferred'"),
        (PredictsFromAnAttribute, "restores", "predictions of a new strategy"),
        (StartsDifferently, "limits", "first_task_is_finetuning"),
    ],
)
def test_a_fault_is_caught(broken: type[ContinualStrategy], check: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words) as caught:
        check_strategy(small(broken), checks=[check])
    assert str(caught.value).startswith(f"{broken.__name__}")


def test_a_method_that_needs_the_task_passes() -> None:
    check_strategy(small(TaskSpecific), checks=["trains", "task_ids", "restores"])


def test_a_limit_that_does_not_hold_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"limits.*task 1.*\n?.*network\..* max \|difference\|"):
        check_limit(small(LwF, distill_weight=0.1), small(Finetune, loss_classes="current"))


def test_differences_are_found_wherever_they_are() -> None:
    nan = float("nan")
    state: Mapping[str, Any] = {"a": torch.tensor([1.0, nan]), "b": [torch.arange(3), {"c": 1, "d": nan}]}
    assert difference(state, {"a": state["a"].clone(), "b": [torch.arange(3), {"c": 1, "d": nan}]}) is None
    found = difference(state, {"a": state["a"] + 0.5, "b": state["b"]})
    assert found == "a (2,) differs in 1 of 2 entries, max |difference| 0.5"
    assert difference(state, {"a": state["a"] + 0.5, "b": state["b"]}, rtol=0.1, atol=0.5) is None
    assert difference(state, {"a": state["a"], "b": [torch.arange(3) + 1, state["b"][1]]}, rtol=9, atol=9) is not None
    assert difference({"a": 1}, {"b": 1}) == "the state has other entries: ['a'] lacking, ['b'] too many"
    assert difference([1, 2], [1, 3], name="x") == "x[1] is 3 instead of 2"
    assert difference(torch.zeros(2), torch.zeros(2, dtype=torch.float64), name="x") is not None


def test_a_fact_that_does_not_hold_is_said_in_the_subject() -> None:
    words = "matches_single_process=False, as an argument of check_strategy or in its Subject"
    with pytest.raises(AssertionError, match=f"two processes against one: network.*{words}"):
        Case(OTHERS["DependsOnRank"], pair=PAIR).check("processes")
    check_strategy(OTHERS["DependsOnRank"], checks=["processes"], pair=PAIR, matches_single_process=False)
    check_strategy(small(StartsDifferently), checks=["limits"], first_task_is_finetuning=False)
    check_strategy(Subject(small(StartsDifferently), first_task_is_finetuning=False), checks=["limits"])


def test_a_run_is_killed_in_every_kind_of_place_and_in_every_task() -> None:
    snapshots = case("LwF(form=sigmoid)").reference.snapshots
    chosen = places(snapshots)
    assert [point.kind for point in chosen] == ["step", "task", "epoch", "step", "phase", "step"]
    assert {point.task for point in chosen} == {0, 1, 2}
    assert set(chosen) < set(places(snapshots, every=True)) < set(snapshots)


def test_the_method_of_the_documentation_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "new_method.md").read_text(encoding="utf-8")
    (tmp_path / "documented_method.py").write_text(text.split("```python\n")[1].split("```")[0], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    check_strategy(
        small(importlib.import_module("documented_method").AnchoredReplay), checks=ALONE, first_task_is_finetuning=False
    )


def test_a_strategy_of_ones_own_is_checked_by_one_call() -> None:
    check_strategy(partial(Finetune, backbone=partial(MLP, hidden=(8,))), checks=ALONE, epochs=3, seed=7)


# ---------------------------------------------------------------------- two processes


@pytest.mark.parametrize("name", ["DrawsBetweenSteps"])
def test_global_draws_between_steps_are_the_same_in_every_run(name: str) -> None:
    drawn = Case(OTHERS[name], pair=PAIR)
    for check in ("seed", "resume", "processes"):
        drawn.check(check)


def test_two_processes_with_batch_normalisation_are_resumed_to_the_bit() -> None:
    subject = Subject(small(Finetune, backbone=NormNet), data=partial(TinyDigits, drop_last=True))
    check_strategy(subject, checks=["processes"], pair=PAIR, matches_single_process=False)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("CountsSteps", "two processes, killed and resumed, against two that were not"),
        ("MeansOfParts", "two processes against one: network"),
        ("DrawsPerProcess", "two processes against one: network"),
        ("FailsOnOneRank", "the second process alone"),
    ],
)
def test_a_fault_of_two_processes_is_caught(name: str, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        Case(OTHERS[name], pair=PAIR).check("processes")
