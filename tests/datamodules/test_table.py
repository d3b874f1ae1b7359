from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cl_lightning import cli
from cl_lightning.data.tables import quantile_bins
from cl_lightning.datamodules.table import Table
from cl_lightning.stream import ClassIncremental

pd = pytest.importorskip("pandas", reason="pandas is not installed: pip install 'cl-lightning[tables]'")


def frame(rows: int = 60) -> Any:
    """Classes a, b, c in turn; a column of numbers with gaps, one of categories, and a domain by halves."""
    random = np.random.default_rng(0)
    age = random.normal(40, 10, rows)
    age[::7] = np.nan
    colour = np.array(["red", "green", None], dtype=object)[random.integers(0, 3, rows)]
    kind = np.array(["a", "b", "c"])[np.arange(rows) % 3]
    place = np.array(["north", "south"])[np.arange(rows) * 2 // rows]
    return pd.DataFrame({"age": age, "colour": colour, "kind": kind, "place": place, "id": np.arange(rows)})


def table(tmp_path: Path, content: Any = None, name: str = "t.csv", **options: Any) -> Table:
    path = tmp_path / name
    content = frame() if content is None else content
    {".csv": content.to_csv, ".parquet": content.to_parquet}[path.suffix](path, index=False)
    return Table(str(path), **{"target": "kind", "drop": ["id"], **options})


def test_preprocessing_is_fitted_on_the_first_task_alone(tmp_path):
    data = table(tmp_path, scenario=ClassIncremental(sizes=[1, 2]), categorical=["colour", "place"])
    stream = data.make_stream(3)
    assert stream.class_names == ("a", "b", "c")
    source, plain = data.samples(train=True), frame()
    first = stream.train[0]
    rows = source.take(torch.as_tensor(first.copy())).double().numpy()
    # The training rows in the order of the file: those that are no test samples.
    held = data._held_out(np.arange(60) % 3, None)
    inputs = plain[~held].reset_index(drop=True)
    known = inputs.iloc[first]
    assert set(known["kind"]) == {"a"}
    age = inputs["age"].fillna(known["age"].median())
    expected = (age - age.iloc[first].mean()) / age.iloc[first].std(ddof=0)
    every = source.take(torch.arange(len(inputs))).double().numpy()
    np.testing.assert_allclose(every[:, 0], expected, rtol=1e-5, atol=1e-6)
    assert abs(rows[:, 0].mean()) < 1e-6
    colours = sorted({"(missing)" if value is None or value != value else value for value in known["colour"]})
    for place, colour in enumerate(colours):
        same = inputs["colour"].isna() if colour == "(missing)" else inputs["colour"] == colour
        np.testing.assert_array_equal(every[:, 1 + place], same.to_numpy().astype(float))
    assert data.image_shape == (1 + len(colours) + 2,)


def test_a_category_that_the_first_task_lacks_is_all_zeros(tmp_path):
    content = frame()
    content.loc[content["kind"] != "a", "colour"] = "blue"
    content.loc[content["kind"] == "a", "colour"] = "red"
    data = table(tmp_path, content, scenario=ClassIncremental(sizes=[1, 2]), drop=["id", "place", "age"])
    stream = data.make_stream(0)
    values = data.samples(train=True).take(torch.as_tensor(np.concatenate(stream.train)))
    assert data.image_shape == (1,)
    assert values.flatten().tolist() == [1.0] * len(stream.train[0]) + [0.0] * len(stream.train[1])


def test_test_rows_are_a_share_of_each_class_and_depend_on_the_seed(tmp_path):
    data = table(tmp_path, test_fraction=0.25)
    data.make_stream(0)
    train, test = data.samples(train=True), data.samples(train=False)
    assert np.bincount(train.labels).tolist() == [15, 15, 15]
    assert np.bincount(test.labels).tolist() == [5, 5, 5]
    again, other = table(tmp_path, test_fraction=0.25), table(tmp_path, test_fraction=0.25)
    again.make_stream(0)
    other.make_stream(1)
    assert data.fingerprint(0) == again.fingerprint(0) != other.fingerprint(0)


def test_a_file_of_test_samples_has_the_classes_of_the_training_samples(tmp_path):
    frame(9).to_csv(tmp_path / "test.csv", index=False)
    data = table(tmp_path, test=str(tmp_path / "test.csv"))
    data.make_stream(0)
    assert len(data.samples(train=True).labels), len(data.samples(train=False).labels) == (60, 9)
    content = frame(9)
    content.loc[0, "kind"] = "d"
    content.to_csv(tmp_path / "test.csv", index=False)
    with pytest.raises(ValueError, match="label d of sample 60 is no class of the training samples"):
        table(tmp_path, test=str(tmp_path / "test.csv")).make_stream(0)
    frame(9).drop(columns="colour").to_csv(tmp_path / "test.csv", index=False)
    with pytest.raises(ValueError, match="lacks the column 'colour'"):
        table(tmp_path, test=str(tmp_path / "test.csv")).make_stream(0)


def test_domains_are_the_values_or_the_quantiles_of_a_column(tmp_path):
    data = table(tmp_path, domain="place")
    stream = data.make_stream(0)
    assert [task.name for task in stream.tasks] == ["place north", "place south"]
    assert data.image_shape == (1 + 3,)  # the domain is no input
    binned = table(tmp_path, frame(), domain="id", domain_bins=3, drop=None)
    stream = binned.make_stream(0)
    assert [task.name for task in stream.tasks] == ["id 0 to 19.67", "id 19.67 to 39.33", "id 39.33 to 59"]
    assert [len(part) + len(held) for part, held in zip(stream.train, stream.test, strict=True)] == [20, 20, 20]
    numbers, _ = quantile_bins(np.array([5.0, 1.0, 3.0, 2.0]), np.ones(4, dtype=bool), 2, "x")
    assert numbers.tolist() == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="'x' has too few different values for 3 domains"):
        quantile_bins(np.array([1.0, 1.0, 1.0, 2.0]), np.ones(4, dtype=bool), 3, "x")


def test_parquet_gives_the_same_stream_as_csv(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'cl-lightning[tables]'")
    first, second = table(tmp_path), table(tmp_path, name="t.parquet")
    for data in (first, second):
        data.make_stream(0)
    rows = torch.arange(48)
    torch.testing.assert_close(*(data.samples(train=True).take(rows) for data in (first, second)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "knd"}, r"no column 'knd' \(the class\); do you mean 'kind'\?"),
        ({"target": "colour"}, r"has no value in the column 'colour' \(the class\); fill it or remove the row"),
        ({"domain": "colour"}, "has no value in the column 'colour'"),
        ({"drop": ["idd"]}, r"no column 'idd' \(to leave out\); do you mean 'id'"),
        ({"numeric": ["colour"]}, "the column 'colour' is numeric, and row . has '(red|green)'; name the column in"),
        ({"numeric": ["ages"]}, r"no column 'ages' \(an input\); do you mean 'age'"),
        ({"drop": ["id", "age", "colour", "place"]}, "nothing is left"),
        ({"domain": "place", "domain_bins": 2}, "the column 'place' has no numbers; leave domain_bins out"),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        table(tmp_path, **options).make_stream(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_fraction": 0.0}, "test_fraction is 0.0"),
        ({"domain_bins": 1, "domain": "x"}, "domain_bins is 1"),
        ({"domain_bins": 2}, "there is no domain; give the column as domain"),
        ({"numeric": ["x"], "categorical": ["x"]}, "'x' is in numeric and in categorical"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Table("t.csv", **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "no file"),
        ("t.txt", b"a,b\n1,2\n", "ends with .txt; give a .csv, .tsv or .parquet file"),
        ("t.csv", b"", "cannot be read as a table"),
        ("t.csv", b"a,kind\n", "has no rows"),
        ("t.csv", b"\xff\xfe\x00\x01", "cannot be read as a table"),
        ("t.parquet", b"PAR1 no table", "cannot be read as a table"),
    ],
)
def test_files_that_are_no_tables_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Table(str(tmp_path / name), target="kind").make_stream(0)
    with pytest.raises(ValueError, match="no table 'boston' without download; use breast_cancer, diabetes, digits"):
        Table("sklearn:boston").make_stream(0)


def test_a_table_of_scikit_learn_is_learnt_by_domains_and_resumed(tmp_path):
    arguments = [
        *("fit", "--config", "table_domains", "--config", "er", "--model.backbone", "TableResNet"),
        *("--trainer.max_epochs", "5", "--trainer.accelerator", "cpu", "--loop.stop_after_task", "1"),
        *("--run_dir", str(tmp_path / "run")),
    ]
    assert cli.main(arguments) == 0
    assert cli.main([*arguments[:-4], *arguments[-2:], "--ckpt_path", "last"]) == 0
    import json

    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["finished"] == 4
    assert results["measures"]["average_accuracy"] > 0.85  # .95 measured; the larger class is .63
