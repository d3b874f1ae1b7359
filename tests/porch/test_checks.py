import math

import numpy as np
import pytest

from cl_lightning.checks import above, at_least, matching, one_of, within

NAN, INF = math.nan, math.inf


class DERpp:
    pass


class Child(DERpp):
    pass


def message(check, *args, **options):
    with pytest.raises(ValueError, match=": ") as error:
        check(*args, **options)
    return str(error.value)


def test_a_lower_bound_is_allowed_by_at_least_and_refused_by_above():
    at_least("A", 0, x=0, y=0.0, z=INF)
    at_least("A", 1, x=1)
    assert message(at_least, "A", 1, x=0) == "A: x is 0; it must be at least 1"
    assert message(at_least, "A", 0, x=-1e-300) == "A: x is -1e-300; it must be at least 0"
    above("A", 0, x=1e-300, y=INF)
    assert message(above, "A", 0, x=0) == "A: x is 0; it must be above 0"
    assert message(above, "A", 0.5, x=0.5) == "A: x is 0.5; it must be above 0.5"


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1]", (0, 0.5, 1), (-1e-9, 1 + 1e-9)),
        ("(0, 1)", (1e-9, 0.5, 1 - 1e-9), (0, 1)),
        ("[0, 1)", (0, 1 - 1e-9), (-1e-9, 1)),
        ("(0, 1]", (1e-9, 1), (0, 1 + 1e-9)),
        ("[2,3.5]", (2, 3.5), (1.999, 3.501, -2)),
        ("[-1, 1]", (-1, 0), (-1.001,)),
        ("(1e-3, 2e+1]", (1.1e-3, 20), (1e-3, 20.1)),
        ("[1, inf)", (1, 1e300), (0.999, INF)),
        ("(-inf, 0]", (-1e300, 0), (-INF, 1e-9)),
    ],
)
def test_an_interval_includes_the_bounds_with_square_brackets_alone(interval, inside, outside):
    for value in inside:
        within("A", interval, x=value)
    for value in outside:
        assert message(within, "A", interval, x=value) == f"A: x is {value!r}; it must be in {interval}"


@pytest.mark.parametrize(
    "interval", ["0, 1", "[0, 1", "[0; 1]", "[0 1]", "[0, 1, 2]", "", "]0, 1[", "[a, 1]", "[nan, 1]"]
)
def test_a_malformed_interval_is_an_error_of_the_caller(interval):
    assert message(within, "A", interval, x=0.5).startswith(f"within: interval is {interval!r}; write it as '[0, 1]'")


def test_the_allowed_values_are_listed():
    one_of("ER", ("joint", "sum"), reduction="joint", other="sum")
    assert message(one_of, "ER", ("joint", "sum"), reduction="max") == "ER: reduction is 'max'; use 'joint' or 'sum'"
    assert message(one_of, "A", ("a", "b", "c"), x=[]) == "A: x is []; use 'a', 'b' or 'c'"
    assert message(one_of, "A", {"a": 1}, x=2) == "A: x is 2; use 'a'"
    assert message(one_of, "A", (str(n) for n in (1, 2)), x="3", y="4") == "A: x is '3'; use '1' or '2'"


@pytest.mark.parametrize(
    ("owner", "name"), [(DERpp(), "DERpp"), (DERpp, "DERpp"), (Child(), "Child"), ("a name", "a name")]
)
def test_the_owner_is_an_instance_a_class_or_a_name(owner, name):
    assert message(at_least, owner, 0, logit_weight=-1) == f"{name}: logit_weight is -1; it must be at least 0"


def test_the_first_wrong_option_is_named_and_no_other():
    assert message(at_least, "A", 0, first=1, second=-2, third=-3) == "A: second is -2; it must be at least 0"
    assert message(within, "A", "[0, 1]", first=1, second=2) == "A: second is 2; it must be in [0, 1]"


CHECKS = [(at_least, 0), (above, -1), (within, "[-1, 1]"), (within, "(-inf, inf)"), (one_of, (0, 1))]


@pytest.mark.parametrize(("check", "bound"), CHECKS)
@pytest.mark.parametrize("value", [NAN, np.float64(NAN), None, "0.5", [0.5], 1j])
def test_nan_and_what_is_no_number_is_refused(check, bound, value):
    assert f"A: x is {value!r}; " in message(check, "A", bound, x=value)


@pytest.mark.parametrize(("check", "bound"), CHECKS)
def test_none_is_allowed_where_it_is_optional(check, bound):
    check("A", bound, optional=True, x=None, y=1 if check is one_of else 0.5)
    said = message(check, "A", bound, optional=True, x=None, y=-2 if check is not within else NAN)
    assert said.startswith("A: y is ")
    assert said.endswith(", or null")


def test_numbers_of_numpy_are_numbers():
    at_least("A", 1, x=np.int64(1), y=np.float32(1.5))
    within("A", "[0, 1]", x=np.float32(1))
    with pytest.raises(ValueError, match="it must be above 1"):
        above("A", 1, x=np.int64(1))


def test_an_option_may_have_the_name_of_an_argument():
    assert message(at_least, "A", 1, low=0) == "A: low is 0; it must be at least 1"
    assert message(one_of, "A", "a", owner=1, allowed=2) == "A: owner is 1; use 'a'"
    assert message(within, "A", "[0, 1]", interval=2) == "A: interval is 2; it must be in [0, 1]"


def test_names_that_match_a_pattern_keep_their_order_and_a_pattern_without_a_match_is_refused():
    names = ["head.weight", "blocks.0.qkv.weight", "blocks.1.qkv.weight", "blocks.1.mlp.weight"]
    assert matching("A", names, names=["*.qkv.*", "head.*"]) == names[:3]
    assert matching("A", names, names=["blocks.1.*", "*.qkv.*"]) == names[1:]
    assert message(matching, DERpp(), names, parts=["head.*", "QKV"]) == (
        f"DERpp: parts has 'QKV', which matches none of {', '.join(names)}"
    )
    assert message(matching, "A", [str(k) for k in range(9)], x=["a"]).endswith("none of 0, 1, 2, 3, 4, 5, 6, 7, ...")
