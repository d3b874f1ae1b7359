import copy
from functools import partial

import pytest
import torch
from support.fakes import normal
from support.runs import NormNet

from cl_lightning.models import MLP, CosineHead, ExpandableBackbone, LinearHead, Network, ResNet32, align_head

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
