"""Options of a run that differ from the options of the checkpoint from which it is resumed, and which of them hold."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

from cl_lightning.memory import Memory
from cl_lightning.report.comparison import comparable, shown
from cl_lightning.report.fields import flattened

_OF_MEMORY = re.compile(r"(^|\.)(memory_size|buffer_size|exemplars_per_class|memory_per_class)$")
_OF_OPTIMIZER = re.compile(r"^model\.init_args\.(.*_)?(optimizer|scheduler|lr_factors)(\.|$)")


class Change(NamedTuple):
    """An option with another value than in the checkpoint.

    Attributes:
        task: Task in which the run is resumed.
        option: Key in the configuration, such as ``model.init_args.memory_size``.
        before, now: Values as text; empty if the option is not given.
        holds: ``now``, ``next phase``, or ``checkpoint`` if the state in the checkpoint decides it for the whole run.
    """

    task: int
    option: str
    before: str
    now: str
    holds: str

    def __str__(self) -> str:
        remark = {
            "now": "",
            "next phase": " (from the next phase on; the optimizer of this one continues)",
            "checkpoint": " (no effect: the memory keeps the size that it has in the checkpoint)",
        }
        return f"{shown(self.option)} {self.before or 'not given'} -> {self.now or 'not given'}{remark[self.holds]}"


def changes(saved: Mapping[str, Any], text: str, strategy: Any, *, from_config: bool) -> list[Change]:
    """Options that differ from those of a checkpoint; called before the state of the checkpoint is loaded.

    Options that cannot change a result are left out, and so are all options if one run was started from a
    configuration and the other in Python.

    Args:
        saved: The checkpoint.
        text: Options of this run, as YAML: its configuration, or what is recorded in its place.
        strategy: The strategy, with the memories that its options make.
        from_config: Whether ``text`` is a configuration.
    """
    part = saved["cl_lightning"]
    earlier = part.get("config") or part.get("recorded", "")
    if not earlier or not text or bool(part.get("config")) != from_config:
        return []
    old, new = (comparable(flattened(yaml.safe_load(each) or {})) for each in (earlier, text))
    place, sizes = part["place"], _other_memories(saved, strategy)
    found = []
    for option in dict.fromkeys((*old, *new)):
        before, now = old.get(option, ""), new.get(option, "")
        if before == now or before.startswith("(not recorded") or now.startswith("(not recorded"):
            continue
        holds = "now"
        if _OF_MEMORY.search(option) and sizes:
            holds = "checkpoint"
        elif _OF_OPTIMIZER.search(option) and place["running"]:
            holds = "next phase"
        found.append(Change(place["task"], option, before, now, holds))
    return found


def _other_memories(saved: Mapping[str, Any], strategy: Any) -> list[str]:
    """Names of the memories of a strategy that have another size in the checkpoint."""
    state = saved["state_dict"]
    memories = ((name, module) for name, module in strategy.named_modules() if isinstance(module, Memory))
    return [name for name, module in memories if int(state.get(f"{name}.size", module.size)) != module.size]


def held(text: str, found: list[Change]) -> str:
    """Options of a run as YAML, with the values that hold where the checkpoint decides them."""
    kept = [change for change in found if change.holds == "checkpoint"]
    if not kept or not text:
        return text
    content = yaml.safe_load(text)
    for change in kept:
        *way, last = change.option.split(".")
        target = content
        for key in way:
            target = target[key]
        target[last] = yaml.safe_load(change.before)
    return str(yaml.safe_dump(content, sort_keys=False))
