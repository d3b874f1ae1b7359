"""Networks for classes of pixels, and their heads."""

import pytest
import torch
from torch import nn

from cl_lightning.models import ConvPixels, PixelHead, TorchvisionPixels


@pytest.mark.parametrize(("channels", "side"), [((4,), 8), ((4, 6), 8), ((4, 6, 8), 4)])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_features_are_a_map_of_half_the_size(channels, norm, side):
    net = ConvPixels((3, 16, 16), channels=channels, norm=norm)
    images = torch.randn(2, 3, 16, 16)
    assert net(images).shape == (2, 4, 8, 8)
    assert net.num_features == 4
    net.eval()
    assert torch.allclose(net(images)[:1], net(images[:1]), atol=1e-5)
    norms = {type(layer) for layer in net.modules() if isinstance(layer, nn.BatchNorm2d | nn.GroupNorm)}
    assert norms == {nn.BatchNorm2d if norm == "batch" else nn.GroupNorm}


def test_sizes_that_are_no_powers_of_two_fit():
    assert ConvPixels((1, 13, 18), channels=(2, 3, 4))(torch.randn(1, 1, 13, 18)).shape == (1, 2, 7, 9)


def test_each_place_is_classified_by_the_same_rows():
    head = PixelHead(5)
    assert head(torch.zeros(2, 5, 3, 4)).shape == (2, 0, 3, 4)
    head.grow(2)
    head.grow(3)
    features = torch.randn(2, 5, 3, 4)
    logits = head(features)
    assert logits.shape == (2, 5, 3, 4)
    bias = torch.cat([block.bias for block in head.blocks])
    assert torch.allclose(logits[1, :, 2, 3], head.weight() @ features[1, :, 2, 3] + bias, atol=1e-6)
    other = PixelHead(5)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(features), logits)


def test_networks_of_torchvision_give_the_map_before_their_last_layer():
    net = TorchvisionPixels((3, 32, 32), model="deeplabv3_mobilenet_v3_large").eval()
    with torch.no_grad():
        features = net(torch.randn(1, 3, 32, 32))
    assert features.shape[:2] == (1, net.num_features)
    assert features.dim() == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvPixels((3, 4, 4)), "too small for 3"),
        (lambda: ConvPixels((3, 16, 16), channels=()), "channels is empty"),
        (lambda: ConvPixels((3, 16, 16), channels=(0,)), "channels"),
        (lambda: ConvPixels((3, 16, 16), norm="layer"), "norm"),
        (lambda: ConvPixels((16,)), "takes samples"),
        (lambda: TorchvisionPixels((3, 32, 32), model="unet"), "deeplabv3_resnet50"),
        (lambda: TorchvisionPixels((1, 32, 32)), "1 channels; the networks take 3"),
    ],
)
def test_wrong_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
