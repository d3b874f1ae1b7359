"""The protocol of runs as titles and texts, for the comparison with published numbers."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from cl_lightning.report.comparison import Group
from cl_lightning.report.runs import Run

Card = list[tuple[str, list[tuple[str, tuple[str, ...]]]]]
"""Titles with their values; each value with the labels of its groups."""

_SHOWN = 4  # at most so many values of a group whose runs differ


def protocol(groups: Sequence[Group]) -> Card:
    """Data, stream, training and evaluation of the runs. A fact in which groups differ has several values."""
    return _card(groups, _FACTS)


def software(groups: Sequence[Group]) -> Card:
    """Hardware and software of the runs."""
    names: dict[str, Callable[[Run], str]] = {
        "Device": _device,
        "System": lambda run: run.hardware.get("system", ""),
        "Software": lambda run: ", ".join(f"{name} {version}" for name, version in run.versions.items()),
    }
    return _card(groups, names)


def _card(groups: Sequence[Group], facts: Mapping[str, Callable[[Run], str]]) -> Card:
    card: Card = []
    for title, fact in facts.items():
        values: dict[str, list[str]] = {}
        for group in groups:
            values.setdefault(_joined([fact(run) for run in group.runs]), []).append(group.label)
        if set(values) != {""}:
            card.append((title, [(value or "not known", tuple(labels)) for value, labels in values.items()]))
    return card


def _joined(values: Sequence[str]) -> str:
    different = list(dict.fromkeys(value for value in values if value))
    if len(different) <= 1:
        return "".join(different)
    more = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
    return "; ".join(different[:_SHOWN]) + more


# ---------------------------------------------------------------------- configured classes


def described(config: Mapping[str, str], key: str) -> str:
    """A class of a configuration with its options, in the form of a call; the classes of a list separated by commas."""
    items = sorted({int(found[1]) for entry in config if (found := re.match(rf"{re.escape(key)}\.(\d+)\.", entry))})
    if items:
        return ", ".join(filter(None, (described(config, f"{key}.{item}") for item in items)))
    path = config.get(f"{key}.class_path") or config.get(key)
    if path is None:
        return ""
    start = f"{key}.init_args."
    options = {entry.removeprefix(start): value for entry, value in config.items() if entry.startswith(start)}
    plain = {name: value for name, value in options.items() if "." not in name}
    nested = dict.fromkeys(name.partition(".")[0] for name in options if "." in name)
    inner = {name: described(config, f"{start}{name}") for name in nested}
    given = ", ".join(f"{name}={value}" for name, value in (plain | {k: v for k, v in inner.items() if v}).items())
    return f"{path.rpartition('.')[2]}({given})" if given else path.rpartition(".")[2]


def _configured(run: Run, key: str) -> str:
    return described(run.config or {}, key)


def _text(run: Run, name: str) -> str:
    return run.protocol.texts.get(name, "")


# ---------------------------------------------------------------------- facts


def _data(run: Run) -> str:
    config = run.config or {}
    name = config.get("data.class_path", "").rpartition(".")[2]
    folders = [config[key] for key in ("data.init_args.name", "data.init_args.dataset") if key in config]
    parts = [f"{len(run.class_names)} classes", f"{sum(task.train for task in run.tasks)} training"]
    if val := sum(task.val for task in run.tasks):
        parts.append(f"{val} validation")
    parts.append(f"{sum(task.test for task in run.tasks)} test samples")
    called = " ".join(filter(None, [name, *folders]))
    shape = _text(run, "image_shape")
    sizes = f"{parts[0]}, {', '.join(parts[1:-1])} and {parts[-1]}" + (f", images {_times(shape)}" if shape else "")
    return f"{called}: {sizes}" if called else sizes


def _times(shape: str) -> str:
    return " x ".join(re.findall(r"\d+", shape))


def _fingerprint(run: Run) -> str:
    if not run.fingerprints:
        return ""
    return hashlib.blake2b("\0".join(run.fingerprints).encode(), digest_size=6).hexdigest()


def _stream(run: Run) -> str:
    new = [len(task.classes) for task in run.tasks]
    runs = [(size, len(list(members))) for size, members in groupby(new)]
    sizes = " + ".join(f"{count} x {size}" if count > 1 and len(runs) > 1 else str(size) for size, count in runs)
    scenario = described({f"s.{key}": value for key, value in run.protocol.scenario.items()}, "s")
    return f"{len(run.tasks)} tasks of {sizes} classes" + (f"; {scenario}" if scenario else "")


def _order(run: Run) -> str:
    if not run.class_order:
        return ""
    shown = ", ".join(map(str, run.class_order[:10])) + (", …" if len(run.class_order) > 10 else "")
    digest = run.order_hash or hashlib.blake2b(json.dumps(run.class_order).encode(), digest_size=16).hexdigest()
    return f"{shown}; hash {digest[:12]}"


def _epochs(run: Run) -> str:
    per_task = [", ".join(f"{name} {count}" for name, count in task.items()) or "none" for task in run.protocol.epochs]
    if per_task:
        runs = [(value, len(list(members))) for value, members in groupby(per_task)]
        start, parts = 0, []
        for value, count in runs:
            place = (
                "" if len(runs) == 1 else f"task {start}: " if count == 1 else f"tasks {start} to {start + count - 1}: "
            )
            parts.append(place + re.sub(r"^train (\d+)$", r"\1", value))
            start += count
        return "; ".join(parts)
    config = run.config or {}
    first = config.get("loop.first_task_epochs")
    return config.get("trainer.max_epochs", "") + (f" ({first} for the first task)" if first else "")


def _batch(run: Run) -> str:
    size = _text(run, "batch_size") or (run.config or {}).get("data.init_args.batch_size", "")
    extra = []
    if _text(run, "accumulate_grad_batches") not in ("", "1"):
        extra.append(f"gradients accumulated over {_text(run, 'accumulate_grad_batches')} batches")
    if _text(run, "one_pass") == "true":
        extra.append("each sample in one batch only")
    if _text(run, "passes") not in ("", "1"):
        extra.append(f"{_text(run, 'passes')} steps per batch")
    return ", ".join([size, *extra]) if size else ""


def _augmentation(run: Run) -> str:
    configured = _configured(run, "data.init_args.transforms")
    names = run.protocol.texts.get("augmentation")
    if names is None:
        return configured or ("none given: default of the data set" if run.config is not None else "")
    return configured or ", ".join(re.findall(r'"([^"]*)"', names)) or "none"


def _normalisation(run: Run) -> str:
    mean, std = (_text(run, name) or (run.config or {}).get(f"data.init_args.{name}", "") for name in ("mean", "std"))
    return f"mean {mean.strip('[]')}; std {std.strip('[]')}" if mean and std else ""


def _backbone(run: Run) -> str:
    text = _configured(run, "model.init_args.backbone") or _text(run, "backbone")
    return f"{text}, frozen" if text and _text(run, "freeze_backbone") == "true" else text


def _weights(run: Run) -> str:
    config = run.config or {}
    start = "model.init_args.backbone.init_args."
    given = {key.removeprefix(start): value for key, value in config.items() if key.startswith(start)}
    names = ("pretrained", "weights", "checkpoint", "checkpoint_path", "tag")
    given_names = [f"{name}={given[name]}" for name in names if given.get(name, "false") not in ("false", "")]
    return ", ".join(given_names) or ("from scratch" if run.config is not None else "")


def _optimizer(run: Run) -> str:
    configured = _configured(run, "model.init_args.optimizer")
    if configured:
        return configured
    texts = run.protocol.texts
    name = texts.get("optimizers.0.name")
    if name is None:
        return ""
    start = "optimizers.0."
    options = {key.removeprefix(start): value for key, value in texts.items() if key.startswith(start)}
    unset = {"false", "0", "0.0", "null"}
    given = [
        f"{key}={value}" for key, value in options.items() if key not in ("name", "initial_lr") and value not in unset
    ]
    return f"{name}({', '.join(given)})"


def _memory(run: Run) -> str:
    config = run.config or {}
    sizes = [value for key, value in config.items() if re.search(r"(^|[._])memory_size$", key)]
    held = _text(run, "memory_samples")
    parts = [f"{', '.join(sizes)} samples at most"] if sizes else []
    if run.finished and held and (held != "0" or parts):
        parts.append(f"{held} at the end")
    if run.finished:
        kept = [f"{kind} {size:,} B" for kind, size in run.bytes_kept.items() if size]
        parts.append("kept between tasks: " + (", ".join(kept) or "nothing except the network"))
    return "; ".join(parts)


def _numbers(run: Run) -> str:
    parts = []
    if precision := _text(run, "precision"):
        parts.append(f"precision {precision}")
    if clip := _text(run, "gradient_clip_val"):
        parts.append(f"gradients clipped at {clip}")
    return ", ".join(parts)


def seeds(run: Run) -> str:
    """Seed of a run, and the seed of its data if it has one of its own."""
    seed, own = run.draw
    return f"{seed} (data {own})" if own else seed


def _test_data(run: Run) -> str:
    return "; ".join(run.protocol.test_data_use)


def _task_ids(run: Run) -> str:
    return {"true": "given to the network", "false": "not given"}.get(_text(run, "task_ids_at_test"), "")


def _validation(run: Run) -> str:
    fraction = _text(run, "val_fraction") or (run.config or {}).get("data.init_args.val_fraction", "")
    return (
        "none held out"
        if fraction in ("0", "0.0")
        else f"{fraction} of the training samples held out"
        if fraction
        else ""
    )


def _device(run: Run) -> str:
    hardware = run.hardware
    if not hardware:
        return ""
    name = ": ".join(filter(None, (hardware.get("device", ""), hardware.get("name", ""))))
    parts = [f"{hardware['processes']} processes"] if hardware.get("processes", "1") != "1" else []
    parts += [f"{hardware['threads']} threads"] if hardware.get("threads", "1") != "1" else ["1 thread"]
    return ", ".join([name, *parts])


_FACTS: dict[str, Callable[[Run], str]] = {
    "Data": _data,
    "Stream": _stream,
    "Class order": _order,
    "Hash of the data": _fingerprint,
    "Seeds": seeds,
    "Epochs per task": _epochs,
    "Batch size": _batch,
    "Augmentation": _augmentation,
    "Normalisation": _normalisation,
    "Backbone": _backbone,
    "Weights": _weights,
    "Head": lambda run: _configured(run, "model.init_args.head") or _text(run, "head"),
    "Optimizer": _optimizer,
    "Schedule": lambda run: _configured(run, "model.init_args.scheduler") or ("constant" if run.config else ""),
    "Memory": _memory,
    "Numbers": _numbers,
    "Callbacks": lambda run: _configured(run, "trainer.callbacks"),
    "Validation": _validation,
    "Test data used for": _test_data,
    "Task ids at test": _task_ids,
}
