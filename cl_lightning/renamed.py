"""Names of earlier releases and their current names, to read saved checkpoints, configurations and manifests."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_P = "cl_lightning"

MODULES = {
    **dict.fromkeys(("backbones", "heads", "closed_form", "network", "normalization", "prompts"), ("models",)),
    **dict.fromkeys(("expansion", "svm", "peft"), ("models",)),
    "prototypes": ("memory",),
    **dict.fromkeys(("memory", "teacher", "importance", "sensitivity", "consolidation"), ("memory",)),
    **dict.fromkeys(("sources", "transforms", "pixels", "corruptions", "loaders", "feature_cache"), ("data",)),
    "features": ("data",),
    "losses": ("losses",),
    **dict.fromkeys(("loop", "loop_setup", "checkpoint", "stopping", "finite", "lean", "live_views"), ("loop",)),
    **dict.fromkeys(("measures", "cost"), ("measures",)),
    "hooks": ("callback",),
    "schedules": ("strategies.base.schedules",),
    "parameter_groups": ("strategies.base.optimizers",),
    "strategy": ("strategies.base.strategy", "strategy"),
    "strategies.exemplar_free.prototype_augmentation": ("strategies.exemplar_free.pass_",),
}
"""Moved modules, and the modules in which their classes are searched, relative to the package."""

CLASSES = {
    "heads.PrototypeHead": "memory.PrototypeHead",
    "memory.Herding": "memory.HerdingPolicy",
    **{
        f"memory.replay.{name}": f"memory.{name}"
        for name in ("ClassBalanced", "HerdingPolicy", "Policy", "Reservoir", "Ring")
    },
    "stream.core.Catalogue": "stream.DatasetInfo",
    "stream.modifiers.Thinning": "stream.Subsampling",
    "stream.Thinning": "stream.Subsampling",
}
"""Renamed classes, old import path to new, relative to the package."""

_ANY = ""


def _in_options(phase: str) -> dict[str, str]:
    return {f"{phase}_{name}": f"{phase}_options.{name}" for name in ("epochs", "optimizer", "scheduler", "batch_size")}


OPTIONS: dict[str, dict[str, str]] = {
    _ANY: {"visible": "loss_classes"},
    "ER": {"mix": "replay_by"},
    "DER": {"feed": "update_memory", "later": "new_class_targets"},
    "DERpp": {"feed": "update_memory", "later": "new_class_targets"},
    "L2P": {"vote": "batchwise_prompt", "selected": "top_k"},
    "WA": {"distill_share": "distill_weight"},
    "BiC": {"distill_share": "distill_weight", **_in_options("bias")},
    "FOSTER": _in_options("compress"),
    "FeTrIL": _in_options("head"),
    "EFCpp": _in_options("rebalance"),
    "SLCA": _in_options("align"),
    **{
        name: {"trained": "params", "scored": "predict_when"}
        for name in ("Source", "BNAdapt", "Tent", "EATA", "CoTTA", "LAME")
    },
}
"""Renamed options of strategies, old to new, by class; options of the first entry belong to every strategy. A name with
a dot is an option inside another option."""

STATE_KEYS = {
    "network.head.session.": "network.head.temporary.",
    "network.head.lasting.": "network.head.final.",
    "turned_head.": "rotation_head.",
}
"""Renamed prefixes of keys in a strategy's state dict, old to new."""


def class_path(path: str) -> str:
    """Current import path of a class, given its path in an earlier release; other paths are returned unchanged."""
    if not path.startswith(f"{_P}."):
        return path
    inside = path.removeprefix(f"{_P}.")
    if (now := CLASSES.get(inside)) is not None:
        return f"{_P}.{now}"
    module, _, name = inside.rpartition(".")
    for target in MODULES.get(module, ()):
        found = importlib.import_module(f"{_P}.{target}")
        if hasattr(found, name):
            return f"{_P}.{target}.{name}"
    return path


def options_of(name: str) -> dict[str, str]:
    """Renamed options of a strategy, old to new, by the name or import path of its class."""
    return {**OPTIONS[_ANY], **OPTIONS.get(name.rpartition(".")[2], {})}


def config(content: Any, note: Callable[[str], None] = lambda line: None) -> Any:
    """A configuration with current names: import paths of classes, and options of the strategy.

    Args:
        content: Content of a configuration file, as plain values.
        note: Called with one line for each name that was changed.

    Returns:
        ``content`` itself where no name changes.
    """
    changed = _paths(content, note, {})
    model = changed.get("model") if isinstance(changed, Mapping) else None
    if isinstance(model, Mapping) and isinstance(model.get("init_args"), Mapping):
        names = options_of(str(model.get("class_path", "")))
        if not names.keys() & model["init_args"].keys():
            return changed
        arguments: dict[str, Any] = {}
        for key, value in model["init_args"].items():
            outer, _, inner = _renamed(key, names, note).partition(".")
            arguments[outer] = {**arguments.get(outer, {}), inner: value} if inner else value
        changed = {**changed, "model": {**model, "init_args": arguments}}
    return changed


def state_dict(state: Mapping[str, Any]) -> dict[str, Any]:
    """A strategy's state dict with current keys."""

    def now(key: str) -> str:
        for old, new in STATE_KEYS.items():
            if key.startswith(old):
                return new + key.removeprefix(old)
        return key

    return {now(key): value for key, value in state.items()}


def _renamed(key: str, names: Mapping[str, str], note: Callable[[str], None]) -> str:
    if key in names:
        note(f"option {key!r} of the strategy is now called {names[key]!r}")
    return names.get(key, key)


def _paths(content: Any, note: Callable[[str], None], done: dict[int, Any]) -> Any:
    """``content`` with current paths; the very object where nothing changes. ``done`` holds results by object.

    An object that stands in many places (YAML aliases) is looked at once, and one that contains itself stays as it is.
    """
    if isinstance(content, str):
        path = class_path(content)
        if path != content:
            note(f"{content} is now called {path}")
        return path
    if not isinstance(content, (Mapping, list)) or id(content) in done:
        return done.get(id(content), content)
    done[id(content)] = content
    items = content.items() if isinstance(content, Mapping) else enumerate(content)
    changes = {key: now for key, value in items if (now := _paths(value, note, done)) is not value}
    if changes:
        changed = {**content, **changes} if isinstance(content, Mapping) else list(content)
        if isinstance(changed, list):
            for index, now in changes.items():
                changed[index] = now
        done[id(content)] = changed
    return done[id(content)]


def arguments(given: list[str], strategy: str, note: Callable[[str], None]) -> Iterator[str]:
    """Command-line arguments with current names of a strategy's options, for example of ``--model.mix`` for ER.

    Args:
        given: The arguments.
        strategy: Name or import path of the strategy's class.
        note: Called with one line for each name that was changed.
    """
    names = options_of(strategy)
    for argument in given:
        option, equals, value = argument.partition("=")
        group = next((group for group in ("--model.init_args.", "--model.") if option.startswith(group)), None)
        if group is not None:
            key, dot, inside = option.removeprefix(group).partition(".")
            option = group + _renamed(key, names, note) + dot + inside
        yield option + equals + value
