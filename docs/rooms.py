"""The rooms of the package, from top to bottom, and the check that every import goes down.

    python docs/rooms.py

prints each import of a room above, each import in ``FORBIDDEN``, each import from a file of another room although the
room itself exports the name, each circle of imports, and each file that ``ROOMS`` lists wrongly or does not list; exit
code 1 if there is any. ``docs/generate.py`` writes the
table of ``docs/design.md`` from ``ROOMS``.
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "cl_lightning"


class Room(NamedTuple):
    """A folder or a module of the package, its purpose, and its content."""

    name: str
    purpose: str
    holds: str


ROOMS = (
    Room("api", "the Python front door", "(porch)"),
    Room(
        "cli",
        "the command line",
        "main, arguments, configs, processes, commands, parsing, trust, prediction, discovery, described, listing, "
        "shorthand",
    ),
    Room(
        "study",
        "many runs in one command",
        "command, definition, program, checking, storage, selection, worker, warm, progress, page",
    ),
    Room(
        "testing",
        "the conformance suite, for our methods and users' own",
        "checks, bench, pair, compare, task_free, targets",
    ),
    Room(
        "loop",
        "the task loop, checkpoints and results",
        "task_loop, hooks, run_files, task_lines, run (position, restore), options, lightning_support, dry_run, "
        "checkpoint, stopping, nan_guard, fast_step, warning_filters, run_lock, logging, results, logger_guard, "
        "checkpoint_parts, process_state, option_changes",
    ),
    Room("callbacks", "mechanisms that cut across methods, one file each", "(top-level folder)"),
    Room("datamodules", "sources of data, one file each, over one base", "(top-level folder)"),
    Room("callback", "hooks of a callback for the start and the end of a task", "(porch)"),
    Room("strategies", "methods, one file each", "a folder per family"),
    Room("strategy", "all names that a method imports from the base", "(porch)"),
    Room(
        "strategies.base",
        "the base class of methods and its parts",
        "strategy, replay, task_incremental, phases, schedules, optimizers, terms, passes, evaluation, traits, "
        "host, gradients, exemplars, expanding, virtual, second_pass, rehearse, alternating_rate, inner_adam, "
        "unlearning, stream_schedules",
    ),
    Room(
        "data",
        "from files to augmented tensors",
        "sources, images, loaders, transforms, auto_augment, aug_mix, pixels, corruptions, rotations, feature_pool, "
        "feature_cache, arrays, samples, standardize, tables, joined, files, datasets, decoding, labels, scaling, "
        "shifts, layout, balance, cut_mix, levels, targets, shared, labelled",
    ),
    Room(
        "report",
        "tables, plots and pages of finished runs",
        "command, runs, unfinished, fields, comparison, statistics, tables, plots, page, single, several, cards, parts",
    ),
    Room(
        "measures",
        "accuracy matrix, measures and cost of a run",
        "accuracy, scores, matrix, functional, curves, cost, compatibility, plasticity, clusters, speed, unlearning",
    ),
    Room("optim", "optimizers that any strategy takes", "default, sam, upgd, alternating"),
    Room(
        "memory",
        "samples, prototypes, networks and importances kept from earlier tasks",
        "replay, policies, herding, prototypes, class_statistics, drift, teacher, importance, paths, sensitivity, "
        "consolidation, owners, input_spaces, growing, accounting, mean_covariance, budget, slots, weight_space, "
        "sample_importance, dual_spaces, hyper_domains, category_balanced, task_memories",
    ),
    Room(
        "models",
        "modules with parameters: backbones, heads, adapters",
        "backbones, background_head, residual, weights, convnet, heads, growing, text_head, closed_form, network, "
        "normalization, prompts, expert_prompts, expansion, masks, svm, consolidated_head, cut, energy_head, kmeans, "
        "max_margin, null_space, pixels, random_layer, simplex_head, vae, mean_head, mixture, dependence, domain_head, "
        "transport, vectors, task_head, task_networks, clustering, `peft/` (a file per mechanism)",
    ),
    Room("losses", "functions of logits, features, labels", "classification, distillation, contrastive, targets"),
    Room(
        "stream",
        "the samples of each task; pure numpy",
        "tasks, core, scenarios, modifiers, rehearsal, requests, levels, label_sets, domains, dealing, manifest, draws",
    ),
    Room("batch", "a batch and its random numbers", "(porch)"),
    Room("distributed", "sums and rows over all processes", "(porch)"),
    Room("checks", "options of constructors that are out of range", "(porch)"),
    Room("hashing", "counter-based random numbers", "(porch)"),
    Room("lightning_private", "private names of Lightning that are touched", "(porch)"),
    Room("recorded", "options of objects made in Python, as plain values", "(porch)"),
    Room("parser_private", "private names of jsonargparse that are touched", "(porch)"),
    Room("files", "text files that are replaced as a whole", "(porch)"),
    Room("checksums", "files that show whether they are whole", "(porch)"),
    Room("renamed", "names of earlier releases in saved files", "(porch)"),
    Room("catalogue", "names of all classes, from a generated table", "(porch)"),
    Room("escape_control", "removal of control characters from printed names", "(porch)"),
)
ORDER = {room.name: place for place, room in enumerate(ROOMS)}
FORBIDDEN = {
    ("callbacks", "datamodules"),
    ("callbacks", "loop"),
    ("callbacks", "strategies"),
    ("datamodules", "callbacks"),
    ("datamodules", "strategies"),
    ("report", "models"),
}
"""Imports that the order alone would allow."""


class Import(NamedTuple):
    """A name that a file imports from the package; ``module`` is relative to the package."""

    path: Path
    line: int
    module: str
    name: str


def files(root: Path = ROOT) -> list[Path]:
    """Modules of the package, including the two top-level folders."""
    folders = (root / PACKAGE, root / "callbacks", root / "datamodules")
    found = (path for folder in folders for path in folder.rglob("*.py"))
    linked = (root / PACKAGE / "callbacks", root / PACKAGE / "datamodules")
    return sorted(path for path in found if not any(path.is_relative_to(link) for link in linked))


def imports(path: Path) -> Iterator[Import]:
    """Imports of the package anywhere in a file, including imports for type checkers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            module = (node.module or "").partition(".")[2]
            for alias in node.names:
                yield Import(path, node.lineno, module, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(f"{PACKAGE}."):
                    yield Import(path, node.lineno, alias.name.partition(".")[2], "")


def room_of(module: str) -> tuple[str, str]:
    """Room of a module, and the rest of its name inside the room."""
    if f"{module}.".startswith("strategies.base."):
        return "strategies.base", module.removeprefix("strategies.base").lstrip(".")
    room, _, inside = module.partition(".")
    return room, inside


def module_of(path: Path, root: Path = ROOT) -> str:
    """``memory.replay`` for ``cl_lightning/memory/replay.py``, ``callbacks.distillation`` for ``callbacks/...``."""
    parts = path.relative_to(root).with_suffix("").parts
    parts = parts[1:] if parts[0] == PACKAGE else parts
    return ".".join(part for part in parts if part != "__init__")


@cache
def exported(room: str, root: Path = ROOT) -> frozenset[str]:
    """Names in ``__all__`` of a room; none for a room that is one file, or has no list."""
    path = root.joinpath(PACKAGE, *room.split("."), "__init__.py")
    if not path.is_file():
        return frozenset()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return frozenset(ast.literal_eval(node.value))
    return frozenset()


def problems(root: Path = ROOT) -> list[str]:
    """Each import that breaks a rule, in one line."""
    found = []
    for path in files(root):
        module = module_of(path, root)
        room = room_of(module)[0]
        if room in ("", "__main__"):
            continue
        where = path.relative_to(root)
        if room not in ORDER:
            found.append(f"{where}: {room!r} is not a room; put the file into one of {', '.join(ORDER)}")
            continue
        for item in imports(path):
            target, inside = room_of(item.module or item.name)
            if target == room:
                continue
            start = f"{where}:{item.line}: imports {PACKAGE}.{item.module or item.name}"
            if target not in ORDER:
                if (root / PACKAGE / target).exists() or (root / PACKAGE / f"{target}.py").exists():
                    found.append(f"{start}, which is not a room")
                continue
            if ORDER[target] < ORDER[room]:
                found.append(f"{start}: {target} is above {room}")
            elif (room, target) in FORBIDDEN:
                found.append(f"{start}: {room} must not know {target}")
            elif inside and item.name in exported(target, root):
                found.append(f"{start} for {item.name}: import it from the room, {PACKAGE}.{target}")
    return found + [f"circle of imports: {' -> '.join(circle)}" for circle in circles(root)]


def wrong_lists(root: Path = ROOT) -> Iterator[str]:
    """Rooms whose list is not that of their files, apart from rooms of one file and rooms with folders."""
    for room in ROOMS:
        folder = root.joinpath(PACKAGE, *room.name.split("."))
        if not folder.is_dir() or room.holds.startswith(("(", "a folder")):
            continue
        listed = set(re.findall(r"\w+", re.sub(r"\(.*?\)|`.*", "", room.holds)))
        there = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("__")}
        for name in sorted(there ^ listed):
            what = "is not listed" if name in there else "is listed, but is not there"
            yield f"docs/rooms.py: {name} of {room.name} {what}"


def circles(root: Path = ROOT) -> list[list[str]]:
    """Circles of imports among files; a room's ``__init__`` counts for the files that import it from outside."""
    names = {module_of(path, root): path for path in files(root) if path.name != "__init__.py"}
    graph = {
        name: sorted(
            {
                target
                for item in imports(path)
                for target in (f"{item.module}.{item.name}", item.module)
                if target in names and target != name
            }
        )
        for name, path in names.items()
    }
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append([*trail[trail.index(name) :], name])
        elif name not in done:
            for target in graph[name]:
                visit(target, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    return found


if __name__ == "__main__":
    lines = [*problems(), *wrong_lists()]
    print("\n".join(lines))
    sys.exit(1 if lines else 0)
