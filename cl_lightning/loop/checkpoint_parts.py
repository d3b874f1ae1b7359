"""Types of the parts of a checkpoint: a file may be whole and still hold other things than this program wrote."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from cl_lightning.escape_control import printable


class _Each(NamedTuple):
    """A mapping whose keys are of a type and whose values have one form."""

    key: type
    form: Any


class _Natural:
    """An integer from 0 to 2^63 - 1."""


class _Counters:
    """Nested mappings of natural numbers and truth values."""


_FORMS: Mapping[str, Any] = {
    "epoch": _Natural,
    "global_step": _Natural,
    "pytorch-lightning_version": str,
    "state_dict": _Each(str, Tensor),
    "loops": {"fit_loop": _Counters},
    "callbacks": _Each(str, dict),
    "optimizer_states": [{"state": dict, "param_groups": [{"params": [_Natural]}]}],
    "lr_schedulers": [dict],
    "cl_lightning": {
        "schema": _Natural,
        "place": {
            **dict.fromkeys(("task", "phase", "origin"), _Natural),
            **dict.fromkeys(("running", "done", "learnt"), bool),
        },
        "strategy": str,
        "manifest": str,
        "fingerprints": [str],
        "class_names": [str],
        "raw_shape": [_Natural],
        "image_shape": [_Natural],
        "matrix": _Each(str, Tensor),
        "costs": [
            {
                **dict.fromkeys(("training", "statistics", "evaluation", "saving", "images", "samples"), (float, int)),
                **dict.fromkeys(("steps", "peak_process_bytes", "raw_bytes", "parameters", "trainable"), _Natural),
                "epochs": _Each(str, _Natural),
                "bytes_kept": [_Each(str, _Natural)],
            }
        ],
        "config": str,
        "recorded": str,
        "option_changes": [{"task": _Natural, **dict.fromkeys(("option", "before", "now", "holds"), str)}],
        "seed": int,
        "processes": _Natural,
        "process_statistics": _Each(str, dict),
        "versions": _Each(str, str),
        "exact": bool,
        "rows": _Natural,
        "unwritten_rows": [_Each(str, str)],
        "terms": {"sums": dict, "recorded": _Natural, "logged_step": int},
    },
}
"""Form of each part; a part may be missing, and other parts are free."""


def check_parts(checkpoint: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` for the first part that has not the type that this program writes."""
    _check(checkpoint, _FORMS, "")


def _check(value: Any, form: Any, where: str) -> None:
    if isinstance(form, Mapping):
        _require(isinstance(value, Mapping), value, "a mapping", where)
        for key, inner in form.items():
            if key in value:
                _check(value[key], inner, f"{where}.{key}" if where else key)
    elif isinstance(form, _Each):
        _require(isinstance(value, Mapping), value, "a mapping", where)
        for key, item in value.items():
            _require(type(key) is form.key, key, f"a mapping with keys of type {form.key.__name__}", where)
            _check(item, form.form, f"{where}.{key}")
    elif isinstance(form, list):
        _require(isinstance(value, list | tuple), value, "a list", where)
        for index, item in enumerate(value):
            _check(item, form[0], f"{where}[{index}]")
    elif form is _Counters:
        if isinstance(value, Mapping):
            for key, item in value.items():
                _check(item, form, f"{where}.{key}")
        elif not isinstance(value, bool):
            _check(value, _Natural, where)
    elif form is _Natural:
        _require(type(value) is int and 0 <= value < 2**63, value, "an integer from 0", where)
    else:
        kinds = form if isinstance(form, tuple) else (form,)
        fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        _require(fits, value, " or ".join(kind.__name__ for kind in kinds), where)


def _require(fits: bool, value: Any, wanted: str, where: str) -> None:
    if not fits:
        text = repr(value) if isinstance(value, int | float | str | bool | None) else type(value).__name__
        raise ValueError(f"its part {where} must be {wanted}, got {text if len(text) <= 40 else type(value).__name__}")


@contextmanager
def named(path: str | Path | None, until: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn every error inside into a ``ValueError`` in one line that names the checkpoint that is being read.

    Args:
        path: The checkpoint; None changes no error.
        until: Errors are left as they are once this is true.
    """
    try:
        yield
    except Exception as error:  # values of the file reach code of Lightning, torch and methods, which raises anything
        if path is None or until() or isinstance(error, OSError) or f"checkpoint {path}:" in str(error):
            raise
        if isinstance(error, ValueError):
            reason = str(error)
        elif isinstance(error, KeyError):
            reason = f"its part {error} is missing"
        elif isinstance(error, RecursionError):
            reason = "one of its parts is nested too deeply"
        else:
            reason = f"one of its parts is malformed: {error or type(error).__name__}"
        raise ValueError(f"checkpoint {path}: {printable(' '.join(reason.split()))}") from error
