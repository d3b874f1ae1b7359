import pytest
import torch
from support.fakes import normal

from cl_lightning.memory import MeanCovariance


@pytest.mark.parametrize("unbiased", [True, False])
def test_it_is_the_mean_over_classes_whatever_their_sizes_and_updates(unbiased):
    features, labels = normal(40, 3), torch.tensor([0] * 20 + [2] * 5 + [1] * 14 + [-1])
    covariances = [features[labels == c].T.cov(correction=int(unbiased)) for c in range(3)]
    expected = torch.stack(covariances).mean(0)
    for parts in ([slice(0, 40)], [slice(0, 20), slice(20, 25), slice(25, 40)], [slice(20, 40), slice(0, 20)]):
        kept = MeanCovariance(3, unbiased=unbiased)
        for part in parts:
            kept.update(features[part], labels[part], 4)
        torch.testing.assert_close(kept.mean, expected, rtol=1e-12, atol=1e-12)
        assert int(kept.merged) == 3


def test_a_class_that_recurs_counts_once_more_and_an_update_without_labels_not_at_all():
    features, labels = normal(30, 2), torch.zeros(30, dtype=torch.int64)
    kept = MeanCovariance(2)
    kept.update(features[:10], labels[:10], 1)
    kept.update(features[10:], labels[10:], 1)
    kept.update(features, labels - 1, 1)
    torch.testing.assert_close(kept.mean, (features[:10].T.cov() + features[10:].T.cov()) / 2)
    assert int(kept.merged) == 2
    assert kept.num_bytes() == 8 * 5
    single = MeanCovariance(2, unbiased=False)
    single.update(features[:1], labels[:1], 1)
    assert single.mean.tolist() == [[0, 0], [0, 0]]
