from functools import partial

import pytest
import torch
from torch.nn import functional as F

from cl_lightning.models import MLP, RandomLayer


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid"])
def test_it_is_an_affine_map_of_the_features_and_an_activation(activation):
    layer = RandomLayer((1, 4, 4), units=30, activation=activation, backbone=partial(MLP, hidden=(5,)))
    images = torch.randn(3, 1, 4, 4)
    features = F.relu(F.linear(images.flatten(1), layer.backbone.layers[1].weight, layer.backbone.layers[1].bias))
    inner = features @ layer.layer.weight.T + layer.layer.bias
    expected = {"relu": inner.clamp(min=0), "tanh": inner.tanh(), "sigmoid": 1 / (1 + (-inner).exp())}[activation]
    torch.testing.assert_close(layer(images), expected)
    assert layer.num_features == 30


def test_by_default_it_is_on_the_pixels_with_the_initial_weights_of_a_linear_layer():
    torch.manual_seed(0)
    layer = RandomLayer((1, 8, 8))
    assert layer.layer.weight.shape == (5000, 64)
    bound = 1 / 8  # 1 / sqrt(64), for weights and biases
    for values in (layer.layer.weight, layer.layer.bias):
        assert 0.99 * bound < float(values.abs().max()) <= bound
        assert float(values.var()) == pytest.approx(bound**2 / 3, rel=0.05)


def test_mixed_precision_does_not_round_it():
    layer, images = RandomLayer((1, 8, 8), units=50), torch.randn(4, 1, 8, 8)
    expected = layer(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(images), expected)


@pytest.mark.parametrize("options", [{"units": 0}, {"activation": "gelu"}])
def test_options_out_of_range_are_errors(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"RandomLayer: {name} is '?{value}'?; "):
        RandomLayer((1, 2, 2), **options)
