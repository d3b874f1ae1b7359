"""Herding where several rows are equally good."""

import pytest
import torch

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
