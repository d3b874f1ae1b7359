"""The page of a study, from runs that are made up."""

import csv
import json
import re
from xml.etree import ElementTree

import pytest
import yaml
from support.reports import ER, FINETUNE, Page, content

from cl_lightning.study import page, selection, storage
from cl_lightning.study.definition import parse

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used with Study.optimize")


def made(**changes):
    methods = ["finetune", {"name": "er", "config": "er"}, {"name": "lwf", "config": "lwf"}]
    return parse({"data": ["b", "c"], "methods": methods, "seeds": 4, "name": "mine", **changes}, "mine.yaml")


def carried_out(folder, study, left_out=()):
    """The study with finished cells, apart from those that are left out."""
    trials = storage.Trials(storage.connect(storage.url_of(folder), 20), study.name)
    storage.begin(trials, study, folder)
    cells = {cell.name: cell for cell in study.cells}
    for _ in study.cells:
        trial = trials.study().ask()
        cell = cells[trial.user_attrs["cell"]]
        if cell.name in left_out:
            trial.set_user_attr("error", "the loss is nan")
            trials.study().tell(trial, state=storage.TrialState.FAIL)
            continue
        trial.set_user_attr("arguments", study.arguments(cell.data, cell.method, cell.seed))
        level = {"finetune": 0.4, "er": 0.7, "lwf": 0.55}[cell.method.name] + 0.001 * cell.seed**2
        made = content(FINETUNE if cell.method.name == "finetune" else ER, cell.seed, level=level, data=cell.data.name)
        target = folder / "runs" / cell.name
        target.mkdir(parents=True)
        (target / "results.json").write_text(json.dumps(made))
        trials.study().tell(trial, level)
    return trials


def rows(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.reader(file))


def parsed(path):
    reader = Page()
    text = path.read_text(encoding="utf-8")
    reader.feed(text)
    return reader, text


def test_a_page_compares_all_methods_on_all_streams(tmp_path):
    study = made()
    trials = carried_out(tmp_path, study)
    path = page.write(trials, study, tmp_path, "python -m cl_lightning")
    reader, text = parsed(path)
    assert reader.open == []
    assert len(set(reader.ids)) == len(reader.ids)  # plots of several streams do not share ids
    assert all(link.startswith("#") for link in reader.links)  # self-contained
    for said in ("24 of 24 runs are complete", "Mean ranks over streams", "cannot be below 0.125", "Results on b"):
        assert said in text
    assert "python -m cl_lightning fit --config c --config lwf --seed_everything=3" in text

    difference = rows(tmp_path / "tables" / "difference-from-finetune-on-b-last-accuracy.csv")
    assert difference[0] == ["method", "pairs", "difference (%)", "p", "p, corrected"]
    for name, row in zip(("er", "lwf"), difference[1:], strict=True):
        assert [*row[:2], *row[3:]] == [name, "4", "0.125", "0.250"]
    assert rows(tmp_path / "tables" / "mean-ranks.csv")[1:] == [["er", "1.00"], ["lwf", "2.00"], ["finetune", "3.00"]]
    exact = rows(tmp_path / "tables" / "b-all-digits.csv")
    assert [row[0] for row in exact] == ["method", "finetune", "er", "lwf"]
    latex = (tmp_path / "tables" / "results-on-b.tex").read_text()
    assert latex.count(r"\\") == 4
    plots = sorted((tmp_path / "plots").glob("*.svg"))
    assert {"mean-ranks.svg", "b-cost-seconds.svg", "c-cost-bytes-kept.svg"} <= {plot.name for plot in plots}
    for plot in plots:
        ElementTree.fromstring(plot.read_text())


def test_cells_that_are_missing_are_named_and_the_others_compared(tmp_path):
    study = made(data=["b"], seeds=2)
    trials = carried_out(tmp_path, study, left_out=("b/er/seed_1",))
    text = page.write(trials, study, tmp_path, "x").read_text(encoding="utf-8")
    assert re.search(r"<code>b/er/seed_1</code> has failed: the loss is nan", text)
    assert "Mean ranks" not in text
    difference = rows(tmp_path / "tables" / "difference-from-finetune-on-b-last-accuracy.csv")
    assert {row[0]: row[1] for row in difference[1:]} == {"er": "1", "lwf": "2"}
    assert "5 of 6 runs are complete" in text


def test_a_baseline_is_chosen_by_the_study(tmp_path):
    study = made(data=["b"], seeds=1, baseline="lwf")
    page.write(carried_out(tmp_path, study), study, tmp_path, "x")
    assert (tmp_path / "tables" / "difference-from-lwf-on-b-last-accuracy.csv").is_file()


def test_nothing_to_compare(tmp_path):
    study = made(data=["b"], seeds=1)
    with pytest.raises(ValueError, match="no cell has finished"):
        page.write(carried_out(tmp_path, study, [cell.name for cell in study.cells]), study, tmp_path, "x")


def test_the_chosen_options_and_their_cost(tmp_path):
    spaces = {"er": {"model.lr": [0.001, 0.1, 1.0], "model.kind": ["x", "y"]}}
    study = made(data=["b"], seeds=2, spaces=spaces, select={"data": "a", "trials": 3})
    trials = carried_out(tmp_path, study)
    search = trials.study("a", "er")
    for index, score in enumerate((0.5, 0.8, 0.3)):
        trial = search.ask()
        setting = {"model.lr": spaces["er"]["model.lr"][index], "model.kind": "x"}
        known = {"setting": setting, "score": score, "scores": [score], "seconds": 10.0, "runs": 1}
        for key, value in known.items():
            trial.set_user_attr(key, value)
        search.tell(trial, score)
    frozen = selection.freeze(tmp_path, trials, study, "a", "er")
    assert frozen.options == {"model.lr": 0.1, "model.kind": "x"}
    text = page.write(trials, study, tmp_path, "x").read_text(encoding="utf-8")
    chosen = rows(tmp_path / "tables" / "chosen-options.csv")
    assert chosen[1][:3] == ["er on a", "model.lr=0.1, model.kind=x", "80.0"]
    assert chosen[1][4:] == ["3", "3", "30", frozen.hash[7:19]]
    assert rows(tmp_path / "tables" / "sensitivity-to-the-options.csv")[1] == ["er on a", "3", "80.0", "50.0", "30.0"]
    assert (tmp_path / "plots" / "sensitivity-er-on-a-model-lr.svg").is_file()  # and none of an option that is a text
    assert len(list((tmp_path / "plots").glob("sensitivity-*"))) == 1
    assert "Test samples took no part" in text

    path = selection.frozen_file(tmp_path, "a", "er")
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**content, "options": {"model.lr": 1.0}}))
    with pytest.raises(ValueError, match="its hash differs"):
        selection.freeze(tmp_path, trials, study, "a", "er")
    changed = {**content, "options": {"model.lr": 1.0}}
    path.write_text(yaml.safe_dump({**changed, "hash": selection.digest(changed)}))  # the storage knows the hash too
    with pytest.raises(ValueError, match="its hash differs"):
        selection.freeze(tmp_path, trials, study, "a", "er")
