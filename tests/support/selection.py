"""Which tests of each method depend on what has changed, by the imports of its files.

A test with the mark ``dependent`` runs for the methods that depend on a changed file, and for a rotating tenth of the
other methods (``support/rotation.py``). Changed are the files that differ from the commit with which the work began:
the commit that ``CL_LIGHTNING_BASE`` names, otherwise the newest common commit with the upstream branch or ``origin``.
Where there is no git, or no difference from that commit (a checkout of what has been pushed), nothing has changed.
Where there is no such commit, it is not known what has changed, and the tests run for all methods, as in
``make stress``.

A file depends on the files that it imports, and on the files that these import. An import of a name from a room counts
as an import from the file inside which the room takes the name, so that ``from cl_lightning.memory import Teacher``
does not depend on the replay memory.
"""

import ast
import inspect
import os
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cl_lightning.cli import discovery
from support import ROOT
from support.subjects import METHOD_OF, SUBJECTS, TESTS

BASE, AFFECTED, CHANGED = "CL_LIGHTNING_BASE", "CL_LIGHTNING_AFFECTED", "CL_LIGHTNING_CHANGED"
EVERYTHING = "*"
_WITHOUT_EFFECT = ("docs/", "benchmarks/", "LICENSE", ".gitignore", "ruff.toml")
_LINKED = ("callbacks", "datamodules")


def changed(root: Path = ROOT) -> frozenset[str] | None:
    """Files that differ from the base, relative to the checkout; None where there is no base."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()) != root.resolve():
            return frozenset()
        base = _base(git)
        if base is None:
            return None
        names = git("diff", "-z", "--name-only", "--no-renames", base) + git(
            "ls-files", "-z", "--others", "--exclude-standard"
        )
    except (OSError, subprocess.CalledProcessError):
        return frozenset()
    return frozenset(filter(None, names.split("\0")))


def _base(git: Any) -> str | None:
    chosen = os.environ.get(BASE)
    for name in [chosen] if chosen else ["@{upstream}", "origin/HEAD", "origin/main", "origin/master"]:
        try:
            return str(git("merge-base", "HEAD", name)).strip()
        except subprocess.CalledProcessError:
            if chosen:
                raise ValueError(f"{BASE}: there is no commit {chosen!r}; unset it, or name a commit") from None
    return None


class _Imports(NamedTuple):
    """What a file takes from others."""

    names: tuple[tuple[str, str], ...]
    """Module and name of each ``from module import name``."""
    modules: tuple[str, ...]
    """Modules of each ``import module``."""
    bound: dict[str, tuple[str, str]]
    """Module and name behind each name that the file binds by an import at its top level."""


class Graph:
    """The imports among the files of the package and of the tests.

    Args:
        root: The checkout.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self._files: dict[str, str] = {}  # module: file
        for top, prefix in (("cl_lightning", ""), ("callbacks", "cl_lightning."), ("datamodules", "cl_lightning.")):
            self._add(root, top, prefix)
        self._add(root / "tests", "", "")
        self._imports = {file: _imports(root / file, module) for module, file in self._files.items()}
        self._needs = {file: self._needs_of(file) for file in self._imports}

    def _add(self, base: Path, top: str, prefix: str) -> None:
        for path in sorted((base / top).rglob("*.py")):
            inside = path.relative_to(self.root)
            if inside.parts[0] == "cl_lightning" and inside.parts[1] in _LINKED:
                continue  # the same files by a link
            parts = path.relative_to(base).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            self._files[prefix + module] = str(inside)

    def affected(self, files: Iterable[str]) -> frozenset[str]:
        """The files that depend on any of these, and these themselves."""
        changed = set(files)
        found = changed & self._imports.keys()
        while more := {
            file
            for file, (followed, leaves) in self._needs.items()
            if file not in found and (followed & found or leaves & changed)
        }:
            found |= more
        return frozenset(found)

    def knows(self, file: str) -> bool:
        return file in self._imports

    def _needs_of(self, file: str) -> tuple[set[str], set[str]]:
        """Files that a file depends on together with all that they need, and files whose own text alone counts."""
        followed: set[str] = set()
        leaves: set[str] = set()
        for module in self._imports[file].modules:
            followed |= {self._files[module]} if module in self._files else set()
        for module, name in self._imports[file].names:
            self._resolve(module, name, followed, leaves)
        return followed - {file}, leaves - {file}

    def _resolve(self, module: str, name: str, followed: set[str], leaves: set[str]) -> None:
        """Add the file behind a name: a module of a package, or where a file takes the name from, or the file."""
        while True:
            if f"{module}.{name}" in self._files:
                followed.add(self._files[f"{module}.{name}"])
                return
            if module not in self._files:
                return
            home = self._files[module]
            if name not in self._imports[home].bound:
                followed.add(home)
                return
            leaves.add(home)
            module, name = self._imports[home].bound[name]


def _imports(path: Path, module: str) -> _Imports:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names, modules, bound = [], [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = _source(node, module, path.name == "__init__.py")
            names += [(source, alias.name) for alias in node.names]
            if node in tree.body:
                bound |= {alias.asname or alias.name: (source, alias.name) for alias in node.names}
    return _Imports(tuple(names), tuple(modules), bound)


def _source(node: ast.ImportFrom, module: str, package: bool) -> str:
    """Module of an import, absolute."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + package]
    return ".".join([*parts, *filter(None, [node.module])])


def affected(files: frozenset[str] | None, root: Path = ROOT) -> frozenset[str]:
    """The files that depend on changed files; ``{"*"}`` for everything.

    Args:
        files: Changed files; None where they are not known. A change of a file that is neither code nor known to have
            no effect on methods, such as ``setup.cfg``, and a removed file change everything.
    """
    if files is None:
        return frozenset({EVERYTHING})
    graph = Graph(root)
    known = set()
    for file in files:
        if (graph.knows(file) and file != "tests/conftest.py") or file.startswith("experiments/"):
            known.add(file)
        elif not (file.endswith(".md") or file.startswith(_WITHOUT_EFFECT)):
            return frozenset({EVERYTHING})
    return graph.affected(known) | {file for file in known if file.startswith("experiments/")}


@cache
def now() -> frozenset[str]:
    """The affected files of this run: found once, before the workers start, which inherit the answer."""
    if AFFECTED not in os.environ:
        files = changed()
        os.environ[CHANGED] = "\n".join(sorted(files or ()))
        os.environ[AFFECTED] = "\n".join(sorted(affected(files)))
    return frozenset(filter(None, os.environ[AFFECTED].split("\n")))


def changed_now() -> frozenset[str]:
    """The changed files of this run."""
    now()
    return frozenset(filter(None, os.environ.get(CHANGED, "").split("\n")))


def depends(files: Iterable[str], on: frozenset[str]) -> bool:
    """Whether any of the files is affected."""
    return EVERYTHING in on or not on.isdisjoint(files)


def file_of(cls: type) -> str:
    """File of a class of the package, relative to the checkout; callbacks and data modules by their real place."""
    return str(Path(inspect.getfile(cls)).resolve().relative_to(ROOT))


def files_of_config(path: Path) -> Iterator[str]:
    """A config of a method, and the file of its strategy."""
    yield str(path.relative_to(ROOT))
    model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
    name = (model if isinstance(model, str) else model["class_path"]).rpartition(".")[2]
    yield from (file_of(cls) for cls in discovery.strategies() if cls.__name__ == name)


def files_of_method(name: str) -> Iterator[str]:
    """Files of a subject of the conformance suite: its strategy and its test file."""
    yield file_of(SUBJECTS[name].factory.func)
    family, _, stem = METHOD_OF[name].partition("/")
    yield str((TESTS / family / f"test_{stem}.py").relative_to(ROOT))


def files_of_module(method: str) -> Iterator[str]:
    """Files of the strategies of a module, such as ``rehearsal/er``: the module and its test file."""
    for name, other in METHOD_OF.items():
        if other == method:
            yield from files_of_method(name)


def files_of(item: Any) -> Iterator[str]:
    """Files that a test is about: its own, and the files of the method that its parameter ``name`` names."""
    yield str(Path(item.path).relative_to(ROOT))
    yield from own_files_of(item)


def own_files_of(item: Any) -> Iterator[str]:
    """Files of the method that a test is about: its strategy and its test file, or the test's own file."""
    if (name := parameters(item).get("name")) in SUBJECTS:
        yield from files_of_method(name)
    else:
        yield str(Path(item.path).relative_to(ROOT))


def parameters(item: Any) -> dict[str, Any]:
    """Parameters of a test by name."""
    return dict(item.callspec.params) if hasattr(item, "callspec") else {}
