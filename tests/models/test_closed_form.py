import itertools
import math
import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from support import forks
from support.fakes import normal
from torch.nn import functional as F

from cl_lightning.memory import PrototypeHead
from cl_lightning.models import (
    LDAHead,
    RidgeHead,
    gaussian_classifier,
    recursive_ridge,
    solve_positive,
    validated_ridge,
)

CLASSES, WIDTH = 6, 8


def samples(count=120, seed=0):
    """Features around different means, and columns in which each class occurs."""
    labels = torch.randint(CLASSES, (count,), generator=torch.Generator().manual_seed(seed))
    labels[:CLASSES] = torch.arange(CLASSES)
    return normal(count, WIDTH, seed=seed) + 2 * normal(CLASSES, WIDTH, seed=99)[labels], labels


def learnt(make, parts, classes=CLASSES, seed=0):
    """A head after parts of a stream, each ``(features, labels)``; it grows when a class is first met."""
    torch.manual_seed(seed)  # for random projections
    head = make(WIDTH)
    for features, labels in parts:
        head.grow(max(0, int(labels.max()) + 1 - head.num_columns))
        head.fit_features(features, labels)
    head.grow(classes - head.num_columns)
    return head


def cuts(features, labels):
    """The same samples: at once, backwards one by one, by classes, and in batches in which classes come again."""
    yield [(features, labels)]
    yield [(features[i : i + 1], labels[i : i + 1]) for i in reversed(range(len(labels)))]
    yield [(features[labels == c], labels[labels == c]) for c in range(CLASSES)]
    sizes = [1, 30, 2, 50, len(labels) - 83]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
    yield [(features[rows], labels[rows]) for rows in order.split(sizes)]


HEADS = {
    "lda": LDAHead,
    "lda within": partial(LDAHead, covariance="within", ridge=0.0, shrinkage=0.1, priors="counts"),
    "ridge": partial(RidgeHead, ridge=0.5),
    "ridge recursive": partial(RidgeHead, ridge=0.5, backend="recursive"),
    "projected": partial(RidgeHead, ridge=0.5, projection=40),
    "projected recursive": partial(RidgeHead, ridge=0.5, projection=40, backend="recursive"),
}


@pytest.mark.parametrize("name", HEADS)
def test_scores_do_not_depend_on_order_nor_on_how_the_stream_is_cut(name):
    features, labels = samples()
    first, *others = [learnt(HEADS[name], parts) for parts in cuts(features, labels)]
    for other in others:
        torch.testing.assert_close(other(features), first(features), rtol=1e-8, atol=1e-8)
        assert torch.equal(other.counts, first.counts)


@pytest.mark.parametrize("options", [{}, {"projection": 64}, {"projection": 64, "activation": "tanh"}])
@pytest.mark.parametrize("backend", ["accumulate", "recursive"])
def test_ridge_is_the_joint_solution_on_the_expanded_features(options, backend):
    features, labels = samples()
    head = learnt(partial(RidgeHead, ridge=2.0, backend=backend, **options), list(cuts(features, labels))[3])
    inputs, targets = head.expand(features), F.one_hot(labels, CLASSES).double()
    identity = torch.eye(inputs.shape[1], dtype=torch.float64)
    joint = torch.linalg.solve(inputs.T @ inputs + 2.0 * identity, inputs.T @ targets)
    torch.testing.assert_close(head.weight().T, joint, rtol=1e-8, atol=1e-8)
    if backend == "recursive":
        assert torch.equal(head.inverse, head.inverse.T)
        product = head.inverse @ (inputs.T @ inputs + 2.0 * identity)
        torch.testing.assert_close(product, identity, rtol=0, atol=1e-6)


def test_a_batch_that_lacks_the_highest_classes_leaves_them_their_columns():
    features, labels = samples()
    early = labels < 2
    for backend in ("accumulate", "recursive"):
        parts = [(features[~early], labels[~early]), (features[early], labels[early])]
        head = learnt(partial(RidgeHead, backend=backend), parts)
        assert head(features).shape == (len(labels), CLASSES)
        assert torch.isfinite(head(features)).all()


def test_one_step_of_the_recursion_on_numbers():
    inverse, weight = recursive_ridge(
        torch.eye(1, dtype=torch.float64) / 0.5,
        torch.zeros(1, 1, dtype=torch.float64),
        *torch.tensor([[[3.0]], [[1.0]]]).double(),
    )
    torch.testing.assert_close(inverse, torch.tensor([[1 / 9.5]]).double())
    torch.testing.assert_close(weight, torch.tensor([[3 / 9.5]]).double())


def test_lda_is_bayes_rule_for_normal_distributions_with_one_covariance():
    means, root = normal(3, 4), normal(4, 4, seed=1)
    covariance = root @ root.T + torch.eye(4, dtype=torch.float64)
    weight, bias = gaussian_classifier(means, covariance)
    points = normal(50, 4, seed=2)
    peers = [torch.distributions.MultivariateNormal(mean, covariance).log_prob(points) for mean in means]
    scores = points @ weight.T + bias
    torch.testing.assert_close(scores.softmax(1), torch.stack(peers, 1).softmax(1))


def test_the_covariances_match_their_definitions():
    features, labels = samples()
    total = learnt(LDAHead, [(features, labels)]).shared_covariance()
    torch.testing.assert_close(total, features.T.cov() + torch.eye(WIDTH, dtype=torch.float64))
    within = learnt(partial(LDAHead, covariance="within", ridge=0.0, shrinkage=0.25), [(features, labels)])
    means = torch.stack([features[labels == c].mean(0) for c in range(CLASSES)])
    rest = features - means[labels]
    pooled = rest.T @ rest / (len(labels) - CLASSES)
    identity = torch.eye(WIDTH, dtype=torch.float64)
    torch.testing.assert_close(within.shared_covariance(), 0.75 * pooled + 0.25 * pooled.trace() / WIDTH * identity)


def test_classes_of_one_sample_and_of_none_have_their_share_in_mean_and_covariance():
    features, labels = samples()
    labels = torch.where(labels == 3, 2, labels)  # class 3 has no samples
    labels[(labels == 1).nonzero()[1:]] = 2  # class 1 has one
    options = {"covariance": "within", "ridge": 0.1, "priors": "counts"}
    head = learnt(partial(LDAHead, **options), [(features, labels)])
    present = labels.unique()
    assert present.tolist() == [0, 1, 2, 4, 5]
    means = torch.stack([features[labels == c].mean(0) for c in present])
    rest = features - means[torch.searchsorted(present, labels)]
    covariance = rest.T @ rest / (len(labels) - 5) + 0.1 * torch.eye(WIDTH, dtype=torch.float64)
    weight, bias = gaussian_classifier(means, covariance)
    expected = features @ weight.T + bias + (labels.bincount()[present] / len(labels)).log()
    torch.testing.assert_close(head(features)[:, present], expected)


def test_without_enough_samples_the_median_ridge_is_taken_in_any_order():
    features, labels = samples()
    ridges = [100.0, 1.0, 10.0, 0.1, 1000.0]
    for count, chosen in ((4, 10.0), (5, None)):
        head = learnt(partial(RidgeHead, ridge=ridges), [(features[:count], labels[:count])])
        assert float(head.chosen) == chosen if chosen else float(head.chosen) in ridges
    before = learnt(partial(RidgeHead, ridge=[1e-3, 1e3, 1.0]), [(features, labels)])
    kept = float(before.chosen)
    before.fit_features(features[:4], labels[:4])
    assert float(before.chosen) == kept  # that of the task before


def test_priors_are_added_as_logarithms():
    features, labels = samples()
    plain, weighed = (learnt(partial(LDAHead, priors=p), [(features, labels)]) for p in ("equal", "counts"))
    gap = weighed(features) - plain(features)
    torch.testing.assert_close(gap, (labels.bincount() / len(labels)).log().double().expand_as(gap))


def test_lda_with_a_huge_ridge_is_the_nearest_class_mean():
    features, labels = samples()
    head = learnt(partial(LDAHead, ridge=1e9), [(features, labels)])
    nearest = learnt(partial(PrototypeHead, metric="euclidean"), [(features, labels)])
    assert torch.equal(head(features).argmax(1), nearest.classify(features).argmax(1))


def test_lda_without_ridge_does_not_mind_an_invertible_linear_map():
    features, labels = samples()
    mapped = features @ (normal(WIDTH, WIDTH, seed=7) + 3 * torch.eye(WIDTH, dtype=torch.float64))
    make = partial(LDAHead, covariance="within", ridge=0.0)
    scores = [learnt(make, [(points, labels)])(points).softmax(1) for points in (features, mapped)]
    torch.testing.assert_close(*scores, rtol=1e-7, atol=1e-7)


def test_a_further_class_leaves_the_sums_of_others_but_not_their_scores():
    features, labels = samples()
    old = labels < CLASSES - 1
    before = learnt(LDAHead, [(features[old], labels[old])])
    after = learnt(LDAHead, [(features[old], labels[old]), (features[~old], labels[~old])])
    assert torch.equal(before.sums[:-1], after.sums[:-1])
    assert not torch.allclose(before(features)[:, 0], after(features)[:, 0])  # by way of the covariance


def test_a_single_sample_and_fewer_samples_than_features_are_solved():
    features, labels = samples()
    for make in (LDAHead, partial(LDAHead, covariance="within", ridge=0.0), RidgeHead):
        for count in (1, 5):
            head = learnt(make, [(features[:count], labels[:count])], classes=int(labels[:count].max()) + 1)
            assert torch.isfinite(head(features)[:, labels[:count]]).all()


def test_a_singular_matrix_is_inverted_where_it_can_be():
    root = normal(5, 3)
    matrix, right = root @ root.T, normal(5, 2, seed=1)
    torch.testing.assert_close(solve_positive(matrix, right), torch.linalg.pinv(matrix) @ right)
    assert torch.equal(solve_positive(torch.zeros_like(matrix), right), torch.zeros_like(right))
    torch.testing.assert_close(solve_positive(1e-20 * matrix, 1e-20 * right), solve_positive(matrix, right))
    line = normal(5, 1, seed=2)  # of rank 1: the pseudo-inverse of v v^T is v v^T / |v|^4
    expected = line @ (line.T @ right) / line.square().sum() ** 2
    torch.testing.assert_close(solve_positive(line @ line.T, right), expected)


def test_a_ridge_that_tends_to_infinity_leaves_the_sums_of_the_classes():
    features, labels = samples()
    head = learnt(partial(RidgeHead, ridge=1e12), [(features, labels)])
    sums = torch.stack([features[labels == c].sum(0) for c in range(CLASSES)])
    assert torch.equal(head(features).argmax(1), (features @ sums.T).argmax(1))


@pytest.mark.parametrize(
    ("activation", "by_hand"),
    [("relu", lambda value: max(value, 0.0)), ("identity", float), ("tanh", math.tanh)],
)
def test_inputs_are_the_activation_of_the_projected_features(activation, by_hand):
    head = RidgeHead(2, projection=3, activation=activation)
    head.random.copy_(torch.tensor([[1.0, -2.0, 1.0], [0.5, 3.0, 2.0]]))
    found = head.expand(torch.tensor([[2.0, -1.0], [-0.75, 0.5]]))
    projected = [[2 - 0.5, -4 - 3, 2 - 2], [-0.75 + 0.25, 1.5 + 1.5, -0.75 + 1]]
    expected = torch.tensor([[by_hand(value) for value in row] for row in projected], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("init", "variance", "kurtosis"),
    [("normal", 1.0, 3.0), ("uniform", 1 / (3 * 49), 1.8)],
)
def test_the_projection_has_the_law_of_its_init(init, variance, kurtosis):
    torch.manual_seed(0)
    values = RidgeHead(49, projection=4000, init=init).random.double()
    assert values.shape == (49, 4000)
    assert abs(float(values.mean())) < 4 * (variance / values.numel()) ** 0.5
    assert float(values.var()) == pytest.approx(variance, rel=0.02)
    centred = values - values.mean()
    assert float(centred.pow(4).mean() / centred.square().mean() ** 2) == pytest.approx(kurtosis, rel=0.02)
    if init == "uniform":  # the initial weights of a linear layer of 49 inputs
        assert 0.999 / 7 < float(values.abs().max()) <= 1 / 7
    assert torch.equal(RidgeHead(49, init=init).random, torch.zeros(0, 0))


def test_an_identity_projection_is_plain_ridge():
    features, labels = samples()
    plain = learnt(RidgeHead, [(features, labels)])
    head = RidgeHead(WIDTH, projection=WIDTH, activation="identity")
    head.random.copy_(torch.eye(WIDTH))
    head.grow(CLASSES)
    head.fit_features(features, labels)
    torch.testing.assert_close(head(features), plain(features))


@pytest.mark.parametrize("count", [40, 400])  # fewer samples than inputs, and more
def test_the_validated_ridge_is_that_of_a_plain_search(count):
    features, labels = samples(count, seed=5)
    noisy = labels.clone()
    noisy[::3] = noisy[::3].flip(0)
    head = RidgeHead(WIDTH, projection=100)
    targets = F.one_hot(noisy, CLASSES).double()
    held_out = torch.arange(count) % 5 == 0
    ridges = [10.0**power for power in range(-4, 7)]

    def error(ridge):
        inputs = head.expand(features)
        gram = inputs[~held_out].T @ inputs[~held_out] + ridge * torch.eye(100, dtype=torch.float64)
        weight = torch.linalg.solve(gram, inputs[~held_out].T @ targets[~held_out])
        return float((inputs[held_out] @ weight - targets[held_out]).square().mean())

    fine = [10.0 ** (power / 20) for power in range(-80, 121)]  # a change of 12 % in a sum would be noticed
    assert validated_ridge(head.expand, features, targets, held_out, fine) == min(fine, key=error)
    best = min(ridges, key=error)
    assert ridges[0] < best < ridges[-1]
    assert validated_ridge(head.expand, features, targets, held_out, ridges) == best
    assert validated_ridge(head.expand, features, targets, held_out, [best]) == best


def test_only_the_choice_of_the_ridge_depends_on_the_newest_task():
    features, labels = samples(600)
    ridges = [10.0**power for power in range(-8, 9)]
    parts = list(cuts(features, labels))[2]
    head = learnt(partial(RidgeHead, ridge=ridges, projection=40), parts)
    assert float(head.chosen) in ridges
    fixed = learnt(partial(RidgeHead, ridge=float(head.chosen), projection=40), [(features, labels)])
    torch.testing.assert_close(head(features), fixed(features), rtol=1e-6, atol=1e-6)
    few = learnt(partial(RidgeHead, ridge=ridges), [(features[:3], labels[:3])])
    assert float(few.chosen) == 1.0  # too few samples to hold any out


def test_classes_without_samples_are_never_predicted_and_rows_without_label_do_not_count():
    features, labels = samples()
    hidden = labels.clone()
    hidden[labels == 2] = -1
    for make in HEADS.values():
        torch.manual_seed(0)
        head = make(WIDTH)
        head.grow(CLASSES)
        assert torch.equal(head(features), torch.full((len(labels), CLASSES), -torch.inf).double())
        head.fit_features(features, hidden)
        scores = head(features)
        assert torch.isinf(scores[:, 2]).all()
        assert torch.isfinite(scores[:, [0, 1, 3, 4, 5]]).all()
        peer = learnt(make, [(features[labels != 2], labels[labels != 2])])
        torch.testing.assert_close(peer(features), scores)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_takes_its_shape_and_its_sums_from_the_state_that_it_loads(name):
    features, labels = samples()
    *most, last = list(cuts(features, labels))[2]
    head = learnt(HEADS[name], most, classes=CLASSES - 1)
    other = HEADS[name](WIDTH)
    state = torch.random.get_rng_state()
    other.load_state_dict(head.state_dict())
    assert torch.equal(state, torch.random.get_rng_state())
    for one in (head, other):
        one.grow(1)
        one.fit_features(*last)
    assert torch.equal(head(features), other(features))
    assert head.num_bytes() == other.num_bytes() == sum(value.nbytes for value in head.state_dict().values())


def test_scores_are_as_precise_as_the_features_and_not_less_under_autocast():
    features, labels = samples()
    head = learnt(RidgeHead, [(features, labels)])
    with torch.autocast("cpu", torch.bfloat16):
        low = head(features.float())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), head(features), rtol=1e-5, atol=1e-5)
    assert head(features.bfloat16()).dtype == torch.float32


def test_heads_are_made_of_buffers_alone():
    assert not [*itertools.chain.from_iterable(learnt(make, [samples()]).parameters() for make in HEADS.values())]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(LDAHead, covariance="full"), "LDAHead: covariance is 'full'"),
        (partial(LDAHead, ridge=-1.0), "LDAHead: ridge is -1"),
        (partial(LDAHead, shrinkage=2.0), "shrinkage is 2"),
        (partial(RidgeHead, ridge=0.0), "RidgeHead: ridge is 0"),
        (partial(RidgeHead, ridge=[]), r"RidgeHead: ridge is \[\]"),
        (partial(RidgeHead, projection=0), "projection is 0"),
        (partial(RidgeHead, activation="sin"), "activation is 'sin'"),
        (partial(RidgeHead, init="orthogonal"), "RidgeHead: init is 'orthogonal'"),
        (partial(RidgeHead, backend="recursive", ridge=[1.0, 2.0]), "give one, or use accumulate"),
    ],
)
def test_options_out_of_range_are_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make(4)


SEARCH = {"search": partial(RidgeHead, ridge=[0.1, 1.0, 10.0], projection=20)}


def share_the_samples(path: str) -> None:
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=2)
    features, labels = samples()
    mine = slice(0, 13) if dist.get_rank() == 0 else slice(13, None)
    for name, alone in torch.load(path, weights_only=True).items():
        torch.manual_seed(0)
        head = (HEADS | SEARCH)[name](WIDTH)
        head.grow(CLASSES)
        rows = slice(None) if head.needs_all_rows else mine
        head.fit_features(features[rows], labels[rows])
        torch.testing.assert_close(head(features), alone, rtol=1e-8, atol=1e-8)
        assert head.counts.sum() == len(labels)
    dist.destroy_process_group()


def test_two_processes_with_uneven_shares_are_one(tmp_path):
    features, labels = samples()
    alone = {name: learnt(make, [(features, labels)])(features) for name, make in (HEADS | SEARCH).items()}
    torch.save(alone, tmp_path / "alone.pt")
    forks.pair(share_the_samples, str(tmp_path / "alone.pt"))
