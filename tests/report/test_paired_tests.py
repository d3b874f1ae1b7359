"""Tests of paired differences, and ranks over data sets, against enumerations and published numbers."""

import itertools
from xml.etree import ElementTree

import numpy as np
import pytest

from cl_lightning.report import plots
from cl_lightning.report.statistics import (
    MOST_PAIRS,
    cliques,
    critical_difference,
    holm,
    mean_ranks,
    permutation_test,
)


def enumerated(differences):
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True))
            for signs in itertools.product((1, -1), repeat=len(differences))]  # fmt: skip
    return sum(abs(total) >= abs(sum(differences)) - 1e-12 for total in sums) / len(sums)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_the_permutation_test_is_the_enumeration_of_all_signs(count):
    differences = np.random.default_rng(count).normal(0.4, 1.0, count).tolist()
    assert permutation_test(differences) == pytest.approx(enumerated(differences), abs=1e-15)


def test_the_permutation_test_on_numbers_that_are_known():
    assert permutation_test([1.0, 2.0, 3.0]) == 2 / 8  # no other pattern reaches the sum, apart from its mirror
    assert permutation_test([3.0, 1.0, -1.0]) == 6 / 8  # 5, 3 and 3 of the sums 5, 3, 3, 1, and their mirrors
    assert permutation_test([0.0, 0.0]) == 1.0
    assert permutation_test([0.1] * 20) == 2.0**-19
    assert permutation_test([-0.1] * MOST_PAIRS) == 2.0 ** (1 - MOST_PAIRS)
    # Darwin's maize (Fisher, The Design of Experiments, 1935): 863 of 2^15 patterns on one side
    maize = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
    assert permutation_test(maize) == pytest.approx(2 * 863 / 2**15, abs=1e-12)
    with pytest.raises(ValueError, match="41 differences; give 1 to 40"):
        permutation_test([1.0] * 41)


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_ranks_share_their_mean_where_scores_are_equal():
    assert mean_ranks([[0.9, 0.5, 0.5], [0.1, 0.3, 0.2]]) == [(1 + 3) / 2, (2.5 + 1) / 2, (2.5 + 2) / 2]


def test_the_critical_difference_is_that_of_the_published_table():
    # Demsar (JMLR 2006), table 5: q is 1.960, 2.343, 2.569 for 2, 3, 4 methods; example with 4 methods on 14 data sets
    for methods, q in ((2, 1.960), (3, 2.343), (4, 2.569)):
        assert critical_difference(methods, 6) == pytest.approx(q * (methods * (methods + 1) / 36) ** 0.5, abs=2e-3)
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.01)
    assert critical_difference(4, 14, level=0.9) == pytest.approx(2.291 * (20 / 84) ** 0.5, abs=2e-3)


def test_methods_that_do_not_differ_are_joined_in_largest_groups():
    assert cliques([1.0, 1.4, 2.2, 4.0], 1.0) == [(1.0, 1.4), (1.4, 2.2)]
    assert cliques([2.2, 1.0, 1.9, 1.4], 1.0) == [(1.0, 1.9), (1.4, 2.2)]
    assert cliques([1.0, 2.0, 3.0], 1.0) == []
    assert cliques([3.0, 1.0, 2.0], 5.0) == [(1.0, 3.0)]


def test_a_plot_is_a_file_of_its_own_with_colours():
    plot = plots.ranks("ranks", "Mean ranks", ["a", "b & c"], [1.2, 1.8], [(1.2, 1.8)], 0.9)
    text = plots.standalone(plot)
    assert "var(" not in text
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a (1.20)", "b & c (1.80)", "critical difference 0.90"} <= set(texts)
