import math

import pytest
import torch
from sklearn.datasets import load_digits
from support.fakes import normal
from torch.nn import functional as F

from cl_lightning.memory import HyperDomains, bipolar


def space(widths=(3, 2), dimensions=8, **options):
    return HyperDomains(widths, dimensions=dimensions, **options)


def layers(count, widths=(3, 2), seed=0):
    return [normal(count, width, seed=seed + place) for place, width in enumerate(widths)]


def learnt(domains, features):
    domains.begin()
    domains.observe(features)
    domains.add()
    domains.set_threshold(domains.scores(domains.encode(features))[:, -1])


def test_zero_has_the_sign_1():
    values = bipolar(torch.tensor([-2.0, 0.0, 0.5, -0.0]))
    assert values.tolist() == [-1, 1, 1, 1]
    assert values.dtype == torch.int8


def test_a_code_is_the_sign_of_the_sum_of_the_signs_of_its_layers():
    domains, features = space(), layers(5)
    projections = domains.projections.double()
    first, second = features[0] @ projections[:3], features[1] @ projections[3:]
    votes = torch.where(first >= 0, 1, -1) + torch.where(second >= 0, 1, -1)
    expected = torch.where(votes >= 0, 1, -1)
    assert (votes == 0).any()
    assert torch.equal(domains.encode(features).long(), expected)


def test_projections_are_standard_normal_and_a_function_of_their_key():
    domains = HyperDomains([40, 30], dimensions=200)
    assert domains.projections.shape == (70, 200)
    assert abs(domains.projections.mean()) < 0.03
    assert abs(domains.projections.std() - 1) < 0.03
    assert torch.equal(HyperDomains([40, 30], dimensions=200).projections, domains.projections)
    assert not torch.equal(HyperDomains([40, 30], dimensions=200, key=1).projections, domains.projections)
    assert not any("projections" in name for name in domains.state_dict())


@pytest.mark.parametrize("theta", [0.3, 1.0, 2.2])
def test_the_expected_cosine_of_two_codes_is_linear_in_the_angle(theta):
    x, y = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[math.cos(theta), math.sin(theta), 0.0]])
    domains = HyperDomains([3], dimensions=20_000)
    first, second = domains.encode([x]).double(), domains.encode([3 * y]).double()
    assert abs(float(F.cosine_similarity(first, second)) - (1 - 2 * theta / math.pi)) < 0.02


def test_the_vector_of_a_domain_is_the_sum_of_its_codes_in_any_order():
    domains, features = space(), layers(6)
    domains.begin()
    for part in ([0, 4], [], [5, 1, 2], [3]):
        domains.observe([layer[part] for layer in features])
    assert torch.equal(domains.pending, domains.encode(features).long().sum(dim=0))
    assert domains.samples == 6
    domains.add()
    assert len(domains) == 1
    assert torch.equal(domains.vectors[0], domains.pending)
    domains.begin()
    assert domains.samples == 0
    assert not domains.pending.any()


def test_scores_are_cosines():
    domains = space()
    for number in range(2):
        learnt(domains, layers(5, seed=10 * number))
    codes = domains.encode(layers(3, seed=30))
    expected = F.cosine_similarity(codes.double()[:, None], domains.vectors.double(), dim=2)
    torch.testing.assert_close(domains.scores(codes), expected)
    domains.vectors[0] = 0
    assert not domains.scores(codes)[:, 0].any()


def test_a_sample_is_an_outlier_below_the_threshold_of_its_nearest_domain():
    domains = space()
    scores = torch.tensor([[0.5, 0.2], [0.2, 0.35], [0.2, 0.3]], dtype=torch.float64)
    assert domains.is_outlier(torch.zeros(3, 0)).all()
    domains.thresholds = torch.tensor([0.1, 0.35], dtype=torch.float64)
    assert domains.is_outlier(scores).tolist() == [False, False, True]


def test_the_threshold_is_a_quantile_of_the_scores_of_the_domain():
    domains = space(quantile=0.25)
    domains.begin()
    domains.observe(layers(3))
    domains.add()
    assert not domains.is_outlier(torch.tensor([[-1.0]])).any()
    domains.set_threshold(torch.zeros(0))
    assert domains.thresholds[0] == -math.inf
    domains.set_threshold(torch.tensor([0.9, 0.1, 0.5, 0.3, 0.7]))
    assert domains.thresholds[0] == pytest.approx(0.3)


def test_outliers_and_nearest_domains_are_counted():
    domains = space(dimensions=500)
    for number in range(2):
        learnt(domains, layers(5, seed=10 * number))
    domains.thresholds = torch.tensor([0.0, 1.0], dtype=torch.float64)  # nearly all of the second are outliers
    features = [torch.cat(parts) for parts in zip(layers(5), layers(4, seed=10), strict=True)]
    scores = domains.scores(domains.encode(features))
    nearest = scores.argmax(dim=1)
    domains.begin()
    domains.observe(features)
    assert domains.votes.tolist() == [int((nearest == 0).sum()), int((nearest == 1).sum())]
    assert domains.outliers == domains.is_outlier(scores).sum()
    assert 0 < domains.outliers < 9
    twin = space(dimensions=500)
    twin.load_state_dict(domains.state_dict())
    for name, buffer in domains.named_buffers():
        assert torch.equal(dict(twin.named_buffers())[name], buffer)
    assert domains.num_bytes() == 2 * 500 * 8 + 2 * 8


def test_turned_digits_are_found_to_be_another_domain_and_routed():
    digits = torch.as_tensor(load_digits().images, dtype=torch.float32) / 16 - 0.3
    upright, turned = digits.flatten(1), torch.rot90(digits, 1, (1, 2)).flatten(1)
    domains = HyperDomains([64], dimensions=1000)
    learnt(domains, [upright[:1000]])
    shares = []
    for held_out in (upright[1000:], turned[1000:]):
        domains.begin()
        domains.observe([held_out])
        shares.append(float(domains.outliers / domains.samples))
    assert 0.02 < shares[0] < 0.12
    assert shares[1] > 0.95
    learnt(domains, [turned[:1000]])
    routed = [domains.scores(domains.encode([x[1000:]])).argmax(dim=1) for x in (upright, turned)]
    assert (routed[0] == 0).double().mean() > 0.95
    assert (routed[1] == 1).double().mean() > 0.95


@pytest.mark.parametrize(
    ("options", "words"),
    [({"dimensions": 0}, "dimensions is 0"), ({"quantile": 1.5}, "quantile is 1.5"), ({"widths": ()}, "layers is 0")],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        space(**options)
