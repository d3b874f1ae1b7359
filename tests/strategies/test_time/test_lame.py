import pytest
import torch
from support.adaptation import adapt, batches, scores, source_network, stream, watching
from support.fakes import normal

from cl_lightning.strategies.test_time.lame import LAME, adjusted, affinities, laplacian_objective, laplacian_step
from cl_lightning.strategies.test_time.source import Source


def test_without_affinities_predictions_stay():
    q = normal(6, 4).softmax(1)
    torch.testing.assert_close(adjusted(q, torch.zeros(6, 6, dtype=torch.float64)), q, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["linear", "rbf"])
def test_the_objective_with_one_half_falls_at_each_step(kind):
    """Both kernels are positive semi-definite; without the half it need not fall."""
    rises = 0
    for seed in range(100):
        q = (2 * normal(12, 5, seed=seed)).softmax(1)
        weights = affinities(normal(12, 3, seed=1000 + seed), kind, 3)
        assert torch.linalg.eigvalsh(weights).min() > -1e-9
        z, value = q, laplacian_objective(q, q, weights)
        whole = value - (z * (weights @ z)).sum() / 2
        for _ in range(20):
            z = laplacian_step(z, q, weights)
            torch.testing.assert_close(z.sum(1), torch.ones(12, dtype=torch.float64))
            now = laplacian_objective(z, q, weights)
            assert now <= value + 1e-9
            value, before, whole = now, whole, now - (z * (weights @ z)).sum() / 2
            rises += bool(whole > before + 1e-9)
    assert rises > 0 or kind == "rbf"


def test_a_fixed_point_is_where_the_gradient_is_level_on_the_simplex():
    q, weights = normal(8, 3).softmax(1), affinities(normal(8, 4, seed=1), "linear")
    z = adjusted(q, weights, 500).requires_grad_()
    (gradient,) = torch.autograd.grad(laplacian_objective(z, q, weights), z)
    torch.testing.assert_close(gradient, gradient.mean(1, keepdim=True).expand_as(gradient), rtol=0, atol=1e-6)


def test_affinities_are_their_formulas():
    h = normal(6, 3)
    unit = h / h.norm(dim=1, keepdim=True)
    distances = (unit[:, None] - unit[None]).norm(dim=2)
    torch.testing.assert_close(affinities(h, "linear"), unit @ unit.T)
    ranked = distances.argsort(1)  # itself first
    width = distances.gather(1, ranked)[:, 2].mean()
    torch.testing.assert_close(affinities(h, "rbf", 2), torch.exp(-distances.square() / (2 * width**2)))
    found = affinities(h, "knn", 2)
    for i in range(6):
        assert set(found[i].nonzero().flatten().tolist()) == set(ranked[i, 1:3].tolist())
        assert found[i].max() == 1.0
    both = affinities(h, "knn", 2, symmetric=True)
    torch.testing.assert_close(both, (found + found.T) / 2)
    assert affinities(h[:1], "knn", 5).tolist() == [[0.0]]  # a batch of one has no neighbours
    assert affinities(h[:1], "rbf", 5).tolist() == [[1.0]]
    assert affinities(h[:3], "knn", 5).sum(1).tolist() == [2.0, 2.0, 2.0]


def test_certain_predictions_and_equal_features_are_finite():
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    same = torch.ones(3, 4, dtype=torch.float64)
    weights = affinities(same, "rbf", 2)
    torch.testing.assert_close(weights, torch.ones(3, 3, dtype=torch.float64))
    z = laplacian_step(q, q, torch.zeros(3, 3, dtype=torch.float64))
    torch.testing.assert_close(z, q, rtol=0, atol=1e-9)
    torch.testing.assert_close(laplacian_objective(z, q, weights), -(z.sum(0).square().sum()) / 2, rtol=0, atol=1e-6)


def test_neighbours_agree():
    """Two groups; in each, one sample is taken for the other group's class, and is outvoted."""
    features = torch.cat([normal(5, 8) * 0.1 + 1, normal(5, 8, seed=1) * 0.1 - 1])
    q = torch.full((10, 2), 0.2, dtype=torch.float64)
    q[:5, 0], q[5:, 1] = 0.8, 0.8
    q[0], q[9] = q[0].flip(0), q[9].flip(0)
    assert adjusted(q, affinities(features, "knn", 3)).argmax(1).tolist() == [0] * 5 + [1] * 5


def test_a_stream_is_corrected_batch_by_batch_and_the_network_stays():
    strategy, source = watching(LAME, affinity="rbf"), watching(Source)
    made = adapt(strategy)
    adapt(source)
    network, parts = source_network("source"), iter(source.noted[1] + source.noted[2])
    made.datamodule.begin(made.stream.tasks[1])
    state, before = made.strategy.network.state_dict(), network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items() if name in state)
    for mine, (images, _) in zip(strategy.noted[1] + strategy.noted[2], batches(made.datamodule), strict=True):
        with torch.no_grad():
            features = network(images).features
        q = next(parts).softmax(1)
        expected = adjusted(q, affinities(features, "rbf", 5))
        torch.testing.assert_close(mine.softmax(1), expected, rtol=1e-3, atol=1e-4)


def test_it_helps_where_classes_come_in_order_and_not_where_they_are_mixed():
    def error(cls, order: str) -> float:
        options = {"samples": None, "batch_size": 71, "corruptions": ["impulse_noise"], "order": order}
        return adapt(watching(cls), stream(**options)).matrix.measures()["mean_online_error"]

    plain = error(Source, "sorted")
    assert error(Source, "shuffled") == pytest.approx(plain)  # does not depend on the order
    assert error(LAME, "sorted") < plain
    assert error(LAME, "sorted") < error(LAME, "shuffled")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"affinity": "far"}, "affinity is 'far'"),
        ({"neighbours": 0}, "neighbours is 0"),
        ({"iterations": 0}, "iterations is 0"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=f"LaplacianAdjustment: .*{words}"):
        LAME(**options)


def test_scores_are_logarithms_of_probabilities():
    strategy = watching(LAME)
    adapt(strategy)
    torch.testing.assert_close(scores(strategy).exp().sum(1), torch.ones(400), rtol=0, atol=1e-4)
