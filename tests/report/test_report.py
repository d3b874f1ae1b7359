import csv
import io
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from support.reports import ER, FINETUNE, check_page, content, parsed, put, two_methods

from cl_lightning import cli, measures
from cl_lightning.loop import results
from cl_lightning.report import cards, command, page, runs, statistics, tables
from cl_lightning.report.comparison import LAST, comparable, compare, pareto
from cl_lightning.report.fields import UnusableRunError

# ---------------------------------------------------------------------- reading


def test_what_the_task_loop_writes_is_read_and_reported(tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = (
        "--trainer.max_epochs 1 --trainer.enable_progress_bar false --trainer.logger false --data.batch_size 256"
    )
    more = "--trainer.callbacks+=ContinualEvaluation --trainer.callbacks.every_n_steps 2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cli.main(["fit", *arguments.split(), *more.split(), "--run_dir", str(folder)]) == 0
    written = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    run = runs.read(folder)
    assert run.notes == ()
    assert run.complete
    assert run.last == written["measures"]
    assert [list(row) for row in run.accuracy] == written["matrix"]["R_ci"]
    assert run.total_bytes == sum(written["cost"]["bytes_kept"].values()) > 0
    assert run.budget == written["cost"]["memory_mb"]
    assert run.curves is not None
    assert len(run.curves.average()) == len(written["continual_evaluation"]["steps"])
    assert None not in (run.confusion, run.calibration, run.parameters, run.flops, run.peak_memory)
    capsys.readouterr()
    assert cli.main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 0
    out, err = capsys.readouterr()
    assert f"{100 * written['measures']['average_accuracy']:.1f}" in out
    assert err == f"report: {tmp_path / 'page.html'}\n"
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    for part in (
        "Protocol",
        "Confusion",
        "Calibration",
        "stability gap",
        "Cost",
        "continual evaluation during training",
    ):
        assert part in html


def test_the_reader_knows_the_schema_that_is_written():
    assert runs.OLDEST <= results.SCHEMA == runs.NEWEST


def test_a_half_written_run_is_used_and_marked(tmp_path, capsys):
    for seed in range(2):
        put(tmp_path / "er" / str(seed), content(seed=seed))
    put(tmp_path / "er" / "2", content(seed=2, finished=1))
    assert command.main([str(tmp_path), "--output", str(tmp_path / "page.html")]) == 0
    out, err = capsys.readouterr()
    assert "er/2: is unfinished: 1 of 3 tasks are done" in err
    assert "ER (1 of 3 tasks)" in out
    compared = command.read([str(tmp_path)])
    assert [len(group.runs) for group in compared.groups] == [2, 1]
    assert compared.difference(compared.groups[1], LAST) is None  # a third of a stream is easier than the whole of it


def test_a_run_without_a_finished_task_is_used_and_marked(tmp_path, capsys):
    put(tmp_path / "run", content(finished=0))
    assert command.main([str(tmp_path), "--output", str(tmp_path / "page.html")]) == 0
    assert "0 of 3 tasks" in capsys.readouterr().err


def test_a_run_of_an_older_schema_is_used_and_reported():
    old = {key: value for key, value in content().items() if key in (
        "strategy", "seed", "tasks", "finished", "measures", "measures_per_task", "class_order")}  # fmt: skip
    matrix = content()["matrix"]
    run = runs.parse({**old, "schema": 1, "matrix": {"R_ci": matrix["R_ci"]}}, Path("old"))
    assert "older schema 1" in run.notes[0]
    assert "None" not in page.render(compare([run]))
    assert run.last["average_accuracy"] == content()["measures"]["average_accuracy"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"schema": 2, "strat', "not JSON"),
        ("\x00\x01", "not JSON"),
        ("[1, 2]", "no field schema"),
        ('{"accuracy": 0.5}', "no field schema"),
        ('{"schema": 99}', "schema 99, of a newer cl_lightning"),
        ('{"schema": 0}', "schema 0, of an older cl_lightning"),
        ('{"schema": "2"}', "schema must be an integer"),
        ('{"schema": 2, "strategy": "ER", "tasks": []}', "no field finished"),
        ('{"schema": 2, "strategy": "ER", "tasks": [], "finished": 1}', "finished is 1, of 0 tasks"),
        ('{"schema": 2, "seed": NaN}', "NaN is not a number"),
        ('{"schema": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_not_of_a_run_is_named_in_one_line(tmp_path, capsys, text, reason):
    put(tmp_path / "bad", text)
    put(tmp_path / "good", content())
    compared = command.read([str(tmp_path)])
    assert len(compared.runs) == 1
    (problem,) = compared.problems
    assert problem.place == str(tmp_path / "bad")
    assert reason in problem.text
    assert command.main([str(tmp_path / "bad"), "--output", str(tmp_path / "none.html")]) == 2
    assert not (tmp_path / "none.html").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line


def test_what_is_left_out_is_reported_on_the_page_and_in_the_terminal(tmp_path, capsys):
    put(tmp_path / "bad", "{")
    put(tmp_path / "good", content())
    assert command.main([str(tmp_path), "--output", str(tmp_path / "page.html")]) == 0
    line = next(line for line in capsys.readouterr().err.splitlines() if "bad" in line)
    assert "not JSON" in line
    assert "not JSON" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_folders_are_searched_once_each_in_order(tmp_path):
    for place in ("b/0001", "b/0000", "a/0000", ".hidden/0000"):
        put(tmp_path / place, content())
    (tmp_path / "b/0002").mkdir()
    (tmp_path / "b/0002/config.yaml").write_text("seed_everything: 0\n")
    found, problems = runs.find([str(tmp_path / "b/0000/results.json"), str(tmp_path), str(tmp_path / "a")])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["b/0000", "a/0000", "b/0001"]
    assert [problem.text for problem in problems] == ["has no results.json: the run ended before its first task"]


def test_a_folder_without_a_run_is_reported(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    _, problems = runs.find([str(tmp_path / "empty"), str(tmp_path / "file.txt"), str(tmp_path / "gone")])
    assert [re.split(": |;", problem.text)[0] for problem in problems] == [
        "neither is a run nor contains one",
        "is a file",
        "there is no such folder",
    ]


def test_a_malformed_optional_field_is_left_out_and_reported():
    data = content()
    data["cost"]["seconds"][1]["training"] = "a while"
    data["confusion"] = [[1, 2], [3]]
    data["matrix"]["R_ti"][0][0] = 1.5
    run = runs.parse(data, Path("run"))
    assert run.seconds == ()
    assert run.confusion is None
    assert run.accuracy_known is None
    assert run.notes == (
        "results.json: matrix.R_ti.0.0 must be a number in [0, 1], is 1.5; left out",
        "results.json: confusion must be a matrix of at least 2 rows and columns, is a list; left out",
        "results.json: cost.seconds.1.training must be a number, is a text; left out",
    )


def test_a_field_that_a_report_cannot_do_without_is_named():
    data = content()
    data["matrix"]["R_ci"][2][0] = -0.1
    with pytest.raises(UnusableRunError, match=r"matrix\.R_ci\.2\.0 must be a number in \[0, 1\], is -0\.1"):
        runs.parse(data, Path("run"))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, entry in items for place in places(entry, (*path, key)))]


SAMPLE = content(tasks=2)
PLACES = [place for place in places(SAMPLE) if place]
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.just(10**400)
    | st.just("\ud800<script>\x00\n"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def mangle(edits: list[tuple[int, Any]], drop: bool) -> Any:
    data = json.loads(json.dumps(SAMPLE))
    for index, value in edits:
        *path, last = PLACES[index]
        target = data
        try:
            for key in path:
                target = target[key]
            if drop:
                del target[last]
            else:
                target[last] = value
        except (KeyError, IndexError, TypeError):  # an earlier edit took the place away
            continue
    return data


EDITS = st.lists(st.tuples(st.integers(0, len(PLACES) - 1), JUNK), min_size=1, max_size=4)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(EDITS, st.booleans())
def test_mangled_results_give_clear_errors_or_a_table(edits, drop):
    run, message = None, "none"
    try:
        run = runs.parse(mangle(edits, drop), Path("run"))
    except UnusableRunError as error:
        message = str(error)
    assert message
    assert "\n" not in message
    if run is None:
        return
    compared = compare([run, parsed(FINETUNE)])
    sheet = tables.outcome(compared)
    tables.print_rich([sheet], Console(file=io.StringIO()))
    for text in (tables.comma_separated(compared), tables.markdown(sheet), tables.latex(sheet)):
        assert text.encode("utf-8")


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(EDITS, st.booleans())
def test_mangled_results_that_are_read_make_a_page(edits, drop):
    try:
        run = runs.parse(mangle(edits, drop), Path("run"))
    except UnusableRunError:
        return
    check_page(page.render(compare([run, parsed(FINETUNE, tasks=2)] if drop else [run])))


# ---------------------------------------------------------------------- numbers


def test_interval_is_that_of_students_t():
    found = statistics.estimate([1.0, 2.0, 4.0])
    assert found is not None
    spread = math.sqrt(((1 - 7 / 3) ** 2 + (2 - 7 / 3) ** 2 + (4 - 7 / 3) ** 2) / 2)
    assert found.mean == pytest.approx(7 / 3)
    assert found.half == pytest.approx(4.302652729911275 * spread / math.sqrt(3))  # t of 2 degrees of freedom, 97.5 %
    assert found.count == 3


def test_t_has_its_closed_form_for_one_degree_of_freedom_and_is_normal_for_many():
    assert statistics.student_t(0.95, 1) == pytest.approx(math.tan(math.pi * 0.475))
    assert statistics.student_t(0.95, 10**7) == pytest.approx(1.959963984540054, abs=1e-5)


def test_one_value_has_no_interval_and_none_has_no_mean():
    assert statistics.estimate([3.0, None]) == statistics.Estimate(3.0, None, 1)
    assert statistics.estimate([None]) is None


def test_paired_difference_is_the_interval_of_the_differences_over_common_keys():
    a, b = {1: 5.0, 2: 9.0, 3: 1.0}, {2: 6.0, 1: 1.0, 4: 0.0}
    assert statistics.paired_difference(a, b) == statistics.estimate([4.0, 3.0])
    assert statistics.paired_difference(a, {9: 1.0}) is None


def test_a_shift_that_is_common_to_both_leaves_no_interval_in_the_paired_difference():
    easy = {seed: 0.5 + 0.1 * seed for seed in range(4)}
    found = statistics.paired_difference({seed: value + 0.25 for seed, value in easy.items()}, easy)
    assert found is not None
    assert found.mean == pytest.approx(0.25)
    assert found.half == pytest.approx(0.0, abs=1e-12)
    assert found.clear


def test_numbers_in_the_tables_match_the_results():
    rows = list(csv.DictReader(io.StringIO(tables.comma_separated(compare(two_methods())))))
    assert [row["method"] for row in rows] == ["Finetune", "ER"]
    names = {
        "last_accuracy": "average_accuracy",
        "average_incremental_accuracy": "average_incremental_accuracy",
        "forgetting": "forgetting",
        "backward_transfer": "backward_transfer",
        "task_known_last_accuracy": "task_aware/average_accuracy",
    }
    for row, (method, level) in zip(rows, ((FINETUNE, 0.4), (ER, 0.8)), strict=True):
        written = [content(method, seed, level=level) for seed in range(3)]
        for name, key in names.items():
            expected = statistics.estimate(one["measures"][key] for one in written)
            assert expected is not None
            assert float(row[name]) == expected.mean
            assert float(row[f"{name}_ci95"]) == expected.half
        spent = [3 * (1.75 + seed) for seed in range(3)]  # saving is no part of it
        assert float(row["seconds"]) == pytest.approx(sum(spent) / 3)
        assert float(row["bytes_kept"]) == 2048
    assert rows[1]["baseline"] == "Finetune"
    assert rows[1]["pairs"] == "3"
    assert float(rows[1]["last_accuracy_difference"]) == pytest.approx(0.4)
    assert rows[0]["last_accuracy_difference"] == ""
    cells = tables.outcome(compare(two_methods())).rows[1]
    mean = sum(content(seed=seed)["measures"]["average_accuracy"] for seed in range(3)) / 3
    assert cells[2].startswith(f"{100 * mean:.1f} ± ")


def test_pareto_front_holds_what_nothing_beats():
    points = [(1.0, 0.5), (2.0, 0.9), (2.0, 0.7), (0.5, 0.4), (3.0, 0.9), (1.0, 0.5)]
    assert sorted(pareto(points)) == [0, 1, 3, 5]


# ---------------------------------------------------------------------- groups


def test_runs_are_grouped_by_configuration_without_seed_and_bookkeeping():
    compared = compare([*two_methods(2), parsed(ER, 0, options={"memory_size": 50})])
    assert [(group.label, len(group.runs)) for group in compared.groups] == [
        ("Finetune", 2),
        ("ER", 2),
        ("ER memory_size=50", 1),
    ]
    assert compared.baseline is compared.groups[0]


def test_settings_that_had_no_effect_and_that_older_runs_lack_do_not_part_runs():
    old = {"model.class_path": "ER", "loop.keep_tasks": "last"}
    new = {"loop.keep_last": "2", "loop.nan_loss": "stop", "loop.feature_cache": "null", "loop.feature_cache_gb": "8.0"}
    assert comparable({**old, **new}) == comparable(old)
    assert comparable({**old, "loop.nan_loss": "skip"}) != comparable(old)


def test_a_repeated_seed_counts_once_and_is_reported():
    first, again = parsed(seed=1), parsed(seed=1)
    again = runs.replace(again, name="again", written=2.0)
    compared = compare([first, again, parsed(seed=2)])
    assert [run.name for run in compared.groups[0].runs] == ["again", parsed(seed=2).name]
    assert any("left out" in problem.text for problem in compared.problems)


def test_runs_of_one_configuration_on_other_data_stay_apart():
    found = compare([parsed(seed=0), parsed(seed=0, data="y")])
    assert [(group.label, len(group.runs)) for group in found.groups] == [("ER", 1), ("ER #2", 1)]
    assert found.streams


def test_classes_may_share_a_name():
    data = content(classes=["crane", "a", "crane", "b", "c", "d"])
    data["class_names"] = ["crane", "a", "crane", "b", "c", "d"]
    for task in data["tasks"]:
        task["columns"] = [2 * int(task["name"][-1]), 2 * int(task["name"][-1]) + 1]
    run = runs.parse(data, Path("run"))
    assert run.bounds == [2, 4, 6]
    assert page.render(compare([run])).count(">crane<") >= 4  # per class, and in the confusion matrix


def test_without_configuration_runs_of_one_seed_stay_apart():
    data = [content(seed=seed) for seed in (0, 1, 0)]
    for one in data:
        one["config"] = None
    found = compare([runs.parse(one, Path(str(index))) for index, one in enumerate(data)])
    assert [(group.label, len(group.runs)) for group in found.groups] == [("ER", 2), ("ER #2", 1)]


def test_a_baseline_is_found_by_label_method_or_path_or_is_an_error():
    members = [*two_methods(1), parsed(ER, 0, options={"memory_size": 50})]
    assert compare(members, baseline="er memory_size=50").baseline.label == "ER memory_size=50"
    assert compare(members, baseline=FINETUNE).baseline.label == "Finetune"
    with pytest.raises(ValueError, match="not among the methods; use one of 'Finetune', 'ER', 'ER memory_size=50'"):
        compare(members, baseline="DER")
    with pytest.raises(ValueError, match="matches 2 groups"):
        compare([parsed(ER, 0, options={"memory_size": m}) for m in (1, 2)], baseline="ER")


def test_every_field_that_differs_is_shown_protocol_apart_from_method():
    other = content(ER, 0, options={"memory_size": 5, "mix": "step", "optimizer": {"class_path": "torch.optim.Adam"}})
    other["config"]["trainer"] |= {"max_epochs": 7, "callbacks": [{"class_path": "some.EMA"}], "log_every_n_steps": 1}
    other["config"]["data"]["init_args"]["batch_size"] = 64
    other["config"]["seed_everything"] = 99
    other["versions"]["torch"] = "2.6.0"
    compared = compare([parsed(FINETUNE), runs.parse(other, Path("er"))])
    assert {entry.field: dict(entry.values) for entry in compared.protocol} == {
        "trainer.max_epochs": {"2": ("Finetune",), "7": ("ER",)},
        "data.init_args.batch_size": {"32": ("Finetune",), "64": ("ER",)},
        "model.init_args.memory_size": {None: ("Finetune",), "5": ("ER",)},
        "model.init_args.optimizer.class_path": {None: ("Finetune",), "torch.optim.Adam": ("ER",)},
    }
    assert {entry.field for entry in compared.options} == {"model.init_args.mix", "trainer.callbacks.0.class_path"}
    assert [entry.field for entry in compared.software] == ["torch"]
    html = page.render(compared)
    assert "model.optimizer" in html
    assert "trainer.max_epochs" in html


def test_runs_of_one_stream_have_no_notice():
    shuffled = [
        parsed(method, seed) for method in (FINETUNE, ER) for seed in range(3)
    ]  # each seed has hashes of its own
    assert compare(shuffled).streams == ()


def test_different_streams_are_reported_at_the_top_of_the_page():
    sizes = compare([parsed(FINETUNE), parsed(ER, tasks=4)])
    assert sizes.streams == (
        "Finetune: 3 tasks, 6 classes, 300 test samples. ER: 4 tasks, 8 classes, 400 test samples.",
    )
    order = compare([parsed(FINETUNE, 1), parsed(ER, 1, data="y")])
    assert "With seed 1" in order.streams[0]
    names = compare([parsed(FINETUNE), parsed(ER, classes=list("abcdef"))])
    assert names.streams[0].startswith("The classes differ.")
    for compared in (sizes, order, names):
        html = page.render(compared)
        assert html.index("have different streams") < html.index("<h2>Results</h2>")
    assert order.difference(order.groups[1], LAST) is None  # equal seeds, but not equal data


def test_area_under_budgets_is_that_of_the_measure_over_network_and_exemplars():
    sizes, seeds = (10, 20, 40), (0, 1)
    members = [
        parsed(ER, seed, level=0.5 + size / 100, options={"memory_size": size}) for size in sizes for seed in seeds
    ]
    (budget,) = compare([*members, parsed(FINETUNE)]).budgets
    assert budget.label == "ER"
    assert budget.megabytes == (10.0, 20.0, 40.0)
    for area, key in ((budget.average, "average_incremental_accuracy"), (budget.last, "average_accuracy")):
        each = []
        for seed in seeds:
            found = [run.last[key] for run in members if run.seed == seed]
            budgets = torch.tensor([10.0, 20.0, 40.0], dtype=torch.float64)
            each.append(measures.area_under_budget(budgets, torch.tensor(found, dtype=torch.float64)))
        assert area == statistics.estimate(each)
    assert "AUC-A" in page.render(compare(members))


def test_methods_that_differ_in_more_than_memory_have_no_budget_curve():
    assert (
        compare([parsed(ER, options={"memory_size": 1, "mix": "a"}), parsed(ER, options={"memory_size": 2})]).budgets
        == ()
    )


def test_protocol_card_says_what_was_done():
    found = dict(cards.protocol(compare([parsed(ER, options={"memory_size": 5})]).groups))
    said = {title: values[0][0] for title, values in found.items()}
    assert said["Data"] == "Digits: 6 classes, 900 training and 300 test samples"
    assert said["Stream"] == "3 tasks of 2 classes; ClassIncremental(tasks=3)"
    assert said["Epochs per task"] == "2"
    assert said["Optimizer"] == "SGD(lr=0.05)"
    assert said["Augmentation"] == "none"
    assert said["Test data used for"] == "evaluation after each task"
    assert said["Memory"].startswith("5 samples at most")
    assert "0123456789ab" in said["Class order"]
