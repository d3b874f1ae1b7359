import pytest
import torch
from support.fakes import normal

from cl_lightning.models import kmeans


def test_three_groups_have_their_means_as_centres():
    groups = [normal(20, 4, seed=seed) + 100 * seed for seed in range(3)]
    centres = kmeans(torch.cat(groups)[torch.randperm(60, generator=torch.Generator().manual_seed(0))], 3)
    expected = torch.stack([group.mean(0) for group in groups])
    torch.testing.assert_close(centres[centres[:, 0].argsort()], expected[expected[:, 0].argsort()])


def test_each_centre_is_the_mean_of_the_points_nearest_to_it():
    points = normal(200, 3)
    centres = kmeans(points, 7, key=3)
    nearest = torch.cdist(points, centres).argmin(1)
    expected = torch.stack([points[nearest == place].mean(0) for place in range(7)])
    torch.testing.assert_close(centres, expected)
    assert torch.equal(kmeans(points, 7, key=3), centres)
    assert not torch.equal(kmeans(points, 7, key=4), centres)


def test_first_centres_are_far_from_each_other():
    """Drawn uniformly, some 5 of 10 groups would have no centre at first, and Lloyd's rule does not move one there."""
    points = torch.cat([normal(30, 2, seed=seed) / 100 + 10 * seed for seed in range(10)])
    for key in range(5):
        nearest = torch.cdist(points, kmeans(points, 10, key=key)).argmin(1)
        assert len(nearest.unique()) == 10
        assert float(torch.cdist(points, kmeans(points, 10, key=key)).amin(1).max()) < 1


def test_one_centre_is_the_mean_and_centres_beyond_distinct_points_are_equal_to_points():
    points = normal(5, 3)
    torch.testing.assert_close(kmeans(points, 1), points.mean(0, keepdim=True))
    centres = kmeans(points[[0, 0, 1]].float(), 4)
    assert centres.shape == (4, 3)
    assert centres.dtype == torch.float64
    assert torch.cdist(centres, points[:2].float().double()).amin(1).max() < 1e-12
    assert torch.cdist(points[:2].float().double(), centres).amin(1).max() < 1e-12


def test_a_number_of_assignments_ends_the_iteration():
    points = normal(200, 3)
    early, late = kmeans(points, 7, iterations=1), kmeans(points, 7)
    assert not torch.allclose(early, late)


@pytest.mark.parametrize(
    ("points", "options"), [(normal(0, 2), {}), (normal(3, 2), {"count": 0}), (normal(3, 2), {"iterations": 0})]
)
def test_wrong_arguments_are_errors(points, options):
    with pytest.raises(ValueError, match="kmeans: "):
        kmeans(points, **{"count": 2, **options})
