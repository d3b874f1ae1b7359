import pytest
import torch
from support.fakes import normal
from torch import nn

from cl_lightning.models import MLP, ConvNet1d, ResNet20, TableResNet, example


def randomised(network: nn.Module) -> nn.Module:
    """The network in eval mode, in double precision, with batch norms that are not the identity."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return network.double().eval()


def norm(module: nn.BatchNorm1d, x: torch.Tensor) -> torch.Tensor:
    shape = (-1, *[1] * (x.dim() - 2))
    mean, var, weight, bias = (
        part.view(shape) for part in (module.running_mean, module.running_var, module.weight, module.bias)
    )
    return (x - mean) / (var + module.eps).sqrt() * weight + bias


def test_a_table_resnet_is_its_equation():
    network = randomised(TableResNet((5,), width=4, blocks=2, expansion=3, dropout=0.5))
    x = normal(7, 5)
    hidden = x @ network.first.weight.T + network.first.bias
    for block in network.blocks:
        first, second = block[1], block[4]
        assert first.weight.shape == (12, 4)
        inner = (norm(block[0], hidden) @ first.weight.T + first.bias).clamp(min=0)
        hidden = hidden + inner @ second.weight.T + second.bias
    torch.testing.assert_close(network(x), norm(network.norm, hidden).clamp(min=0))
    assert network.num_features == 4


def test_a_convolution_over_time_is_its_plain_loop():
    network = randomised(ConvNet1d((2, 8), channels=(3, 4), kernel=3))
    x = normal(5, 2, 8)

    def convolved(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        padded = torch.cat([torch.zeros_like(x[..., :1]), x, torch.zeros_like(x[..., :1])], dim=2)
        windows = torch.stack([padded[..., t : t + 3] for t in range(x.shape[2])], dim=2)  # (B, C, T, 3)
        return torch.einsum("bctk,ock->bot", windows, weight)

    layers = network.layers
    hidden = norm(layers[1], convolved(x, layers[0].weight)).clamp(min=0)
    hidden = hidden.view(5, 3, 4, 2).amax(3)
    hidden = norm(layers[5], convolved(hidden, layers[4].weight)).clamp(min=0)
    torch.testing.assert_close(network(x), hidden.mean(2))


def test_tokens_are_embedded_first():
    network = randomised(ConvNet1d((8,), channels=(3, 4), kernel=3, vocabulary=6))
    tokens = torch.randint(6, (5, 8), generator=torch.Generator().manual_seed(0))
    embedded = network.embedding.weight[tokens].transpose(1, 2)
    torch.testing.assert_close(network(tokens), network.layers(embedded).mean(2))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((8,), {}, r"vocabulary is None, samples have shape \(8,\); give vocabulary for tokens"),
        ((2, 8), {"vocabulary": 4}, r"vocabulary is 4, samples have shape \(2, 8\)"),
        ((2, 8), {"kernel": 4}, "an odd kernel"),
        ((2, 8), {"channels": ()}, "give at least one number of channels"),
        ((2, 3), {}, "sequences of length 3 are too short to be halved 2 times; give fewer channels"),
        ((1, 8, 8), {}, r"ConvNet1d: image_shape \(1, 8, 8\); it takes samples \(features,\) or \(channels, length\)"),
    ],
)
def test_sequences_that_do_not_fit_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        ConvNet1d(shape, **options)


def test_a_backbone_says_which_samples_it_takes():
    with pytest.raises(ValueError, match=r"TableResNet: image_shape \(2, 8\); it takes samples \(features,\), each"):
        TableResNet((2, 8))
    with pytest.raises(ValueError, match=r"ResNet20: image_shape \(8,\); it takes samples \(channels, height, width\)"):
        ResNet20((8,))
    with pytest.raises(ValueError, match="image_shape"):
        MLP(())
    for shape in ((6,), (2, 3), (1, 2, 3)):
        assert MLP(shape, hidden=(5,))(torch.zeros(4, *shape)).shape == (4, 5)


def test_trial_inputs_suit_the_backbone():
    zeros = example(MLP((6,)), 3, (6,))
    assert zeros.dtype == torch.float32
    assert not zeros.any()
    numbers = [example(MLP((6,)), 3, (6,), torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*numbers)
    assert numbers[0].std() > 0.5
    wrapped = nn.Sequential(ConvNet1d((8,), vocabulary=2))
    tokens = example(wrapped, 3, (8,), torch.Generator().manual_seed(0))
    assert tokens.dtype == torch.int64
    assert set(tokens.flatten().tolist()) == {0, 1}
