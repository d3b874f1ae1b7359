import pytest
import torch
from support.fakes import normal

from cl_lightning.strategies.few_shot.softnet import SoftNet
from cl_lightning.strategies.few_shot.tuned_sessions import batch_means


def test_new_classes_have_the_means_of_their_rows_and_other_classes_keep_theirs():
    features, means = normal(5, 3).requires_grad_(), normal(4, 3, seed=1)
    labels = torch.tensor([2, 0, 2, 2, 1])
    found = batch_means(features, labels, means, torch.tensor([2, 3]))
    torch.testing.assert_close(found[2], (features[0] + features[2] + features[3]) / 3)
    assert torch.equal(found[[0, 1, 3]], means[[0, 1, 3]])
    (gradient,) = torch.autograd.grad(found.sum(), features)
    torch.testing.assert_close(gradient[:, 0], torch.tensor([1 / 3, 0, 1 / 3, 1 / 3, 0]).double())


def test_the_base_session_trains_the_backbone():
    with pytest.raises(ValueError, match="SoftNet: adapt is False, but the base session trains the backbone; use True"):
        SoftNet(adapt=False)
