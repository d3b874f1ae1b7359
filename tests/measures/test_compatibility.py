"""Measures of features of successive networks."""

import math

import pytest
import torch
from support.fakes import normal

from cl_lightning.measures import (
    average_compatibility,
    average_multi_model_accuracy,
    backward_compatibility,
    forward_compatibility,
    retrieval_accuracy,
    verification_accuracy,
)

NAN = float("nan")
M = torch.tensor([[0.5, NAN, NAN], [0.6, 0.7, NAN], [0.5, 0.4, 0.9]], dtype=torch.float64)


def test_the_measures_of_a_matrix_worked_out_by_hand():
    # (1, 0): .6 > .5; (2, 0): .5 = .5; (2, 1): .4 < .7
    assert average_compatibility(M) == pytest.approx(2 / 3)
    assert average_compatibility(M, strict=True) == pytest.approx(1 / 3)
    assert average_multi_model_accuracy(M) == pytest.approx((0.5 + 0.6 + 0.7 + 0.5 + 0.4 + 0.9) / 6)
    assert backward_compatibility(M) == pytest.approx((0.0 - 0.3) / 2)
    assert forward_compatibility(M) == pytest.approx(((0.6 - 0.7) + (0.4 - 0.9)) / 2)


def test_a_network_that_does_not_change_is_compatible_with_itself():
    same = torch.full((4, 4), 0.8, dtype=torch.float64).tril()
    assert average_compatibility(same) == 1.0
    assert average_compatibility(same, strict=True) == 0.0
    assert backward_compatibility(same) == forward_compatibility(same) == 0.0


def test_a_single_network_has_no_compatibility():
    single = torch.tensor([[0.6]], dtype=torch.float64)
    assert average_multi_model_accuracy(single) == 0.6
    for measure in (average_compatibility, backward_compatibility, forward_compatibility):
        assert math.isnan(measure(single))


def test_retrieval_compares_directions_with_all_other_images():
    gallery = torch.tensor([[1.0, 0.0], [3.0, 0.3], [0.0, 2.0], [-0.1, 1.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert retrieval_accuracy(gallery, gallery, labels) == 1.0
    turned = torch.tensor([[0.2, 1.0], [5.0, 0.0], [0.0, 2.0], [-0.1, 7.0]])
    # the first query is now nearest to image 2, of the other class
    assert retrieval_accuracy(turned, gallery, labels) == 0.75
    assert retrieval_accuracy(turned, gallery, labels, chunk=3) == 0.75
    assert retrieval_accuracy(turned, gallery, torch.tensor([0, 1, 0, 1])) == 0.25


def by_angle(angles, same):
    second = torch.stack([torch.tensor(angles).cos(), torch.tensor(angles).sin()], dim=1)
    return torch.tensor([[2.0, 0.0]]).expand(len(angles), 2), second, torch.tensor(same)


def test_verification_takes_the_best_threshold_of_the_other_folds():
    pairs = by_angle([0.1, 0.2, 0.3, 0.9, 1.0, 0.4, 1.1, 0.35], [True, True, True, False, False, True, False, True])
    # Two folds of four pairs. The second one gives the threshold cos(.4), which is right on all pairs of the first one;
    # the first one gives cos(.3), at which the pairs of .4 and .35 are rejected.
    assert verification_accuracy(*pairs, folds=2) == pytest.approx((1.0 + 0.5) / 2)


def test_of_equal_thresholds_the_highest_is_used_and_no_pair_may_pass():
    pairs = by_angle([0.1, 0.2, 0.3, 0.9, 1.0, 0.4, 1.1, 0.15], [True, True, True, False, False, True, False, False])
    # In the second fold cos(.4) and infinity are right on three pairs each: all pairs of the first one are rejected.
    # The first one gives cos(.3): the pair of .4 is rejected and that of .15 accepted, both wrongly.
    assert verification_accuracy(*pairs, folds=2) == pytest.approx((0.25 + 0.5) / 2)


def test_verification_against_every_threshold_in_turn():
    first, second = normal(60, 5), normal(60, 5, seed=1)
    second = second + first
    same = torch.arange(60) % 2 == 0
    second[~same] = normal(30, 5, seed=2)
    scores = torch.cosine_similarity(first, second, dim=1)
    total = 0.0
    for fold in range(10):
        held = torch.arange(fold * 6, fold * 6 + 6)
        rest = torch.tensor([i for i in range(60) if i not in held.tolist()])
        candidates = [*sorted(scores[rest].tolist(), reverse=True)]
        hits = [int(((scores[rest] >= value) == same[rest]).sum()) for value in candidates]
        best = candidates[hits.index(max(hits))]
        total += float(((scores[held] >= best) == same[held]).double().mean()) / 10
    assert verification_accuracy(first, second, same) == pytest.approx(total)
    assert total > 0.7


def test_equal_cosines_are_on_one_side_of_the_threshold():
    pairs = torch.ones(8, 2)
    same = torch.tensor([True, True, False, False] * 2)
    assert verification_accuracy(pairs, pairs, same, folds=2) == 0.5


def test_folds_out_of_range_are_errors():
    with pytest.raises(ValueError, match="verification_accuracy: folds is 1; it must be at least 2"):
        verification_accuracy(torch.ones(8, 2), torch.ones(8, 2), torch.ones(8, dtype=torch.bool), folds=1)
    with pytest.raises(ValueError, match="verification_accuracy: pairs is 4; it must be at least 10"):
        verification_accuracy(torch.ones(4, 2), torch.ones(4, 2), torch.ones(4, dtype=torch.bool))
