import copy
from functools import partial

import pytest
import torch
from support.fakes import normal
from support.runs import NormNet

from cl_lightning.models import (
    MLP,
    ConvNet,
    CosineHead,
    ExpandableBackbone,
    LinearHead,
    Network,
    ResNet,
    ResNet18,
    ResNet32,
    align_head,
)

SHAPE = (1, 4, 4)


def grown(count, extractor=NormNet):
    backbone = ExpandableBackbone(SHAPE, extractor=extractor).double()
    for _ in range(count - 1):
        backbone.expand()
    return backbone


def test_one_extractor_is_the_plain_backbone():
    torch.manual_seed(0)
    plain = MLP(SHAPE, hidden=(8,)).double()
    torch.manual_seed(0)
    backbone = grown(1, partial(MLP, hidden=(8,)))
    assert torch.equal(backbone(normal(5, *SHAPE)), plain(normal(5, *SHAPE)))
    assert backbone.num_features == plain.num_features == 8


def test_features_stand_side_by_side_and_a_new_extractor_starts_from_the_last():
    backbone = grown(2).eval()
    with torch.no_grad():
        backbone.extractors[1].layers[1].weight.mul_(2.0)
    backbone.expand()
    first, second, third = (extractor(normal(5, *SHAPE)) for extractor in backbone.extractors)
    features = backbone(normal(5, *SHAPE))
    assert backbone.num_features == features.shape[1] == 48
    assert torch.equal(features, torch.cat([first, second, third], 1))
    assert torch.equal(second, third)
    assert not torch.equal(first, second)
    earlier, newest = backbone.split(features)
    assert torch.equal(earlier, torch.cat([first, second], 1))
    assert torch.equal(newest, third)
    assert not {id(p) for p in backbone.extractors[1].parameters()} & {
        id(p) for p in backbone.extractors[2].parameters()
    }


def test_those_that_are_kept_stay_the_same_objects():
    backbone = grown(3)
    first = backbone.extractors[0]
    backbone.keep(1)
    assert list(backbone.extractors) == [first]
    assert backbone.num_features == 16


def test_ten_resnets_have_the_parameters_of_the_literature():
    backbone = ExpandableBackbone((3, 32, 32), extractor=ResNet32)
    for _ in range(9):
        backbone.expand()
    count = sum(parameter.numel() for parameter in backbone.parameters())
    assert count == 10 * 463_504
    assert 4 * count / 2**20 == pytest.approx(17.7, abs=0.05)  # MB


DIVIDED = {
    "ResNet32": (ResNet32, (3, 32, 32), 112_016, 351_488),
    "ResNet18": (partial(ResNet18, width=4, stem="imagenet"), (3, 32, 32), None, None),
    "MLP": (partial(MLP, hidden=(8, 6), dropout=0.1), (1, 8, 8), 64 * 8 + 8, 8 * 6 + 6),
    "ConvNet": (partial(ConvNet, channels=(3, 4), kernels=(3, 2), hidden=(5,)), (1, 8, 8), 30 + 52, 4 * 5 + 5),
    "ConvNet, pixels": (partial(ConvNet, channels=(3, 4), kernels=(3, 2), hidden=()), (1, 8, 8), 30, 52),
}


@pytest.mark.parametrize("name", DIVIDED)
def test_the_two_parts_of_a_backbone_are_the_backbone(name):
    build, shape, of_stem, of_last = DIVIDED[name]
    backbone, images = build(shape).eval(), normal(2, *shape).float()
    stem, last = backbone.divide()
    assert torch.equal(last(stem(images)), backbone(images))
    counts = [sum(p.numel() for p in module.parameters()) for module in (stem, last)]
    assert sum(counts) == sum(p.numel() for p in backbone.parameters())
    assert {id(p) for module in (stem, last) for p in module.parameters()} == {id(p) for p in backbone.parameters()}
    if of_stem is not None:
        assert counts == [of_stem, of_last]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (NormNet, "NormNet is not divided"),
        (partial(MLP, hidden=(8,)), "MLP: layers with weights: 1; to divide"),
        (partial(ResNet, blocks=(1,), width=4, shortcut="pad"), "ResNet: it has one stage"),
    ],
)
def test_a_backbone_without_a_last_stage_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        ExpandableBackbone((1, 8, 8), extractor=build, share_stem=True)


def test_extractors_on_a_common_stem_share_all_but_their_last_stage():
    build = partial(ResNet18, width=4)
    backbone = ExpandableBackbone((1, 8, 8), extractor=build, share_stem=True).eval()
    images, of_one = normal(2, 1, 8, 8).float(), sum(p.numel() for p in backbone.parameters())
    first = backbone(images)
    backbone.expand()
    with torch.no_grad():
        for parameter in backbone.extractors[1].parameters():
            parameter.mul_(1.1)
    features = backbone(images)
    assert features.shape == (2, 64)
    assert torch.equal(features[:, :32], first)
    assert not torch.equal(features[:, 32:], first)
    of_last = sum(p.numel() for p in build((1, 8, 8)).divide()[1].parameters())
    assert sum(p.numel() for p in backbone.parameters()) == of_one + of_last
    other = ExpandableBackbone((1, 8, 8), extractor=build, share_stem=True).eval()
    other.load_state_dict(backbone.state_dict())
    assert torch.equal(other(images), features)


def test_a_new_extractor_may_start_from_the_first():
    backbone = grown(2)
    with torch.no_grad():
        backbone.extractors[1].layers[1].weight.mul_(2.0)
    backbone.expand(source=0)
    weights = [extractor.layers[1].weight for extractor in backbone.extractors]
    assert torch.equal(weights[2], weights[0])
    assert not torch.equal(weights[2], weights[1])
    assert backbone.earlier == list(backbone.extractors[:2])


@pytest.mark.parametrize(("saved", "there"), [(3, 1), (1, 3), (2, 2)])
def test_a_network_takes_its_shape_from_the_state_that_it_loads(saved, there):
    def network(count):
        backbone = grown(count)
        head = LinearHead(backbone.num_features)
        head.grow(4)
        if count > 1:
            head.grow(2)
        return Network(backbone, head).float().eval()

    source, target = network(saved), network(there)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1)
    stood = torch.get_rng_state()
    target.load_state_dict(source.state_dict())
    assert torch.equal(torch.get_rng_state(), stood)  # what is made to be overwritten draws nothing that counts
    assert target.backbone.num_features == target.head.num_features == 16 * saved
    images = normal(3, *SHAPE).float()
    assert torch.equal(target(images).logits, source(images).logits)


@pytest.mark.parametrize("bias", [True, False])
def test_logits_of_a_wider_head_are_the_old_ones_and_what_new_features_add(bias):
    head = LinearHead(3, bias=bias).double()
    head.grow(2)
    head.grow(4)
    head.double()
    old, before = normal(5, 3), copy.deepcopy(head)
    head.resize(5)
    new = normal(5, 2, seed=1)
    weight = head.weight()
    assert weight.shape == (6, 5)
    assert head.block_sizes() == [2, 4]
    assert weight[:, 3:].abs().min() > 0
    found = head(torch.cat([old, new], 1))
    torch.testing.assert_close(found, before(old) + new @ weight[:, 3:].T)
    torch.testing.assert_close(head(torch.cat([old, torch.zeros_like(new)], 1)), before(old))
    head.resize(3)
    assert torch.equal(head.weight(), before.weight())
    assert torch.equal(head(old), before(old))


def test_rows_of_a_wider_head_are_aligned_over_all_features():
    head = LinearHead(3).double()
    head.grow(4)
    head.resize(6)
    head.grow(2)
    head.double()
    old = head.weight()[:4].clone()
    align_head(head)
    norms = head.weight().norm(dim=1)
    assert torch.equal(head.weight()[:4], old)
    torch.testing.assert_close(norms[4:].mean(), norms[:4].mean())


def test_a_head_of_another_kind_and_width_is_still_refused():
    wide = CosineHead(6)
    wide.grow(2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        CosineHead(3).load_state_dict(wide.state_dict())
