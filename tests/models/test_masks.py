import pytest
import torch
from support.fakes import normal
from torch import nn

from cl_lightning.models import MLP, ConvNet, GatedBackbone, LinearHead, Network, ResNet20


def gated(tasks=2):
    torch.manual_seed(0)
    chain = ConvNet((2, 7, 7), channels=[3], kernels=[2], hidden=[4], conv_dropout=0.0, dropout=0.0)
    backbone = GatedBackbone(chain)
    for _ in range(tasks):
        backbone.add_task()
    return backbone.double().eval()


def test_units_are_multiplied_by_the_masks_after_the_activation():
    backbone, images = gated(), normal(5, 2, 7, 7)
    backbone.task, backbone.scale = 1, 2.5
    conv, linear = backbone.layers[0], backbone.layers[5]
    first, second = ((1 / (1 + (-2.5 * e).exp())) for e in backbone.embeddings_of(1))
    maps = nn.functional.max_pool2d(conv(images).relu(), 2) * first[:, None, None]
    expected = linear(maps.flatten(1)).relu() * second
    torch.testing.assert_close(backbone(images), expected)
    backbone.task = 0
    assert not torch.allclose(backbone(images), expected)


def test_gradients_between_units_of_earlier_tasks_are_stopped():
    backbone = gated()
    past = [torch.tensor([1.0, 0.25, 0.0]), torch.tensor([0.5, 1.0, 0.0, 0.75])]
    (conv, conv_bias), (linear, linear_bias) = backbone.factors(past)
    assert conv.shape == (3, 1, 1, 1)
    assert conv.flatten().tolist() == conv_bias.tolist() == [0, 0.75, 1]
    assert linear_bias.tolist() == [0.5, 0, 1, 0.25]
    assert linear.shape == backbone.layers[5].weight.shape == (4, 27)  # 3 channels of 3 x 3 pixels
    for i, a in enumerate(past[1]):
        for j in range(27):
            assert linear[i, j] == 1 - min(a, past[0][j // 9])


def test_the_kernels_of_a_second_convolution_are_stopped_by_both_ends():
    backbone = GatedBackbone(ConvNet((1, 9, 9), channels=[2, 3], kernels=[2, 2], hidden=[]))
    past = [torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.25, 0.0])]
    _, (factor, _) = backbone.factors(past)
    assert factor.shape == (3, 2, 1, 1)
    assert factor[:, :, 0, 0].tolist() == [[0.5, 0.0], [0.75, 0.75], [1.0, 1.0]]


def test_full_masks_stop_everything_and_empty_masks_nothing():
    backbone = gated()
    for value, expected in ((1.0, 0.0), (0.0, 1.0)):
        for weight, bias in backbone.factors([torch.full((size,), value) for size in backbone.sizes]):
            assert weight.eq(expected).all()
            assert bias.eq(expected).all()


def test_a_state_with_other_tasks_is_restored():
    network = Network(gated(3), LinearHead(4))
    other = Network(gated(1), LinearHead(4))
    for small, large in ((other, network), (network, Network(gated(1), LinearHead(4)))):
        state = large.state_dict()
        small.backbone.restore_network(small, state, "backbone.")
        small.load_state_dict(state)
        assert small.state_dict().keys() == state.keys()


def test_what_is_no_chain_is_refused():
    with pytest.raises(ValueError, match="GatedBackbone: ResNet20 is no chain of layers; use MLP or ConvNet"):
        GatedBackbone(ResNet20((3, 32, 32)))
    chain = MLP((1, 4, 4), hidden=(3,))
    chain.layers.append(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="MLP has BatchNorm1d, which does not commute with masks"):
        GatedBackbone(chain)
