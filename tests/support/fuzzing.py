"""How many examples a property is tried on, and damage to files."""

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([-1, 2**63, 10**30, "\ud800", "<script>\x00\n", "../../etc/passwd", "${x", "a.b.c", "[", "???"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def cases(count: int) -> settings:
    """So many examples, always the same; in a stress run many times as many, and others each time."""
    factor = settings().max_examples // 100
    calm = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=count * factor, deadline=None, derandomize=factor == 1, suppress_health_check=calm)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Some bits flipped, bytes replaced, left out or put in between, or the end cut off."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(result) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "replace", "remove", "insert", "cut"]))
        if kind == "flip" and result:
            result[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "replace":
            result[place : place + 1] = draw(st.binary(min_size=1, max_size=2))
        elif kind == "remove":
            del result[place : place + draw(st.integers(1, 30))]
        elif kind == "insert":
            result[place:place] = draw(st.binary(min_size=1, max_size=8))
        else:
            del result[max(place, len(result) // 2) :]
    return bytes(result)


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a value of dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(*way, key) for key, _ in items] + [spot for key, item in items for spot in places(item, (*way, key))]


@st.composite
def mangled(draw: st.DrawFn, make: Callable[[], Any], junk: st.SearchStrategy[Any] = JUNK) -> Any:
    """What ``make`` gives, of dicts and lists, with some keys dropped and some values replaced."""
    content = make()
    for _ in range(draw(st.integers(1, 3))):
        if not (spots := places(content)):
            break
        *way, last = draw(st.sampled_from(spots))
        target = content
        for key in way:
            target = target[key]
        if draw(st.integers(0, 4)) == 0:
            del target[last]
        else:
            target[last] = draw(junk)
    return content


def check_message(error: BaseException, what: str = "") -> None:
    """An error says what is wrong, in one line."""
    assert str(error)
    assert what in str(error)
    assert "\n" not in str(error)
