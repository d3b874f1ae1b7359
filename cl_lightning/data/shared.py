"""Data sets that a process reads and decodes once, for itself and for the processes that it forks."""

import json
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

_OF_THE_STREAM = (
    *("scenario", "batch_size", "eval_batch_size", "val_fraction", "transforms", "mean", "std", "resize"),
    *("center_crop", "interpolation", "seed", "workers", "sampler", "class_weights", "drop_last"),
)
"""Options of a data module that change the stream or its batches, and not the data set."""
M = TypeVar("M", bound=Callable[..., Any])
T = TypeVar("T")


class _Store:
    """Values by key while sharing is on; each is made once."""

    def __init__(self) -> None:
        self.on = False
        self.kept: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        if not self.on:
            return make()
        if key not in self.kept:
            self.kept[key] = make()
        found: T = self.kept[key]
        return found


_STORE = _Store()


@contextmanager
def sharing_sources() -> Iterator[None]:
    """Keep the data sets that are read inside the context, and use them again for equal options."""
    before, _STORE.on = _STORE.on, True
    try:
        yield
    finally:
        _STORE.on = before
        if not before:
            _STORE.kept.clear()


def read_once(source: M) -> M:
    """Decorator for ``source`` of a data module, if its result depends on nothing but the options of the data set.

    It may neither depend on the seed of the run or the stream, nor set attributes.
    """

    @wraps(source)
    def read(self: Any, *, train: bool) -> Any:
        options = {name: value for name, value in self._recorded.items() if name not in _OF_THE_STREAM}
        kind = f"{type(self).__module__}.{type(self).__qualname__}"
        key = json.dumps([kind, train, options], sort_keys=True, default=repr)
        return _STORE.get(key, lambda: source(self, train=train))

    return read  # type: ignore[return-value]


def once_of(source: object, make: Callable[[], T]) -> T:
    """What ``make`` makes of a source, such as its decoded images; kept if the source itself is."""
    if any(source is kept for kept in _STORE.kept.values()):
        return _STORE.get(("of", id(source)), make)
    return make()
