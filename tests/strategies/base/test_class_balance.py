"""Class weights and the balanced sampler in runs: effect, exactness, and what has no use of them."""

from functools import partial

import pytest
import torch
from support.cases import PAIR

from cl_lightning.models import MLP
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.pass_ import PASS
from cl_lightning.strategies.pretrained.simplecil import SimpleCIL
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.strategies.rehearsal.wa import WA
from cl_lightning.testing import Case, Subject, TinyDigits, run

NET = partial(MLP, hidden=(16,))
UNEQUAL = {"5": 3.0, "3": 0.25}


def subject(kind, data, **options):
    return Subject(
        partial(kind, backbone=NET, **options),
        name=kind.__name__,
        data=data,
        first_task_is_finetuning=False,
        reason="-",
    )


@pytest.mark.parametrize("options", [{"class_weights": UNEQUAL}, {"sampler": "balanced", "class_weights": "balanced"}])
@pytest.mark.parametrize(("kind", "more"), [(ER, {"memory_size": 20}), (WA, {"memory_size": 20})])
def test_a_resumed_run_is_the_uninterrupted_one(kind, more, options):
    Case(subject(kind, partial(TinyDigits, **options), **more)).check("resume")


def test_two_processes_are_one():
    data = partial(TinyDigits, sampler="balanced", class_weights=UNEQUAL)
    Case(subject(ER, data, memory_size=20), pair=PAIR).check("processes")


def test_weights_and_sampler_change_what_is_learnt_and_weights_of_one_do_not():
    plain = run(subject(Finetune, TinyDigits))
    ones = run(subject(Finetune, partial(TinyDigits, class_weights=[1.0] * 10)))
    assert [step.loss for step in ones.steps] == pytest.approx([step.loss for step in plain.steps], rel=1e-4)
    for options in ({"class_weights": UNEQUAL}, {"sampler": "balanced"}):
        other = run(subject(Finetune, partial(TinyDigits, **options)))
        assert [step.loss for step in other.steps] != pytest.approx([step.loss for step in plain.steps], rel=1e-3)


def test_methods_without_a_use_of_them_are_refused():
    with pytest.raises(ValueError, match="PASS does not use class_weights: its losses are not the shared"):
        run(subject(PASS, partial(TinyDigits, class_weights="balanced")))
    with pytest.raises(
        ValueError, match=r"SimpleCIL takes no gradient step, so that data\.class_weights has no effect"
    ):
        run(subject(SimpleCIL, partial(TinyDigits, class_weights="balanced")))
    with pytest.raises(
        ValueError, match=r"SimpleCIL takes no step on images, so that data\.sampler balanced has no effect"
    ):
        run(subject(SimpleCIL, partial(TinyDigits, sampler="balanced")))


def test_weights_of_unknown_classes_are_refused_before_training():
    with pytest.raises(ValueError, match="TinyDigits: class_weights names 'z', which is no class"):
        TinyDigits(class_weights={"z": 2.0}).make_stream(0)
    with pytest.raises(ValueError, match="TinyDigits: sampler is 'even'; use 'shuffled' or 'balanced'"):
        TinyDigits(sampler="even")


def test_small_classes_are_as_frequent_as_large_ones():
    data = TinyDigits(sampler="balanced", val_fraction=0.0)
    data.make_stream(0)
    data.begin(data.stream.tasks[0])
    data.begin_phase(0, None, 0)
    rows = torch.cat([batch.labels for batch in data.train_dataloader()])
    counts = torch.bincount(rows)
    assert counts.max() - counts.min() <= 1
    assert len(rows) == len(data.stream.train[0])
