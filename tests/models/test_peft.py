import copy
from functools import partial

import pytest
import torch
from support.peft import ALL, MERGED, SILENT, disturbed, model
from support.pretrained import tiny_vit
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from cl_lightning.models import (
    MLP,
    SSF,
    VPT,
    AdaptedBackbone,
    Adapter,
    FiLM,
    LoRA,
    PeftPair,
    Prefix,
    Timm,
    WholeModel,
)


@pytest.fixture
def images():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", SILENT)
def test_inserted_it_changes_nothing(name, images):
    net = model()
    before = net(images)
    peft = ALL[name](net).double().eval()
    assert torch.equal(net(images), before)
    assert sum(parameter.numel() for parameter in peft.parameters()) > 0


@pytest.mark.parametrize("name", ALL)
def test_it_changes_the_model_while_it_is_in_and_on_and_removal_restores_it_to_the_bit(name, images):
    net = model()
    state, before = copy.deepcopy(net.state_dict()), net(images)
    peft = disturbed(ALL[name], net)
    changed = net(images)
    assert not torch.allclose(changed, before)
    assert changed.shape == before.shape
    with peft.disabled():
        assert torch.equal(net(images), before)
    assert torch.equal(net(images), changed)
    assert net.state_dict().keys() == state.keys()
    peft.remove()
    assert torch.equal(net(images), before)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    assert sum(hooks) == 0


@pytest.mark.parametrize("name", sorted(MERGED))
def test_merged_it_is_what_it_was_unmerged(name, images):
    net = model()
    peft = disturbed(ALL[name], net)
    expected = net(images)
    peft.merge()
    torch.testing.assert_close(net(images), expected)
    assert not any(len(m._forward_hooks) for m in net.modules())


@pytest.mark.parametrize("name", sorted(set(ALL) - MERGED))
def test_what_is_not_linear_cannot_be_merged(name):
    with pytest.raises(ValueError, match="cannot be merged"):
        ALL[name](model()).merge()


def test_a_scale_is_merged_into_layers_without_a_shift_and_into_convolutions():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2, bias=False)
    )
    net = net.double().eval()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    peft = disturbed(SSF, net)
    expected = net(images)
    peft.merge()
    torch.testing.assert_close(net(images), expected)
    bare = nn.Sequential(nn.LayerNorm(4, elementwise_affine=False))
    with pytest.raises(ValueError, match="LayerNorm has no weights"):
        FiLM(bare).merge()


@pytest.mark.parametrize("name", ALL)
def test_its_state_is_its_own_and_makes_another_model_the_same(name, images):
    first, second = model(), model()
    peft, other = disturbed(ALL[name], first), disturbed(ALL[name], second, seed=1)
    assert not torch.allclose(first(images), second(images))
    state = peft.state_dict()
    assert all(key.startswith("sites.") for key in state)
    assert {name for name, _ in peft.named_parameters()} <= state.keys()
    other.load_state_dict(state)
    assert torch.equal(first(images), second(images))


@pytest.mark.parametrize("name", ALL)
def test_two_sets_take_turns_and_each_comes_back_to_the_bit(name, images):
    net = model()
    one, two = (disturbed(ALL[name], net, seed=seed) for seed in (1, 2))
    with two.disabled():
        alone = net(images)
    with one.disabled():
        other = net(images)
    with two.disabled():
        assert torch.equal(net(images), alone)
    assert not torch.allclose(alone, other)


@pytest.mark.parametrize("name", ALL)
def test_a_copy_has_hooks_of_its_own(name, images):
    pair = nn.ModuleDict({"net": model()})
    pair["peft"] = disturbed(ALL[name], pair["net"])
    expected = pair["net"](images)
    twin = copy.deepcopy(pair)
    assert torch.equal(twin["net"](images), expected)
    with torch.no_grad():
        for parameter in pair["peft"].parameters():
            parameter *= -2.0
    assert torch.equal(twin["net"](images), expected)
    assert not torch.allclose(pair["net"](images), expected)
    twin["peft"].remove()
    assert torch.equal(twin["net"](images), model()(images))
    assert not torch.allclose(pair["net"](images), expected)


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_its_parameters_and_not_the_frozen_model(name, images):
    net = model().requires_grad_(False)
    peft = disturbed(ALL[name], net)
    net(images).square().sum().backward()
    assert all(parameter.grad is not None for parameter in peft.parameters())
    moved = [name for name, parameter in peft.named_parameters() if parameter.grad.abs().max() > 0]
    assert moved == [name for name, _ in peft.named_parameters()]
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("name", ALL)
def test_it_runs_in_mixed_precision(name):
    net = tiny_vit()
    ALL[name](net)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(net(torch.randn(2, 3, 8, 8))).all()


# ---------------------------------------------------------------------- numbers of parameters, on a ViT-B/16


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (partial(Adapter, bottleneck=64), 12 * (768 * 64 * 2 + 64 + 768)),
        (partial(Adapter, bottleneck=16), 12 * (768 * 16 * 2 + 16 + 768)),
        (partial(LoRA, rank=5, parts="kv", targets=[f"blocks.{i}.attn.qkv" for i in range(5)]), 5 * 2 * 2 * 5 * 768),
        (  # of LAE, with a scale for keys and one for values
            partial(LoRA, rank=5, parts="kv", learn_scale=True, targets=[f"blocks.{i}.attn.qkv" for i in range(5)]),
            5 * (2 * 2 * 5 * 768 + 2),
        ),
        (partial(Prefix, length=10, learn_scale=True, blocks=range(5)), 5 * (2 * 10 * 768 + 2)),
        (VPT, 12 * 5 * 768),
        (partial(VPT, deep=False, length=3), 3 * 768),
        (Prefix, 12 * 2 * 5 * 768),
        (FiLM, 25 * 2 * 768),
        (SSF, 2 * (768 + 12 * (768 + 2304 + 768 + 768 + 3072 + 768) + 768)),
        (WholeModel, 0),
    ],
)
def test_numbers_of_parameters_match_the_papers(make, count):
    with torch.device("meta"):
        peft = make(VisionTransformer(num_classes=0))
    assert sum(parameter.numel() for parameter in peft.parameters()) == count


# ---------------------------------------------------------------------- a backbone with one of them


def adapted(peft, **options):
    return AdaptedBackbone((1, 8, 8), backbone=partial(MLP, hidden=(6,)), peft=peft, **options).eval()


@pytest.mark.parametrize("peft", [SSF, WholeModel, partial(LoRA, targets=["*"])])
def test_after_adaptation_the_features_of_both_stand_side_by_side(peft):
    images = torch.randn(3, 1, 8, 8)
    backbone = adapted(peft, concatenate=True)
    with backbone.peft.disabled():
        plain = backbone.base(images)
    with torch.no_grad():
        for parameter in backbone.adapted_parameters():
            parameter += 0.1
    tuned = backbone(images)
    assert (backbone.num_features, tuned.shape[1]) == (12, 6)
    backbone.finish()
    assert torch.equal(backbone(images), torch.cat([plain, tuned], dim=1))
    other = adapted(peft, concatenate=True)
    other.load_state_dict(backbone.state_dict())
    assert torch.equal(other(images), backbone(images))
    assert torch.equal(copy.deepcopy(backbone)(images), backbone(images))


def test_without_concatenation_there_is_one_backbone():
    backbone = adapted(WholeModel)
    assert backbone.original is None
    backbone.finish()
    assert backbone(torch.randn(2, 1, 8, 8)).shape == (2, backbone.num_features) == (2, 6)


@pytest.mark.parametrize("name", ALL)
def test_a_pair_has_two_sets_that_take_turns(name, images):
    pair = PeftPair((3, 8, 8), backbone=lambda shape: Wrapped(), peft=ALL[name]).double().eval()
    with torch.no_grad():
        for parameter in (*pair.online.parameters(), *pair.offline.parameters()):
            parameter += 0.3 * torch.randn_like(parameter)
    online, offline = pair(images), pair.offline_features(images)
    assert torch.equal(pair(images), online)
    assert not torch.allclose(online, offline)
    with pair.online.disabled():
        assert torch.equal(pair(images), tiny_vit().double()(images))
    twin = copy.deepcopy(pair)
    assert torch.equal(twin.offline_features(images), offline)
    before = [parameter.clone() for parameter in pair.offline.parameters()]
    pair.ema_update(0.75)
    for old, own, other in zip(before, pair.offline.parameters(), pair.online.parameters(), strict=True):
        torch.testing.assert_close(own, 0.75 * old + 0.25 * other)
    pair.ema_update(1.0)
    assert torch.equal(pair(images), online)
    pair.copy_online()
    assert torch.equal(pair.offline_features(images), online)
    assert torch.equal(twin.offline_features(images), offline)


class Wrapped(nn.Module):
    num_features = 24

    def __init__(self):
        super().__init__()
        self.model = tiny_vit()

    def forward(self, images):
        return self.model(images)


def test_the_whole_model_cannot_be_there_twice():
    with pytest.raises(ValueError, match="WholeModel trains the model itself"):
        PeftPair((1, 8, 8), backbone=partial(MLP, hidden=(6,)), peft=WholeModel)


def test_a_vit_from_a_file_takes_them_all(shared_data):
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3}
    path = shared_data / "models" / "vit_p8_32_tinyimagenet_fp16.pt"
    net = Timm((3, 32, 32), name="vit_tiny_patch16_224", weights=str(path), kwargs=settings).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = net(images)
        for name, make in ALL.items():
            peft = make(net).eval()
            assert torch.equal(net(images), before) == (name in SILENT)
            peft.remove()
        assert torch.equal(net(images), before)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(LoRA, rank=0), "LoRA: rank is 0"),
        (partial(LoRA, parts="kx"), "parts is 'kx'"),
        (
            partial(LoRA, targets=["*.query"]),
            r"no layer \(Linear\) of the model matches '\*.query'; there are: blocks.0",
        ),
        (partial(Adapter, place="above"), "place is 'above'"),
        (partial(Adapter, bottleneck=0), "bottleneck is 0"),
        (partial(Adapter, blocks=[2]), r"Adapter: blocks \[2\]; the model has blocks 0 to 1"),
        (partial(SSF, spread=-1.0), "SSF: spread is -1"),
        (partial(VPT, length=0), "VPT: length is 0"),
        (partial(Prefix, low=2.0), "low is 2.0"),
        (partial(Prefix, length=0), "length is 0"),
        (partial(Prefix, length=[3, 0], blocks=[0, 1]), "length is 0"),
        (partial(Prefix, length=[3]), "length has 1 numbers for blocks None; give one number for each"),
        (partial(Prefix, length=[3], blocks=[0, 1]), r"length has 1 numbers for blocks \[0, 1\]"),
        (partial(Prefix, length=[3, 4], blocks=[1, -1]), r"length has 2 numbers for blocks \[1, -1\]"),
    ],
)
def test_options_out_of_range_are_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make(tiny_vit())


@pytest.mark.parametrize("make", [Adapter, VPT, Prefix])
def test_a_model_without_blocks_is_reported(make):
    with pytest.raises(ValueError, match="MLP has no transformer blocks"):
        make(MLP((1, 8, 8)))


def test_a_model_without_norms_is_reported():
    with pytest.raises(ValueError, match="FiLM: no layer"):
        FiLM(MLP((1, 8, 8)))


def test_orthonormal_rows_that_are_not_trained():
    peft = LoRA(model(), rank=5, parts="qv", orthonormal=True, train_down=False).double()
    for site in peft.sites:
        for matrix in site.down:
            torch.testing.assert_close(matrix @ matrix.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-6)
    assert {name.rpartition(".")[2] for name, _ in peft.named_parameters()} == {"up"}
    other = LoRA(model(), rank=5, parts="qv", orthonormal=True, train_down=False).double()
    assert not torch.equal(other.sites[0].down, peft.sites[0].down)
    other.load_state_dict(peft.state_dict())
    assert torch.equal(other.sites[0].down, peft.sites[0].down)
    trained = LoRA(model(), rank=5, parts="qv", orthonormal=True)
    assert trained.sites[0].down.requires_grad
    torch.testing.assert_close(trained.sites[0].down[1] @ trained.sites[0].down[1].T, torch.eye(5))
    with pytest.raises(ValueError, match="rank is 25, but a layer has 24 inputs"):
        LoRA(model(), rank=25, orthonormal=True)


def test_learnt_scales_are_drawn_around_their_centre():
    torch.manual_seed(0)
    scales = LoRA(tiny_vit(depth=40), parts="qkv", scale=2.0, learn_scale=True, scale_spread=0.5).scales().detach()
    assert scales.shape == (40, 3)
    assert 1.5 <= float(scales.min()) < 1.6
    assert 2.4 < float(scales.max()) <= 2.5
    assert abs(float(scales.mean()) - 2) < 0.1
    with pytest.raises(ValueError, match=r"scale_spread is 0\.5, but learn_scale is False"):
        LoRA(tiny_vit(), scale_spread=0.5)


def test_scaled_gradients_are_of_the_rows_of_b_and_the_output_is_the_same(images):
    net = model()
    peft = disturbed(partial(LoRA, parts="qv", learn_scale=True), net)
    plain = net(images)
    plain.square().sum().backward()
    expected = [(site.up.grad.clone(), site.down.grad.clone()) for site in peft.sites]
    peft.zero_grad()
    factors = [torch.rand(2, 24, dtype=torch.float64) for _ in peft.sites]
    with peft.scaled_gradients(factors):
        scaled = net(images)
    assert torch.equal(scaled, plain)
    scaled.square().sum().backward()
    for site, (up, down), factor in zip(peft.sites, expected, factors, strict=True):
        torch.testing.assert_close(site.up.grad, factor[:, :, None] * up)
        torch.testing.assert_close(site.down.grad, down)
    peft.zero_grad()
    net(images).square().sum().backward()
    torch.testing.assert_close(peft.sites[0].up.grad, expected[0][0])
