"""Manifests and configurations of streams."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from support.streams import data

from cl_lightning.stream import (
    Blurry,
    ClassIncremental,
    FewShot,
    FromManifest,
    LabelFraction,
    LongTailed,
    NoisyLabels,
    Online,
    PowerLawRehearsal,
    RotatedDomains,
    Scenario,
    Stream,
)

# Manifests


def manifest() -> Stream:
    scenario = LabelFraction(RotatedDomains(degrees=[0, 22.5], share="split"), 0.5)
    return replace(scenario(data(3, 6), seed=-1, val_fraction=0.25), batch_size=4)


def test_a_manifest_file_comes_back_and_is_the_scenario_of_itself(tmp_path: Path) -> None:
    stream, path = manifest(), tmp_path / "stream.json"
    stream.save(path)
    stream.save(path)  # over itself
    assert Stream.load(path) == stream
    assert FromManifest(str(path))(data(3, 6), seed=9) == stream
    assert [item.name for item in tmp_path.iterdir()] == ["stream.json"]
    online = Online(FromManifest(str(path)))(data(3, 6), seed=9)
    assert online.hashes == stream.hashes
    with pytest.raises(ValueError, match="use the scenario that made the stream"):
        Online(FromManifest(str(path))).extend(online, data(4), seed=0)


def test_a_manifest_of_other_data_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "stream.json"
    info = data(4, 6)
    ClassIncremental(tasks=2)(info, seed=0).save(path)
    load = FromManifest(str(path))
    with pytest.raises(ValueError, match=r"stream\.json: Stream: task \d: train has index 23; the data has 23 samples"):
        load(replace(info, train_labels=info.train_labels[:-1]), seed=0)
    with pytest.raises(ValueError, match=r"task 1: test has index 15; the data has 15 samples"):
        load(replace(info, test_labels=info.test_labels[:-1]), seed=0)
    with pytest.raises(ValueError, match=r"class 0 \(column 0\) is 'class 0' in the stream and 'c 0' in the data"):
        load(data(4, 6, names="c {}"), seed=0)
    with pytest.raises(ValueError, match=r"class 3 \(column 3\) is 'class 3' in the stream and None in the data"):
        load(data(3, 6), seed=0)
    with pytest.raises(ValueError, match=r"task 0: train has sample \d+ of class 'class \d', which does not belong"):
        load(data(4, 6, shuffle=1), seed=0)


def _set(path: str, value: Any) -> Any:
    def change(content: dict[str, Any]) -> None:
        *way, last = [int(key) if key.isdecimal() else key for key in path.split(".")]
        place: Any = content
        for key in way:
            place = place[key]
        place[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format", "zip"), "format: is 'zip'"),
        (_set("version", 2), "version: is 2; this release reads version 1"),
        (_set("version", True), "version: must be int, got bool"),
        (lambda content: content.pop("order"), "order: the field is missing"),
        (_set("order.0", 2), "order: is not the order"),
        (_set("class_names", ["a", "b"]), "class_names: 2 names for 3 columns"),
        (_set("class_names", ["a", "b", "b"]), "class_names: 'b' is given twice"),
        (_set("class_names.1", "x"), "task 0: hash: does not match"),
        (_set("tasks", []), "tasks: must hold at least one"),
        (_set("tasks.1.train.0", 0.5), "task 1: train: must hold int only, got float"),
        (_set("tasks.1.train.0", True), "task 1: train: must hold int only, got bool"),
        (_set("tasks.1.train.0", 10**30), "task 1: train: an index is beyond 64 bits"),
        (_set("tasks.1.train.0", -1), "task 1: train has the negative index -1"),
        (_set("tasks.1.train.0", 10**6), "task 1: unlabelled has samples that are not in train|task 1: hash"),
        (_set("tasks.1.train", []), "task 1: train is empty"),
        (_set("tasks.1.val", [0, 0]), "task 1: val has an index twice"),
        (_set("tasks.1.test", None), "task 1: test: must be list, got NoneType"),
        (_set("tasks.1.test.0", 1000), "task 1: hash: does not match"),
        (_set("tasks.1.name", "x"), "task 1: hash: does not match"),
        (_set("tasks.1.classes", [0, 0]), "task 1: classes: has a label twice"),
        (_set("tasks.1.index", 0), "task 1: index: is 0; tasks must be in order"),
        (_set("tasks.1.shift", ["rotate", 23]), "task 1: hash: does not match"),
        (_set("tasks.1.shift", ["shear", 23]), "task 1: shift: Shift: kind 'shear'"),
        (_set("tasks.1.shift", ["rotate", 10**400]), "task 1: shift: "),
        (_set("tasks.1.shift", ["rotate"]), "task 1: shift: must be null or"),
        (_set("tasks.1", 3), "tasks: must hold dict only, got int"),
        (_set("parts", []), "parts: must hold at least one"),
        (_set("parts.0.tasks", 3), "parts: their tasks add up to 3, the stream has 2"),
        (_set("parts.0.val_fraction", 1), "part 0: val_fraction: must be at least 0 and below 1"),
        (_set("passes", 0), "passes: must be at least 1"),
        (_set("batch_size", "many"), "batch_size: must be int or null, got str"),
        (_set("one_pass", 1), "one_pass: must be bool, got int"),
        (_set("scenario", []), "scenario: must be dict, got list"),
    ],
)
def test_the_error_of_a_changed_manifest_names_file_task_and_field(change: Any, message: str, tmp_path: Path) -> None:
    content, path = manifest().to_dict(), tmp_path / "stream.json"
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"^[^\n]*stream\.json: ({message})[^\n]*$"):
        Stream.load(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"NaN", b"[" * 100000, b"9" * 5000, b'{"version": 1}', b'{"passes": NaN}'],
)
def test_a_file_that_is_no_manifest_is_reported(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "stream.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]*stream\.json: [^\n]+$"):
        Stream.load(path)
    with pytest.raises(ValueError, match=r"^[^\n]*absent\.json: cannot be read: [^\n]+$"):
        Stream.load(tmp_path / "absent.json")


def _spots(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(spot for key, item in items for spot in _spots(item, (*way, key)))]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.data(), JSON)
def test_whatever_a_manifest_holds_nothing_but_value_error_comes_of_it(draw: st.DataObject, value: Any) -> None:
    content: Any = manifest().to_dict()
    *way, last = draw.draw(st.sampled_from(_spots(content)[1:]))
    place = content
    for key in way:
        place = place[key]
    place[last] = value
    problem = ""
    try:
        Stream.from_dict(json.loads(json.dumps(content))).check(data(3, 6))
    except ValueError as error:
        problem = str(error)
    assert "\n" not in problem


# Configuration


@pytest.mark.parametrize(
    "scenario",
    [
        ClassIncremental(first=4, increment=2, class_order=1993),
        ClassIncremental(tasks=2, class_order=["b", "a"]),
        ClassIncremental(sizes=[1, 2], class_order=[1, 0, 2]),
        FewShot(4, 2, 1, [[1, 2], [3, 4]], "random"),
        FewShot(4, 2, 1, "lists.json"),
        LabelFraction(LongTailed(Online(RotatedDomains(degrees=[0.0, 7.5])), 20.0, "shuffled"), per_class=3),
        Blurry(3, 40.0, 20.0, one_pass=False),
        FromManifest("stream.json"),
        NoisyLabels(PowerLawRehearsal(ClassIncremental(tasks=2), 0.5, "exponential", 2.0), 0.2, "asymmetric"),
    ],
)
def test_a_scenario_is_configured_by_its_description(scenario: Scenario) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--scenario", type=Scenario)
    told = json.dumps(scenario.describe())
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
    assert instantiate(parser.parse_args(["--scenario", told])).scenario == scenario
