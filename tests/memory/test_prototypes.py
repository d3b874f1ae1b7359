from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.fakes import normal
from torch import Tensor

from cl_lightning.memory import (
    GaussianPrototypes,
    Prototypes,
    class_means,
    class_statistics,
    dense_columns,
    kernel_drift,
    nearest_mean_scores,
    shrink,
    squared_distances,
)


def labelled(n: int, num_classes: int, seed: int = 0) -> Tensor:
    return torch.randint(-1, num_classes, (n,), generator=torch.Generator().manual_seed(seed))


def test_statistics_match_a_plain_loop():
    features, labels = normal(60, 4) + 100, labelled(60, 5)
    labels[labels == 3] = 2  # class 3 has no sample
    labels[0], labels[labels == 4] = 4, 1  # class 4 has at most one
    labels[0] = 4
    counts, means, covariances = class_statistics(features, labels, 5)
    for c in range(5):
        rows = features[labels == c]
        assert counts[c] == len(rows)
        torch.testing.assert_close(means[c], rows.mean(0) if len(rows) else torch.zeros(4, dtype=torch.float64))
        expected = rows.T.cov() if len(rows) > 1 else torch.zeros(4, 4, dtype=torch.float64)
        torch.testing.assert_close(covariances[c], expected)
    assert counts.tolist()[3:] == [0, 1]
    torch.testing.assert_close(class_means(features, labels, 5), means)


def test_covariance_of_float32_features_far_from_the_origin_keeps_its_digits():
    features = (normal(500, 3) * 0.01 + 1000).float()
    covariance = class_statistics(features, torch.zeros(500, dtype=torch.int64), 1).covariances
    torch.testing.assert_close(covariance[0], features.double().T.cov(), rtol=1e-9, atol=0)


def test_the_covariance_of_two_rows_is_half_the_square_of_their_difference_and_of_one_is_0():
    features = normal(3, 4)
    counts, means, covariances = class_statistics(features, torch.tensor([0, 2, 0]), 3)
    gap = features[0] - features[2]
    assert counts.tolist() == [2, 0, 1]
    torch.testing.assert_close(means, torch.stack([features[[0, 2]].mean(0), torch.zeros(4).double(), features[1]]))
    torch.testing.assert_close(covariances[0], torch.outer(gap, gap) / 2)
    assert (covariances[1:] == 0).all()


def test_class_means_come_in_the_features_type_but_at_least_float32():
    labels = torch.zeros(3, dtype=torch.int64)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert class_means(torch.ones(3, 2, dtype=dtype), labels, 1).dtype == expected


def test_updates_in_parts_give_the_statistics_of_the_whole():
    features, labels = normal(90, 3) + 5, labelled(90, 4)
    store = Prototypes(3, covariance=True).double()
    for part in range(3):
        store.update(features[part::3], labels[part::3], num_classes=4)
    whole = class_statistics(features, labels, 4)
    torch.testing.assert_close(store.means, whole.means)
    torch.testing.assert_close(store.covariances, whole.covariances)
    assert store.counts.tolist() == whole.counts.tolist()


def test_rows_that_come_one_by_one_have_the_covariance_of_all():
    features, store = normal(3, 2), Prototypes(2, covariance=True).double()
    for count in range(1, 4):
        store.update(features[count - 1 : count], torch.tensor([0]), num_classes=1)
        expected = features[:count].T.cov() if count > 1 else torch.zeros(2, 2).double()
        torch.testing.assert_close(store.covariances[0], expected)


def test_replacing_forgets_the_classes_at_hand_and_no_others():
    store = Prototypes(2, covariance=True).double()
    store.update(normal(20, 2), torch.arange(20) % 2, num_classes=2)
    before = store.means.clone()
    fresh = normal(6, 2, seed=1)
    store.update(fresh, torch.ones(6, dtype=torch.int64), num_classes=3, replace=True)
    assert torch.equal(store.means[0], before[0])
    torch.testing.assert_close(store.means[1], fresh.mean(0))
    torch.testing.assert_close(store.covariances[1], fresh.T.cov())
    assert store.counts.tolist() == [10, 6, 0]
    assert store.known.tolist() == [True, True, False]
    assert store.known_columns().tolist() == [0, 1]


def test_growing_keeps_what_is_there():
    store = Prototypes(2)
    store.update(torch.ones(3, 2), torch.tensor([1, 1, 1]), num_classes=2)
    store.update(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), num_classes=4)
    assert store.means.tolist() == [[0, 0], [1, 1], [0, 0], [0, 0]]
    assert store.counts.tolist() == [0, 3, 0, 0]


@pytest.mark.parametrize("covariance", [False, True])
def test_a_fresh_store_takes_its_size_from_the_state_dict(tmp_path: Path, covariance: bool):
    store = Prototypes(2, covariance=covariance)
    store.update(normal(20, 2).float(), torch.arange(20) % 3, num_classes=3)
    torch.save(store.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    larger = Prototypes(2, covariance=covariance)
    larger.grow(7)
    for other in (Prototypes(2, covariance=covariance), larger):
        other.load_state_dict(state, strict=True)
        assert all(torch.equal(a, b) for a, b in zip(store.buffers(), other.buffers(), strict=True))
    assert store.num_bytes() == 3 * (2 * 4 + 8 + (4 * 4 if covariance else 0))


def test_a_store_without_features_of_its_size_refuses_to_load():
    with pytest.raises(RuntimeError, match="size mismatch"):
        Prototypes(2).load_state_dict(Prototypes(3).state_dict())
    with pytest.raises(ValueError, match="num_features is 0"):
        Prototypes(0)


def test_shrinking_on_numbers():
    covariance = torch.tensor([[2.0, 1.0, 0.0], [1.0, 4.0, 3.0], [0.0, 3.0, 6.0]]).double()
    # V1 = 4, V2 = (1 + 3) / 2 = 2 where zeros do not count, else 4 / 3
    expected = torch.tensor([[2 + 0.5 * 4, 1 + 3 * 2, 6], [1 + 6, 4 + 2, 3 + 6], [6, 9, 6 + 2]]).double()
    torch.testing.assert_close(shrink(covariance, 0.5, 3.0, skip_zeros=True), expected)
    expected = torch.tensor([[4.0, 5, 4], [5, 6, 7], [4, 7, 8]]).double()
    torch.testing.assert_close(shrink(covariance, 0.5, 3.0), expected)
    assert torch.equal(shrink(covariance, 0.0, 0.0), covariance)
    diagonal = torch.diag(torch.tensor([1.0, 3.0]).double())  # nothing off the diagonal to take the mean of
    for skip in (False, True):
        torch.testing.assert_close(shrink(diagonal, 1.0, 1.0, skip_zeros=skip), diagonal + 2 * torch.eye(2).double())
    several = torch.stack([covariance, 2 * covariance])
    torch.testing.assert_close(shrink(several, 0.5, 3.0)[1], 2 * expected)
    one = torch.full((1, 1), 2.0).double()
    torch.testing.assert_close(shrink(one, 1.0, 1.0), 2 * one)


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_two_shrinks_are_one_with_a_larger_weight_and_can_be_undone(weight):
    covariance = normal(30, 5).T.cov()
    once = shrink(covariance, 2 * weight + weight**2, 2 * weight + weight**2)
    shrunk = shrink(covariance, weight, weight)
    torch.testing.assert_close(shrink(shrunk, weight, weight), once)
    torch.testing.assert_close(shrink(shrunk, -weight / (1 + weight), -weight / (1 + weight)), covariance)


def test_distances_of_all_pairs_are_those_of_a_plain_loop():
    rows, columns, root = normal(7, 4), normal(3, 4, seed=1), normal(4, 4, seed=2)
    metric = root @ root.T
    found, plain = squared_distances(rows, columns, metric), squared_distances(rows, columns)
    for i in range(7):
        for j in range(3):
            gap = rows[i] - columns[j]
            torch.testing.assert_close(found[i, j], gap @ metric @ gap)
            torch.testing.assert_close(plain[i, j], gap @ gap)


def test_columns_that_occur_are_listed_and_labels_are_their_places():
    columns, places = dense_columns(torch.tensor([5, 2, -1, 5]), 8)
    assert columns.tolist() == [2, 5]
    assert places.tolist() == [1, 0, -1, 1]
    columns, places = dense_columns(torch.tensor([-1]), 2, reduce=False)
    assert (columns.tolist(), places.tolist()) == ([], [-1])


@pytest.mark.parametrize("block_size", [1000, 3])
def test_scores_are_minus_squared_distances_and_cosines(block_size: int):
    features, means = normal(10, 4), normal(3, 4, seed=1)
    scores = nearest_mean_scores(features, means, block_size=block_size)
    torch.testing.assert_close(scores, -torch.cdist(features, means).square())
    cosines = nearest_mean_scores(features, means, "cosine", block_size=block_size)
    torch.testing.assert_close(cosines, torch.cosine_similarity(features[:, None], means, dim=2))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_scores_of_features_in_half_precision_are_not_rounded(metric):
    store = Prototypes(16)
    store.update(normal(40, 16).float() + 3, torch.arange(40) % 10, num_classes=11)
    features = (normal(30, 16, seed=1) + 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        scores = store.scores(features, 11, metric)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, store.scores(features.float(), 11, metric))
    assert (scores[:, 10] == -torch.inf).all()


def test_nearest_means_far_from_the_origin_are_distinguished_in_float32_under_autocast():
    means = torch.eye(4) + 1000
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = nearest_mean_scores(means + 0.01, means)
    assert scores.argmax(1).tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(
        scores, -torch.cdist(means.double() + 0.01, means.double()).square().float(), rtol=1e-2, atol=1e-3
    )


@pytest.mark.parametrize("block_size", [1000, 7])
def test_drift_is_the_kernel_average_of_a_plain_loop(block_size: int):
    old, new, prototypes = (normal(n, 4, seed=n) for n in (50, 51, 3))
    new = new[:50]
    drift = kernel_drift(old, new, prototypes, 1.3, block_size=block_size)
    for c, prototype in enumerate(prototypes):
        weight = (-(old - prototype).square().sum(1) / (2 * 1.3**2)).exp()
        torch.testing.assert_close(drift[c], (weight[:, None] * (new - old)).sum(0) / weight.sum())


def test_a_common_shift_moves_every_prototype_by_it():
    old, prototypes, shift = (normal(n, 8, seed=n) for n in (50, 3, 1))
    for options in ({}, {"rescale": True}, {"metric": torch.eye(8)}):
        moved = kernel_drift(old, old + shift, prototypes, 0.2, block_size=16, **options)
        torch.testing.assert_close(moved, shift.expand(3, 8), rtol=1e-13, atol=1e-14)


def test_without_drift_nothing_moves():
    old, prototypes = normal(50, 8), normal(3, 8, seed=1)
    assert (kernel_drift(old, old, prototypes, 0.2) == 0).all()
    assert (kernel_drift(old[:0], old[:0], prototypes, 0.2) == 0).all()


def test_a_wide_kernel_gives_the_mean_drift_and_a_narrow_one_that_of_the_nearest_sample():
    old, new, prototypes = normal(50, 8), normal(50, 8, seed=1), normal(3, 8, seed=2)
    wide = kernel_drift(old, new, prototypes, 1e9)
    torch.testing.assert_close(wide, (new - old).mean(0).expand(3, 8))
    nearest = torch.cdist(prototypes, old).argmin(1)
    torch.testing.assert_close(kernel_drift(old, new, prototypes, 1e-6), (new - old)[nearest])


def test_prototypes_far_from_all_samples_do_not_underflow():
    old, new = normal(50, 8), normal(50, 8, seed=1)
    assert kernel_drift(old, new, normal(3, 8, seed=2) + 1e3, 0.01).isfinite().all()


def test_a_metric_is_the_euclidean_distance_after_its_square_root():
    old, new, prototypes, root = (normal(*s, seed=sum(s)) for s in ((50, 4), (50, 4), (3, 4), (4, 4)))
    drift = kernel_drift(old, new, prototypes, 1.0, metric=root @ root.T)
    mapped = kernel_drift(old @ root, new @ root, prototypes @ root, 1.0)
    torch.testing.assert_close(drift @ root, mapped)


def test_rescaled_distances_follow_the_definition_and_ignore_the_unit():
    old, new, prototypes = normal(50, 4), normal(50, 4, seed=1), normal(3, 4, seed=2)
    d = -torch.cdist(prototypes, old).square()
    weight = ((d - d.min()) / (d.max() - d.min()) / (2 * 0.2**2)).softmax(1)
    drift = kernel_drift(old, new, prototypes, 0.2, rescale=True, block_size=11)
    torch.testing.assert_close(drift, weight @ (new - old))
    scaled = kernel_drift(10 * old, 10 * new, 10 * prototypes, 0.2, rescale=True)
    torch.testing.assert_close(scaled, 10 * drift)
    small = kernel_drift(1e-3 * old, 1e-3 * new, 1e-3 * prototypes, 0.2, rescale=True)  # all distances are below 1
    torch.testing.assert_close(small, 1e-3 * drift)
    alone = kernel_drift(old[:1], new[:1], prototypes[:1], 0.2, rescale=True)  # all distances are the same
    torch.testing.assert_close(alone, (new - old)[:1])


def test_a_kernel_without_width_is_an_error():
    with pytest.raises(ValueError, match="sigma is 0"):
        kernel_drift(normal(2, 2), normal(2, 2), normal(1, 2), 0)


def _on_two_processes(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    features, labels = normal(41, 3) + 10, labelled(41, 5)
    labels[:30][labels[:30] == 4] = 0  # only the second process sees class 4
    share = slice(0, 30) if rank == 0 else slice(30, None)
    store = Prototypes(3, covariance=True).double()
    store.update(features[:10], labels[:10], num_classes=5, reduce=False)
    store.update(features[share], labels[share], num_classes=6)
    alone = Prototypes(3, covariance=True).double()
    alone.update(features[:10], labels[:10], num_classes=5, reduce=False)
    alone.update(features, labels, num_classes=6, reduce=False)
    for ours, expected in zip(store.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(ours, expected)
    assert store.counts[4] > 0
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path: Path):
    mp.spawn(_on_two_processes, (str(tmp_path),), nprocs=2)


def test_draws_of_a_class_have_its_mean_and_covariance():
    features, labels = normal(300, 4) @ normal(4, 4, seed=1) + 5, torch.arange(300) % 3
    store = GaussianPrototypes(4, jitter=1e-5).double()
    store.update(features, labels, num_classes=3)
    # With the axes as noise, draws are the columns of the factor behind the mean.
    columns = torch.full((4,), 2)
    factor = store.sample(columns, torch.eye(4, dtype=torch.float64)) - store.means[2]
    expected = features[labels == 2].T.cov() + 1e-5 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(factor.T @ factor, expected)
    drawn = store.sample(torch.ones(50_000, dtype=torch.int64), normal(50_000, 4, seed=2))
    torch.testing.assert_close(drawn.mean(0), store.means[1], rtol=0.01, atol=0.05)
    torch.testing.assert_close(drawn.T.cov(), features[labels == 1].T.cov(), rtol=0.05, atol=0.1)


def test_a_class_of_fewer_samples_than_features_can_be_drawn_from():
    store = GaussianPrototypes(6)
    store.update(normal(4, 6).float(), torch.tensor([0, 0, 0, 2]), num_classes=3)
    drawn = store.sample(torch.tensor([0, 2]), normal(2, 6).float())
    assert drawn.isfinite().all()
    assert (drawn[1] - store.means[2]).norm() < 0.05  # a single sample: jitter alone
    assert store.factors[1].count_nonzero() == 0
    with pytest.raises(ValueError, match="jitter is 0"):
        GaussianPrototypes(6, jitter=0)


def test_draws_of_a_shrunk_distribution_have_more_equal_variances():
    features = normal(300, 4) @ normal(4, 4, seed=1)
    store = GaussianPrototypes(4, jitter=1e-3, shrinkage=0.5).double()
    store.update(features, torch.zeros(300, dtype=torch.int64), num_classes=1)
    covariance = features.T.cov()
    mean = covariance.trace() / 4
    rest = (covariance.sum() - covariance.trace()) / 12
    expected = covariance + 0.5 * rest + (0.5 * (mean - rest) + 1e-3) * torch.eye(4).double()
    torch.testing.assert_close(store.factors[0] @ store.factors[0].T, expected)
    with pytest.raises(ValueError, match="GaussianPrototypes: shrinkage is -1"):
        GaussianPrototypes(4, shrinkage=-1.0)


@pytest.mark.parametrize("shrinkage", [0.0, 1.0])
def test_distributions_are_pooled_like_covariances_and_take_their_size_from_a_state(shrinkage):
    features, labels = normal(60, 3), torch.arange(60) % 2
    store, whole = (GaussianPrototypes(3, shrinkage=shrinkage).double() for _ in range(2))
    store.update(features[:25], labels[:25], num_classes=2)
    store.update(features[25:], labels[25:])
    whole.update(features, labels, num_classes=2)
    for ours, expected in zip(store.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(ours, expected)
    other = GaussianPrototypes(3).double()
    other.load_state_dict(store.state_dict())
    assert torch.equal(other.factors, store.factors)
    assert store.num_bytes() == 2 * (3 + 9 + 1) * 8


def test_with_the_metric_of_efc_no_drift_is_none_and_a_shift_is_exact():
    old, prototypes, weight = normal(80, 5), normal(3, 5, seed=1), normal(4, 5, seed=2)
    options = {"sigma": 0.2, "metric": weight.T @ weight, "rescale": True}
    assert torch.equal(kernel_drift(old, old, prototypes, **options), torch.zeros(3, 5, dtype=torch.float64))
    shift = normal(1, 5, seed=3)
    torch.testing.assert_close(kernel_drift(old, old + shift, prototypes, **options), shift.expand(3, 5))


def test_covariances_of_a_few_large_features_are_factorised():
    for seed in range(20):
        features = 1e7 * normal(3, 16, seed=seed)
        store = GaussianPrototypes(16, jitter=1e-5).double()
        store.update(features, torch.zeros(3, dtype=torch.int64), num_classes=1)
        found = store.factors[0] @ store.factors[0].T
        torch.testing.assert_close(found, features.T.cov(), rtol=1e-10, atol=1.0)
