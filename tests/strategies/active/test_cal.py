"""CAL, continual active learning."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from support.fakes import normal
from support.runs import assert_resumes, plain_net, run, sgd
from support.watching import watching
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.measures import speed_up
from cl_lightning.strategies.active.cal import ContinualActive, badge, chosen_queries, diverse_subset
from cl_lightning.strategy import PhaseOptions
from cl_lightning.stream import Rounds
from cl_lightning.testing import Subject, small

WHY = "the samples whose labels are queried are trained on, and no others"
SUBJECTS = {
    name: Subject(
        small(ContinualActive, first_queries=16, queries=8, candidates=12, **options),
        first_task_is_finetuning=False,
        reason=WHY,
    )
    for name, options in (
        ("ContinualActive", {}),
        ("ContinualActive(sds2)", {"replay": "sds2", "query": "badge"}),
        ("ContinualActive(retrain)", {"replay": "retrain", "query": "margin"}),
    )
}
SLOW = "three configurations pass the suite, with rounds of their own"
PUBLISHED = {
    "cal": {
        "source": "README of the released code: CIFAR-10, CAL-SDS2, as its card gives it",
        "backbone": "ResNet18",
        "replay": "sds2",
        "query": "uncertainty",
        "first_queries": 2500,
        "queries": 2500,
        "first_options": {"epochs": 100},
        "replay_size": 40,
        "alpha": 0.25,
        "beta": 0.75,
        "optimizer": "SGD(lr=0.02)",
        "trainer.max_epochs": 40,
    }
}
DATA = {"scenario": Rounds(6), "batch_size": 16}
FIRST = PhaseOptions(epochs=20)
SMALL = partial(ContinualActive, backbone=plain_net, first_queries=40, queries=40, first_options=FIRST)


def test_queries_are_the_most_uncertain_samples():
    logits = torch.tensor([[4.0, 0.0, 0.0], [1.0, 0.9, -5.0], [0.3, 0.2, 0.1], [2.0, 1.8, 1.5]])
    features = normal(4, 2)
    p = logits.double().softmax(1)
    entropies = [-sum(float(x) * float(x.log()) for x in row) for row in p]
    margins = [float(row.sort().values[-1] - row.sort().values[-2]) for row in p]
    most = sorted(range(4), key=lambda i: -entropies[i])
    assert chosen_queries("uncertainty", logits, features, 2, 0).tolist() == most[:2]
    least = sorted(range(4), key=margins.__getitem__)
    assert chosen_queries("margin", logits, features, 2, 0).tolist() == least[:2]
    assert most[:2] != least[:2]
    assert sorted(chosen_queries("random", logits, features, 9, 0).tolist()) == [0, 1, 2, 3]
    drawn = {tuple(chosen_queries("random", logits, features, 1, key).tolist()) for key in range(60)}
    assert len(drawn) == 4


def test_badge_is_k_means_plus_plus_on_the_gradients_of_the_last_layer():
    p, features = normal(12, 3).softmax(1), normal(12, 4, seed=1)
    g = torch.stack(
        [torch.outer(row - F.one_hot(row.argmax(), 3), h).flatten() for row, h in zip(p, features, strict=True)]
    )
    counts = torch.zeros(12)
    first = int(g.norm(dim=1).argmax())
    for key in range(800):
        rows = badge(p, features, 2, key).tolist()
        assert rows[0] == first
        counts[rows[1]] += 1
    squares = (g - g[first]).square().sum(1)
    torch.testing.assert_close(counts / 800, (squares / squares.sum()).float(), atol=0.06, rtol=0)
    third = torch.zeros(12)
    for key in range(800):
        rows = badge(p, features, 3, key).tolist()
        assert len(set(rows)) == 3
        third[rows[2]] += 1
    assert third[first] == 0
    assert sorted(badge(torch.full((5, 2), 0.5).double(), torch.ones(5, 2).double(), 5, 0).tolist()) == list(range(5))


def gain(features, entropies, chosen, diversity):
    squares = torch.cdist(features, features).square()
    similarity = torch.exp(-squares / (2 * squares.mean()))
    covered = similarity[:, list(chosen)].amax(1).sum() if chosen else torch.tensor(0.0)
    return float(covered + diversity * torch.log1p(entropies[list(chosen)].sum()))


@pytest.mark.parametrize("diversity", [0.0, 3.0])
def test_the_subset_is_greedy_and_near_the_best_one(diversity):
    features, entropies = normal(9, 3), normal(9, seed=1).abs()
    found = diverse_subset(features, entropies, 4, diversity).tolist()
    left = []
    for row in found:  # no other row has a larger gain
        values = [gain(features, entropies, [*left, i], diversity) for i in range(9) if i not in left]
        assert gain(features, entropies, [*left, row], diversity) == pytest.approx(max(values), rel=1e-12)
        left.append(row)
    best = max(gain(features, entropies, s, diversity) for s in itertools.combinations(range(9), 4))
    assert gain(features, entropies, found, diversity) >= (1 - 1 / np.e) * best
    gains = [
        gain(features, entropies, found[: i + 1], diversity) - gain(features, entropies, found[:i], diversity)
        for i in range(4)
    ]
    assert all(later <= sooner + 1e-12 for sooner, later in itertools.pairwise(gains))


def record(strategy, batch, output, terms):
    return strategy.asked.labelled.clone(), strategy.asked.current.clone(), batch, output, terms


@pytest.mark.parametrize("replay", ["er", "der", "sd"])
def test_every_term_is_that_of_the_equations(replay):
    options = {"backbone": plain_net, "first_queries": 24, "queries": 16, "alpha": 0.3, "beta": 0.6}
    watched = watching(ContinualActive, record, replay=replay, **options)
    run(watched, data={"scenario": Rounds(2), "batch_size": 8}, max_epochs=6)
    for task, share in ((0, None), (1, 16 / 40)):
        _, _, batch, output, terms = watched.recorded[task][-1]
        ce = F.cross_entropy(output.logits.double(), batch.labels, reduction="none")
        terms = {name: float(value) for name, value in terms.items()}
        if task == 0:
            assert terms == pytest.approx({"ce": float(ce.mean())}, rel=1e-4)
            continue
        assert len(batch) == 24
        stored = batch.parts["replay"][1].extra["logits"].double()
        old, new = output.logits[8:].double(), stored
        replayed = float(ce[8:].mean())
        divergence = (new.softmax(1) * (new.log_softmax(1) - old.log_softmax(1))).sum(1).mean()
        expected = {
            "er": {"ce": float(ce.mean())},
            "der": {
                "ce": float(ce[:8].mean()),
                "logits": 0.3 * float((old - new).square().sum(1).mean()),
                "replay": 0.6 * replayed,
            },
            "sd": {
                "ce": share * float(ce[:8].mean()),
                "distill": (1 - share) * 0.3 * float(divergence),
                "replay": (1 - share) * 0.7 * replayed,
            },
        }[replay]
        assert terms == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def rounds():
    watched = watching(SMALL.func, record, **SMALL.keywords, replay="sd")
    return run(watched, data=DATA, max_epochs=2)


def test_only_queried_samples_are_trained_on_and_none_is_queried_twice(rounds):
    strategy = rounds.strategy
    for task, steps in strategy.recorded.items():
        labelled, current, *_ = steps[0]
        assert len(labelled) == 40 * (task + 1) == len(labelled.unique())
        assert current.equal(labelled[-40:])
        seen = torch.cat([batch.parts["stream"][1].indices for _, _, batch, _, _ in steps]).unique()
        assert seen.equal(current.sort().values)


def test_the_history_is_kept_in_full_with_logits_of_the_round_of_each_sample(rounds):
    memory = rounds.strategy.memory
    assert len(memory) == 240 == memory.size
    assert memory.tasks.bincount().tolist() == [40] * 6
    source, asked = rounds.datamodule.samples(train=True), rounds.strategy.asked.labelled[:240]
    expected = rounds.stream.columns_of(np.asarray(source.labels))[asked.numpy()]
    assert np.array_equal(np.sort(memory.labels.numpy()), np.sort(expected))
    strategy = rounds.strategy.eval()
    batch = rounds.datamodule.finish(memory.at(torch.arange(200, 240), Draw.of(40, 0)), augment=False)
    last = memory.tasks[200:240] == 5
    torch.testing.assert_close(
        strategy.network(batch.images).logits[last].detach(),
        memory.fields["logits"][200:240][last],
        atol=1e-5,
        rtol=1e-5,
    )


def test_replay_is_faster_than_retraining_at_equal_accuracy_and_queries_are_better_than_chance():
    opt = {"optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9)}
    found = {}
    for name, options, epochs in (
        ("retrain", {"replay": "retrain", "query": "margin"}, 15),
        ("er", {"replay": "er", "query": "margin"}, 6),
        ("random", {"replay": "er", "query": "random"}, 6),
    ):
        made = run(SMALL(**opt, **options), data=DATA, max_epochs=epochs)
        rows = [20 * 40, *(40 * (t + 1) * 15 if name == "retrain" else 40 * 3 * 6 for t in range(1, 6))]
        found[name] = made.matrix.R_ci[:, 0].tolist(), rows
    # Measured: 0.95 after the last round for both, and samples in steps.
    assert speed_up(*found["er"], *found["retrain"]) > 1.5
    assert found["er"][0][-1] > found["retrain"][0][-1] - 0.05
    assert np.mean(found["er"][0][2:]) > np.mean(found["random"][0][2:])


def test_retraining_begins_with_the_first_network_and_has_all_labelled_samples():
    starts = []

    class Watching(ContinualActive):
        def begin_task(self, task):
            super().begin_task(task)
            starts.append({name: value.clone() for name, value in self.network.state_dict().items()})

    strategy = Watching(backbone=plain_net, replay="retrain", first_queries=16, queries=16)
    run(strategy, data={"scenario": Rounds(3), "batch_size": 8}, max_epochs=1)
    for start in starts[1:]:
        assert all(value.equal(starts[0][name]) for name, value in start.items())
    assert any(not value.equal(starts[0][name]) for name, value in strategy.network.state_dict().items())


def test_rounds_are_resumed(tmp_path):
    few = {"scenario": Rounds(2), "batch_size": 4}
    make = partial(ContinualActive, backbone=plain_net, optimizer=sgd, first_queries=24, queries=24, query="badge")
    assert_resumes(lambda: (make(), []), tmp_path, data=few)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"replay": "mir"}, "replay is 'mir'"),
        ({"query": "entropy"}, "query is 'entropy'"),
        ({"first_queries": 0}, "first_queries is 0"),
        ({"queries": 0}, "queries is 0"),
        ({"candidates": 0}, "candidates is 0"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"beta": -1.0}, "beta is -1"),
        ({"diversity": -1.0}, "diversity is -1"),
        ({"replay_size": 0}, "replay_size is 0"),
        ({"loss_classes": "task"}, "loss_classes is 'task'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ContinualActive(**options)
