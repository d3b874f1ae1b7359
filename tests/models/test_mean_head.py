import pytest
import torch
from support.fakes import normal

from cl_lightning.models import NearestMeanHead


def grown(*sizes: int) -> NearestMeanHead:
    head = NearestMeanHead(3)
    for size in sizes:
        head.grow(size)
    return head.double()


def test_the_nearest_of_the_normalised_means_has_the_largest_score():
    head, means, features = grown(2, 3), normal(5, 3), normal(40, 3, seed=1)
    head.fill(means)
    directions = means / means.norm(dim=1, keepdim=True)
    own = features / features.norm(dim=1, keepdim=True)
    distances = torch.stack([(own - direction).norm(dim=1) for direction in directions], dim=1)
    torch.testing.assert_close(head(features), 1 - distances.square() / 2)
    assert torch.equal(head(features).argmax(1), distances.argmin(1))
    assert torch.equal(head.classify(features), head(features))
    head.fill(7 * means)
    torch.testing.assert_close(head(features), 1 - distances.square() / 2)


def test_a_class_without_a_mean_is_never_predicted():
    head, means = grown(2, 3), normal(5, 3)
    means[[1, 4]] = 0
    head.fill(means)
    scores = head(-normal(20, 3, seed=2))
    assert (scores[:, [1, 4]] == -torch.inf).all()
    assert scores[:, [0, 2, 3]].isfinite().all()
    head.grow(2)
    assert (head(normal(4, 3))[:, 5:] == -torch.inf).all()


def test_while_no_class_has_a_mean_all_scores_are_zero():
    assert torch.equal(grown(2)(normal(4, 3)), torch.zeros(4, 2).double())
    assert grown()(normal(4, 3)).shape == (4, 0)


def test_it_has_no_parameters_and_takes_its_shape_and_means_from_a_state():
    head, other = grown(2, 1), NearestMeanHead(3).double()
    head.fill(normal(3, 3))
    assert not list(head.parameters())
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other.double()(normal(4, 3)), head(normal(4, 3)), rtol=1e-6, atol=1e-6)


def test_means_of_another_number_are_an_error():
    with pytest.raises(ValueError, match=r"NearestMeanHead: means are \(2, 3\); give one for each column, \(3, 3\)"):
        grown(3).fill(normal(2, 3))
