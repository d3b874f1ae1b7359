"""Facts about a method, and runs that they refuse."""

import pytest
import torch
from support.runs import loop, plain_net, run, sgd

from cl_lightning.callbacks.continual_evaluation import ContinualEvaluation
from cl_lightning.cli.discovery import strategies
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.wa import WA
from cl_lightning.strategy import Traits
from cl_lightning.stream import ClassIncremental, Online, RotatedDomains


def small(cls, **options):
    return cls(backbone=plain_net, optimizer=sgd, **options)


def test_every_method_names_its_family_and_its_paper():
    for cls in strategies():
        assert cls.traits.family, cls
        assert cls.traits.paper, cls
        assert isinstance(cls.traits, Traits)


@pytest.mark.parametrize(
    ("facts", "said"), [({"task_ids": "maybe"}, "task_ids is 'maybe'"), ({"scenarios": ("blurry",)}, "'blurry'")]
)
def test_facts_that_do_not_exist_are_refused(facts, said):
    with pytest.raises(ValueError, match=f"Traits: .*{said}"):
        Traits(**facts)


@pytest.mark.parametrize(
    ("facts", "scenario", "said"),
    [
        (
            {"inputs": ("tokens",)},
            ClassIncremental(tasks=5),
            "Told takes inputs of the kind tokens, Digits gives image",
        ),
        (
            {"targets": ("pixels",)},
            ClassIncremental(tasks=5),
            "Told takes targets of the kind pixels, Digits gives class",
        ),
        ({"scenarios": ("online",)}, ClassIncremental(tasks=5), "Told does not take class-incremental streams"),
        ({"scenarios": ("class-incremental",)}, Online(ClassIncremental(tasks=5)), "does not take online streams"),
        (
            {"scenarios": ("class-incremental",)},
            RotatedDomains(tasks=2),
            r"does not take domain-incremental streams \(task 1 brings no new class\)",
        ),
    ],
)
def test_a_run_that_does_not_fit_is_refused_before_training(facts, scenario, said):
    class Told(Finetune):
        traits = Finetune.traits.but(**facts)

        def losses(self, batch, output):
            raise AssertionError("it must not train")

    with pytest.raises(ValueError, match=said):
        loop(small(Told), data={"scenario": scenario}).fit()


def test_the_share_of_old_classes_asks_for_new_classes_in_every_task():
    with pytest.raises(ValueError, match="WA does not take domain-incremental streams"):
        loop(small(WA, memory_size=30), data={"scenario": RotatedDomains(tasks=2)}).fit()
    run(small(WA, memory_size=30, distill_weight=0.5), data={"scenario": RotatedDomains(tasks=2)}, max_epochs=1)


# ---------------------------------------------------------------------- the task at test time


class OneHeadPerTask(Finetune):
    """Logits of the task that is asked for, with a shift of the images that belongs to it."""

    traits = Finetune.traits.but(task_ids="needed")

    def predict(self, images, tasks=None):
        if tasks is None:
            raise ValueError(f"{type(self).__name__}: predictions need the task of each image")
        scores = super().predict(images)
        return scores.masked_fill(~self.task_columns[tasks], -1e9)


class Infers(OneHeadPerTask):
    traits = Finetune.traits.but(task_ids="inferred")

    def predict(self, images, tasks=None):
        if tasks is None:
            tasks = torch.zeros(len(images), dtype=torch.int64, device=images.device)  # always the first one
        return super().predict(images, tasks)


def test_a_method_that_needs_the_task_has_no_class_incremental_reading(tmp_path):
    watch = ContinualEvaluation(every_n_steps=2)
    made = run(small(OneHeadPerTask), watch, max_epochs=2, folder=tmp_path)
    plain = run(small(Finetune), max_epochs=2)
    assert made.matrix.R_ci.isnan().all()
    assert torch.equal(made.matrix.R_ti.nan_to_num(), plain.matrix.R_ti.nan_to_num())  # the same columns decide
    assert made.matrix.learned == 3
    measures = made.matrix.measures()
    assert not {"average_accuracy", "forgetting"} & set(measures)
    aware = {name: value for name, value in plain.matrix.measures().items() if name.startswith("task_aware/")}
    assert measures == aware
    assert made.results()["protocol"]["task_ids_at_test"]
    assert made.matrix.confusion.numel() == 0


def test_a_method_that_infers_the_task_has_both_readings():
    made = run(small(Infers), max_epochs=2)
    plain = run(small(Finetune), max_epochs=2)
    assert torch.equal(made.matrix.R_ti.nan_to_num(), plain.matrix.R_ti.nan_to_num())
    last = made.matrix.R_ci[-1]
    assert last[0] == made.matrix.R_ti[-1, 0]  # of the first task, which it always infers
    assert (last[1:] == 0).all()


def test_predictions_of_a_method_that_ignores_tasks_are_made_once_per_batch():
    calls = []

    class Counts(Finetune):
        def predict(self, images, tasks=None):
            calls.append(tasks)
            return super().predict(images)

    run(small(Counts), max_epochs=1, options={"stop_after_task": 0})
    assert len(calls) == 1 + 1  # the test samples of one task in one batch, and the count of FLOPs
    assert calls == [None, None]


def test_options_of_the_data_follow_from_the_facts():
    plain = {"cumulative": False, "with_unlabelled": False, "left_out": 0.0}
    assert Traits().data_options(3) == plain
    traits = Traits(needs_all_data=True, uses_unlabelled=True, left_out=(0.0, 0.4, 0.2))
    shares = [traits.data_options(task)["left_out"] for task in range(5)]
    assert shares == [0.0, 0.4, 0.2, 0.2, 0.2]
    assert traits.data_options(0) == {**plain, "cumulative": True, "with_unlabelled": True}
