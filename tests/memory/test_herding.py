"""Herding: equal to the plain loop of its paper, and of one order where several rows are equally good."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from cl_lightning.memory.herding import herding_indices, random_per_class


def computed_elsewhere(features, seed):
    """The same features with the rounding of another batch size or number of processes, in float32."""
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (features * (1 + 1e-7 * noise)).float()


@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"normalize_mean": True}])
def test_equally_good_rows_go_by_their_order_whatever_the_rounding(options):
    """The two images of a class are equally far from their mean; equal images have equal features."""
    torch.manual_seed(0)
    for trial in range(200):
        pair = torch.randn(2, 16, dtype=torch.float64)
        pair = pair / pair.norm(dim=1, keepdim=True)
        assert herding_indices(computed_elsewhere(pair, trial), 1, **options).tolist() == [0]
        twins = torch.randn(6, 16, dtype=torch.float64).repeat(2, 1)
        chosen = [
            herding_indices(computed_elsewhere(twins, seed), 4, **options).tolist() for seed in (trial, trial + 1)
        ]
        assert chosen[0] == chosen[1]
        first = chosen[0][0]
        assert first < 6


def test_better_rows_go_first():
    """Rows that differ by more than rounding are chosen by their distance, as without a tolerance."""
    torch.manual_seed(0)
    for _ in range(50):
        phi = torch.randn(40, 8, dtype=torch.float64)
        mean, chosen = phi.mean(0), []
        for k in range(1, 11):
            total = phi[chosen].sum(0)
            distance = (mean - (total + phi) / k).norm(dim=1)
            distance[chosen] = float("inf")
            chosen.append(int(distance.argmin()))
        assert herding_indices(phi, 10, normalize=False).tolist() == chosen


def test_rows_of_each_class_are_chosen_at_random_with_equal_chances():
    labels = torch.tensor([2, 0, 2, -1, 0, 2, 2, 5])
    shares = torch.zeros(8)
    for key in range(2000):
        chosen = random_per_class(labels, 2, key)
        assert chosen[labels == 2].sum() == 2
        assert chosen[[1, 4, 7]].all()
        assert not chosen[3]
        shares += chosen / 2000
    torch.testing.assert_close(shares[labels == 2], torch.full((4,), 0.5), atol=0.05, rtol=0)
    assert not random_per_class(labels, 0, 1).any()
    by_row = random_per_class(labels, torch.where(labels == 2, 3, 1), 1)
    assert [int(by_row[labels == label].sum()) for label in (0, 2, 5)] == [1, 3, 1]


# herding


def plain_herding(features: Tensor, count: int) -> list[int]:
    """Algorithm 4 of iCaRL, read aloud."""
    phi = nn.functional.normalize(features, dim=1)
    mu, chosen = phi.mean(0), list[int]()
    for k in range(1, count + 1):
        distance = {
            row: float((mu - (phi[chosen].sum(0) + phi[row]) / k).norm())
            for row in range(len(phi))
            if row not in chosen
        }
        chosen.append(min(distance, key=lambda row: distance[row]))
    return chosen


@pytest.fixture
def clouds() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(23, 5, generator=generator, dtype=torch.float64) + 1 for _ in range(5))


def test_herding_equals_the_plain_loop_and_ends_as_a_permutation(clouds: Iterator[Tensor]) -> None:
    for features in clouds:
        rows = herding_indices(features, 23)
        assert rows.tolist() == plain_herding(features, 23)
        assert sorted(rows.tolist()) == list(range(23))


def test_a_shorter_herding_is_the_beginning_of_a_longer_one(clouds: Iterator[Tensor]) -> None:
    features = next(clouds)
    assert all(torch.equal(herding_indices(features, m), herding_indices(features, 99)[:m]) for m in range(24))


def test_herding_comes_nearer_to_the_mean_than_the_first_rows(clouds: Iterator[Tensor]) -> None:
    for features in clouds:
        phi = nn.functional.normalize(features, dim=1)
        chosen = phi[herding_indices(features, 10)]
        errors = [float((phi.mean(0) - chosen[:k].mean(0)).norm()) for k in range(1, 11)]
        assert sum(errors[5:]) < sum(errors[:5])
        assert errors[-1] < float((phi.mean(0) - phi[:10].mean(0)).norm())


def test_herding_without_normalisation_and_with_a_normalised_mean() -> None:
    features = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.9, 0.1]])
    assert herding_indices(features, 1, normalize=False).tolist() == [2]  # mean (1.3, 0.37)
    assert herding_indices(features * 10, 1, normalize=False).tolist() == [2]
    line = torch.tensor([[0.1, 0.0], [1.0, 0.0], [0.0, 0.3]])  # mean (0.37, 0.1) points along (0.96, 0.26)
    assert herding_indices(line, 1, normalize=False).tolist() == [0]
    assert herding_indices(line, 1, normalize=False, normalize_mean=True).tolist() == [1]
