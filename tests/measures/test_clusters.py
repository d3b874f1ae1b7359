"""Clustering accuracy of discovered classes."""

import itertools
import math

import pytest
import torch

from cl_lightning.measures import clustering_accuracy


def test_it_is_the_best_of_all_assignments():
    counts = torch.randint(0, 20, (4, 4), generator=torch.Generator().manual_seed(0))
    best = max(itertools.permutations(range(4)), key=lambda m: sum(int(counts[c, m[c]]) for c in range(4)))
    right = [int(counts[c, best[c]]) for c in range(4)]
    found = clustering_accuracy(counts, torch.tensor([True, True, False, False]))
    assert found.all == pytest.approx(sum(right) / int(counts.sum()))
    assert found.old == pytest.approx(sum(right[:2]) / int(counts[:2].sum()))
    assert found.new == pytest.approx(sum(right[2:]) / int(counts[2:].sum()))


def test_numbers_of_clusters_do_not_matter_and_a_permutation_is_perfect():
    counts = torch.tensor([[0, 7, 0], [0, 0, 9], [5, 0, 0]])
    assert clustering_accuracy(counts, torch.tensor([True, False, False])) == (1.0, 1.0, 1.0)
    table = torch.randint(0, 9, (3, 3), generator=torch.Generator().manual_seed(1))
    old = torch.tensor([True, False, True])
    assert clustering_accuracy(table, old) == pytest.approx(clustering_accuracy(table[:, [2, 0, 1]], old))


def test_surplus_clusters_have_no_class_and_missing_samples_no_accuracy():
    found = clustering_accuracy(torch.tensor([[6, 4, 0], [0, 0, 10]]), torch.tensor([True, True]))
    assert found.all == pytest.approx(16 / 20)
    assert found.old == found.all
    assert math.isnan(found.new)
