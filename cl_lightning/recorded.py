"""Options of objects that were made in Python, as plain values: for results, so that different runs are never pooled.

What cannot be read (an object of another library without attributes) gets a mark that differs in each run.
"""

import dataclasses
import functools
import hashlib
import inspect
import math
import secrets
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_INSTALLED = ("cl_lightning", "torch", "torchvision", "timm", "lightning", "torchmetrics", "numpy", "builtins")
_DEEPEST, _LONGEST, _SAMPLED = 6, 200, 2**20


def options_of(made: object) -> dict[str, Any]:
    """Arguments of the constructors of an object, as plain values by name; called inside the constructor of a base.

    Includes defaults, and the arguments that a class passes on to its bases. Where a class and its base have an option
    of the same name, the value of the class counts.
    """
    found: dict[str, Any] = {}
    frame = inspect.currentframe()
    frame = frame.f_back if frame is not None else None
    while frame is not None and frame.f_code.co_name == "__init__" and frame.f_locals.get("self") is made:
        code = frame.f_code
        count = code.co_argcount + code.co_kwonlyargcount
        names = [name for name in code.co_varnames[:count] if name != "self"]
        passed = {name: frame.f_locals[name] for name in names if name in frame.f_locals}
        place = count
        if code.co_flags & inspect.CO_VARARGS:
            passed["args"] = list(frame.f_locals.get(code.co_varnames[place], ()))
            place += 1
        if code.co_flags & inspect.CO_VARKEYWORDS:
            passed |= frame.f_locals.get(code.co_varnames[place], {})
        found |= {name: value for name, value in passed.items() if not (name == "args" and not value)}
        frame = frame.f_back
    return {name: described(value) for name, value in found.items()}


def described(value: Any, depth: int = 0) -> Any:
    """A value as plain values for JSON: classes and functions by import path, arrays and code of users by digest."""
    if isinstance(value, np.generic | Enum):
        value = value.item() if isinstance(value, np.generic) else value.value
    if value is None or isinstance(value, bool | int | str):
        return (
            value if value is None or isinstance(value, bool) else int(value) if isinstance(value, int) else str(value)
        )
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if depth > _DEEPEST:
        return _unknown()
    inner = functools.partial(described, depth=depth + 1)
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, Tensor | np.ndarray):
        return _of_array(value)
    if isinstance(value, list | tuple | set | frozenset | range):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else list(value)
        few = len(items) <= _LONGEST
        return [inner(item) for item in items] if few else f"{len(items)} items {_digest(repr(items))}"
    if isinstance(value, Mapping):
        return {str(key): inner(item) for key, item in value.items()}
    if isinstance(value, type):
        return _path(value) + _code_of_class(value)
    if isinstance(value, functools.partial):
        return {"class_path": inner(value.func), "init_args": {**inner(value.keywords), "args": inner(value.args)}}
    if isinstance(value, MethodType):
        return {"class_path": _path(value.__func__), "init_args": inner(value.__self__)}
    if isinstance(value, FunctionType):
        seen = [cell.cell_contents for cell in value.__closure__ or ()]
        if _path(value).partition(".")[0] in _INSTALLED and not seen:
            return _path(value)
        return {"class_path": _path(value), "init_args": {"code": _of_code(value), "uses": inner(seen)}}
    return {"class_path": _path(type(value)) + _code_of_class(type(value)), "init_args": _attributes(value, inner)}


def _attributes(value: Any, inner: Any) -> Any:
    if (options := getattr(value, "_recorded", None)) is not None:
        return options
    if dataclasses.is_dataclass(value):
        return {field.name: inner(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, nn.Module):
        return {"structure": _digest(repr(value))}  # its weights depend on the seed
    if hasattr(value, "__dict__"):
        return {name: inner(item) for name, item in vars(value).items() if not name.startswith("__")}
    text = repr(value)
    return _unknown() if " at 0x" in text else text


def _code_of_class(cls: type) -> str:
    """A digest of the methods of a class that is not of an installed package, with its bases; empty without any."""
    parts = [
        f"{name}{_of_code(inspect.unwrap(item))}"
        for base in cls.__mro__
        if base.__module__.partition(".")[0] not in _INSTALLED
        for name, item in sorted(vars(base).items())
        if isinstance(item, FunctionType)
    ]
    return f" {_digest(''.join(parts))}" if parts else ""


def _of_code(function: Any) -> str:
    def text(code: CodeType) -> str:
        constants = [text(item) if isinstance(item, CodeType) else repr(item) for item in code.co_consts]
        return f"{code.co_code.hex()} {code.co_names} {constants}"

    code = getattr(function, "__code__", None)
    return "" if code is None else _digest(f"{text(code)} {function.__defaults__} {function.__kwdefaults__}")


def _of_array(value: Tensor | np.ndarray) -> str:
    array = value.detach().cpu() if isinstance(value, Tensor) else value
    flat = array.reshape(-1)
    sample = flat[:: max(len(flat) // _SAMPLED, 1)]
    content = sample.float().numpy() if isinstance(sample, Tensor) else sample
    return f"{value.dtype} {tuple(value.shape)} {_digest(np.ascontiguousarray(content).tobytes())}"


def _path(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', type(thing).__name__)}"


def _digest(content: str | bytes) -> str:
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return hashlib.blake2b(raw, digest_size=6).hexdigest()


def _unknown() -> str:
    return f"(not recorded: {secrets.token_hex(4)})"
