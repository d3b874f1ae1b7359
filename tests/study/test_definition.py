"""The file of a study: what it means, and the one line that a mistake gets."""

import pytest
from support.studies import PROGRAM, options_of, write

from cl_lightning.study.checking import check
from cl_lightning.study.command import main
from cl_lightning.study.definition import DefinitionError, parse

SPACES = {"er": {"model.level": [0.1, 0.2]}}
SELECT = {"data": "a", "trials": 2}


def made(**changes):
    return {"data": ["b"], "methods": ["finetune", "er"], **changes}


def test_cells_are_all_combinations_and_each_is_a_command():
    er = {"name": "small", "config": "er", "options": {"model.memory_size": 100, "trainer.max_epochs": 3}}
    data = ["b", {"name": "c", "config": "digits", "options": {"data.batch_size": 8}}]
    shared = {"trainer.max_epochs": 2, "model.optimizer": "SGD"}
    study = parse(made(data=data, methods=["finetune", er], seeds=2, options=shared), "folder/mine.yaml")
    assert study.name == "mine"
    assert [cell.name for cell in study.cells] == [
        f"{data}/{method}/seed_{seed}" for seed in (0, 1) for data in "bc" for method in ("finetune", "small")
    ]
    cell = study.cells[-1]
    assert study.arguments(cell.data, cell.method, cell.seed, {"model.optimizer.lr": 0.1}) == [
        *("fit", "--config", "digits", "--config", "er", "--model.optimizer=SGD", "--data.batch_size=8"),
        *("--model.memory_size=100", "--trainer.max_epochs=3", "--model.optimizer.lr=0.1", "--seed_everything=1"),
    ]


def test_a_study_is_the_same_after_it_was_written():
    select = {**SELECT, "seeds": [3, 4], "pruner": "median", "tasks": 2}
    spaces = {"er": {"model.level": [0.1, "x", None, True], "model.lr": {"low": 0.1, "high": 1.0, "log": True}}}
    study = parse(made(seeds=[5, 1], options={"trainer.max_epochs": 2}, spaces=spaces, select=select), "s.yaml")
    assert parse(study.to_dict(), "other.yaml") == study


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": ["er", "er"]}, "'er' twice, so that two cells are the same"),
        ({"methods": ["er", {"name": "other", "config": "er"}]}, "er and other are the same"),
        ({"seeds": [1, 1]}, "a seed twice, so that two cells are the same"),
        ({"seeds": []}, "give a list of integers"),
        ({"seeds": True}, "give a list of integers"),
        ({"data": []}, "data is missing"),
        ({"methdos": ["er"]}, "unknown key 'methdos'; did you mean 'methods'"),
        ({"methods": [{"name": "../er", "config": "er"}]}, "names a folder"),
        ({"options": {"run_dir": "x"}}, "run_dir is set by the study"),
        ({"options": {"--trainer.max_epochs": 1}}, "without dashes"),
        ({"baseline": "err"}, "did you mean 'er'"),
        ({"spaces": SPACES}, "there are spaces, and no select"),
        ({"select": SELECT}, "no spaces"),
        ({"spaces": {"eer": {}}, "select": SELECT}, "did you mean 'er'"),
        ({"spaces": {"er": {"model.level": [1]}}, "select": SELECT}, "at least two"),
        ({"spaces": {"er": {"model.level": [1, 1]}}, "select": SELECT}, "a value twice"),
        ({"spaces": {"er": {"model.level": {"low": 2, "high": 1}}}, "select": SELECT}, "low must be below high"),
        ({"spaces": {"er": {"model.level": {"low": 0, "high": 1, "log": True}}}, "select": SELECT}, "above 0"),
        ({"spaces": SPACES, "select": SELECT, "options": {"model.level": 1}}, "is searched, and set in options"),
        ({"spaces": SPACES, "select": {**SELECT, "split": "test"}}, "never on test data"),
        ({"spaces": SPACES, "select": {**SELECT, "score": "test_accuracy"}}, "test data select nothing"),
        ({"spaces": SPACES, "select": {**SELECT, "val_fraction": 0}}, "above 0"),
        ({"spaces": SPACES, "select": {"trials": 2}}, "give data, a stream whose classes"),
        ({"spaces": SPACES, "select": {"data": "a"}}, "give trials"),
        ({"spaces": SPACES, "select": {**SELECT, "sampler": "grid"}}, "remove trials"),
        ({"spaces": SPACES, "select": {"protocol": "first_tasks", "trials": 2}}, "takes tasks"),
        (
            {"spaces": {"er": {"model.level": {"low": 0, "high": 1}}}, "select": {"data": "a", "sampler": "grid"}},
            "needs a list of values for model.level",
        ),
        (
            {"spaces": SPACES, "select": {"data": "a", "sampler": "plasticity_first", "stability": {"er": "model.x"}}},
            "no space for 'model.x'",
        ),
    ],
)
def test_a_mistake_is_one_line(changes, said):
    with pytest.raises(DefinitionError, match=said) as caught:
        parse(made(**changes), "s.yaml")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("s.yaml: ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spaces": {"er": {"model.wrong": [1, 2]}}, "select": SELECT}, "spaces.er, on a: ER takes no 'wrong'"),
        ({"methods": [{"name": "er", "config": "er", "options": {"model.wrong": 1}}]}, "er on b: ER takes no 'wrong'"),
        (
            {"data": ["a"], "spaces": SPACES, "select": {**SELECT, "data": "a"}},
            "a and a share the classes 'a', 'b', 'c'",
        ),
        ({"spaces": SPACES, "select": {**SELECT, "tasks": 9}}, "tasks is 9; a has 3"),
        ({"spaces": SPACES, "select": {"protocol": "first_tasks", "tasks": 3, "trials": 2}}, "must not see all"),
    ],
)
def test_what_only_the_run_knows_is_one_line_before_anything_runs(changes, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, **changes)
    assert main(["s.yaml"], PROGRAM) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: study: ")
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "studies").exists()


def test_methods_of_the_same_configuration_are_the_same_cell():
    program = PROGRAM.__class__("x", PROGRAM.run, lambda arguments: describe_alike(arguments))
    with pytest.raises(DefinitionError, match="finetune and er have the same configuration"):
        check(parse(made(), "s.yaml"), program)


def describe_alike(arguments):
    assert options_of(arguments)["seed_everything"] == "0"
    return PROGRAM.describe(["fit"])


def test_a_storage_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    assert main(["s.yaml", "--storage", f"sqlite:///{tmp_path}/none/x.sqlite3"], PROGRAM) == 2
    error = capsys.readouterr().err
    assert "cannot be reached (unable to open database file)" in error
    assert error.count("\n") == 1


def test_a_password_is_in_no_message(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    assert main(["s.yaml", "--storage", "nodatabase://me:secret@host/x"], PROGRAM) == 2
    error = capsys.readouterr().err
    assert "nodatabase://me@host/x" in error
    assert "secret" not in error
