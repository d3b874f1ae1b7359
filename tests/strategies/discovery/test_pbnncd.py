"""PBN, and NCD k-means and spectral clustering, on sessions without labels."""

from functools import partial

import pytest
import torch
from support.fakes import batch_of, normal, task_of
from support.runs import run
from support.watching import watching
from torch.nn import functional as F

from cl_lightning.callbacks.discovery_accuracy import DiscoveryAccuracy
from cl_lightning.models import MLP
from cl_lightning.strategies.discovery.pbnncd import PBNNCD, TabularEncoder
from cl_lightning.stream import ClassIncremental, Discovery
from cl_lightning.testing import Subject, TinyDigits, small

ORDER = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
SESSIONS = Discovery(ClassIncremental(sizes=[4, 3, 3], class_order=ORDER), later=0.2)
SUBJECTS = {
    name: Subject(
        small(PBNNCD, **options),
        data=partial(TinyDigits, scenario=SESSIONS),
        first_task_is_finetuning=False,
        matches_single_process=False,
        reason="samples are reconstructed as well; batch normalisation of the decoder is over a process",
    )
    for name, options in (
        ("PBNNCD", {}),
        ("PBNNCD(estimated)", {"new_classes": "estimated", "most_classes": 4, "clustering": "spectral"}),
    )
}
SLOW = "two configurations pass the suite, and each session is clustered from ten starts"
PUBLISHED = {
    "pbnncd": {
        "source": "ColinTr/PracticalNCD: Pendigits, as its card gives it",
        "classification_weight": 0.461,
        "latent": 11,
        "optimizer": "AdamW(lr=0.00284)",
        "trainer.max_epochs": 200,
        "trainer.callbacks": ["DiscoveryAccuracy()"],
    }
}
ADAM = partial(torch.optim.AdamW, lr=2e-3)
SMALL = partial(PBNNCD, optimizer=ADAM, latent=16, dropout=0.0)
MIXED = {"scenario": Discovery(ClassIncremental(sizes=[6, 2, 2]), later=0.2), "batch_size": 64}


def test_the_encoder_has_the_sizes_of_the_paper_and_its_output_norm_one():
    encoder = TabularEncoder((16,), latent=5, dropout=0.2)
    shapes = [tuple(layer.weight.shape) for layer in encoder.layers if isinstance(layer, torch.nn.Linear)]
    assert shapes == [(12, 16), (8, 12), (5, 8)]
    assert isinstance(encoder.layers[-1], torch.nn.Linear)
    assert [layer.p for layer in encoder.layers if isinstance(layer, torch.nn.Dropout)] == [0.2, 0.2]
    torch.testing.assert_close(encoder(normal(4, 16).float()).norm(dim=1), torch.ones(4))


def record(strategy, batch, output, terms):
    weight = strategy.classification_weight
    rows, known = batch.parts["labelled"]
    seen = strategy.task.num_seen - (0 if strategy.task.is_first else strategy.task.num_new)
    ce = -output.logits[rows][:, :seen].double().log_softmax(1)[torch.arange(len(known)), known.labels].mean()
    found = strategy.decoder(F.normalize(output.features, dim=1)).double()
    square = (found - batch.images.flatten(1).double()).square().sum() / len(batch)
    wanted = {"ce": weight * float(ce), "reconstruction": (1 - weight) * float(square)}
    parameters = [*strategy.network.parameters(), *strategy.decoder.parameters()]
    gradients = torch.autograd.grad(sum(terms.values()), parameters, retain_graph=True, allow_unused=True)
    moved = [g is not None and bool(g.abs().sum() > 0) for g in gradients]
    names = [name for name, _ in strategy.network.named_parameters()] + ["decoder"] * len(
        list(strategy.decoder.parameters())
    )
    return batch, {name: float(v) for name, v in terms.items()}, wanted, dict(zip(names, moved, strict=True))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_both_terms_are_those_of_the_equation(weight):
    strategy = watching(PBNNCD, record, optimizer=ADAM, latent=16, dropout=0.0, classification_weight=weight)
    run(strategy, data=MIXED, max_epochs=1)
    for task in (0, 1):
        batch, terms, wanted, moved = strategy.recorded[task][1]
        assert terms == pytest.approx(wanted, rel=1e-4, abs=1e-9)
        assert moved["decoder"] == (weight < 1)
        heads = [value for name, value in moved.items() if name.startswith("head.blocks.0")]
        assert heads == [weight > 0] * len(heads)
        assert batch.parts["unlabelled"][1].labels.unique().tolist() == ([] if task == 0 else [-1])


def test_columns_of_new_classes_get_no_gradient(monkeypatch):
    monkeypatch.setattr(PBNNCD, "_num_new", lambda self, task: task.num_new)
    strategy = SMALL(classification_weight=0.5)
    strategy.build((1, 8, 8))
    strategy.network.head.grow(2)
    strategy.network.head.grow(2)
    strategy.task, labels = task_of(1), torch.tensor([0, 1, 1])
    assert strategy.task.num_seen == 4
    batch = batch_of(labels, images=normal(3, 1, 8, 8).float())
    joint = batch.replace(parts={"labelled": (slice(0, 3), batch)})
    strategy.losses(joint, strategy.network(batch.images))["ce"].backward()
    first, second = (block.weight.grad for block in strategy.network.head.blocks)
    assert first.abs().sum() > 0
    assert second.abs().sum() == 0


@pytest.fixture(scope="module")
def learnt():
    accuracy = DiscoveryAccuracy()
    return run(SMALL(), accuracy, data=MIXED, max_epochs=10), accuracy


def test_new_classes_are_discovered_and_old_ones_kept(learnt):
    _, accuracy = learnt
    plain = DiscoveryAccuracy()
    run(SMALL(classification_weight=1.0), plain, data=MIXED, max_epochs=10)
    # Measured: .98, .99, .96 and .94, .99, .73 against .77, .99, .10 and .71, .83, .23.
    for found, other in zip(accuracy.tasks[1:], plain.tasks[1:], strict=True):
        assert found.all > other.all + 0.1
        assert found.new > other.new + 0.3
        assert found.old > 0.95


def test_the_memory_has_pseudo_labels_of_new_classes_and_no_true_ones(learnt):
    made, _ = learnt
    strategy, stream = made.strategy, made.stream
    counts = strategy.memory.labels.bincount(minlength=10)
    labels = stream.columns_of(made.datamodule.samples(train=True).labels)
    first = torch.as_tensor(labels[stream.train[0]]).bincount(minlength=10)
    assert counts[:6].tolist() == first[:6].tolist()
    assert (counts[6:] > 0).all()
    assert strategy.num_clusters() == 10
    images = normal(5, 1, 8, 8).float()
    strategy.eval()
    assert strategy.predict(images).argmax(1).equal(strategy.clusters(images))


def test_results_have_all_old_and_new_accuracies_of_each_task(learnt, tmp_path):
    _, accuracy = learnt
    found = accuracy.results()
    assert set(found) == {"all", "old", "new"}
    assert found["old"][0] is None
    assert all(0 <= value <= 1 for value in found["all"])
    again = DiscoveryAccuracy()
    again.load_state_dict(accuracy.state_dict())
    assert again.results() == found


def test_a_later_task_with_labels_is_learnt_from_them():
    data = {"scenario": ClassIncremental(sizes=[6, 4]), "batch_size": 64}
    made = run(SMALL(), data=data, max_epochs=3)
    assert made.matrix.measures()["average_accuracy"] > 0.8
    assert made.strategy.num_clusters() == 10


@pytest.mark.parametrize("clustering", ["kmeans", "ncd_kmeans", "spectral"])
def test_sessions_of_new_classes_alone_are_clustered(clustering):
    accuracy = DiscoveryAccuracy()
    data = {"scenario": Discovery(ClassIncremental(sizes=[8, 2]), later=0.0), "batch_size": 64}
    made = run(SMALL(mixed=False, clustering=clustering), accuracy, data=data, max_epochs=4)
    assert accuracy.tasks[1].all > 0.6
    assert made.strategy.num_clusters() == 10


def test_the_number_of_new_classes_is_estimated_and_surplus_clusters_count():
    strategy = SMALL(new_classes="estimated", most_classes=5, latent=32)
    strategy.build((4,))
    strategy.network.head.grow(2)
    strategy.network.head.grow(1)
    strategy.task = task_of(1)
    places = F.normalize(torch.eye(6, 32)[:5] + 0.0, dim=1)
    points = (places[:, None] + 0.02 * normal(5, 20, 32).float()).flatten(0, 1)
    known, labels = points[:40], torch.arange(2).repeat_interleave(20)
    found = strategy._discovered(points, known, labels, places[:2], strategy.task)
    assert len(found) == 3
    strategy.centres.fill(torch.cat([places[:2], found]), 3)
    assert strategy.num_clusters() == 5
    assert strategy.predict(normal(2, 4).float()).shape == (2, 3)


def test_another_encoder_is_normalised():
    strategy = SMALL(backbone=partial(MLP, hidden=(8,)))
    strategy.build((1, 8, 8))
    torch.testing.assert_close(strategy._latent(normal(3, 1, 8, 8).float()).norm(dim=1), torch.ones(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_size": 0}, "memory_size is 0"),
        ({"classification_weight": 1.5}, "classification_weight is 1.5"),
        ({"clustering": "means"}, "clustering is 'means'"),
        ({"new_classes": "some"}, "new_classes is 'some'"),
        ({"most_classes": 1}, "most_classes is 1"),
        ({"least_similarity": 1.0}, "least_similarity is 1"),
        ({"labelled_size": 0}, "count is 0"),
        ({"latent": 0}, "latent is 0"),
        ({"dropout": 1.0}, "dropout is 1"),
        ({"replay_size": 3}, "policy and replay_size"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PBNNCD(**options)
