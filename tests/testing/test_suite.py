"""What the suite itself relies on: the choice of rotating tests, and the seconds of each method."""

from types import SimpleNamespace

import pytest
from support import ROOT, costs, rotation
from support.subjects import METHOD_OF, SUBJECTS

from cl_lightning.cli import discovery
from cl_lightning.testing import check_strategy

NAMES = [f"method {number}" for number in range(20)]


def chosen(seed, count=4, affected=frozenset(), **options):
    """Names that run, where a test of 20 names rotates."""
    mark = pytest.mark.rotating(count, **options).mark
    items = [
        SimpleNamespace(
            path="file",
            originalname="test",
            callspec=SimpleNamespace(id=name, params={"name": name}),
            get_closest_marker=lambda _: mark,
        )
        for name in NAMES
    ]
    left_out = rotation.left_out(items, seed, affected)
    return {item.callspec.id for item in items if item not in left_out}


def test_as_many_are_chosen_as_the_mark_says_and_the_same_each_time():
    assert len(chosen("2026-11-30")) == 4
    assert chosen("2026-11-30") == chosen("2026-11-30") != chosen("2026-12-01")
    assert chosen("all") == set(NAMES)


def test_all_have_their_turn():
    assert set().union(*(chosen(f"2026-11-{day}") for day in range(40))) == set(NAMES)


def test_each_group_has_as_many():
    def tens(name):
        return len(name)

    found = chosen("2026-11-30", 2, each=tens)
    assert sorted(map(len, found)) == [8, 8, 9, 9]


def test_what_depends_on_a_change_is_among_the_chosen():
    def files(name):
        return [f"{name}.py"]

    late = sorted(set(NAMES) - chosen("2026-11-30"))[:3]
    found = chosen("2026-11-30", affected=frozenset(f"{name}.py" for name in late), of=files)
    assert len(found) == 4
    assert found > set(late)
    assert chosen("2026-11-30", affected=frozenset("*"), of=files) == chosen("2026-11-30")


def dependent(seed, affected, changed=()):
    """Subjects for which a dependent test runs."""
    items = [
        SimpleNamespace(
            path=ROOT / "tests" / "testing" / "test_every_strategy.py",
            callspec=SimpleNamespace(params={"name": name}),
            get_closest_marker=lambda kind: kind == "dependent" or None,
        )
        for name in SUBJECTS
    ]
    left_out = rotation.left_out(items, seed, frozenset(affected), frozenset(changed))
    return {item.callspec.params["name"] for item in items if item not in left_out}


def test_of_methods_that_depend_on_no_change_each_has_its_turn_within_ten_days():
    turns = [dependent(f"2026-11-{day}", []) for day in range(10, 20)]
    assert sorted(name for turn in turns for name in turn) == sorted(SUBJECTS)
    assert max(map(len, turns)) < len(SUBJECTS) / 3
    assert dependent("all", []) == set(SUBJECTS)


def test_a_change_that_concerns_many_methods_tests_those_that_have_changed_and_others_in_turn(monkeypatch):
    monkeypatch.setattr(rotation, "MOST", 8)
    own = [f"cl_lightning/strategies/rehearsal/{stem}.py" for stem in ("wa", "er", "gdumb")]
    days = [dependent(f"2026-11-{day}", "*", own) for day in range(10, 20)]
    assert all({"WA", "ER", "GDumb"} <= day for day in days)
    assert max(map(len, days)) <= 8 + max(len(dependent(f"2026-11-{day}", [])) for day in range(10, 20))
    assert min(map(len, days)) >= 8
    assert len({frozenset(day) for day in days}) == 10
    monkeypatch.setattr(rotation, "MOST", len(SUBJECTS))
    assert dependent("2026-11-30", "*") == set(SUBJECTS)


def test_a_method_depends_on_its_strategy_its_test_and_the_test_for_all():
    for file in ("cl_lightning/strategies/rehearsal/wa.py", "tests/strategies/rehearsal/test_wa.py"):
        assert dependent("2026-11-30", [file]) == dependent("2026-11-30", []) | {"WA"}
    assert len(dependent("2026-11-30", ["tests/testing/test_every_strategy.py"])) >= min(rotation.MOST, len(SUBJECTS))


def test_variants_that_pass_the_suite_in_the_test_of_their_method_have_their_turn_with_it():
    def conforms():
        check_strategy(None)

    def learns():
        pass

    path = ROOT / "tests" / "strategies" / "rehearsal" / "test_wa.py"
    suite, other = (
        SimpleNamespace(path=path, function=function, get_closest_marker=lambda _: None)
        for function in (conforms, learns)
    )
    days = [f"2026-11-{day}" for day in range(10, 20)]
    assert sum(suite not in rotation.left_out([suite, other], day, frozenset()) for day in days) == 1
    for day in days:
        for affected in ("*", "tests/strategies/rehearsal/test_wa.py"):  # which depends on the file of the method
            assert suite not in rotation.left_out([suite, other], day, frozenset({affected}))
    assert not rotation.left_out([suite], "all", frozenset())


def test_methods_whose_own_files_have_not_changed_are_tested_in_turn():
    items = {
        stem: SimpleNamespace(
            path=ROOT / "tests" / "strategies" / "rehearsal" / f"test_{stem}.py",
            function=None,
            get_closest_marker=lambda _: None,
        )
        for stem in ("er", "wa", "gem", "gdumb", "icarl", "bic", "foster", "fdr")
    }
    shared = SimpleNamespace(path=ROOT / "tests" / "loop" / "test_x.py", get_closest_marker=lambda _: None)

    def run(day, changed=()):
        left_out = rotation.left_out([*items.values(), shared], day, frozenset("*"), frozenset(changed))
        assert shared not in left_out
        return {stem for stem, item in items.items() if item not in left_out}

    days = [f"2026-11-{day}" for day in range(10, 10 + rotation.DAYS)]
    assert sorted(stem for day in days for stem in run(day)) == sorted(items)
    assert all(run(day) for day in days)
    for file in ("cl_lightning/strategies/rehearsal/wa.py", "tests/strategies/rehearsal/test_wa.py"):
        assert all("wa" in run(day, [file]) for day in days)
    assert run("all") == set(items)


def test_a_failure_says_how_to_repeat_it():
    item = SimpleNamespace(nodeid="tests/test_x.py::test_y[er]@tests/test_x.py", get_closest_marker=lambda _: object())
    expected = f"CL_LIGHTNING_ROTATION={rotation.ROTATION} python -m pytest 'tests/test_x.py::test_y[er]'"
    assert rotation.how_to_repeat(item) == expected


def test_a_method_above_the_limit_is_an_error_unless_its_file_says_why(monkeypatch):
    monkeypatch.setattr(costs, "_reason", lambda method: None)
    totals = costs.Totals()
    spent = (("rehearsal/er", 9.0), ("rehearsal/er", 8.0), ("rehearsal/wa", 9.0), ("rehearsal/gem", 8.0), (None, 100.0))
    for method, seconds in spent:
        totals.add(SimpleNamespace(cost=seconds, method=method, piece=costs.PIECE))
    assert totals.too_slow() == ["rehearsal/er", "rehearsal/wa"]
    lines = list(totals.summary())
    assert "34 s for 3 methods, 11.3 s each; 100 s for the rest" in lines[0]
    assert "rehearsal/er 17.0 s, rehearsal/wa 9.0 s" in lines[1]
    assert lines[2].startswith("error: the tests of rehearsal/er take 17.0 s; the limit is 8 s")
    assert lines[3].startswith("note: the tests of rehearsal/wa take 9.0 s")
    assert totals.fails()
    monkeypatch.setattr(costs, "_reason", lambda method: "it has to")
    assert not totals.fails()
    totals.add(SimpleNamespace(cost=15.0, method="exemplar_free/efc", piece=None))  # two strategies
    assert totals.too_slow() == []


def test_seconds_do_not_depend_on_the_machine():
    totals = costs.Totals()
    for _ in range(3):  # on a machine that takes three times as long
        totals.add(SimpleNamespace(cost=8.0, method="rehearsal/er", piece=3 * costs.PIECE))
    totals.add(SimpleNamespace(cost=0.0, method=None, piece=50 * costs.PIECE))  # once, it was interrupted
    assert totals.seconds["rehearsal/er"] == pytest.approx(8.0)
    assert not totals.fails()


def test_time_that_was_counted_is_not_counted_again_when_processes_end(monkeypatch):
    clock = SimpleNamespace(user=0.0, system=0.0, children_user=0.0, children_system=0.0)
    monkeypatch.setattr(costs, "_elsewhere", 0.0)
    monkeypatch.setattr(costs, "_last", 0.0)
    monkeypatch.setattr(costs.os, "times", lambda: clock)
    costs.spent_elsewhere(3.0)
    clock.user = 1.0
    with costs.children_not_counted():
        clock.children_user = 3.0
    assert costs.lap() == 4.0


def test_the_piece_of_work_is_timed_now_and_then(monkeypatch):
    monkeypatch.setattr(costs, "_calls", 0)
    found = [costs.piece_now_and_then() for _ in range(2 * costs.EVERY)]
    assert [number for number, seconds in enumerate(found, start=1) if seconds] == [costs.EVERY, 2 * costs.EVERY]


def test_every_strategy_is_a_subject():
    assert {subject.factory.func for subject in SUBJECTS.values()} == set(discovery.strategies())
    assert METHOD_OF["ER(replay_by=loader)"] == METHOD_OF["ER"] == "rehearsal/er"
    assert METHOD_OF["PASS"] == "exemplar_free/pass"
    assert SUBJECTS["ER"].name == "ER"
    assert not SUBJECTS["ER"].first_task_is_finetuning
    assert SUBJECTS["ER"].reason
