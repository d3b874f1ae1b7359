import pytest
import torch
from torch import nn

from cl_lightning.models import ConvNet, InstanceNormConvNet


def test_it_is_the_alexnet_of_hat_and_gpm():
    net = ConvNet((3, 32, 32))
    shapes = [tuple(p.shape) for name, p in net.named_parameters() if name.endswith("weight")]
    assert shapes == [(64, 3, 4, 4), (128, 64, 3, 3), (256, 128, 2, 2), (2048, 1024), (2048, 2048)]
    assert [layer.p for layer in net.layers if isinstance(layer, nn.Dropout)] == [0.2, 0.2, 0.5, 0.5, 0.5]
    kinds = [type(layer).__name__ for layer in net.layers[:4]]
    assert kinds == ["Conv2d", "ReLU", "Dropout", "MaxPool2d"]
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, net.num_features) == (2, 2048)


def test_images_of_any_size_that_is_large_enough():
    net = ConvNet((1, 9, 8), channels=[3, 5], kernels=[2, 2], hidden=[])
    assert net(torch.zeros(2, 1, 9, 8)).shape == (2, net.num_features) == (2, 5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"channels": [4, 4], "kernels": [3, 3]}, "images of 5 x 8 pixels are too small for kernels"),
        ({"channels": [4], "kernels": [3, 3]}, "1 channels and 2 kernels; give as many of both"),
        ({"channels": [], "kernels": []}, "0 channels and 0 kernels"),
        ({"channels": [0], "kernels": [3]}, "channels is 0; it must be at least 1"),
        ({"channels": [4], "kernels": [3], "dropout": 1.0}, "dropout 1.0; both must be in"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ValueError, match=f"ConvNet: .*{said}"):
        ConvNet((1, 5, 8), **options)


def test_the_network_of_condensation_normalises_each_channel_of_an_image():
    net = InstanceNormConvNet((3, 32, 32))
    shapes = [tuple(p.shape) for p in net.parameters() if p.dim() > 1]
    assert shapes == [(128, 3, 3, 3), (128, 128, 3, 3), (128, 128, 3, 3)]
    assert [type(layer).__name__ for layer in net.layers[:4]] == ["Conv2d", "GroupNorm", "ReLU", "AvgPool2d"]
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, net.num_features) == (2, 128 * 4 * 4)
    net = InstanceNormConvNet((1, 9, 6), width=5, depth=2).double()
    images = torch.randn(3, 1, 9, 6, dtype=torch.float64)
    assert net(images).shape == (3, net.num_features) == (3, 5 * 2 * 1)
    maps = net.layers[:2](images)  # scale 1 and shift 0 at first
    torch.testing.assert_close(maps.mean((2, 3)), torch.zeros(3, 5, dtype=torch.float64))
    torch.testing.assert_close(maps.var((2, 3), correction=0), torch.ones(3, 5, dtype=torch.float64), rtol=1e-3, atol=0)
    front, last = net.divide()
    torch.testing.assert_close(last(front(images)), net(images))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"depth": 3}, "images of 5 x 8 pixels are too small for depth 3"),
        ({"depth": 0}, "depth is 0; it must be at least 1"),
        ({"width": 0}, "width is 0; it must be at least 1"),
    ],
)
def test_options_of_the_network_of_condensation_out_of_range_are_refused(options, said):
    with pytest.raises(ValueError, match=f"InstanceNormConvNet: {said}"):
        InstanceNormConvNet((1, 5, 8), **options)
