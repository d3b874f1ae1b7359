import pytest
import torch
from support.fakes import normal
from torch import nn

from cl_lightning.models import (
    MLP,
    ConvNet,
    GatedBackbone,
    LinearHead,
    Network,
    ResNet20,
    clamp_embeddings,
    compensate_scale,
    newly_used,
    risen_scale,
)


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


def test_the_compensated_gradient_is_as_if_the_scale_were_the_largest():
    """``s_max sigmoid(e) (1 - sigmoid(e))`` while |s e| is at most 50, and less beyond."""
    values = torch.linspace(-5, 5, 11, dtype=torch.float64)
    for scale in (0.0025, 1.0, 3.0):
        e = nn.Parameter(values.clone())
        torch.sigmoid(scale * e).sum().backward()
        compensate_scale([e, nn.Parameter(values)], scale, 400.0)  # the second one has no gradient
        torch.testing.assert_close(e.grad, 400 * torch.sigmoid(values) * (1 - torch.sigmoid(values)))
    e = nn.Parameter(torch.tensor([4.0, -4.0], dtype=torch.float64))
    e.grad = torch.ones_like(e)
    compensate_scale([e], 20.0, 400.0)
    torch.testing.assert_close(e.grad, (20 * (torch.tensor(50.0).double().cosh() + 1) / (e.cosh() + 1)).detach())


def test_the_scale_rises_linearly_from_its_inverse():
    assert [risen_scale(done, 4.0) for done in (0.0, 0.5, 1.0)] == [0.25, 2.125, 4.0]


def test_the_share_of_free_units_that_masks_use():
    masks = [torch.tensor([0.5, 1.0]), torch.tensor([0.25, 0.75, 0.0])]
    past = [torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.0, 0.0])]
    assert newly_used(masks, past) == (0.5 + 0.125 + 0.75) / 3.5
    assert newly_used(masks, [torch.ones(2), torch.ones(3)]) == 0


def test_embeddings_are_clamped_at_six():
    e = nn.Parameter(torch.tensor([-7.0, -6.0, 3.0, 60.0]))
    clamp_embeddings([e])
    assert e.tolist() == [-6, -6, 3, 6]
