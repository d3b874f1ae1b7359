"""``results.json``: matrix, measures, costs and protocol of a run, in plain values."""

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Checkpoint,
    DeviceStatsMonitor,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
)
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cl_lightning.callback import ContinualCallback
from cl_lightning.escape_control import printable
from cl_lightning.files import replaced
from cl_lightning.loop.run import Run
from cl_lightning.measures import SCORES, base_novel_harmonic, performance_drop
from cl_lightning.memory import Memory
from cl_lightning.recorded import described

if TYPE_CHECKING:
    from cl_lightning.measures import AccuracyMatrix
    from cl_lightning.strategy import ContinualStrategy
    from cl_lightning.stream import Stream

SCHEMA = 2
"""Version of ``results.json``; ``docs/results_schema.md`` lists the changes in each version."""
_OLD_NAMES = {"NanGuard": "FiniteLoss"}  # the key in results.json keeps the name of earlier releases
_LARGEST_CONFUSION = 1000  # classes; with more, the confusion matrix would be most of the file
_SECRET = re.compile(
    r"(?i)(^|[._-])("
    r"pass(word|wd|phrase)s?|pwd|secrets?|credentials?|pat|authorization|cookie|dsn|connection_?string|"
    r"(api|access|account|auth|client|deploy|encryption|master|private|secret|service|signing|ssh)[_-]?keys?|"
    r"(database|db|redis|mongo(db)?|mysql|postgres(ql)?|amqp|broker|sentry)_ur[il]"
    r")$"
)
_TOKEN = re.compile(r"(?i)([a-z0-9]*)[._-]?tokens?$")
_TOKENS_OF_MODELS = (
    *("bos", "cls", "class", "dist", "eos", "image", "mask", "max", "min", "n", "num", "pad", "patch", "prefix"),
    *("prompt", "reg", "register", "sep", "special", "text", "unk"),
)
"""Words before "token" in options of models, such as ``class_token``; any other token gives access to something."""
# user:password@, and names before @ that are as long as a token.
_LOGIN = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)(?:([^\s/?#:@]*):[^\s/?#]*|[^\s/?#:@]{20,})(?=@)")
_QUERY = re.compile(r"(?<=[?&;])([\w.-]+)=([^&;#\s]+)")
_LEAST_SECRET = 8  # characters; a shorter value of a variable may be an ordinary word
_REMOVED = "(removed)"
_TRAINER = (
    *("max_epochs", "min_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val"),
    *("gradient_clip_algorithm", "world_size", "check_val_every_n_epoch", "val_check_interval"),
    *("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches"),
)
_PACKAGES = ("cl-lightning", "torch", "lightning", "torchmetrics", "torchvision", "timm", "numpy", "scikit-learn")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    return dict(_versions())


@cache  # this takes longer than writing the rest of the results
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def collect(loop: Run) -> dict[str, Any]:
    """Results of the finished tasks, as ``docs/results_schema.md`` describes them; called on one process."""
    stream, matrix, strategy, data = loop.stream, loop.matrix, loop.strategy, loop.datamodule
    finished, entries = matrix.learned, matrix.to_dict()
    measure(loop)
    per_task = list(loop.measured)
    small = len(matrix.confusion) <= _LARGEST_CONFUSION
    content = {
        "schema": SCHEMA,
        "strategy": class_path(strategy),
        "config": yaml.safe_load(loop.config or loop.recorded),
        "option_changes": loop.option_changes,
        "seed": loop.seed,
        "seeds": {"run": loop.seed, "data": data.seed, "stream": [part.seed for part in stream.parts]},
        "tasks": [
            {
                "name": task.name,
                "classes": list(stream.names_of(task)),
                "labels": list(task.classes),
                "columns": list(task.columns),
                "train": len(stream.train[task.index]),
                "val": len(stream.val[task.index]),
                "test": len(stream.test[task.index]),
            }
            for task in stream.tasks
        ],
        "class_order": list(stream.order),
        "class_names": list(stream.class_names),
        "order_hash": _hash([stream.names_of(task) for task in stream.tasks]),
        "stream_hash": _hash(stream.hashes),
        "fingerprints": loop.fingerprints,
        "finished": finished,
        "score": SCORES[data.target_kind]._asdict(),
        "matrix": entries,
        "measures": per_task[-1] if finished else {},
        "measures_per_task": per_task,
        "per_class": entries["per_class"][finished - 1][: len(matrix.confusion)] if finished else [],
        "confusion": matrix.confusion.tolist() if finished and small else None,
        "cost": loop.meter.summary(),
        "protocol": protocol(loop),
        "versions": versions(),
        "hardware": hardware(loop),
    }
    for callback in loop.trainer.callbacks:  # type: ignore[attr-defined]
        found = callback.results() if isinstance(callback, ContinualCallback) else {}
        if found:
            name = type(callback).__name__
            content[_free_key(_OLD_NAMES.get(name, name), content)] = found
    return content


def measure(loop: Run) -> None:
    """Fill ``measured``. Measures of earlier tasks do not change any more: each is computed once."""
    finished = loop.matrix.learned
    del loop.measured[max(finished - 1, 0) :]
    loop.measured += [measures(loop.matrix, loop.stream, t) for t in range(len(loop.measured), finished)]


def recorded(loop: Run) -> str:
    """Options of a run that was made in Python, as YAML in the form of a configuration and without secrets.

    These are the arguments of strategy and data module, the options of the loop, and those of the Trainer that can
    change a result, with its callbacks.
    """
    trainer, strategy = loop.trainer, loop.strategy
    observers = (Checkpoint, ProgressBar, ModelSummary, LearningRateMonitor, DeviceStatsMonitor)
    callbacks = [item for item in trainer.callbacks if not isinstance(item, observers)]  # type: ignore[attr-defined]
    content = {
        "seed_everything": loop.seed,
        "model": described(strategy),
        "data": described(loop.datamodule),
        "trainer": {
            **{name: described(getattr(trainer, name)) for name in _TRAINER},
            "strategy": class_path(trainer.strategy),
            "callbacks": [described(callback) for callback in callbacks],
        },
        "loop": described(vars(loop.options)),
    }
    return without_secrets(yaml.safe_dump(content, sort_keys=False))


def measures(matrix: "AccuracyMatrix", stream: "Stream", task: int) -> dict[str, float]:
    """Measures after a task by name: measures of the matrix, and measures that need the classes of the stream.

    ``calibration_error`` is the mean of the tasks' calibration errors, weighted by samples. ``performance_drop``,
    ``base_accuracy``, ``novel_accuracy`` and ``harmonic_accuracy`` are the measures of few-shot papers, with the
    classes of the first task as base classes. Undefined measures are left out.
    """
    values = matrix.measures(task)
    totals = matrix.totals[: task + 1]
    weights = totals.double() / totals.sum()
    values["calibration_error"] = float((matrix.R_ece[task, : task + 1] * weights).where(weights > 0, 0.0).sum())
    if task > 0:
        values["performance_drop"] = performance_drop(matrix.R_ci[: task + 1, : task + 1], totals)
        seen, base = stream.tasks[task].num_seen, stream.tasks[0].num_seen
        if seen > base and matrix.per_class.shape[1] >= seen:
            split = base_novel_harmonic(matrix.per_class[task, :seen], base)
            values |= {f"{name}_accuracy": value for name, value in split._asdict().items()}
    return {name: value for name, value in values.items() if value == value}


def protocol(loop: Run) -> dict[str, Any]:
    """Protocol of the run: settings that a reader needs to compare its numbers with the numbers of other runs."""
    stream, strategy, data, trainer = loop.stream, loop.strategy, loop.datamodule, loop.trainer
    kinds = [task.request for task in stream.tasks]
    uses = ["evaluation after each task"]
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    uses += [use for callback in callbacks if (use := getattr(callback, "test_data_use", None)) and use not in uses]
    return {
        "scenario": stream.scenario,
        "num_tasks": len(stream.tasks),
        "new_classes": [task.num_new for task in stream.tasks],
        "epochs": [cost.epochs for cost in loop.meter.tasks],
        "steps": [cost.steps for cost in loop.meter.tasks],
        "batch_size": stream.batch_size or data.batch_size,
        "eval_batch_size": data.eval_batch_size,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "one_pass": stream.one_pass,
        "passes": stream.passes,
        **({} if all(kind == "learn" for kind in kinds) else {"requests": _requests(stream)}),
        **({"wrong_labels": [len(part) for part in stream.noisy]} if any(map(len, stream.noisy)) else {}),
        "val_fraction": data.val_fraction,
        "augmentation": [type(transform).__name__ for transform in data.augmentation.transforms],
        "mean": [float(value) for value in data.normalize.mean],
        "std": [float(value) for value in data.normalize.std],
        "image_shape": list(data.image_shape),
        "backbone": type(strategy.network.backbone).__name__,
        "head": type(strategy.network.head).__name__,
        "loss_classes": strategy.loss_classes,
        "freeze_backbone": strategy.freeze_backbone,
        "task_ids_at_test": strategy.traits.task_ids == "needed",
        "memory_samples": sum(len(module) for module in strategy.modules() if isinstance(module, Memory)),
        "optimizers": loop.optimizers,
        "precision": str(trainer.precision),
        "gradient_clip_val": trainer.gradient_clip_val,
        "callbacks": [class_path(callback) for callback in callbacks if callback not in loop.own_callbacks],
        "test_data_use": uses,
    }


def _requests(stream: "Stream") -> list[str]:
    """What each task of a stream with requests asks, and the number of samples of each request."""
    return [
        task.request if task.learns else f"{task.name} ({len(stream.train[task.index])} samples)"
        for task in stream.tasks
    ]


def bytes_kept(trainer: Trainer, strategy: "ContinualStrategy") -> dict[str, int]:
    """Memory that this process keeps from task to task in addition to the network, with callbacks, in bytes by kind."""
    kept = dict(strategy.bytes_kept())
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ContinualCallback):
            for kind, size in callback.bytes_kept().items():
                kept[kind] = kept.get(kind, 0) + size
    return kept


def class_path(thing: object) -> str:
    """Import path of an object's class."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def hardware(loop: Run) -> dict[str, Any]:
    """Hardware of the run: device, processes, threads, system."""
    trainer = loop.trainer
    device = trainer.strategy.root_device
    found = {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "processes": trainer.world_size,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        found["device_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
        found["cuda"] = torch.version.cuda
    return found


def summary(matrix: "AccuracyMatrix", stream: "Stream", task: int) -> dict[str, float]:
    """Values to log after a task, by name: its measures, and the accuracies on each task."""
    values = {f"stream/{name}": value for name, value in measures(matrix, stream, task).items()}
    for index, value in enumerate(matrix.R_ci[task].tolist()):
        if value == value:
            values[f"accuracy/task_{index:02d}"] = value
    return values


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON; an existing file is replaced atomically."""
    text = _indented(content)
    with replaced(path) as file:
        file.write(text + "\n")


_ENTRIES = {float, type(None)}


def _indented(value: Any, start: str = "\n") -> str:
    """JSON with each list of plain values on one line: one row of a matrix per line, and the fast encoder for each."""
    inner = f"{start} "
    if isinstance(value, dict) and value:
        if all(isinstance(key, str) for key in value) and {dict, list, tuple}.isdisjoint(map(type, value.values())):
            text = json.dumps(value, allow_nan=False, separators=(f",{inner}", ": "))  # by the fast encoder
            return f"{{{inner}{text[1:-1]}{start}}}"
        items = (f"{json.dumps(str(key))}: {_indented(item, inner)}" for key, item in value.items())
        return f"{{{inner}{f',{inner}'.join(items)}{start}}}"
    if isinstance(value, list) and value and {type(value[0]), type(value[-1])} <= _ENTRIES:
        return _row(value)
    if isinstance(value, list | tuple) and not {dict, list, tuple}.isdisjoint(map(type, value)):
        return f"[{inner}{f',{inner}'.join(_indented(item, inner) for item in value)}{start}]"
    return json.dumps(value, allow_nan=False)


def _row(value: list[float | None]) -> str:
    """JSON of a row of a matrix. Rows of finished tasks only get more nulls at their end: their text is made once."""
    end = next((index for index in range(len(value), 0, -1) if value[index - 1] is not None), 0)
    row = tuple(value[:end])
    if not set(map(type, row)) <= _ENTRIES:  # 1, 1.0 and True are equal, and their texts are not
        return json.dumps(value, allow_nan=False)
    text = _text_of_row(row)
    missing = ("null, " * (len(value) - end))[:-2]
    return f"[{text}{', ' if text and missing else ''}{missing}]"


@lru_cache(maxsize=4096)  # five matrices of 800 tasks
def _text_of_row(row: tuple[float | None, ...]) -> str:
    return json.dumps(row, allow_nan=False)[1:-1]


def without_secrets(config: str) -> str:
    """The configuration without credentials.

    Removed are the values of keys such as ``api_key``, ``token``, ``password`` and ``DATABASE_URL``, passwords in URLs
    (``scheme://user:password@host``, ``?token=...``), and, wherever they occur, the values of environment variables
    with such names (``WANDB_API_KEY``, ``HF_TOKEN``).
    """
    secret = {v for name, v in os.environ.items() if len(v) >= _LEAST_SECRET and _is_secret_variable(name)}
    known = sorted(secret, key=len, reverse=True)  # one may contain another
    content = yaml.safe_load(config)  # parsed, because in the text a long or quoted value may be written differently
    cleaned = _cleaned(content, known)
    return config if cleaned == content else str(yaml.safe_dump(cleaned, sort_keys=False))


def _cleaned(value: Any, known: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return {
            _cleaned(key, known): _REMOVED if _is_secret(key, item) else _cleaned(item, known)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_cleaned(item, known) for item in value]
    if not isinstance(value, str):
        return value
    for secret in known:
        value = value.replace(secret, _REMOVED)
    value = _LOGIN.sub(lambda found: f"{found[1]}{found[2] + ':' if found[2] is not None else ''}{_REMOVED}", value)
    return _QUERY.sub(lambda found: f"{found[1]}={_REMOVED}" if _is_secret_name(found[1]) else found[0], value)


def _is_secret_name(name: str) -> bool:
    """Whether an option of this name gives access to something."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)  # apiKey
    token = _TOKEN.search(name)
    if token is not None:
        return token[1].lower() not in _TOKENS_OF_MODELS and (token[1] != "" or not name.lower().endswith("s"))
    return bool(_SECRET.search(name) or re.search(r"(?i)(password|passwd|secret|apikey)$", name))


def _is_secret_variable(name: str) -> bool:
    # PWD and OLDPWD are the working directory.
    return name not in ("PWD", "OLDPWD") and (_is_secret_name(name) or bool(re.search(r"(?i)_pass$", name)))


def _is_secret(key: Any, value: Any) -> bool:
    given = value is not None and not isinstance(value, bool) and value not in ("", [], {})
    return given and _is_secret_name(str(key))


def _free_key(name: str, content: Mapping[str, Any]) -> str:
    key = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    return next(candidate for n in count(1) if (candidate := key if n == 1 else f"{key}_{n}") not in content)


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def optimizer_options(optimizer: Any) -> dict[str, Any]:
    """Name and plain options of an optimizer, of its first group."""
    group = optimizer.param_groups[0]
    plain = {name: value for name, value in group.items() if isinstance(value, bool | int | float | str)}
    return {"name": type(optimizer).__name__, **{name: value for name, value in plain.items() if value == value}}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def show(content: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the accuracy matrix with the measures of a run as a table that fits the terminal."""
    console = console or Console()
    method = content["strategy"].rpartition(".")[2]
    finished = content["finished"]
    if not finished:
        console.print(f"{method}: no task is finished")
        return
    after = [_after_task(content, t) for t in range(finished)]
    columns, digits, gap = _layout(finished, [["task", *_columns(content)], *after], console.width)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, gap - 1, 0, 0))
    score = content.get("score", {}).get("title", "accuracy")
    title = f"{method}: {score} in % " + ("on each task (columns) " if columns else "") + "after each task (rows)"
    table.add_column("task", no_wrap=True)
    for index in range(columns):
        table.add_column(str(index), justify="right", no_wrap=True)
    for name in _columns(content):
        table.add_column(name, justify="right", no_wrap=True, style="bold" if name == "all" else "")
    for t, (name, *cells) in enumerate(after):
        values = content["matrix"]["R_ci"][t][:columns]
        table.add_row(
            Text(name), *(_percent(value, digits) if i <= t else "" for i, value in enumerate(values)), *cells
        )
    console.print(title, style="italic", highlight=False)
    console.print(table)
    measures = content["measures"]
    lines = ["all: average over all classes so far"]
    if score == "accuracy":
        lines[0] += "; known: with the task of each image known"
    mark, words = ("", "") if "average_accuracy" in measures else ("task_aware/", " (the method needs the task)")
    lines.append(
        f"last {score}{words} {_percent(measures[f'{mark}average_accuracy'])} %, average incremental {score} "
        f"{_percent(measures[f'{mark}average_incremental_accuracy'])} %"
    )
    if f"{mark}forgetting" in measures:
        lines[-1] += f", forgetting {_percent(measures[f'{mark}forgetting'])} %"
    if (online := measures.get("mean_online_error")) is not None:
        lines.append(f"online: error of predictions made before each step; mean over domains {_percent(online, 2)} %")
    if (auroc := measures.get("mean_unknown_auroc")) is not None:
        lines.append(f"unknown classes: AUROC of rejecting them; mean over domains {_percent(auroc, 2)} %")
    if (kept := _kept(content)) is not None:
        lines.append(f"kept from task to task in addition to the network: {kept}")
    console.print("\n".join(lines), highlight=False)


def _columns(content: Mapping[str, Any]) -> list[str]:
    """Headings of the summary of a task; "online" only if there are online errors."""
    online = ["online"] if "mean_online_error" in content["measures"] else []
    known = ["known"] if content.get("score", {}).get("name", "accuracy") == "accuracy" else []
    return ["all", *known, "forgetting", *online, "time"]


def _after_task(content: Mapping[str, Any], t: int) -> list[str]:
    """Name and summary of a finished task."""
    name = printable(content["tasks"][t]["name"])
    name = str(t) if name == f"task {t}" else f"{t} {name if len(name) <= 14 else name[:13] + '…'}"
    known = [value for value in content["matrix"]["R_ti"][t][: t + 1] if value is not None]
    measures = content["measures_per_task"][t]
    spent = content["cost"]["seconds"][t]
    seconds = sum(spent[key] for key in ("training", "statistics", "evaluation"))
    return [
        name,
        _percent(measures.get("average_accuracy")),
        *([_percent(sum(known) / len(known) if known else None)] if "known" in _columns(content) else []),
        _percent(measures.get("forgetting")),
        *([_percent(content["matrix"]["online_error"][t])] if "online" in _columns(content) else []),
        f"{seconds:.1f} s"
        if seconds < 100
        else f"{seconds / 60:.1f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h",
    ]


def _layout(finished: int, rows: list[list[str]], width: int) -> tuple[int, int, int]:
    """Number of columns for single tasks, number of decimals in them, and the space between columns.

    Args:
        finished: Number of tasks.
        rows: All other cells; the headings are the first row.
        width: Width of the terminal, in characters.
    """
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for digits, gap in ((1, 2), (1, 1), (0, 1)):
        if sum(widths) + finished * (5 if digits else 3) + gap * (len(widths) + finished) <= width:
            return finished, digits, gap
    return 0, 1, 2


def _kept(content: Mapping[str, Any]) -> str | None:
    """Text with the memory that a run keeps from task to task, by kind; None if it keeps nothing."""
    sizes = {kind: size for kind, size in content["cost"]["bytes_kept"].items() if size}
    parts = [
        f"{kind} {size / 2**20:.2f} MiB" if size >= 10_000 else f"{kind} {size} bytes" for kind, size in sizes.items()
    ]
    return ", ".join(parts) if parts else None


def _percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}"
