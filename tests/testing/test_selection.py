"""Which files depend on a changed file, and what has changed."""

import subprocess

import pytest
from support import selection

FILES = {
    "cl_lightning/__init__.py": "",
    "cl_lightning/memory/__init__.py": "from .a import A\nfrom cl_lightning.memory.b import B\nC = 1",
    "cl_lightning/memory/a.py": "A = 1",
    "cl_lightning/memory/b.py": "from .c import D as B",
    "cl_lightning/memory/c.py": "D = 1",
    "cl_lightning/door.py": "from cl_lightning.memory import A\nfrom cl_lightning.memory import B as Other",
    "cl_lightning/one.py": "from cl_lightning.door import A",
    "cl_lightning/two.py": "def f():\n    from cl_lightning.door import Other",
    "cl_lightning/three.py": "from cl_lightning import memory",
    "cl_lightning/four.py": "import cl_lightning.one",
    "callbacks/__init__.py": "",
    "callbacks/five.py": "from cl_lightning.memory import C",
    "tests/support/six.py": "from cl_lightning.callbacks.five import x",
    "tests/testing/test_seven.py": "from support.six import y\nfrom support import six",
}


@pytest.fixture
def checkout(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "dependents"),
    [
        ("cl_lightning/memory/a.py", "memory/__init__ door one four three callbacks/five support/six test_seven"),
        ("cl_lightning/memory/c.py", "memory/__init__ memory/b door two three callbacks/five support/six test_seven"),
        ("cl_lightning/door.py", "one two four"),
        ("callbacks/five.py", "support/six test_seven"),
        ("tests/testing/test_seven.py", ""),
    ],
)
def test_a_file_depends_on_what_it_imports_but_a_name_from_a_room_only_on_its_file(checkout, file, dependents):
    found = selection.affected(frozenset({file}), checkout) - {file}
    names = dependents.split()
    assert len(found) == len(names)
    assert all(any(path.endswith(f"{name}.py") for path in found) for name in names), found


@pytest.mark.parametrize("file", ["setup.cfg", "cl_lightning/removed.py", "tests/conftest.py", "tests/data.bin"])
def test_a_change_whose_effect_is_not_known_affects_everything(checkout, file):
    (checkout / "tests" / "conftest.py").write_text("")
    affected = selection.affected(frozenset({file, "callbacks/five.py"}), checkout)
    assert selection.depends(["cl_lightning/one.py"], affected)
    assert selection.depends([], selection.affected(None, checkout))


def test_documentation_affects_no_method(checkout):
    files = frozenset({"README.md", "docs/rooms.py", "experiments/methods/rehearsal/er.yaml"})
    assert selection.affected(files, checkout) == {"experiments/methods/rehearsal/er.yaml"}


def git(folder, *arguments):
    author = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(folder), *author, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_changed_is_what_differs_from_the_base_committed_or_not(checkout, monkeypatch):
    monkeypatch.delenv(selection.BASE, raising=False)
    assert selection.changed(checkout) == frozenset()  # no repository
    git(checkout, "init", "-q", "-b", "main")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "first")
    assert selection.changed(checkout) is None  # no base
    base = git(checkout, "rev-parse", "HEAD")
    git(checkout, "update-ref", "refs/remotes/origin/main", base)
    assert selection.changed(checkout) == frozenset()  # no difference: all has been pushed
    (checkout / "cl_lightning" / "one.py").write_text("x = 1")
    (checkout / "cl_lightning" / "new é.py").write_text("")
    assert selection.changed(checkout) == {"cl_lightning/one.py", "cl_lightning/new é.py"}
    git(checkout, "add", ".")
    git(checkout, "mv", "cl_lightning/two.py", "cl_lightning/moved.py")
    git(checkout, "commit", "-q", "-m", "second")
    moved = {"cl_lightning/two.py", "cl_lightning/moved.py"}
    assert selection.changed(checkout) == {"cl_lightning/one.py", "cl_lightning/new é.py"} | moved
    monkeypatch.setenv(selection.BASE, "HEAD")
    assert selection.changed(checkout) == frozenset()
    monkeypatch.setenv(selection.BASE, "nowhere")
    with pytest.raises(ValueError, match="CL_LIGHTNING_BASE: there is no commit 'nowhere'"):
        selection.changed(checkout)
    assert selection.changed(checkout / "tests") == frozenset()  # not the top of the repository


def test_the_graph_of_this_checkout_knows_what_methods_take_from_rooms():
    graph = selection.Graph()
    teacher = graph.affected(["cl_lightning/memory/teacher.py"])
    assert "cl_lightning/strategies/exemplar_free/lwf.py" in teacher
    assert "cl_lightning/strategies/rehearsal/er.py" not in teacher
    assert "cl_lightning/strategies/rehearsal/er.py" in graph.affected(["cl_lightning/strategies/base/replay.py"])
    every = "tests/testing/test_every_strategy.py"
    assert every in graph.affected(["cl_lightning/batch.py"])
    assert every not in graph.affected(["cl_lightning/strategies/rehearsal/er.py"])
    assert every not in graph.affected(["callbacks/ema_ensemble.py"])
