"""CCIC, contrastive interpolation consistency."""

from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.fakes import normal
from support.runs import NormNet, plain_net, run
from support.watching import watching
from torch.nn import functional as F

from cl_lightning.data import RandomCrop
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.strategies.semi_supervised.ccic import (
    CCIC,
    hardest_triplets,
    neighbour_votes,
    push_apart,
    sharpened,
)
from cl_lightning.stream import ClassIncremental, LabelFraction, Subset
from cl_lightning.testing import Subject, TinyDigits, small

HIDDEN = LabelFraction(ClassIncremental(sizes=[4, 3, 3], class_order=[3, 1, 4, 0, 5, 9, 2, 6, 8, 7]), fraction=0.3)
WHY = "unlabelled samples are trained on"
SUBJECTS = {
    "CCIC": Subject(
        small(CCIC, memory_size=30, labelled_size=12, optimizer=partial(torch.optim.SGD, lr=0.02)),
        data=partial(TinyDigits, scenario=HIDDEN),
        first_task_is_finetuning=False,
        reason=WHY,
    )
}
PUBLISHED = {
    "ccic": {
        "source": "aimagelab/mammoth: CIFAR-10 with 25 % of the labels and 500 exemplars, as its card gives it",
        "backbone": "ResNet18",
        "memory_size": 500,
        "optimizer": "Adam(lr=0.0001)",
        "mixing_alpha": 0.75,
        "memory_penalty": 0.7,
        "consistency_weight": 0.75,
        "push_weight": 0.5,
        "trainer.max_epochs": 50,
    }
}
DATA = {
    "scenario": LabelFraction(ClassIncremental(tasks=5), fraction=0.05),
    "batch_size": 32,
    "transforms": [RandomCrop(padding=1)],
}
NET, ADAM = partial(NormNet, units=64), partial(torch.optim.Adam, lr=1e-3)


def test_sharpening_is_a_power_that_sums_to_one():
    p = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[0.25, 0.09, 0.04], [1.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(sharpened(p, 0.5), expected / expected.sum(1, keepdim=True))
    torch.testing.assert_close(sharpened(p[:1], 1.0), p[:1])


@pytest.mark.parametrize("count", [1, 2, 40])
def test_triplets_pair_the_farthest_of_the_class_with_the_nearest_others(count):
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3])
    features = normal(9, 4) * 0.3 + labels[:, None] * torch.tensor([0.7, 0.0, 0.0, 0.0])
    found = []
    for i in range(9):
        d = [float((features[i] - features[j]).square().sum()) for j in range(9)]
        positives = sorted((d[j] for j in range(9) if labels[j] == labels[i] and j != i), reverse=True)
        negatives = sorted(d[j] for j in range(9) if labels[j] != labels[i])
        found += [max(0.0, 1 + p - n) for p, n in list(zip(positives, negatives, strict=False))[:count]]
    assert 0 in found
    assert float(hardest_triplets(features, labels, count)) == pytest.approx(sum(found) / len(found), rel=1e-12)


def test_a_row_at_its_own_place_has_a_finite_gradient():
    features = normal(1, 3).repeat(4, 1).requires_grad_()
    loss = hardest_triplets(features, torch.tensor([0, 0, 1, 1]), 1)
    assert float(loss) == 1
    loss.backward()
    assert features.grad.isfinite().all()
    assert float(hardest_triplets(features, torch.zeros(4).long(), 2)) == 0  # without negatives


def test_two_sets_are_pushed_apart_and_never_together():
    first, second = normal(5, 3) * 0.4, normal(3, 3, seed=1) * 0.4
    d = [[float((a - b).square().sum()) for b in second] for a in first]
    found = [max(0.0, 1 - x) for row in d for x in sorted(row)[:2]]
    found += [max(0.0, 1 - x) for column in zip(*d, strict=True) for x in sorted(column)[:2]]
    assert float(push_apart(first, second, 2)) == pytest.approx(sum(found) / len(found), rel=1e-12)
    assert float(push_apart(first, second + 9, 2)) == 0
    assert float(push_apart(first[:0], second, 2)) == 0


def test_the_nearest_samples_vote_and_a_tie_is_decided_by_the_distance():
    held = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.3], [0.0, 1.0], [-1.0, 0.0]]), dim=1).double()
    labels = torch.tensor([0, 2, 2, 1])
    queries = F.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.2], [0.2, 1.0]]), dim=1).double()
    scores = neighbour_votes(queries, held, labels, 4)
    for query, row in zip(queries, scores, strict=True):
        d = [float((query - other).norm()) for other in held]
        nearest = sorted(range(4), key=d.__getitem__)[:2]
        for c in range(4):
            own = [d[i] for i in range(4) if labels[i] == c] or [2.0]
            assert float(row[c]) == pytest.approx(sum(int(labels[i]) == c for i in nearest) - 1e-5 * min(own), abs=1e-9)
    assert scores.argmax(1).tolist() == [0, 2, 2]  # the first two are ties


def record(strategy, batch, output, terms):
    return strategy.epoch, batch, output, {name: float(term) for name, term in terms.items()}


@pytest.fixture(scope="module")
def steps():
    """Steps of two tasks of two epochs."""
    few = Subset(ClassIncremental(sizes=[5, 5]), per_class=24)
    data = {**DATA, "scenario": LabelFraction(few, fraction=0.25)}
    watched = watching(CCIC, record, backbone=NET, memory_size=40, labelled_size=20, replay_size=10)
    run(watched, data=data, max_epochs=11)
    return watched.recorded


def rows_before(batch):
    """Images, labels and indices of the rows that are mixed, before they are mixed."""
    parts = [part for name, (_, part) in batch.parts.items() if not name.startswith("metric")]
    return [torch.cat([getattr(part, name) for part in parts]) for name in ("images", "labels", "indices")]


def test_images_and_targets_are_mixed_alike_and_the_own_part_is_larger(steps):
    _, batch, _, _ = steps[1][1]
    images, labels, _ = rows_before(batch)
    targets = batch.extra["targets"]
    torch.testing.assert_close(targets.sum(1), torch.ones(len(images)))
    flat, mixed, found = images.flatten(1), batch.images[: len(images)].flatten(1), []
    for row in range(30):  # of S and R
        direction, moved = flat - flat[row], mixed[row] - flat[row]
        shares = (direction @ moved) / direction.square().sum(1).clamp(min=1e-12)
        errors = (moved - shares[:, None] * direction).abs().amax(1)
        errors[row] = torch.inf
        other = int(errors.argmin())
        if float(moved.abs().max()) < 1e-6:
            continue  # mixed with itself
        assert float(errors[other]) < 1e-5
        share = float(shares[other])
        assert -1e-6 <= share <= 0.5
        if labels[other] >= 0:
            one, two = F.one_hot(labels[[row, other]], 10).float()
            torch.testing.assert_close(targets[row], (1 - share) * one + share * two, atol=1e-5, rtol=0)
        found.append((share, int(labels[other] >= 0)))
    shares, known = zip(*found, strict=True)
    assert 0 < sum(known) < len(known)  # with labelled and with unlabelled samples
    assert len({round(share, 5) for share in shares}) > 20  # one for each sample


def test_the_target_of_an_unlabelled_sample_is_the_sharpened_mean_over_its_views(monkeypatch):
    def unmixed(self, rows, batch, salt, alpha):
        return torch.ones(sum(len(part) for _, part in rows.parts.values())), torch.arange(
            sum(len(part) for _, part in rows.parts.values())
        )

    def wanted(strategy, batch, output, terms):
        found = [output.logits[batch.parts[f"view {k}"][0]].double().softmax(1) for k in range(3)]
        mean = sum(found) / 3
        return batch, mean.square() / mean.square().sum(1, keepdim=True)

    monkeypatch.setattr(CCIC, "_partners", unmixed)
    watched = watching(CCIC, wanted, backbone=plain_net, memory_size=40, labelled_size=20, replay_size=10)
    run(watched, data={**DATA, "scenario": LabelFraction(ClassIncremental(sizes=[5, 5]), fraction=0.1)}, max_epochs=1)
    batch, q = watched.recorded[1][2]
    targets = batch.extra["targets"]
    assert targets[:20].equal(F.one_hot(batch.parts["stream"][1].labels, 10).float())
    assert targets[20:30].equal(F.one_hot(batch.parts["replay"][1].labels, 10).float())
    for k in range(3):
        torch.testing.assert_close(targets[batch.parts[f"view {k}"][0]].double(), q, atol=1e-5, rtol=0)


def test_every_term_is_that_of_the_equations(steps):
    for task, number in ((0, 3), (1, 4)):
        _, batch, output, terms = steps[task][number]
        log_p, targets = output.logits.double().log_softmax(1), batch.extra["targets"].double()
        ce = {
            name: -(targets * log_p[: len(targets)]).sum(1)[rows]
            for name, (rows, _) in batch.parts.items()
            if name in ("stream", "replay")
        }
        assert terms["ce"] == pytest.approx(float(ce["stream"].mean()), rel=1e-5)
        views = torch.cat([torch.arange(len(log_p))[batch.parts[f"view {k}"][0]] for k in range(3)])
        square = (log_p.exp()[views] - targets[views]).square().sum() / len(views) / log_p.shape[1]
        assert terms["consistency"] == pytest.approx(0.75 * float(square), rel=1e-5)
        known = [name for name in ("stream", "replay") if name in batch.parts]
        features = [output.features[batch.parts[f"metric {name}"][0]].double() for name in known]
        labels = torch.cat([batch.parts[name][1].labels for name in known])
        assert terms["triplet"] == pytest.approx(float(hardest_triplets(torch.cat(features), labels, 2)), rel=1e-5)
        if task == 0:
            assert set(terms) == {"ce", "consistency", "triplet"}
            continue
        assert terms["replay"] == pytest.approx(0.7 * float(ce["replay"].mean()), rel=1e-5)
        unlabelled = output.features[batch.parts["metric unlabelled"][0]].double()
        assert terms["push"] == pytest.approx(0.5 * float(push_apart(unlabelled, features[1], 2)), rel=1e-5)


def test_the_guess_is_the_same_for_all_views_of_a_sample(steps):
    """Mixed with another row, the share of the own guess is at least a half."""
    _, batch, _, _ = steps[0][2]
    views = [batch.parts[f"view {k}"][1] for k in range(3)]
    assert all(view.indices.equal(views[0].indices) for view in views)
    assert not views[0].images.equal(views[1].images)
    assert not views[1].images.equal(views[2].images)
    assert (views[0].labels == -1).all()


def test_images_of_the_metric_losses_are_mixed_from_the_second_task_on_and_not_at_the_end(steps):
    def shown(entry):
        _, batch, _, _ = entry
        names = [name for name in ("stream", "replay") if name in batch.parts]
        plain_images = torch.cat([batch.parts[name][1].images for name in names])
        return torch.cat([batch.images[batch.parts[f"metric {name}"][0]] for name in names]), plain_images

    def of(task, epoch):
        return next(entry for entry in steps[task] if entry[0] == epoch)

    assert torch.equal(*shown(of(0, 0)))
    assert not torch.equal(*shown(of(1, 0)))
    assert not torch.equal(*shown(of(1, 9)))  # 9 < 0.9 * 11
    assert torch.equal(*shown(of(1, 10)))
    assert "push" in of(1, 9)[3]
    assert "push" not in of(1, 10)[3]
    mixed, images = (each.flatten(1) for each in shown(of(1, 0)))
    nearest = torch.cdist(mixed, images).argmin(1)
    assert (nearest == torch.arange(len(images))).double().mean() > 0.9  # the own image is the larger part


def test_with_all_labels_nothing_is_guessed():
    watched = watching(CCIC, record, backbone=NET, memory_size=40)
    run(watched, data={**DATA, "scenario": ClassIncremental(sizes=[5, 5])}, max_epochs=1)
    for task in (0, 1):
        for _, batch, _, terms in watched.recorded[task]:
            assert terms["consistency"] == terms.get("push", 0.0) == 0
            assert len(batch.parts["view 0"][1]) == 0


def test_the_memory_has_labelled_samples_of_past_tasks_and_predicts_when_a_task_has_ended():
    made = run(CCIC(backbone=NET, memory_size=100, labelled_size=16), data=DATA, max_epochs=1)
    strategy, stream = made.strategy, made.stream
    labelled = sum(len(part) for part in stream.train) - sum(len(part) for part in stream.unlabelled)
    assert len(strategy.memory) == min(labelled, 100)
    images = normal(6, 1, 8, 8).float()
    votes = strategy.eval().predict(images)
    assert votes.round().sum(1).tolist() == [2.0] * 6
    strategy.network.head.grow(1)  # the next task has begun
    assert strategy.predict(images).shape == (6, 11)
    assert strategy.predict(images).equal(strategy.predict_within_task(images))


def test_unlabelled_samples_and_a_small_memory_are_worth_more_than_replay():
    ccic = run(CCIC(backbone=NET, memory_size=100, optimizer=ADAM, labelled_size=32), data=DATA, max_epochs=4)
    er = run(ER(backbone=NET, memory_size=100, optimizer=ADAM), data=DATA, max_epochs=20)
    finetune = finetuning({"backbone": NET, "optimizer": ADAM}, data=DATA, max_epochs=20)
    found, replay = (each.matrix.measures()["average_accuracy"] for each in (ccic, er))
    # Measured: .88, .3 and .18.
    assert found > replay + 0.15
    assert found > finetune.measures()["average_accuracy"] + 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augmentations": 0}, "augmentations is 0"),
        ({"neighbours": 0}, "neighbours is 0"),
        ({"labelled_size": 0}, "count is 0"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"mixing_alpha": 0.0}, "mixing_alpha is 0"),
        ({"memory_penalty": -1.0}, "memory_penalty is -1"),
        ({"consistency_weight": -1.0}, "consistency_weight is -1"),
        ({"push_weight": -1.0}, "push_weight is -1"),
        ({"loss_classes": "task"}, "loss_classes is 'task'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CCIC(**options)
