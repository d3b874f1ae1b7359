"""Clusterings that take known classes into account."""

import math
from itertools import pairwise

import pytest
import torch
from scipy.sparse.csgraph import minimum_spanning_tree
from sklearn.cluster import SpectralClustering
from sklearn.metrics import silhouette_score
from support.fakes import normal

from cl_lightning.models import (
    kernel,
    longest_edge,
    ncd_kmeans,
    plain_kmeans,
    silhouette,
    spectral_embedding,
    spread_points,
)

CENTRES = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 6.0], [6.0, 6.0]], dtype=torch.float64)
POINTS = (CENTRES[:, None] + 0.5 * normal(4, 15, 2)).flatten(0, 1)
TRUTH = torch.arange(4).repeat_interleave(15)


@pytest.mark.parametrize("cluster", [ncd_kmeans, plain_kmeans])
def test_new_centres_are_found_among_samples_of_known_and_new_classes(cluster):
    known = CENTRES[:2] + 0.3
    found = cluster(POINTS, known, 2)
    order = torch.cdist(CENTRES[2:], found).argmin(1)
    means = torch.stack([POINTS[c == TRUTH].mean(0) for c in (2, 3)])
    torch.testing.assert_close(found[order], means)


def test_without_known_classes_among_the_points_all_of_them_are_of_new_classes():
    known = POINTS[:1] + 0.1  # would claim samples
    found = ncd_kmeans(POINTS[:30], known, 2, among_known=False)
    means = torch.stack([POINTS[:15].mean(0), POINTS[15:30].mean(0)])
    torch.testing.assert_close(found[torch.cdist(means, found).argmin(1)], means)
    assert plain_kmeans(POINTS[:30], known, 2, among_known=False).shape == (2, 2)


def inertia(points, known, new):
    return float(torch.cdist(points, torch.cat([known, new])).amin(1).square().sum())


def test_the_squared_distances_never_rise_and_more_starts_are_not_worse():
    points, known = normal(60, 3), normal(3, 3, seed=1)
    values = [inertia(points, known, ncd_kmeans(points, known, 4, starts=1, iterations=n)) for n in range(1, 12)]
    assert all(later <= sooner + 1e-12 for sooner, later in pairwise(values))
    assert values[-1] < values[0]
    one, ten = (inertia(points, known, ncd_kmeans(points, known, 4, starts=count)) for count in (1, 10))
    assert ten <= one


def test_first_centres_are_far_from_known_ones():
    points, known = torch.tensor([[0.0], [0.1], [10.0]]).double(), torch.tensor([[0.0]]).double()
    drawn = [float(spread_points(points, [number], known)) for number in (0.0, 1e-5, 0.5, 0.999)]
    assert drawn[2:] == [10.0, 10.0]
    chances = [float(spread_points(points, [i / 1000], known)) for i in range(1000)]
    assert chances.count(0.1) <= 1  # its squared distance is a ten-thousandth


def test_the_longest_edge_of_the_tree_has_the_similarity_that_is_given():
    distances = torch.cdist(POINTS, POINTS)
    expected = minimum_spanning_tree(distances.numpy()).max()
    assert float(longest_edge(distances)) == pytest.approx(expected, rel=1e-12)
    weights = kernel(POINTS, 0.2)
    place = (distances - expected).abs().argmin()
    assert float(weights.flatten()[place]) == pytest.approx(0.2, rel=1e-9)
    assert float(weights[0, 0]) == pytest.approx(1.0)


def test_the_embedding_separates_clusters_as_another_implementation_does():
    rows = spectral_embedding(POINTS, 3, 0.05)
    assert rows.shape == (60, 3)
    torch.testing.assert_close(rows.T @ rows, torch.eye(3, dtype=torch.float64), atol=1e-9, rtol=0)
    weights = kernel(POINTS, 0.05)
    degrees = weights.sum(1)
    random_walk = rows * degrees.rsqrt()[:, None]  # L v = l v is D^-1 W u = (1 - l) u with u = D^-1/2 v
    moved = (weights / degrees[:, None]) @ random_walk
    for column in range(3):
        ratio = float(moved[:, column] @ random_walk[:, column] / random_walk[:, column].square().sum())
        torch.testing.assert_close(moved[:, column], ratio * random_walk[:, column], atol=1e-9, rtol=0)
        assert ratio < 1 - 1e-12  # the first one is constant
    other = SpectralClustering(4, affinity="precomputed", random_state=0).fit_predict(weights.numpy())
    assert [len(set(other[c == TRUTH])) for c in range(4)] == [1] * 4
    means = torch.stack([rows[c == TRUTH].mean(0) for c in range(4)])
    assert torch.cdist(rows, means).argmin(1).equal(TRUTH)


def test_the_silhouette_is_that_of_another_implementation():
    labels = torch.arange(60) % 5
    labels[0] = 9  # alone
    assert silhouette(POINTS, labels) == pytest.approx(silhouette_score(POINTS.numpy(), labels.numpy()), rel=1e-9)
    assert silhouette(POINTS, TRUTH) > 0.7
    assert silhouette(POINTS, torch.zeros(60).long()) == -1.0


def test_numbers_out_of_range_are_refused():
    for options in ({"count": 0}, {"count": 1, "starts": 0}, {"count": 1, "iterations": 0}):
        with pytest.raises(ValueError, match="ncd_kmeans"):
            ncd_kmeans(POINTS, CENTRES[:1], **options)
    with pytest.raises(ValueError, match="least_similarity"):
        spectral_embedding(POINTS, 2, 1.0)
    assert math.isfinite(float(spectral_embedding(POINTS, 2).sum()))
