"""What each set of few parameters adds to a model, by formula."""

import copy
from functools import partial

import pytest
import timm
import torch
from support.peft import disturbed, model
from torch import nn
from torch.nn import functional as F

from cl_lightning.models import (
    VPT,
    Adapter,
    FiLM,
    LoRA,
    ParallelAdapters,
    Prefix,
    PrefixSite,
    SlimResNet18,
    TwoRanks,
)


@pytest.fixture
def images():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ---------------------------------------------------------------------- formulas


def test_an_adapter_adds_what_the_residual_stream_gives_before_the_norm(images):
    net = model()
    block, x = net.blocks[0], torch.randn(2, 5, 24, dtype=torch.float64)
    plain = block(x)
    middle = x + block.attn(block.norm1(x))
    peft = disturbed(partial(Adapter, bottleneck=7, dropout=0.5), net)
    site = peft.sites[0]
    inner = F.relu(F.linear(middle, site.down.weight, site.down.bias))
    torch.testing.assert_close(block(x), plain + 0.1 * F.linear(inner, site.up.weight, site.up.bias))


@pytest.mark.parametrize("fused", [True, False])
def test_a_prefix_is_more_keys_and_values(fused):
    net = model()
    attention = net.blocks[1].attn
    attention.fused_attn = fused
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    site = disturbed(partial(Prefix, length=4), net).sites[1]
    k = torch.cat([site.keys.expand(2, -1, -1), k], dim=1)
    v = torch.cat([site.values.expand(2, -1, -1), v], dim=1)
    q, k, v = (part.unflatten(2, (3, 8)).transpose(1, 2) for part in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), attention.proj(mixed))


def test_low_rank_changes_that_are_folded_begin_again_from_the_same_output(images):
    net = model()
    peft = disturbed(partial(LoRA, rank=2, parts="kv", scale=0.5), net)
    before, weight = net(images), net.blocks[0].attn.qkv.weight.clone()
    peft.fold()
    torch.testing.assert_close(net(images), before)
    assert not torch.equal(net.blocks[0].attn.qkv.weight, weight)
    assert not any(site.up.any() for site in peft.sites)
    peft.remove()
    torch.testing.assert_close(net(images), before)


def test_a_prefix_may_have_another_length_in_each_block(images):
    net = model()
    peft = disturbed(partial(Prefix, length=[4, 1], blocks=[1, 0]), net)
    assert [len(site.keys) for site in peft.sites] == [4, 1]
    together = net(images)
    peft.remove()
    for site, block in zip(peft.sites, (net.blocks[1], net.blocks[0]), strict=True):
        place = PrefixSite(block.attn)
        place.keys, place.values = site.keys, site.values
    torch.testing.assert_close(net(images), together)


@pytest.mark.parametrize("compensate", [False, True])
def test_scales_of_a_prefix_multiply_its_keys_and_its_values(images, compensate):
    net = model()
    torch.manual_seed(0)
    peft = Prefix(net, low=0.0, high=0.01, compensate=compensate, learn_scale=True).double()
    rows = torch.cat([getattr(site, name) for site in peft.sites for name in ("keys", "values")])
    assert 0 <= rows.min() < 0.001
    assert 0.009 < rows.max() <= 0.01
    with torch.no_grad():
        initial = net(images)
        for site in peft.sites:
            assert site.scales.tolist() == [1.0, 1.0]
            site.scales.copy_(torch.tensor([50.0, -200.0]))
        scaled = net(images)
        peft.remove()
        plain = Prefix(net, compensate=compensate).double()
        for site, origin in zip(plain.sites, peft.sites, strict=True):
            site.keys.copy_(50 * origin.keys)
            site.values.copy_(-200 * origin.values)
        torch.testing.assert_close(scaled, net(images))
    assert (scaled - initial).abs().max() > 0.01


def test_lora_of_keys_and_values_has_a_scale_for_each():
    net = model()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    layer = net.blocks[0].attn.qkv
    q, k, v = layer(x).chunk(3, dim=-1)
    peft = disturbed(partial(LoRA, parts="kv", learn_scale=True), net)
    site = peft.sites[0]
    with torch.no_grad():
        site.factor.copy_(torch.tensor([3.0, -0.5]))
    k = k + 3.0 * x @ site.down[0].T @ site.up[0].T
    v = v - 0.5 * x @ site.down[1].T @ site.up[1].T
    torch.testing.assert_close(layer(x), torch.cat([q, k, v], dim=-1))
    state = peft.state_dict()
    state["sites.0.factor"] = torch.tensor(0.25, dtype=torch.float64)  # of a checkpoint with one scale
    peft.load_state_dict(state)
    assert site.factor.tolist() == [0.25, 0.25]


def test_low_rank_changes_are_matrices_of_the_layers_and_may_be_weighed():
    net = model()
    x, layer = torch.randn(2, 5, 24, dtype=torch.float64), net.blocks[0].attn.qkv
    before = layer(x)
    peft = disturbed(partial(LoRA, rank=2, parts="qv", scale=0.5), net)
    (owner, change), *others = peft.changes()
    assert owner is layer
    assert len(others) == 1
    site = peft.sites[0]
    zeros = torch.zeros(24, 24, dtype=torch.float64)
    expected = torch.cat([0.5 * site.up[0] @ site.down[0], zeros, 0.5 * site.up[1] @ site.down[1]])
    torch.testing.assert_close(change, expected)
    torch.testing.assert_close(layer(x), before + x @ change.T)
    peft.weigh(0.25)
    torch.testing.assert_close(layer(x), before + 0.25 * x @ change.T)
    torch.testing.assert_close(peft.changes()[0][1], change)


@pytest.mark.parametrize("fused", [True, False])
def test_a_compensated_prefix_has_a_full_share_of_attention_in_addition_to_the_image(fused):
    net = model()
    attention = net.blocks[1].attn
    attention.fused_attn = fused
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    q, k, v = (part.unflatten(2, (3, 8)).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1))
    site = disturbed(partial(Prefix, length=4, compensate=True), net).sites[1]
    own_k, own_v = (rows.unflatten(1, (3, 8)).transpose(0, 1) for rows in (site.keys, site.values))
    scores = q @ torch.cat([own_k.expand(2, -1, -1, -1), k], dim=2).transpose(2, 3) * 8**-0.5
    shares = scores.softmax(dim=3)
    mass = shares[..., :4].sum(3, keepdim=True)  # lambda
    shares = torch.cat([shares[..., :4] / mass, shares[..., 4:]], dim=3)
    torch.testing.assert_close(shares.sum(3, keepdim=True), 1 - mass + 1)
    mixed = (shares @ torch.cat([own_v.expand(2, -1, -1, -1), v], dim=2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), F.linear(mixed, attention.proj.weight, attention.proj.bias))


def test_prompts_are_tokens_of_the_sequence():
    net = model()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    first, second = net.blocks

    def with_tokens(block, sequence, tokens):
        return block(torch.cat([sequence, tokens.expand(2, -1, -1)], dim=1))

    tokens = torch.randn(2, 3, 24, dtype=torch.float64)
    shallow = second(with_tokens(first, x, tokens[0]))[:, :5]
    deep = with_tokens(second, with_tokens(first, x, tokens[0])[:, :5], tokens[1])[:, :5]
    first_on = partial(VPT, blocks=[0], through=True)
    for make, expected in ((partial(VPT, deep=False), shallow), (VPT, deep), (first_on, shallow)):
        peft = make(net, length=3).double()
        with torch.no_grad():
            for site, values in zip(peft.sites, tokens, strict=False):
                site.tokens.copy_(values)
        torch.testing.assert_close(net.blocks(x), expected)
        peft.remove()


def test_film_comes_between_normalisation_and_activation():
    net = timm.create_model("mobilenetv2_100", num_classes=0).double().eval()
    maps = torch.randn(2, 32, 4, 4, dtype=torch.float64)
    peft = disturbed(partial(FiLM, targets=["bn1"]), net)
    (site,) = peft.sites
    norm = net.bn1
    plain = F.batch_norm(maps, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    shape = (1, -1, 1, 1)
    torch.testing.assert_close(norm(maps), F.relu6(plain * site.gamma.view(shape) + site.beta.view(shape)))


def test_a_frozen_normalisation_is_not_moved_by_training_film():
    net = timm.create_model("mobilenetv2_100", num_classes=0).eval().requires_grad_(False)
    state = copy.deepcopy(net.state_dict())
    peft = FiLM(net).train()
    optimizer = torch.optim.SGD(peft.parameters(), lr=0.1)
    net(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_folded_parallel_adapters_are_in_the_weights_and_start_again_from_zero(images):
    net = SlimResNet18((3, 8, 8), width=2).double().eval()
    plain = copy.deepcopy(net)
    peft = disturbed(ParallelAdapters, net)
    before = net(images)
    assert (before - plain(images)).abs().max() > 0.1
    peft.fold()
    torch.testing.assert_close(net(images), before, rtol=1e-12, atol=1e-12)
    assert not any(value.any() for value in peft.parameters())
    kernel = net.layer2[0].conv1.weight - plain.layer2[0].conv1.weight  # of stride 2
    assert kernel[:, :, 1, 1].abs().min() > 0
    kernel[:, :, 1, 1] = 0
    assert not kernel.any()
    assert torch.equal(net.layer2[0].downsample[0].weight, plain.layer2[0].downsample[0].weight)  # of size 1


@pytest.mark.parametrize(
    "host",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 6, (3, 1), padding=(1, 0)),
        nn.Conv2d(4, 6, 5, padding=4, dilation=2, bias=False),
        nn.Linear(4, 6),
    ],
)
def test_a_parallel_adapter_is_added_to_the_output_of_its_layer(host):
    host = copy.deepcopy(host).double()
    inputs = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if isinstance(host, nn.Linear):
        inputs = inputs[:, :, 0, 0]
    before = host(inputs)
    peft = disturbed(ParallelAdapters, host)
    [site] = peft.sites
    pixels = inputs[:, :, :: host.stride[0], :: host.stride[1]] if inputs.ndim == 4 else inputs
    groups = getattr(host, "groups", 1)
    blocks = zip(pixels.chunk(groups, 1), site.weight.chunk(groups), strict=True)
    change = torch.cat([torch.einsum("bi...,oi->bo...", part, weight) for part, weight in blocks], 1)
    if host.bias is not None:
        change = change + site.bias.view(-1, *[1] * (inputs.ndim - 2))
    after = host(inputs)
    torch.testing.assert_close(after, before + change)
    peft.merge()
    torch.testing.assert_close(host(inputs), after)


def test_layers_whose_windows_have_no_centre_get_no_parallel_adapter():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 4, padding=2), nn.Conv2d(3, 3, 3, 1, 1))
    assert [site.host[0] for site in ParallelAdapters(net).sites] == [net[3]]
    with pytest.raises(ValueError, match="give other targets"):
        ParallelAdapters(net[:3])


@pytest.mark.parametrize(
    "host",
    [
        nn.Linear(4, 6),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(4, 6, (1, 5), padding="same", dilation=2),
    ],
)
def test_adapters_of_two_ranks_add_their_products_with_a_share_for_each(host):
    host = copy.deepcopy(host).double()
    inputs = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = inputs[:, :, 0, 0] if isinstance(host, nn.Linear) else inputs
    peft, bias = disturbed(partial(TwoRanks, low_rank=2, high_rank=5, targets=None), host), host.bias
    peft.set_scales(torch.tensor([0.3, 1.7], dtype=torch.float64))
    [site] = peft.sites
    change = torch.zeros_like(host.weight)
    for share, down, up in ((0.3, site.down[0], site.up[0]), (1.7, site.down[1], site.up[1])):
        assert down.shape == (up.shape[1], *host.weight.shape[1:])
        for row, column in zip(down, up.T, strict=True):
            change = change + share * column.view(-1, *[1] * row.ndim) * row
    other = copy.deepcopy(host)
    other._forward_hooks.clear()
    with torch.no_grad():
        other.weight += change
    after = host(inputs)
    torch.testing.assert_close(after, other(inputs))
    assert host.bias is bias
    peft.merge()
    torch.testing.assert_close(host.weight, other.weight)
    assert not any(value.any() for value in site.up)


def test_adapters_of_two_ranks_begin_with_small_products():
    torch.manual_seed(0)
    [site] = TwoRanks(nn.Linear(4000, 3), low_rank=2, high_rank=10, targets=None).sites
    assert float(site.down[0].detach().std()) == pytest.approx(1 / 4, rel=0.05)
    assert float(site.down[1].detach().std()) == pytest.approx(1 / 100, rel=0.05)
    assert not any(value.any() for value in site.up)
    with pytest.raises(ValueError, match="a convolution has 2 groups and pads by zeros"):
        TwoRanks(nn.Conv2d(4, 4, 3, groups=2), targets=None)
    with pytest.raises(ValueError, match="TwoRanks: high_rank is 0"):
        TwoRanks(nn.Linear(4, 4), high_rank=0, targets=None)
