import math
from functools import partial

import pytest
import torch
from support.fakes import batch_of, normal
from support.pretrained import TinyViT
from support.runs import loop, plain_net, run
from torch import nn
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP, Backbone, ResNet18
from cl_lightning.strategies.pretrained.ear import (
    ADAPTORS,
    EAR,
    DomainAdaptors,
    StagedEncoder,
    search_score,
    stage_names,
)
from cl_lightning.strategies.pretrained.linear_probe import LinearProbe
from cl_lightning.stream import ClassIncremental, RotatedDomains
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "EAR": Subject(
        small(EAR, dimensions=100, probe=16),
        first_task_is_finetuning=False,
        reason="an adaptor and a head are trained, on a frozen backbone",
    ),
}

adam = partial(torch.optim.Adam, lr=0.01)
PIXELS = partial(MLP, hidden=())
SMALL = partial(EAR, backbone=PIXELS, dimensions=500, optimizer=adam)
IMAGES = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def turned(*degrees):
    return {"scenario": RotatedDomains(degrees=[float(number) for number in degrees], share="split"), "batch_size": 64}


def learnt(make, tasks=1, data=None):
    made = loop(
        make(),
        data=data or {"scenario": ClassIncremental(tasks=5), "batch_size": 64},
        options={"stop_after_task": tasks - 1},
        max_epochs=1,
    )
    made.fit()
    return made


class TwoStages(Backbone):
    """Maps, then tokens, then features."""

    def __init__(self, image_shape):
        super().__init__(image_shape)
        self.conv, self.fold, self.last = nn.Conv2d(1, 3, 3), nn.Flatten(2), nn.Linear(36, 5)
        self.num_features = 5

    def forward(self, images):
        return self.last(self.fold(self.conv(images))).mean(dim=1)


# ---------------------------------------------------------------------- adaptors


def test_the_adaptors_are_those_of_their_equations():
    torch.manual_seed(0)
    f = normal(4, 6)
    made = {name: build(6).double() for name, build in ADAPTORS.items()}
    assert made["identity"](f) is f
    assert made["identity"].units(f) is f
    shift = made["scale_shift"]
    assert torch.equal(shift(f), f)
    with torch.no_grad():
        shift.gamma.copy_(normal(6, seed=1))
        shift.beta.copy_(normal(6, seed=2))
    torch.testing.assert_close(shift(f), normal(6, seed=1) * f + normal(6, seed=2))
    assert torch.equal(shift.units(f), shift(f))
    for rank in (4, 16, 64):
        adaptor = made[f"adapter_{rank}"]
        assert torch.equal(adaptor(f), f)
        assert adaptor.down.weight.shape == (rank, 6)
        below = F.linear(f, adaptor.down.weight, adaptor.down.bias)
        torch.testing.assert_close(adaptor.units(f), below)
        nn.init.normal_(adaptor.up.weight)
        nn.init.normal_(adaptor.up.bias)
        expected = f + F.linear(below.clamp(min=0), adaptor.up.weight, adaptor.up.bias)
        torch.testing.assert_close(adaptor(f), expected)
    one, two = made["mlp_1"], made["mlp_2"]
    hidden = F.linear(f, one.layers[0].weight, one.layers[0].bias)
    torch.testing.assert_close(one(f), hidden.clamp(min=0))
    torch.testing.assert_close(one.units(f), hidden)
    hidden = F.linear(f, two.layers[0].weight, two.layers[0].bias)
    further = F.linear(hidden.clamp(min=0), two.layers[1].weight, two.layers[1].bias)
    torch.testing.assert_close(two(f), further.clamp(min=0))
    torch.testing.assert_close(two.units(f), torch.cat([hidden, further], dim=1))


def test_the_search_score_is_the_log_determinant_of_equal_units():
    units = torch.tensor([[1.0, -1.0, 2.0], [0.5, 3.0, 1.0], [-1.0, -2.0, 0.0]])
    kernel = torch.tensor([[3.0, 2.0, 1.0], [2.0, 3.0, 0.0], [1.0, 0.0, 3.0]]).double() + 1e-3 * torch.eye(3).double()
    torch.testing.assert_close(search_score(units), torch.det(kernel).log())
    equal = torch.ones(2, 5)
    # Eigenvalues of a kernel of fives: 10 and 0, which the ridge lifts.
    assert float(search_score(equal)) == pytest.approx(math.log(10 + 1e-3) + math.log(1e-3))


@pytest.mark.parametrize(("cost", "expected"), [(0.0, "mlp_2"), (0.01, "mlp_1"), (10.0, "identity")])
def test_the_search_weighs_the_score_against_the_parameters(cost, expected):
    strategy = SMALL(cost_weight=cost)
    strategy.build((1, 8, 8))
    features = normal(10, 40).abs().float()  # features above 0 all have the same code
    name, adaptor = strategy.search(features)
    scores = {}
    for kind in ADAPTORS:
        only = SMALL(adaptors=[kind], cost_weight=cost)
        only.build((1, 8, 8))
        found, candidate = only.search(features)
        assert found == kind
        parameters = sum(parameter.numel() for parameter in candidate.parameters())
        scores[kind] = float(search_score(candidate.units(features))) - cost * parameters
    assert name == max(scores, key=scores.get) == expected
    assert len(set(scores.values())) > 2
    again = strategy.search(features)[1]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), adaptor.parameters(), strict=True))


def test_each_sample_passes_the_adaptor_of_its_domain():
    torch.manual_seed(0)
    adaptors = DomainAdaptors(4)
    for name in ("mlp_1", "identity", "adapter_16"):
        adaptors.add(name, ADAPTORS[name](4))
    adaptors.note(0)
    adaptors.note(2)
    features, domains = normal(5, 4).float(), torch.tensor([2, 0, 1, 0, 1])
    expected = torch.stack([adaptors.adaptors[d](row[None])[0] for row, d in zip(features, domains, strict=True)])
    torch.testing.assert_close(adaptors(features, domains), expected)
    twin = DomainAdaptors(4)
    twin.load_state_dict(adaptors.state_dict())
    torch.testing.assert_close(twin(features, domains), expected)
    assert twin.domains.tolist() == [0, 2]
    smaller = DomainAdaptors(4)
    smaller.add("mlp_2", ADAPTORS["mlp_2"](4))
    twin.load_state_dict(smaller.state_dict())
    assert twin.kinds.tolist() == smaller.kinds.tolist()
    assert len(twin.adaptors) == 1


# ---------------------------------------------------------------------- the encoder


def test_stages_are_averaged_over_their_positions():
    torch.manual_seed(0)
    encoder = StagedEncoder((1, 8, 8), backbone=TwoStages, stages=["conv", "fold", "last"])
    assert encoder.widths == (3, 36, 5)
    features = encoder(IMAGES)
    pooled = list(encoder.pooled)
    maps = encoder.base.conv(IMAGES)
    tokens = encoder.base.last(maps.flatten(2))
    expected = [maps.mean(dim=(2, 3)), maps.flatten(2).mean(dim=1), tokens.mean(dim=1)]
    torch.testing.assert_close(pooled, expected)
    torch.testing.assert_close(features, tokens.mean(dim=1))
    plain = StagedEncoder((1, 8, 8), backbone=TwoStages)
    features = plain(IMAGES)
    torch.testing.assert_close(plain.pooled, [features])
    assert plain.widths == (5,)


def test_the_stages_of_known_backbones():
    assert stage_names(ResNet18((3, 8, 8))) == ["layer1", "layer2", "layer3", "layer4"]
    assert stage_names(TinyViT((1, 8, 8))) == ["model.blocks.0", "model.blocks.1"]
    assert stage_names(plain_net((1, 8, 8))) == []
    assert StagedEncoder((1, 8, 8), backbone=TinyViT).widths == (24, 24)


def test_a_stage_of_another_shape_is_an_error():
    class Deep(TwoStages):
        def __init__(self, image_shape):
            super().__init__(image_shape)
            self.fold = nn.Unflatten(1, (1, 3))

        def forward(self, images):
            return self.last(self.fold(self.conv(images)).flatten(3).mean(dim=(1, 2)))

    with pytest.raises(
        ValueError, match=r"stages fold: the output of Unflatten is a tensor of shape \(1, 1, 3, 6, 6\)"
    ):
        StagedEncoder((1, 8, 8), backbone=Deep, stages=["fold"])
    with pytest.raises(ValueError, match="stages has 'nothing', which matches none of conv"):
        StagedEncoder((1, 8, 8), backbone=TwoStages, stages=["nothing"])


# ---------------------------------------------------------------------- the method


def test_the_domain_has_the_vector_and_the_threshold_of_its_images():
    made = learnt(partial(SMALL, quantile=0.1))
    space = made.strategy.parts.space
    images = torch.cat([batch.images for batch in made.strategy.passes.batches()])
    codes = space.encode([images.flatten(1)])
    assert torch.equal(space.vectors, codes.long().sum(dim=0, keepdim=True))
    assert space.samples == space.outliers == len(images)
    scores = F.cosine_similarity(codes.double(), space.vectors.double())
    torch.testing.assert_close(space.thresholds, torch.quantile(scores, 0.1)[None])


def test_the_adaptor_is_the_one_with_the_largest_score_on_some_images(monkeypatch):
    searched, plain = [], EAR.search
    monkeypatch.setattr(EAR, "search", lambda *args: searched.append(args[1]) or plain(*args))
    made = learnt(partial(SMALL, probe=20, cost_weight=0.01))
    strategy = made.strategy
    images = torch.cat([batch.images for batch in strategy.passes.batches(samples=20)])
    assert len(images) == 20
    [features] = searched
    assert torch.equal(features, images.flatten(1))
    name, _ = plain(strategy, features)
    assert strategy.parts.adaptors.kinds.tolist() == [list(ADAPTORS).index(name)]


def test_known_images_train_nothing_and_others_are_a_domain_of_their_own():
    made = learnt(SMALL, data=turned(0, 0, 90, 0))
    before = {name: value.clone() for name, value in made.strategy.state_dict().items()}
    counts = ("space.pending", "space.samples", "space.outliers", "space.votes", "task_columns", "adaptors.domains")
    made._run_task(made.stream.tasks[1], None)
    strategy = made.strategy
    for name, value in strategy.state_dict().items():
        assert name.endswith(counts) or torch.equal(value, before[name]), name
    assert strategy.parts.adaptors.domains.tolist() == [0, 0]
    for task in made.stream.tasks[2:]:
        made._run_task(task, None)
    assert strategy.parts.adaptors.domains.tolist() == [0, 0, 1, 0]
    assert strategy.network.head.block_sizes() == [10, 10]


@pytest.mark.parametrize(("share", "domains"), [(0.0, [0, 1]), (0.5, [0, 0])])
def test_a_domain_is_opened_above_a_share_of_outliers(share, domains):
    made = learnt(partial(SMALL, open_share=share), tasks=2, data=turned(0, 0))
    assert made.strategy.parts.adaptors.domains.tolist() == domains
    assert 0 < made.strategy.parts.space.outliers < 0.2 * made.strategy.parts.space.samples


def test_new_classes_are_a_new_domain():
    made = learnt(partial(SMALL, open_share=1.0), tasks=3)
    assert made.strategy.parts.adaptors.domains.tolist() == [0, 1, 2]
    assert made.strategy.network.head.position.tolist() == [
        [0, 1, -1, -1, -1, -1],
        [-1, -1, 2, 3, -1, -1],
        [-1, -1, -1, -1, 4, 5],
    ]


def test_domains_do_not_change_each_other():
    made = learnt(SMALL, data=turned(0, 90, 180))
    before = {name: value.clone() for name, value in made.strategy.network.state_dict().items()}
    known = torch.zeros(7, dtype=torch.int64)
    with torch.no_grad():
        scores = made.strategy.eval().predict(IMAGES, known)
    for task in made.stream.tasks[1:]:
        made._run_task(task, None)
    state = made.strategy.network.state_dict()
    for name, value in before.items():
        if name.startswith(("backbone", "head.blocks", "adaptors.adaptors")):
            assert torch.equal(state[name], value)
    assert torch.equal(state["space.vectors"][:1], before["space.vectors"])
    assert torch.equal(state["space.thresholds"][:1], before["space.thresholds"])
    with torch.no_grad():
        torch.testing.assert_close(made.strategy.eval().predict(IMAGES, known), scores)
    known_accuracy = made.matrix.R_ti
    for task in range(3):
        assert (known_accuracy[task:, task] == known_accuracy[task, task]).all()


def test_the_loss_is_of_the_adaptor_and_the_layer_of_the_new_domain():
    made = learnt(partial(SMALL, adaptors=["adapter_16"]), tasks=2)
    strategy = made.strategy.train()
    strategy.begin_phase(strategy.phases(strategy.task)[1], 0)
    output = strategy.network(IMAGES[:4])
    adapted = strategy.parts.adaptors.adaptors[1](IMAGES[:4].flatten(1))
    torch.testing.assert_close(output.features, adapted)
    logits = F.linear(adapted, *strategy.network.head.blocks[1].parameters())
    torch.testing.assert_close(output.logits[:, 2:], logits)
    labels = torch.tensor([2, 3, 3, -1])
    terms = strategy.losses(batch_of(labels), output)
    torch.testing.assert_close(terms["ce"], F.cross_entropy(logits[:3], labels[:3] - 2))
    trained = {name for name, parameter in strategy.named_parameters() if parameter.requires_grad}
    new = {f"network.adaptors.adaptors.1.{part}.{kind}" for part in ("down", "up") for kind in ("weight", "bias")}
    assert trained == new | {"network.head.blocks.1.weight", "network.head.blocks.1.bias"}


def test_a_prediction_is_that_of_the_domain_with_the_largest_score():
    made = learnt(SMALL, tasks=2)
    strategy = made.strategy.eval()
    parts = strategy.parts
    with torch.no_grad():
        scores = strategy.predict(IMAGES)
        routed = parts.space.scores(parts.space.encode([IMAGES.flatten(1)])).argmax(dim=1)
        assert len(routed.unique()) == 2
        torch.testing.assert_close(scores, strategy.predict(IMAGES, routed))
        expected = torch.full((7, 4), -math.inf)
        for row, domain in enumerate(routed.tolist()):
            adapted = parts.adaptors.adaptors[domain](IMAGES[row].flatten())
            expected[row, 2 * domain : 2 * domain + 2] = parts.layers.blocks[domain](adapted)
        torch.testing.assert_close(scores, expected)
        # A task that is not known yet is inferred.
        torch.testing.assert_close(strategy.predict(IMAGES, torch.full((7,), 2)), scores)


def test_it_learns_domains_and_classes_better_than_a_linear_head_on_the_same_features():
    for data, margin in ((turned(0, 90), 0.1), ({"scenario": ClassIncremental(tasks=5), "batch_size": 64}, 0.2)):
        made = run(SMALL(), data=data, max_epochs=3)
        plain = run(LinearProbe(backbone=PIXELS, optimizer=adam), data=data, max_epochs=3)
        # Measured: .92 against .74 on domains, .82 against .52 on classes.
        assert last_accuracy(made.matrix.R_ci) > last_accuracy(plain.matrix.R_ci) + margin


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dimensions": 0}, "dimensions is 0"),
        ({"quantile": -0.1}, "quantile is -0.1"),
        ({"open_share": 1.1}, "open_share is 1.1"),
        ({"cost_weight": -1}, "cost_weight is -1"),
        ({"probe": 1}, "probe is 1"),
        ({"adaptors": []}, "adaptors is empty; name at least one of identity"),
        ({"adaptors": ["mlp_1", "mlp_9"]}, "adaptors is 'mlp_9'; use 'identity'"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        EAR(**options)
