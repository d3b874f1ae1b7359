from functools import partial
from itertools import product

import pytest
import torch
from support.fakes import normal
from support.runs import NormNet, plain_net, run
from torch.nn import functional as F

from cl_lightning.models import MLP, LinearHead
from cl_lightning.strategies.exemplar_free.hyper_interval import (
    GeneratedBackbone,
    HyperInterval,
    HyperNetwork,
    OutputsOfTask,
    interval_entropy,
    interval_linear,
)
from cl_lightning.stream import ClassIncremental, RotatedDomains
from cl_lightning.testing import Subject, small

ADAM = partial(torch.optim.Adam, lr=3e-3)
SMALL = partial(HyperInterval, backbone=plain_net, size=12, hidden=(24,), optimizer=ADAM)
SLOW = "both kinds of intervals pass the suite"
REASON = "a hypernetwork makes the weights"

SUBJECTS = {
    "HyperInterval": Subject(small(HyperInterval, size=6, hidden=(8,)), first_task_is_finetuning=False, reason=REASON),
    "HyperInterval(full)": Subject(
        small(HyperInterval, size=6, hidden=(8,), intervals="full"), first_task_is_finetuning=False, reason=REASON
    ),
}

PUBLISHED = {
    "hyper_interval_split_mnist": {
        "source": "arXiv:2405.15444, Split MNIST with the task known",
        "backbone": "MLP(hidden=[400, 400])",
        "size": 72,
        "hidden": [75, 75],
        "radius": 1.0,
        "nominal_weight": 0.5,
        "regularization": 0.01,
        "intervals": "full",
        "optimizer": "Adam(lr=0.001)",
        "data.scenario": "ClassIncremental(tasks=5)",
        "data.batch_size": 128,
        "trainer.max_epochs": 21,
    },
}


# ------------------------------------------------------------------ the hypernetwork


def test_intervals_of_the_weights_match_numbers_by_hand():
    network = HyperNetwork(2, (2,), torch.tensor([0.5, -1.0])).double()
    first, last = network.layers
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[1.0, -2.0], [0.5, 1.0]]))
        first.bias.copy_(torch.tensor([0.25, 0.0]))
        last.weight.copy_(torch.tensor([[2.0, -3.0], [1.0, 1.0]]))
    centre, radius = torch.tensor([[1.0, 0.5]]).double(), torch.tensor([[0.5, 0.25]]).double()
    # Layer 1: centres .25 and 1, half-widths 1 and .5; after the ReLU [0, 1.25] and [.5, 1.5].
    # Layer 2: 2 * .625 - 3 * 1 + .5 = -1.25 and .625 + 1 - 1 = .625; half-widths 2 * .625 + 3 * .5 and .625 + .5.
    middle, width = network(centre, radius)
    assert middle.tolist() == [[-1.25, 0.625]]
    assert width.tolist() == [[2.75, 1.125]]


def test_weights_of_every_point_of_the_box_lie_in_the_interval_and_a_box_of_width_0_is_a_point():
    torch.manual_seed(0)
    network = HyperNetwork(5, (7, 6), normal(9)).double()
    for layer in network.layers[:-1]:
        layer.bias.data = normal(len(layer.bias))
    centre, radius = normal(1, 5), normal(1, 5).abs()
    middle, width = network(centre, radius)
    for seed in range(50):
        inside = centre + radius * (2 * torch.rand(1, 5, generator=torch.Generator().manual_seed(seed)).double() - 1)
        weights = inside
        for place, layer in enumerate(network.layers):
            weights = layer(weights.relu() if place else weights)
        assert ((weights - middle).abs() <= width + 1e-12).all()
        point, zero = network(inside, torch.zeros_like(radius))
        torch.testing.assert_close(point, weights, rtol=0, atol=1e-14)
        assert zero.eq(0).all()


def test_training_starts_near_usual_weights():
    torch.manual_seed(0)
    network, start = HyperNetwork(10, (100,), normal(5000).float()), normal(5000).float()
    made, _ = network(normal(1, 10).float(), torch.zeros(1, 10))
    assert 0.005 < (made[0] - start).std() < 0.1  # measured: .03
    assert 0.0099 < network.layers[1].weight.abs().max() <= 0.01


# ------------------------------------------------------------------ intervals through the network


@pytest.mark.parametrize("point", [True, False])
def test_bounds_of_a_linear_layer_are_reached_by_corners_of_the_box_and_by_none_exceeded(point):
    x_low = normal(1, 2) if point else normal(1, 2).abs()
    x_high = x_low if point else x_low + 0.7
    w_low, b_low = normal(3, 2, seed=1), normal(3, seed=2)
    w_high, b_high = w_low + 0.9, b_low + 0.2
    low, high = interval_linear(x_low, x_high, (w_low, b_low), (w_high, b_high))
    for unit in range(3):
        pairs = [(x_low[0, i], x_high[0, i]) for i in range(2)] + [(w_low[unit, i], w_high[unit, i]) for i in range(2)]
        corners = [x1 * w1 + x2 * w2 + b for x1, x2, w1, w2, b in product(*pairs, (b_low[unit], b_high[unit]))]
        torch.testing.assert_close(low[0, unit], min(corners), rtol=0, atol=1e-14)
        torch.testing.assert_close(high[0, unit], max(corners), rtol=0, atol=1e-14)


def generated(outputs=4, tasks=2, net=plain_net, **options):
    torch.manual_seed(0)
    options = {"hidden": (6,), "size": 5, "radius": 2.0, "universal": False, **options}
    backbone = GeneratedBackbone(net((1, 3, 3)), outputs, **options).double()
    for _ in range(tasks):
        backbone.add_task()
    backbone.double()
    for rho in backbone.radii:
        rho.data = normal(len(rho))
    return backbone


def plain(backbone, weights, images):
    """The network with given weights, layer by layer."""
    parts = weights.split([shape.numel() for shape in backbone.shapes.values()])
    w1, b1, w2, b2 = (part.view(shape) for part, shape in zip(parts, backbone.shapes.values(), strict=True))
    return (images.flatten(1) @ w1.T + b1).relu() @ w2.T + b2


def test_half_widths_of_a_box_add_up_to_the_radius():
    backbone = generated()
    centres, widths = backbone.boxes([0, 1], growth=0.25)
    torch.testing.assert_close(centres, torch.stack(list(backbone.embeddings)))
    torch.testing.assert_close(widths.sum(dim=1), torch.full((2,), 0.5).double())
    expected = 0.5 * backbone.radii[1].exp() / backbone.radii[1].exp().sum()
    torch.testing.assert_close(widths[1], expected)


def test_outputs_are_of_the_network_with_the_middle_weights_of_the_task():
    backbone, images = generated(), normal(3, 1, 3, 3)
    for task in (0, 1):
        backbone.task = task
        expected = plain(backbone, backbone.middle([task])[0], images)
        torch.testing.assert_close(backbone(images), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["full", "light"])
def test_intervals_of_the_outputs_contain_the_outputs_of_their_weights(kind):
    backbone, images = generated(), normal(3, 1, 3, 3)
    backbone.task, backbone.growth = 1, 0.5
    middle, radius = backbone.hypernetwork(*backbone.boxes([1], 0.5))
    low, between, high = backbone.interval(images, backbone(images), kind)
    three = torch.stack([plain(backbone, middle[0] + sign * radius[0], images) for sign in (-1, 0, 1)])
    if kind == "light":
        for found, expected in zip((low, between, high), three.sort(dim=0).values, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
        return
    torch.testing.assert_close(between, three[1], rtol=0, atol=1e-13)
    for seed in range(30):
        signs = 2 * torch.rand(radius.shape[1], generator=torch.Generator().manual_seed(seed)).double() - 1
        found = plain(backbone, middle[0] + signs * radius[0], images)
        assert (low <= found + 1e-12).all()
        assert (found <= high + 1e-12).all()
    backbone.radius = 0.0
    for end in backbone.interval(images, backbone(images), "full"):
        torch.testing.assert_close(end, backbone(images), rtol=0, atol=1e-13)


def test_the_intersection_of_boxes_is_their_common_part_or_the_mean_of_the_ends_where_there_is_none():
    backbone = generated(size=2, radius=4.0, universal=True)
    for embedding, row in zip(backbone.embeddings, ((0.0, 2.0), (1.0, 0.0)), strict=True):
        embedding.data = torch.tensor(row).double()
    for rho in backbone.radii:
        rho.data = torch.zeros(2).double()
    # sigma = 4 / (2 * 2) = 1 and half-widths 2: centres (1, cos 2) and (cos 1, 1)
    centre, width = backbone.intersection()
    first, second = torch.tensor([1.0, 2.0]).double().cos()
    torch.testing.assert_close(centre, torch.stack([(first + 1) / 2, (second + 1) / 2])[None])
    torch.testing.assert_close(width, torch.stack([2 - (1 - first) / 2, 2 - (1 - second) / 2])[None])
    backbone.universal = False
    backbone.embeddings[0].data[0] = 9.0  # boxes [7, 11] and [-1, 3]: apart
    centre, width = backbone.intersection()
    torch.testing.assert_close(centre, torch.tensor([[5.0, 1.0]]).double())
    torch.testing.assert_close(width, torch.tensor([[0.0, 1.0]]).double())


def test_outputs_stand_at_the_columns_of_the_task_above_all_others():
    head = OutputsOfTask(3)
    head.grow(2)
    head.grow(3)
    head.places, head.outputs = torch.tensor([1, 3]), torch.tensor([0, 1])
    logits = head(torch.tensor([[2.0, 5.0, 99.0], [-1.0, -4.0, 99.0]]))
    assert logits.tolist() == [[1.0, 2.0, 1.0, 5.0, 1.0], [-5.0, -1.0, -5.0, -4.0, -5.0]]
    assert head.block_sizes() == [2, 3]


def test_the_entropy_weights_classes_by_the_inverse_of_their_width():
    low, high = torch.tensor([[0.0, 1.0]]).double(), torch.tensor([[2.0, 1.5]]).double()
    p = torch.tensor([1.0, 1.25]).double().softmax(dim=0)
    expected = -(p[0] * p[0].log() / 2.0 + p[1] * p[1].log() / 0.5)
    torch.testing.assert_close(interval_entropy(low, high)[0], expected)
    assert interval_entropy(low, low).isfinite().all()


# ------------------------------------------------------------------ the loss


class Look(HyperInterval):
    """Compares the terms of each step with their formulas."""

    def losses(self, batch, output):
        terms = super().losses(batch, output)
        steps, step = int(self.trainer.num_training_batches), self.seen.get(self.task.index, 0)
        half = steps * 3 / 2
        self.seen[self.task.index] = step + 1
        assert self.backbone.growth == pytest.approx(min(step / half, 1.0))
        kappa = max(1 - 0.02 * min(step, half), 0.8)
        columns = self.task_columns[self.task.index].nonzero()[:, 0]
        labels = torch.searchsorted(columns, batch.labels)
        low, middle, high = self.backbone.interval(batch.images, output.features, "full")
        low, middle, high = (x[:, : len(columns)] for x in (low, middle, high))
        worst = high.clone()
        worst[range(len(labels)), labels] = low[range(len(labels)), labels]
        torch.testing.assert_close(terms["ce"], kappa * F.cross_entropy(middle, labels))
        torch.testing.assert_close(terms["worst_ce"], (1 - kappa) * F.cross_entropy(worst, labels))
        if self.task.is_first:
            assert "regularization" not in terms
            return terms
        t = self.task.index
        if step == 0:
            self.before = [self.backbone.middle([k])[0].detach() for k in range(t)]
            assert terms["regularization"] == 0
        change = sum((self.backbone.middle([k])[0] - self.before[k]).square().sum() for k in range(t))
        torch.testing.assert_close(terms["regularization"], 0.7 / t * change / t)
        self.regularized += float(terms["regularization"]) > 0
        return terms


def test_terms_and_their_schedules_match_the_formulas():
    look = Look(
        backbone=plain_net,
        size=12,
        hidden=(24,),
        optimizer=ADAM,
        intervals="full",
        nominal_weight=0.8,
        nominal_decay=0.02,
        regularization=0.7,
    )
    look.seen, look.regularized = {}, 0
    run(look, max_epochs=3)
    assert len(look.seen) == 3
    assert look.regularized > 10


def test_a_task_trains_the_hypernetwork_and_its_own_box():
    strategy = run(SMALL(), max_epochs=1, options={"stop_after_task": 1}).strategy
    names = {name for name, parameter in strategy.named_parameters() if parameter.requires_grad}
    prefix = "network.backbone."
    layers = {f"{prefix}hypernetwork.layers.{i}.{own}" for i in (0, 1) for own in ("weight", "bias")}
    assert names == layers | {f"{prefix}embeddings.1", f"{prefix}radii.1"}


# ------------------------------------------------------------------ behaviour


def test_it_remembers_tasks_and_finds_the_task_of_most_images():
    made = run(SMALL(hidden=(32,)), max_epochs=6).matrix
    free = run(SMALL(hidden=(32,), regularization=0.0), max_epochs=6).matrix
    # Measured: tasks known .99 against .71; task inferred .77 against .27, where 1/3 of the tasks is .33.
    assert made.R_ti[-1].mean() > 0.93
    assert made.R_ti[-1].mean() > free.R_ti[-1].mean() + 0.1
    assert made.measures()["average_accuracy"] > 0.5


def test_one_network_predicts_all_domains():
    data = {"scenario": RotatedDomains(degrees=[0.0, 15.0, 30.0])}
    options = {"backbone": partial(MLP, hidden=(32,)), "size": 24, "hidden": (32,), "radius": 0.5}
    made = run(HyperInterval(**options, universal=True, intervals="full", optimizer=ADAM), data=data, max_epochs=6)
    strategy, images = made.strategy.eval(), torch.rand(5, 1, 8, 8)
    scores = strategy.predict(images)
    assert torch.equal(scores, strategy.predict(images, torch.zeros(5, dtype=torch.int64)))
    weights, _ = strategy.backbone.hypernetwork(*strategy.backbone.intersection())
    torch.testing.assert_close(scores, plain(strategy.backbone, weights[0], images))
    assert made.matrix.measures()["average_accuracy"] > 0.6


def test_a_task_may_have_fewer_classes_than_the_network_has_outputs():
    made = run(SMALL(backbone=NormNet), data={"scenario": ClassIncremental(sizes=[2, 5, 3])}, max_epochs=4)
    assert made.strategy.backbone.num_features == 5
    assert made.matrix.R_ti[-1].mean() > 0.8


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "HyperInterval: size is 0; it must be at least 1"),
        ({"hidden": (5, 0)}, "hidden is 0"),
        ({"radius": -1.0}, "radius is -1.0"),
        ({"nominal_weight": 1.5}, "nominal_weight is 1.5"),
        ({"nominal_decay": -1.0}, "nominal_decay is -1.0"),
        ({"regularization": -0.1}, "regularization is -0.1"),
        ({"intervals": "half"}, "intervals is 'half'"),
        ({"head": LinearHead}, "remove head; the hypernetwork makes the last layer"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        HyperInterval(**options)


@pytest.mark.parametrize("net", [NormNet, partial(MLP, hidden=(8,), dropout=0.1)])
def test_full_intervals_need_a_chain_whose_bounds_are_known(net):
    with pytest.raises(ValueError, match=r"full intervals need an MLP without dropout.*use --model.intervals light"):
        HyperInterval(intervals="full", backbone=net).build((1, 8, 8))


def test_one_network_for_all_tasks_needs_a_stream_of_domains():
    with pytest.raises(ValueError, match="HyperInterval"):
        run(SMALL(universal=True))
