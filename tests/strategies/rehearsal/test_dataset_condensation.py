"""Dataset Condensation with Contrastive signals, as a memory."""

from functools import partial

import pytest
import torch
from support.baselines import finetuning
from support.runs import NormNet, loop, plain_net, run, sgd
from torch import nn
from torch.nn import functional as F

from cl_lightning.models import MLP, InstanceNormConvNet
from cl_lightning.strategies.rehearsal import dataset_condensation
from cl_lightning.strategies.rehearsal.dataset_condensation import (
    Condensation,
    DatasetCondensation,
    condense,
    matching_loss,
    row_distance,
)
from cl_lightning.stream import ClassIncremental, RotatedDomains, Subset
from cl_lightning.testing import Subject, small

tiny = partial(InstanceNormConvNet, width=4, depth=1)
BRIEF = Condensation(networks=2, steps=2, epochs=1, warm_networks=1, warm_steps=1)
SUBJECTS = {
    "DatasetCondensation": Subject(
        small(DatasetCondensation, images_per_class=2, condensation=BRIEF, matching_network=tiny)
    )
}
PUBLISHED = {
    "dataset_condensation_cifar10": {
        "source": "Saehyung-Lee/DCC: main.py, utils.py (get_loops), 10 images per class, outer warm-up 250, inner 10",
        "images_per_class": 10,
        "backbone": "InstanceNormConvNet()",
        "optimizer": "SGD(lr=0.01, momentum=0.9, weight_decay=0.0005)",
        "matching_network": "InstanceNormConvNet(depth=3, width=128)",
        "condensation": {
            "networks": 1000,
            "steps": 10,
            "epochs": 50,
            "batch_size": 256,
            "lr": 0.1,
            "momentum": 0.5,
            "network_lr": 0.01,
            "warm_networks": 250,
            "warm_steps": 10,
        },
        "data.scenario": "ClassIncremental(tasks=5)",
        "data.batch_size": 128,
        "trainer.max_epochs": 50,
    },
}
SMALL = partial(
    DatasetCondensation,
    backbone=plain_net,
    optimizer=sgd,
    images_per_class=3,
    condensation=BRIEF,
    matching_network=tiny,
)
FEW = {"scenario": Subset(ClassIncremental(sizes=[4, 3, 3]), per_class=12, test_per_class=5), "batch_size": 16}


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_distance_is_a_sum_over_rows_and_leaves_vectors_out():
    first = [torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]]), torch.ones(7), torch.tensor([[[2.0]], [[-1.0]]])]
    second = [torch.tensor([[4.0, 3.0], [-2.0, 0.0], [1.0, 1.0]]), -torch.ones(7), torch.tensor([[[5.0]], [[3.0]]])]
    # 1 - 24/25, 1 - (-1), 1 - 0; then 1 - 1, 1 - (-1)
    expected = (1 - 24 / 25) + 2 + 1 + 0 + 2
    torch.testing.assert_close(row_distance(first, second), torch.tensor(expected), atol=1e-5, rtol=0)
    half = torch.full((1, 1), 1e-3, dtype=torch.float64)
    found = row_distance([half], [half])  # 1 - 1e-6 / (1e-6 + 1e-6)
    torch.testing.assert_close(found, torch.tensor(0.5, dtype=torch.float64))


def linear(classes=3, pixels=4):
    network = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes)).double()
    with torch.no_grad():
        network[1].weight.copy_(normal(classes, pixels, seed=1))
        network[1].bias.copy_(normal(classes, seed=2))
    return network


def row_gradients(network, images, labels):
    """Gradient of the mean cross-entropy of a softmax regression: mean of (p - y) x^T."""
    weight, bias = network[1].weight.detach(), network[1].bias.detach()
    flat = images.flatten(1)
    scores = (flat @ weight.T + bias).exp()
    error = scores / scores.sum(1, keepdim=True) - torch.eye(len(weight), dtype=flat.dtype)[labels]
    return error.T @ flat / len(flat)


def plain_distance(a, b):
    return sum(
        1 - float(x @ y) / (float(x.square().sum().sqrt() * y.square().sum().sqrt()) + 1e-6)
        for x, y in zip(a, b, strict=True)
    )


def test_both_forms_of_the_loss_are_those_of_a_softmax_regression():
    network = linear()
    real = [normal(n, 1, 2, 2, seed=10 + n) for n in (5, 2, 4)]
    synthetic, targets = normal(5, 1, 2, 2, seed=3), torch.tensor([0, 0, 1, 2, 2])
    of_real = [row_gradients(network, part, torch.full((len(part),), c)) for c, part in enumerate(real)]
    class_wise = sum(
        plain_distance(row_gradients(network, synthetic[targets == c], targets[targets == c]), of_real[c])
        for c in range(3)
    )
    found = matching_loss(network, real, synthetic, targets, contrastive=False)
    assert float(found) == pytest.approx(class_wise, rel=1e-10)
    contrastive = plain_distance(row_gradients(network, synthetic, targets), sum(of_real) / 3)
    found = matching_loss(network, real, synthetic, targets, contrastive=True)
    assert float(found) == pytest.approx(contrastive, rel=1e-10)
    assert abs(class_wise - contrastive) > 0.1
    assert all(value.grad is None for value in network.parameters())


@pytest.mark.parametrize("contrastive", [False, True])
def test_the_gradient_of_the_images_is_that_of_finite_differences(contrastive):
    network, real = linear(), [normal(4, 1, 2, 2, seed=c) for c in range(3)]
    targets = torch.tensor([0, 1, 1, 2])

    def loss(images):
        return matching_loss(network, real, images, targets, contrastive=contrastive)

    assert torch.autograd.gradcheck(loss, normal(4, 1, 2, 2, seed=7).requires_grad_())


def test_with_one_class_both_forms_coincide():
    network, real = linear(), [normal(4, 1, 2, 2)]
    synthetic, targets = normal(2, 1, 2, 2, seed=5), torch.zeros(2, dtype=torch.int64)
    both = [matching_loss(network, real, synthetic, targets, contrastive=form) for form in (False, True)]
    torch.testing.assert_close(*both)
    assert float(both[0]) > 0.01
    torch.testing.assert_close(
        matching_loss(network, [synthetic], synthetic, targets, contrastive=True),
        torch.zeros((), dtype=torch.float64),
        atol=1e-4,
        rtol=0,
    )


def test_the_contrastive_form_holds_after_either_warm_up():
    options = Condensation(warm_networks=3, warm_steps=2)
    assert [options.contrasts(*place) for place in ((0, 0), (2, 1), (2, 2), (0, 2), (3, 0), (3, 5))] == [
        *(False, False, True, True, True, True)
    ]


class Looks:
    """Notes the arguments of each matching step."""

    def __init__(self, monkeypatch):
        self.calls = []
        self.plain = matching_loss
        monkeypatch.setattr(dataset_condensation, "matching_loss", self)

    def __call__(self, network, real, synthetic, targets, *, contrastive):
        self.calls.append(
            {
                "network": network,
                "weights": [value.detach().clone() for value in network.parameters()],
                "real": real,
                "images": synthetic.detach().clone(),
                "targets": targets,
                "contrastive": contrastive,
            }
        )
        return self.plain(network, real, synthetic, targets, contrastive=contrastive)


def test_images_and_networks_take_their_steps_in_turn(monkeypatch):
    looks, state = Looks(monkeypatch), torch.get_rng_state()
    images, labels = normal(20, 1, 2, 2), torch.arange(20) % 3
    options = Condensation(
        networks=2, steps=3, epochs=4, batch_size=5, lr=0.3, momentum=0.6, network_lr=0.2, warm_networks=1, warm_steps=2
    )
    first = torch.tensor([0, 3, 1, 2])
    built = []

    def build():
        built.append(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double())
        return built[-1]

    found = condense(images, labels, first, build, options, range(6), key=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert [call["network"] for call in looks.calls] == [*[built[0]] * 3, *[built[1]] * 3]
    assert [call["contrastive"] for call in looks.calls] == [False, False, True, True, True, True]
    assert torch.equal(looks.calls[0]["images"], images[first])
    assert not torch.equal(looks.calls[0]["weights"][0], looks.calls[3]["weights"][0])
    velocity, seen = torch.zeros_like(images[first]), set()
    for place, call in enumerate(looks.calls):
        assert torch.equal(call["targets"], labels[first])
        for label, part in enumerate(call["real"]):
            rows = (part[:, None] == images).flatten(2).all(2).nonzero()[:, 1]
            assert labels[rows].tolist() == [label] * 5
            assert len(rows.unique()) == 5
            seen.update(rows.tolist())
        after = looks.calls[place + 1]["images"] if place < 5 else found
        network = linear()
        with torch.no_grad():
            for value, noted in zip(network.parameters(), call["weights"], strict=True):
                value.copy_(noted)
        x = call["images"].clone().requires_grad_()
        loss = looks.plain(network, call["real"], x, call["targets"], contrastive=call["contrastive"])
        velocity = 0.6 * velocity + torch.autograd.grad(loss, x)[0]
        torch.testing.assert_close(after, call["images"] - 0.3 * velocity)
        if place in (0, 1, 3, 4):  # the network is then trained on the images for 4 epochs of one batch
            optimizer = torch.optim.SGD(network.parameters(), lr=0.2)
            for _ in range(4):
                optimizer.zero_grad()
                F.cross_entropy(network(after), call["targets"]).backward()
                optimizer.step()
            for value, noted in zip(network.parameters(), looks.calls[place + 1]["weights"], strict=True):
                torch.testing.assert_close(value.detach(), noted)
    assert seen == set(range(20))


class Watched(DatasetCondensation):
    """Notes what each step replays."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.replayed = []

    def losses(self, batch, output):
        if "replay" in batch.parts:
            _, part = batch.parts["replay"]
            pixels = 255 * (part.images * 0.376 + 0.305) if self.task.index else None
            assert part.raw.dtype == batch.raw.dtype == torch.uint8
            torch.testing.assert_close(part.raw.float(), pixels.clamp(0, 255).round(), atol=1, rtol=0)
            self.replayed.append((self.task.index, sorted(set(part.tasks.tolist()))))
        return super().losses(batch, output)


def test_the_images_of_all_tasks_so_far_are_replayed():
    data = {**FEW, "mean": [0.305], "std": [0.376], "scenario": Subset(RotatedDomains(tasks=3), per_class=12)}
    made = run(Watched(**SMALL.keywords), data=data)
    strategy = made.strategy
    assert {(task, *tasks) for task, tasks in strategy.replayed} == {(1, 0), (2, 0, 1)}
    memory = strategy.memory
    assert memory.images.dtype == torch.float32
    assert memory.images.shape == (3 * 10 * 3, 1, 8, 8)  # classes come back, and have further images
    counts = torch.zeros(3, 10, dtype=torch.int64).index_put_(
        (memory.tasks, memory.labels), torch.ones(90, dtype=torch.int64), accumulate=True
    )
    assert (counts == 3).all()
    assert memory.num_bytes() == 90 * (64 * 4 + 3 * 8)
    assert strategy.bytes_kept()["synthetic images"] == memory.num_bytes()
    mebi = made.meter.tasks[-1].memory_mb * 2**20
    assert mebi == pytest.approx(4 * sum(p.numel() for p in strategy.network.parameters()) + 90 * 64 * 4)


@pytest.mark.parametrize("given", [3, 5])
def test_images_begin_as_images_of_their_class_and_move_unless_they_are_all_of_them(given, monkeypatch):
    looks = Looks(monkeypatch)
    made = run(
        SMALL(images_per_class=given), data={**FEW, "scenario": Subset(ClassIncremental(sizes=[1, 9]), per_class=4)}
    )
    memory, source = made.strategy.memory, made.datamodule.samples(train=True)
    pixels = source.take(torch.arange(len(source.labels))).flatten(1) / 255
    columns = torch.as_tensor(made.stream.columns_of(source.labels))
    assert memory.labels.bincount().tolist() == [min(given, 4)] * 10  # a class has no more than its images
    black, white = made.strategy.data.pixel_range(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    for task, begin in ((0, looks.calls[0]), (1, looks.calls[4])):
        start = ((begin["images"] - black) / (white - black)).flatten(1)
        nearest = torch.cdist(start.double(), pixels.double()).min(1)
        assert float(nearest.values.max()) < 1e-5
        assert torch.equal(columns[nearest.indices], memory.labels[memory.tasks == task])
        assert len(nearest.indices.unique()) == len(start)
        moved = (memory.images[memory.tasks == task].flatten(1) - start).norm(dim=1)
        assert (moved > 1e-3).all() if given == 3 else (moved < 1e-4).all()  # gradients of all images agree at once
    assert looks.calls[0]["network"][1].out_features == 2  # a task of one class
    assert looks.calls[4]["network"][1].out_features == 9


def test_a_dry_run_takes_one_step(monkeypatch):
    looks = Looks(monkeypatch)
    made = loop(SMALL(), data=FEW, options={"dry_run": True, "stop_after_task": 0}, max_epochs=1)
    made.fit()
    assert [len(call["targets"]) for call in looks.calls][:2] == [2, 2]  # of the first two tasks
    assert len(looks.calls) == 2 + 4


def test_condensed_images_are_better_than_the_images_at_which_they_began():
    # Measured, seeds 0 and 1: .72, .71, of the first images .66, .66, fine-tuning .31. It depends on the learning rate:
    # with 0.1 it is .63. After 40 networks with 3 steps and 0.03: .74, .72; contrastive alone .63, .63.
    data = {"batch_size": 32}
    common = {"backbone": partial(MLP, hidden=(100,)), "optimizer": partial(torch.optim.Adam, lr=2e-3)}
    plain = float(finetuning(common, data=data, max_epochs=3).R_ci[2].mean())
    found = []
    for lr in (0.06, 1e-9):
        options = Condensation(networks=20, steps=2, epochs=2, lr=lr, network_lr=0.05, warm_networks=15)
        network = partial(MLP, hidden=(30,))
        strategy = DatasetCondensation(**common, images_per_class=1, condensation=options, matching_network=network)
        found.append(float(run(strategy, data=data, max_epochs=3).matrix.R_ci[2].mean()))
    assert found[1] > plain + 0.2
    assert found[0] > found[1] + 0.03


def test_resized_images_and_networks_with_batch_normalisation_are_refused():
    with pytest.raises(ValueError, match=r"DatasetCondensation: images are \(1, 8, 8\) and resized to \(1, 16, 16\)"):
        run(SMALL(), data={"resize": 16})
    with pytest.raises(ValueError, match="matching_network is NormNet, which has batch normalisation"):
        run(SMALL(matching_network=NormNet))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images_per_class": 0}, "DatasetCondensation: images_per_class is 0"),
        ({"loss_classes": "current"}, "DatasetCondensation: loss_classes is 'current'"),
        ({"replay_size": 0}, "DatasetCondensation: replay_size is 0"),
    ],
)
def test_wrong_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        DatasetCondensation(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"networks": 0},
        {"steps": 0},
        {"epochs": -1},
        {"batch_size": 0},
        {"lr": 0.0},
        {"momentum": 1.0},
        {"network_lr": 0.0},
        {"warm_networks": -1},
        {"warm_steps": -1},
    ],
)
def test_wrong_options_of_the_condensation_are_errors(options):
    with pytest.raises(ValueError, match=f"Condensation: {next(iter(options))} is"):
        Condensation(**options)
