import json

import pytest
import torch
from lightning.pytorch import Callback
from support import forks
from support.runs import NormNet, assert_resumes, assert_same, assert_same_run, loop, run, sgd

from cl_lightning import measures
from cl_lightning.callbacks.continual_evaluation import ContinualEvaluation, count_among
from cl_lightning.callbacks.ema_ensemble import EMAEnsemble
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.stream import Blurry, ClassIncremental, Online, Subset


def er(**options):
    return ER(**{"memory_size": 40, "backbone": NormNet, "optimizer": sgd, **options})


def recorded(sequences, tasks, ends):
    """A callback that has seen accuracies of 100 samples per task, in percent."""
    made = ContinualEvaluation(windows=[2, 10], beta=1)
    made.tasks, made.ends = tasks, ends
    made.steps = list(range(len(tasks)))
    made.totals = torch.full((max(tasks) + 1,), 100)
    for place, task in enumerate(tasks):
        made.counts.append(torch.tensor([[curve[place]] * 2 for curve in sequences[: task + 1]], dtype=torch.int32))
    return made


def test_measures_of_a_hand_made_curve():
    nothing = None
    first, second = [10, 90, 50, 80], [nothing, nothing, 20, 70]
    found = recorded([first, second], [0, 0, 1, 1], [1, 3]).measures(1)
    assert found["min_accuracy"] == pytest.approx(0.5)
    assert found["worst_case_accuracy"] == pytest.approx((0.7 + 0.5) / 2)
    assert found["windowed_forgetting_10"] == pytest.approx(0.4 / 2)  # the second task never drops
    assert found["windowed_plasticity_10"] == pytest.approx((0.8 + 0.5) / 2)
    assert found["windowed_plasticity_2"] == pytest.approx((0.8 + 0.5) / 2)
    assert found["average_anytime_accuracy"] == pytest.approx((0.1 + 0.9 + 0.35 + 0.75) / 4)
    assert found["learning_curve_area"] == pytest.approx(((0.1 + 0.9) / 2 + (0.2 + 0.7) / 2) / 2)
    assert {f"task_aware/{name}" for name in found if "/" not in name} <= found.keys()


def test_nothing_is_said_of_the_minimum_during_the_first_task():
    found = recorded([[10, 90]], [0, 0], [1]).measures(0)
    assert "min_accuracy" not in found
    assert found["worst_case_accuracy"] == pytest.approx(0.9)


def test_the_learning_curve_of_a_task_ends_with_the_task():
    made = recorded([[10, 90, 0, 0], [None, None, 20, 70]], [0, 0, 1, 1], [1, 3])
    made.beta = 2  # three evaluations, where each task has two
    assert "learning_curve_area" not in made.measures(1)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_the_same_to_the_bit_with_and_without_it(accumulate):
    options = {"accumulate_grad_batches": accumulate}
    plain = run(er(), **options)
    after = torch.get_rng_state()
    watched = run(er(), ContinualEvaluation(every_n_steps=1), **options)
    assert torch.equal(after, torch.get_rng_state())
    assert_same_run(plain, watched)
    assert_same(plain.strategy.memory.state_dict(), watched.strategy.memory.state_dict())


def test_a_frozen_backbone_stays_in_eval_mode():
    made = run(er(freeze_backbone=True), ContinualEvaluation(every_n_steps=3))
    plain = run(er(freeze_backbone=True))
    assert_same_run(made, plain)


def test_it_evaluates_before_the_first_update_of_each_task_then_every_n_steps_and_at_the_end():
    made = ContinualEvaluation(every_n_steps=4)
    loop = run(er(), made)
    first, second, third = loop.meter.tasks[0].steps, *(cost.steps for cost in loop.meter.tasks[1:])
    begin = 0
    for task, steps in enumerate((first, second, third)):
        mine = [step for step, owner in zip(made.steps, made.tasks, strict=True) if owner == task]
        assert mine == sorted({*range(begin, begin + steps + 1, 4), begin + steps})
        begin += steps
    assert made.ends == [max(place for place, owner in enumerate(made.tasks) if owner == task) for task in range(3)]


def test_with_gradient_accumulation_steps_match_the_optimizer():
    made = ContinualEvaluation(every_n_steps=2)
    loop = run(er(), made, accumulate_grad_batches=2)
    steps = [cost.steps for cost in loop.meter.tasks]
    assert made.steps[made.ends[-1]] == sum(steps) == loop.trainer.global_step
    assert [step for step, task in zip(made.steps, made.tasks, strict=True) if task == 0][:3] == [0, 2, 4]


@pytest.mark.parametrize("cache_mb", [256.0, 0.001, 0.0])
def test_on_all_samples_the_last_evaluation_of_a_task_is_the_row_of_the_matrix(cache_mb):
    made = ContinualEvaluation(every_n_steps=5, samples=None, cache_mb=cache_mb)
    loop = run(er(), made)
    assert torch.equal(made.totals, loop.matrix.totals)
    rows, aware = made.curves()[made.ends], made.curves(task_aware=True)[made.ends]
    torch.testing.assert_close(rows, loop.matrix.R_ci, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(aware, loop.matrix.R_ti, rtol=0, atol=0, equal_nan=True)


def test_where_the_images_are_kept_changes_nothing():
    kept = [ContinualEvaluation(every_n_steps=3, samples=20, cache_mb=size) for size in (1.0, 0.001, 0.0)]
    for made in kept:
        run(er(), made)
    assert [made._kept for made in kept] == [True, True, False]
    assert_same(kept[0].state_dict(), kept[1].state_dict())
    assert_same(kept[0].state_dict(), kept[2].state_dict())


def test_the_subset_is_of_the_given_size_and_depends_on_its_own_seed_alone():
    loop = run(er(), ContinualEvaluation(samples=7))
    data = loop.datamodule
    first, again, other = (
        data.evaluation_loader("test", range(3), samples=7, key=key).plan.indices for key in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first) == 21
    assert len(first.unique()) == 21
    later = data.evaluation_loader("test", [2], samples=7, key=0).plan.indices
    assert torch.equal(first[14:], later)
    test = torch.as_tensor(loop.stream.test[2].copy())
    assert torch.isin(later, test).all()


def test_worst_case_is_never_above_the_average_and_more_evaluations_find_a_lower_minimum():
    often, seldom = (ContinualEvaluation(every_n_steps=n, samples=None) for n in (1, 10**6))
    loop = run(er(), often)
    run(er(), seldom)
    assert len(seldom.steps) == 6  # before and after each task
    found = often.measures(2)
    assert found["min_accuracy"] <= seldom.measures(2)["min_accuracy"]
    assert found["worst_case_accuracy"] <= float(loop.matrix.R_ci[2].mean()) + 1e-12


def test_a_resumed_run_has_the_curves_of_one_that_was_not_interrupted(tmp_path):
    assert_resumes(lambda: (er(), [ContinualEvaluation(every_n_steps=3, samples=30)]), tmp_path)


def test_measures_of_a_task_are_taken_once_however_often_they_are_asked_for(tmp_path, monkeypatch):
    calls, area = [], measures.lca
    monkeypatch.setattr(measures, "lca", lambda *given: calls.append(given) or area(*given))
    made = ContinualEvaluation(every_n_steps=3, samples=20)
    done = run(er(), made, folder=tmp_path, data={"scenario": ClassIncremental(tasks=5)}, max_epochs=1)
    assert all(done.results()["continual_evaluation"] == made.results() for _ in range(3))
    assert len(calls) == 2 * 5  # with the task known, and without


def test_a_run_that_went_on_from_a_checkpoint_has_the_results_of_one_that_did_not_stop(tmp_path):
    whole, first, second, loaded = (ContinualEvaluation(every_n_steps=3, samples=30) for _ in range(4))
    run(er(), whole)
    run(er(), first, folder=tmp_path, options={"stop_after_task": 1})
    loop(er(), second, folder=tmp_path).fit("last")
    loaded.load_state_dict(whole.state_dict())
    assert len(whole.results()["measures_per_task"]) == 3
    assert second.results() == loaded.results() == whole.results()


def test_curves_and_state_match_a_plain_loop_over_the_counts():
    made = ContinualEvaluation(every_n_steps=4, samples=30)
    run(er(), made)
    assert [len(counts) for counts in made.counts] == [task + 1 for task in made.tasks]
    table = torch.full((len(made.steps), 3, 2), -1, dtype=torch.int32)
    for place, counts in enumerate(made.counts):
        for task, pair in enumerate(counts.tolist()):
            table[place, task] = torch.tensor(pair)
    assert torch.equal(made.state_dict()["counts"], table)
    for known in (0, 1):
        expected = [
            [count / total if count >= 0 else torch.nan for count, total in zip(row, made.totals.tolist(), strict=True)]
            for row in table[:, :, known].tolist()
        ]
        expected = torch.tensor(expected, dtype=torch.float64)
        found = made.curves(task_aware=bool(known))
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_it_evaluates_what_an_ensemble_puts_in_place_of_the_weights():
    still = EMAEnsemble(momentum=1 - 1e-9, warmup_momentum=1 - 1e-9, restart=True)
    made = ContinualEvaluation(every_n_steps=2)
    watched = run(Finetune(), made, still)  # listed first, it still comes after the average is updated
    curve = made.curves()[: made.ends[0] + 1, 0]
    assert (curve == curve[0]).all()
    assert_same_run(watched, run(Finetune(), EMAEnsemble(momentum=1 - 1e-9, warmup_momentum=1 - 1e-9, restart=True)))
    alone = ContinualEvaluation(every_n_steps=2)
    run(Finetune(), alone)
    assert (alone.curves()[1 : alone.ends[0] + 1, 0] != curve[0]).all()


# ---------------------------------------------------------------------- by samples


BLURRY = {"scenario": Online(Subset(Blurry(tasks=3), per_class=20), batch_size=10), "batch_size": 10}


def test_the_area_is_the_mean_over_the_multiples_of_n_samples():
    made = recorded([[10] * 6], [0] * 6, [5])
    made.every_n_samples = 20
    made.arrived = [0, 20, 30, 45, 45, 90]  # twice in the period of 40: once
    made.seen_counts = [torch.tensor(pair) for pair in ([0, 0], [3, 4], [9, 9], [1, 4], [9, 9], [1, 2])]
    assert made.accuracies_among_seen().nan_to_num(-1).tolist() == [-1, 0.75, -1, 0.25, -1, 0.5]
    assert made.measures(0)["area_under_accuracy"] == pytest.approx(0.5)
    made.every_n_samples = None
    assert "area_under_accuracy" not in made.measures(0)


def test_only_samples_of_the_given_classes_count_and_predictions_are_among_them():
    counts = torch.zeros(2, dtype=torch.int64)
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.6, 0.9, 0.5], [0.1, 0.9, 0.5], [0.7, 0.2, 0.1]])
    count_among(counts, scores, torch.tensor([2, 2, 1, 0]), torch.tensor([True, False, True]))
    assert counts.tolist() == [2, 3]  # without column 1: right, wrong, not counted, right


class Arrivals(Callback):
    """Notes the labels of each batch when it is seen for the first time."""

    def __init__(self):
        self.labels = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch.first_pass:
            self.labels.append(batch.labels.clone())


@pytest.mark.parametrize("passes", [1, 3])
def test_evaluations_follow_the_samples_and_count_the_classes_that_have_arrived(passes):
    made = ContinualEvaluation(every_n_samples=25, samples=None)
    notes = Arrivals()
    data = {"scenario": Online(Blurry(tasks=3), batch_size=10, passes=passes), "batch_size": 10}
    done = run(er(), made, notes, data=data)
    labels = torch.cat(notes.labels)
    ends = torch.tensor([len(part) for part in done.stream.train]).cumsum(0).tolist()
    batches = torch.tensor([len(part) for part in notes.labels]).cumsum(0).tolist()
    due = [n for k, n in enumerate(batches) if n // 25 > (batches[k - 1] if k else 0) // 25]
    expected = sorted([0, *ends[:2], *due, *(end for end in ends if end not in due)])  # before, during, after each task
    assert made.arrived == expected
    assert all(step % passes == 0 for step in made.steps)
    totals = torch.as_tensor(done.stream.columns_of(done.datamodule.samples(train=False).labels)).bincount()
    for arrived, (_, total) in zip(made.arrived, made.seen_counts, strict=True):
        assert int(total) == int(totals[labels[:arrived].unique()].sum())
    curve = made.accuracies_among_seen()
    assert [n for n, value in zip(made.arrived, curve.tolist(), strict=True) if value == value] == due
    assert made.measures(2)["area_under_accuracy"] == pytest.approx(float(curve.nanmean()))
    assert made.results()["every_n_samples"] == 25
    # All classes have arrived in the end: the accuracy of the matrix.
    last = made.seen_counts[-1]
    assert float(last[0] / last[1]) == pytest.approx(done.matrix.measures()["average_accuracy"], abs=0.02)


def test_by_samples_training_is_the_same_and_a_resumed_run_has_the_same_area(tmp_path):
    assert_same_run(run(er(), data=BLURRY), run(er(), ContinualEvaluation(every_n_samples=15), data=BLURRY))
    assert_resumes(lambda: (er(), [ContinualEvaluation(every_n_samples=15, samples=9)]), tmp_path, data=BLURRY)


def test_a_run_that_began_by_steps_is_not_resumed_by_samples():
    by_steps = ContinualEvaluation(every_n_steps=5, samples=9)
    run(er(), by_steps, max_epochs=1)
    with pytest.raises(ValueError, match="ContinualEvaluation: resume without every_n_samples"):
        ContinualEvaluation(every_n_samples=15).load_state_dict(by_steps.state_dict())


def test_later_epochs_and_phases_bring_no_new_samples():
    made = ContinualEvaluation(every_n_samples=60, samples=5)
    done = run(er(), made, max_epochs=2)
    assert made.arrived[-1] == sum(len(part) for part in done.stream.train)


def test_validation_samples_can_take_the_place_of_test_data():
    made = ContinualEvaluation(split="val")
    loop = run(er(), made, data={"val_fraction": 0.1})
    assert made.totals.tolist() == [len(part) for part in loop.stream.val]
    assert loop.results()["protocol"]["test_data_use"] == ["evaluation after each task"]
    with pytest.raises(ValueError, match="val_fraction"):
        run(er(), ContinualEvaluation(split="val"))


def test_results_and_logs_hold_the_curves(tmp_path):
    made = ContinualEvaluation(every_n_steps=3)
    loop = run(er(), made, folder=tmp_path, log_every_n_steps=4)
    content = json.loads((tmp_path / "results.json").read_text())
    found = content["continual_evaluation"]
    assert found["steps"] == made.steps
    assert found["measures"] == made.measures(2)
    assert found["measures_per_task"] == [made.measures(task) for task in range(3)]
    assert len(found["accuracy"]) == len(made.steps)
    assert found["accuracy"][0][1:] == [None, None]
    assert content["protocol"]["test_data_use"][-1] == "continual evaluation during training"
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    header = lines[0].split(",")
    logged = [(int(row[0]), row[header.index("continual/task_00")]) for row in (line.split(",") for line in lines[1:])]
    logged = [(step, float(value)) for step, value in logged if value]
    expected = list(zip(made.steps, made.curves()[:, 0].tolist(), strict=True))
    assert [pair for pair in logged if pair in expected] == logged
    assert {step for step, _ in logged} == set(made.steps)
    assert loop.meter.tasks[0].evaluation > 0
    assert loop.meter.tasks[0].training > 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"every_n_steps": 0},
        {"every_n_samples": 0},
        {"samples": 0},
        {"split": "train"},
        {"windows": [10, 1]},
        {"beta": -1},
        {"cache_mb": -1.0},
    ],
)
def test_options_out_of_range_are_refused(wrong):
    (name, _), *_ = wrong.items()
    with pytest.raises(ValueError, match=rf"ContinualEvaluation: {name}(\[1\])? is "):
        ContinualEvaluation(**wrong)


class _Whole(ContinualEvaluation):
    """With a state of its own in checkpoints."""


def _learn_in_a_pair(path):
    made, whole = ContinualEvaluation(every_n_samples=256, samples=31), _Whole(every_n_steps=10**6, samples=None)
    loop = run(Finetune(), made, whole, devices=2, strategy="ddp", max_epochs=1)
    if loop.trainer.is_global_zero:
        torch.save({"made": made.state_dict(), "rows": whole.curves()[whole.ends], "R": loop.matrix.R_ci}, path)


def test_two_processes_count_what_one_counts(tmp_path):
    forks.pair(_learn_in_a_pair, tmp_path / "two.pt")
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    torch.testing.assert_close(two["rows"], two["R"], rtol=0, atol=0, equal_nan=True)
    one = ContinualEvaluation(every_n_samples=256, samples=31)
    run(Finetune(), one, max_epochs=1)
    state = one.state_dict()
    for name in ("steps", "tasks", "ends", "totals", "arrived", "classes", "num_samples"):
        assert torch.equal(state[name], two["made"][name])
    assert torch.equal(state["counts"][0], two["made"]["counts"][0])  # before the first update: the same network
    for name in ("counts", "seen_counts"):
        assert (state[name] - two["made"][name]).abs().max() <= 1  # later, it differs by rounding
