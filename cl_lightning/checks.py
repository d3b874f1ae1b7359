"""Checks of a constructor's options; each error names the object, the option, its value and what is allowed.

    class DERpp(ContinualStrategy):
        def __init__(self, *, logit_weight: float = 0.1, momentum: float = 0.9, reduction: str = "joint") -> None:
            at_least(self, 0, logit_weight=logit_weight)
            within(self, "[0, 1)", momentum=momentum)
            one_of(self, ("joint", "sum"), reduction=reduction)

``DERpp(logit_weight=-1)`` raises ``ValueError: DERpp: logit_weight is -1; it must be at least 0``.

In each function ``owner`` is the object whose options are checked: an instance, a class, or a name. With several
options the first one that is wrong is reported. NaN is never allowed, and None only with ``optional=True``; the message
then says ``null``, as a configuration file writes it. ``reason`` quotes an error of a library in a message.
"""

import dis
import fnmatch
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

_BOUND = r"\s*([-+]?(?:inf|\d+(?:\.\d+)?(?:e[-+]?\d+)?))\s*"
_INTERVAL = re.compile(rf"([\[(]){_BOUND},{_BOUND}([\])])")


def at_least(owner: object, low: float, /, *, optional: bool = False, **options: Any) -> None:
    """Check that each option is a number ``>= low``.

    Args:
        owner: Object to name in the error: an instance, a class, or a string.
        low: Smallest value that is allowed.
        optional: Whether None is allowed too.
        options: Values by the names of the options.

    Raises:
        ValueError: For the first option that is not, such as ``ER: replay_size is 0; it must be at least 1``.
    """
    _check(owner, options, lambda value: _is_real(value) and value >= low, f"it must be at least {low}", optional)


def above(owner: object, low: float, /, *, optional: bool = False, **options: Any) -> None:
    """Check that each option is a number ``> low``.

    Args:
        owner: Object to name in the error: an instance, a class, or a string.
        low: Largest number that is not allowed.
        optional: Whether None is allowed too.
        options: Values by the names of the options.

    Raises:
        ValueError: For the first option that is not, such as ``LwF: temperature is 0; it must be above 0``.
    """
    _check(owner, options, lambda value: _is_real(value) and value > low, f"it must be above {low}", optional)


def within(owner: object, interval: str, /, *, optional: bool = False, **options: Any) -> None:
    """Check that each option is a number in an interval.

    Args:
        owner: Object to name in the error: an instance, a class, or a string.
        interval: Two bounds in brackets: ``[`` or ``]`` includes the bound, ``(`` or ``)`` excludes it, as in
            ``"[0, 1)"``. A bound may be ``inf`` or ``-inf``.
        optional: Whether None is allowed too.
        options: Values by the names of the options.

    Raises:
        ValueError: For the first option outside, such as ``BiC: held_out is 1.5; it must be in (0, 1)``, or for an
            ``interval`` that is not written as above.
    """
    matched = _INTERVAL.fullmatch(interval)
    if matched is None:
        raise ValueError(f"within: interval is {interval!r}; write it as '[0, 1]', '(0, 1)', '[0, 1)' or '(0, 1]'")
    low, high = float(matched[2]), float(matched[3])
    left, right = (operator.le if bracket in "[]" else operator.lt for bracket in (matched[1], matched[4]))
    remedy = f"it must be in {interval}"
    _check(owner, options, lambda value: _is_real(value) and left(low, value) and right(value, high), remedy, optional)


def one_of(owner: object, allowed: Iterable[Any], /, *, optional: bool = False, **options: Any) -> None:
    """Check that each option is one of the allowed values.

    Args:
        owner: Object to name in the error: an instance, a class, or a string.
        allowed: Allowed values, at least one, such as ``("joint", "sum")`` or ``get_args(Reduction)`` of a ``Literal``.
        optional: Whether None is allowed too.
        options: Values by the names of the options.

    Raises:
        ValueError: For the first option that is not, such as ``ER: reduction is 'max'; use 'joint' or 'sum'``.
    """
    values = tuple(allowed)
    *others, last = map(repr, values)
    listed = f"{', '.join(others)} or {last}" if others else last
    _check(owner, options, lambda value: value in values, f"use {listed}", optional)


def matching(owner: object, among: Iterable[str], /, **options: Iterable[str]) -> list[str]:
    """Names that match one of the patterns of an option, in the order in which they are given.

    Args:
        owner: Object to name in the error: an instance, a class, or a string.
        among: Names, such as ``backbone.blocks.0.attn.qkv.weight``.
        options: One option with its patterns, such as ``names=["backbone.*.attn.qkv.*"]``; ``*``, ``?`` and ``[...]``
            as in a shell, and upper and lower case differ.

    Raises:
        ValueError: For a pattern that matches no name; the error lists names that there are.
    """
    ((option, patterns),) = options.items()
    names, chosen = list(among), set[str]()
    for pattern in patterns:
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"{_named(owner)}: {option} has {pattern!r}, which matches none of {listed or 'no names'}")
        chosen.update(found)
    return [name for name in names if name in chosen]


def _named(owner: object) -> str:
    return owner if isinstance(owner, str) else (owner if isinstance(owner, type) else type(owner)).__name__


def origin(error: BaseException) -> tuple[str, bool]:
    """Package in which an error arose, and whether a ``raise`` statement raised it there.

    ``("torch", False)`` is an error of a compiled function that was called in a file of torch.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "", False
    module = str(trace.tb_frame.f_globals.get("__name__", ""))
    return module.partition(".")[0], trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def reason(error: Exception) -> str:
    """What an error says, in one line, to be quoted in the message of another one; never shortened."""
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror.lower()
    return (str(error).splitlines() or [type(error).__name__])[0]


def _check(
    owner: object, options: Mapping[str, Any], allowed: Callable[[Any], bool], remedy: str, optional: bool
) -> None:
    for option, value in options.items():
        if not (optional and value is None) and not allowed(value):
            raise ValueError(f"{_named(owner)}: {option} is {value!r}; {remedy}{', or null' if optional else ''}")


def _is_real(value: Any) -> bool:
    return isinstance(value, Real)
