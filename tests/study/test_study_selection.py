"""Choice of hyper-parameters: scores by hand, the frozen file, and both phases with made-up runs."""

import json

import optuna
import pytest
import yaml
from optuna.trial import TrialState, create_trial
from support.forks import start
from support.reports import content
from support.studies import done_tasks, options_of, study, write

from cl_lightning.report import runs
from cl_lightning.study import selection
from cl_lightning.study.definition import DefinitionError, Selection, Space, parse
from cl_lightning.study.storage import HALF, PLANNED, SETTING, Trials, begin, connect, plasticity_settings, url_of


def finish(process, code=0):
    process.join(90)
    assert process.exitcode == code


def said(folder):
    return (folder / "said.txt").read_text()


def validated(rows, samples, split="val"):
    """A run whose evaluations at the start and at the end of each task are known."""
    made = content(tasks=len(samples), finished=len(rows))
    accuracy = []
    for row in rows:
        accuracy += [[0.99, *[None] * (len(rows) - 1)], [*row, *[None] * (len(rows) - len(row))]]
    tasks = [n // 2 for n in range(2 * len(rows))]
    made["continual_evaluation"] |= {
        "split": split,
        "samples": samples[: len(rows)],
        "tasks": tasks,
        "accuracy": accuracy,
    }
    made["continual_evaluation"]["steps"] = list(range(len(tasks)))
    return runs.parse(json.loads(json.dumps(made)), "run")


def test_scores_are_those_of_the_validation_samples_at_the_ends_of_tasks():
    found = selection.Validation.of(validated([[0.9], [0.5, 0.8], [0.2, 0.4, 1.0]], [10, 30, 60]))
    averages = [0.9, (0.5 * 10 + 0.8 * 30) / 40, (0.2 * 10 + 0.4 * 30 + 60) / 100]
    assert found.averages() == pytest.approx(averages)
    assert found.score("last_accuracy") == pytest.approx(0.74)
    assert found.score("average_incremental_accuracy") == pytest.approx((0.9 + 0.725 + 0.74) / 3)
    assert found.plasticity() == pytest.approx((0.8 + 1.0) / 2)
    assert selection.Validation.of(validated([[0.6], [0.5, 0.8]], [10, 30])).plasticity() == pytest.approx(0.8)
    assert selection.Validation.of(validated([[0.7]], [10])).plasticity() == pytest.approx(0.7)


def test_test_samples_select_nothing():
    with pytest.raises(DefinitionError, match="evaluates test samples, which select nothing"):
        selection.Validation.of(validated([[0.9]], [10], split="test"))


def test_the_runs_of_a_search_evaluate_validation_samples_and_see_the_first_tasks():
    select = {"data": "a", "trials": 2, "tasks": 2, "val_fraction": 0.2}
    made = parse({"data": ["b"], "methods": ["er"], "spaces": {"er": {"model.x": [1, 2]}}, "select": select}, "s")
    (search,) = made.searches()
    options = options_of(selection.search_arguments(made, *search, 7, {"model.x": 2}))
    assert options["trainer.callbacks.split"] == "val"
    assert options["trainer.callbacks.samples"] == "null"
    assert (options["data.val_fraction"], options["loop.stop_after_task"]) == ("0.2", "1")
    assert (options["model.x"], options["seed_everything"]) == ("2", "7")


def finished(value, number, half=0, **setting):
    attributes = {PLANNED: True, HALF: half, SETTING: setting}
    trial = create_trial(value=value, user_attrs=attributes)
    trial.number = number
    return trial


def test_the_best_setting_is_the_highest_score_and_the_earliest_among_equals():
    select = Selection(trials=3)
    failed = create_trial(state=TrialState.FAIL, user_attrs={PLANNED: True})
    pruned = create_trial(state=TrialState.PRUNED, value=0.9, user_attrs={PLANNED: True})
    known = [failed, pruned, finished(0.5, 2, x=1), finished(0.7, 3, x=2), finished(0.7, 4, x=3)]
    assert selection.best(known, select).user_attrs[SETTING] == {"x": 2}
    assert selection.best([failed, pruned], select) is None


@pytest.mark.parametrize(("share", "weight"), [(0.0, 0), (0.1, 1), (0.25, 10), (0.49, 10), (0.5, 100)])
def test_plasticity_first_takes_the_largest_stability_that_loses_no_more_than_the_share(share, weight):
    select = Selection(sampler="plasticity_first", share=share)
    first = [finished(0.5, 0, lr=1, w=0), finished(0.8, 1, lr=2, w=0), finished(0.6, 2, lr=3, w=0)]
    second = [finished(0.4, 3, 1, lr=2, w=100), finished(0.61, 4, 1, lr=2, w=10), finished(0.75, 5, 1, lr=2, w=1)]
    chosen = selection.best([*first, *second], select, "w").user_attrs[SETTING]
    assert chosen == {"lr": 2, "w": weight}


def test_the_halves_of_plasticity_first():
    first, second = plasticity_settings([Space("lr", (0.1, 0.2)), Space("w", (1, 10, 0)), Space("m", ("a", "b"))], "w")
    assert first == [{"lr": lr, "m": m, "w": 0} for lr in (0.1, 0.2) for m in "ab"]
    assert second == [{"w": 10}, {"w": 1}]
    assert plasticity_settings([Space("lr", (1, 2))], None) == ([{"lr": 1}, {"lr": 2}], [])


def test_settings_depend_on_the_number_of_the_trial_and_not_on_the_worker():
    spaces = [Space("x", (), 0.001, 1.0, True), Space("n", (), 1, 100), Space("c", ("a", "b", "c"))]

    def draw(order, seed=0):
        study, found = optuna.create_study(), {}
        for number in order:
            study.sampler = selection.sampler_of(Selection(trials=9, seed=seed), number)
            found[number] = selection.suggest(study.ask(), spaces)
        return found

    assert draw([0, 1, 2]) == draw([2, 0, 1])
    assert draw([0]) != draw([0], seed=1)
    values = [setting["x"] for setting in draw(range(60)).values()]
    assert sum(value < 0.0316 for value in values) == pytest.approx(30, abs=12)  # half of them, by the logarithm
    assert all(isinstance(setting["n"], int) for setting in draw(range(5)).values())


def test_pruners():
    assert isinstance(selection.pruner_of(Selection(trials=4), 3), optuna.pruners.NopPruner)
    assert isinstance(selection.pruner_of(Selection(trials=4, pruner="median"), 3), optuna.pruners.MedianPruner)
    assert isinstance(selection.pruner_of(Selection(trials=4, pruner="hyperband"), 3), optuna.pruners.HyperbandPruner)


# ---------------------------------------------------------------------- whole studies


@pytest.fixture
def searched(tmp_path):
    """A study whose search has three settings on the stream ``a``, with two seeds each, and two cells per method."""
    spaces = {"er": {"model.level": [0.3, 0.6, 0.4]}}
    select = {"data": "a", "sampler": "grid", "seeds": [5, 6], "score": "last_accuracy", "tasks": 2}
    write(tmp_path, spaces=spaces, select=select, seeds=[0, 1])
    finish(start(study, tmp_path, "s.yaml", "--workers", "2"))
    return tmp_path


def test_two_phases_and_a_frozen_choice(searched):
    places = done_tasks(searched)
    assert {place: run.tasks for place, run in places.items() if place.startswith("search")} == {
        f"search/a/er/{number:04d}/seed_{seed}": [0, 1] for number in range(3) for seed in (5, 6)
    }
    frozen = searched / "studies" / "s" / "selected" / "a" / "er.yaml"
    content = yaml.safe_load(frozen.read_text())
    assert content["options"] == {"model.level": 0.6}
    assert content["result"]["scores"] == pytest.approx([0.45, 0.45])  # tasks of 100 samples: level, and half of it
    assert content["cost"] == {"settings": 3, "pruned": 0, "failed": 0, "runs": 6, "seconds": 2 * 3 * (2 * 7.25)}
    log = (searched / "studies" / "s" / "logs" / "runs" / "b" / "er" / "seed_1.log").read_text()
    assert "--model.level=0.6 " in log
    assert f"hyper-parameters of {content['hash']}\n" in log
    plain = (searched / "studies" / "s" / "logs" / "runs" / "b" / "finetune" / "seed_1.log").read_text()
    assert "model.level" not in plain

    frozen.write_text(frozen.read_text().replace("0.6", "0.4"))  # the second phase takes no other options
    write(
        searched,
        spaces={"er": {"model.level": [0.3, 0.6, 0.4]}},
        select={"data": "a", "sampler": "grid", "seeds": [5, 6], "score": "last_accuracy", "tasks": 2},
        seeds=[0, 1, 2],
    )
    finish(start(study, searched, "s.yaml"), 1)
    assert "er.yaml: it was changed after the search, its hash differs" in said(searched)


def test_a_trial_of_the_second_half_takes_the_choice_of_the_first(tmp_path):
    spaces = {"er": {"model.level": [0.4, 0.8], "model.weight": [0, 1, 4]}}
    select = {"data": "a", "sampler": "plasticity_first", "stability": {"er": "model.weight"}, "share": 0.2}
    write(tmp_path, methods=["er"], seeds=[0], spaces=spaces, select=select)
    finish(start(study, tmp_path, "s.yaml", "--workers", "2"))
    content = yaml.safe_load((tmp_path / "studies" / "s" / "selected" / "a" / "er.yaml").read_text())
    assert content["options"] == {"model.level": 0.8, "model.weight": 1}  # 0.8 - 0.1 is kept, 0.8 - 0.4 is not
    assert content["cost"]["settings"] == 4


def test_a_low_accuracy_ends_a_setting_early(tmp_path):
    levels = [0.6, 0.5, 0.1, 0.2]
    select = {"data": "a", "sampler": "grid", "pruner": "median"}
    options = {"model.patient": 0.15}  # the lowest would never end by itself
    write(tmp_path, methods=["er"], seeds=[0], spaces={"er": {"model.level": levels}}, select=select, options=options)
    finish(start(study, tmp_path, "s.yaml"))
    content = yaml.safe_load((tmp_path / "studies" / "s" / "selected" / "a" / "er.yaml").read_text())
    assert content["options"] == {"model.level": 0.6}
    assert content["cost"]["pruned"] >= 1
    places = done_tasks(tmp_path)
    assert places["search/a/er/0002/seed_0"].tasks == [0]


def test_a_study_is_enqueued_once(tmp_path):
    known = {"spaces": {"er": {"model.level": [0.3, 0.6]}}, "select": {"data": "a", "trials": 3}}
    made = write(tmp_path, **known)
    trials = Trials(connect(url_of(tmp_path), 20), made.name)
    for _ in range(2):
        begin(trials, made, tmp_path)
    assert len(trials.of("a", "er")) == 3
    assert len(trials.of()) == 4
    for changes, what in (
        ({"select": {"data": "a", "trials": 4}}, "other select"),
        ({"options": {"model.x": 0.7}}, "other options"),
        ({"spaces": {"er": {"model.level": [0.3, 0.7]}}}, "other spaces of er"),
        (
            {"methods": ["finetune", {"name": "er", "config": "other"}]},
            "another config or other options of er in methods",
        ),
    ):
        with pytest.raises(DefinitionError, match=what):
            begin(trials, write(tmp_path, **(known | changes)), tmp_path)
    with pytest.raises(DefinitionError, match="of the folder"):
        begin(trials, made, tmp_path / "other")
