import copy
import runpy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from safetensors.torch import save_file
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.models import (
    MLP,
    Backbone,
    BasicBlock,
    CifarResNet,
    LinearHead,
    Network,
    Output,
    PadShortcut,
    ResNet18,
    ResNet20,
    ResNet32,
    ResNet56,
    SlimResNet18,
    Timm,
    frozen_copy,
    joined,
)

COLOUR = (3, 32, 32)
SMALL_NETS: list[type[Backbone]] = [ResNet20, ResNet32, ResNet56, ResNet18, SlimResNet18, MLP]
TINY_VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3}


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def build(kind: Callable[..., Backbone], *arguments: Any, seed: int = 0, **options: Any) -> Backbone:
    torch.manual_seed(seed)
    return kind(*arguments, **options).eval()


def images(shape: ImageShape, number: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(number, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("net", "parameters", "features"),
    [
        (ResNet20(COLOUR), 269_072, 64),
        (ResNet32(COLOUR), 463_504, 64),
        (ResNet56(COLOUR), 852_368, 64),
        (ResNet32(COLOUR, shortcut="conv"), 463_504 + 2_752, 64),
        (ResNet18(COLOUR), 11_168_832, 512),
        (ResNet18(COLOUR, stem="imagenet"), 11_176_512, 512),
        (SlimResNet18(COLOUR), 1_093_140, 160),
        (MLP((1, 28, 28)), 474_400, 400),
    ],
)
def test_parameters_and_features_are_as_many_as_documented(net: Backbone, parameters: int, features: int) -> None:
    assert (count(net), net.num_features) == (parameters, features)
    assert f"{parameters:,}" in str(type(net).__doc__) or isinstance(net, ResNet32)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 5, 9), (1, 1, 1)])
@pytest.mark.parametrize("kind", SMALL_NETS)
def test_any_shape_of_image_gives_one_vector_each(kind: type[Backbone], shape: ImageShape) -> None:
    net = build(kind, shape)
    assert net.image_shape == shape
    for number in (0, 1, 3):
        features = net(images(shape, number))
        assert features.shape == (number, net.num_features)
        assert features.isfinite().all()


def test_the_stem_for_imagenet_divides_the_map_by_four_more() -> None:
    assert build(ResNet18, COLOUR).feature_map(images(COLOUR)).shape == (2, 512, 4, 4)
    assert build(ResNet18, COLOUR, stem="imagenet").feature_map(images(COLOUR)).shape == (2, 512, 1, 1)


def test_features_are_the_mean_of_the_feature_map() -> None:
    net = build(ResNet20, COLOUR)
    torch.testing.assert_close(net(images(COLOUR)), net.feature_map(images(COLOUR)).flatten(2).mean(2))


def test_the_pad_shortcut_is_every_second_pixel_between_zeros() -> None:
    maps = torch.arange(2 * 2 * 5 * 4, dtype=torch.float64).view(2, 2, 5, 4)
    expected = torch.zeros(2, 6, 3, 2, dtype=torch.float64)
    for row in range(3):
        for column in range(2):
            expected[:, 2:4, row, column] = maps[:, :, 2 * row, 2 * column]
    assert torch.equal(PadShortcut(2, 6, 2)(maps), expected)


def test_a_block_without_residual_is_its_shortcut() -> None:
    block = BasicBlock(2, 4, stride=2, shortcut="pad", last_relu=False).double().eval()
    nn.init.zeros_(block.bn2.weight)
    maps = images((2, 6, 6)).double()
    assert torch.equal(block(maps), F.pad(maps[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)))
    block.last_relu = True
    assert torch.equal(block(maps), F.pad(maps[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)).clamp(min=0))


def test_without_the_last_relu_features_have_both_signs_and_nothing_else_changes() -> None:
    for kind in (ResNet20, ResNet18):
        with_relu, without = build(kind, COLOUR), build(kind, COLOUR, last_relu=False)
        assert (with_relu(images(COLOUR)) >= 0).all()
        assert (without(images(COLOUR)) < 0).any()
        expected = without.feature_map(images(COLOUR)).clamp(min=0).mean((2, 3))
        assert torch.equal(with_relu(images(COLOUR)), expected)


@pytest.mark.parametrize("last_relu", [True, False])
def test_maps_of_stages_are_those_before_the_last_relu_of_each(last_relu: bool) -> None:
    net = CifarResNet((3, 8, 8), depth=8, width=4, last_relu=last_relu).eval()
    pixels = torch.randn(5, 3, 8, 8)
    maps: list[Tensor] = []
    features = net(pixels, maps)
    assert torch.equal(features, net(pixels))
    assert [tuple(part.shape) for part in maps] == [(5, 4, 8, 8), (5, 8, 4, 4), (5, 16, 2, 2)]
    assert all(part.min() < 0 for part in maps)
    maps_in = F.relu(net.bn1(net.conv1(pixels)))
    for stage, found in zip((net.layer1, net.layer2, net.layer3), maps, strict=True):
        (block,) = stage
        inner = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(maps_in)))))
        torch.testing.assert_close(found, inner + block.downsample(maps_in))
        maps_in = F.relu(found)
    end = maps[-1].relu() if last_relu else maps[-1]
    torch.testing.assert_close(features, end.mean((2, 3)))


def test_a_stage_of_several_blocks_gives_the_map_of_its_last_block() -> None:
    net = ResNet18((3, 8, 8), width=4).eval()
    pixels = torch.randn(2, 3, 8, 8)
    maps: list[Tensor] = []
    net(pixels, maps)
    whole = F.relu(net.bn1(net.conv1(pixels)))
    for found, stage in zip(maps, (net.layer1, net.layer2, net.layer3, net.layer4), strict=True):
        whole = stage(whole)
        torch.testing.assert_close(found.relu(), whole)


def test_a_network_gives_maps_if_asked_to_and_so_do_its_copies_and_joined_passes() -> None:
    net = CifarResNet((3, 8, 8), depth=8, width=4).eval()
    head = LinearHead(net.num_features)
    head.grow(2)
    network = Network(net, head)
    pixels = torch.randn(5, 3, 8, 8)
    assert network(pixels).maps == ()
    network.gives_maps = True
    output, copied = network(pixels), frozen_copy(network)(pixels)
    maps: list[Tensor] = []
    net(pixels, maps)
    for found in (output, copied, joined([network(pixels[:2]), network(pixels[2:])])):
        assert len(found.maps) == 3
        for one, other in zip(found.maps, maps, strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(found.logits, output.logits)
    plain = joined([Output(pixels, pixels), Output(pixels, pixels)])
    assert plain.maps == ()
    assert len(plain.logits) == 10


def test_a_compiled_backbone_gives_the_same_maps() -> None:
    net = CifarResNet((3, 8, 8), depth=8, width=4).eval()
    pixels = torch.randn(2, 3, 8, 8)
    eager: list[Tensor] = []
    compiled: list[Tensor] = []
    net(pixels, eager)
    net.compile(backend="eager")
    net(pixels, compiled)
    assert len(compiled) == 3
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other)


def test_convolutions_start_with_the_variance_of_he_by_fan_out() -> None:
    net = build(ResNet18, COLOUR)
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 1e5:
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            assert module.weight.var().item() == pytest.approx(2 / fan_out, rel=0.03)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()


def test_an_mlp_is_its_matrix_products() -> None:
    net = build(MLP, (1, 2, 3), hidden=(5, 4), dropout=0.5).double()
    x = images((1, 2, 3)).double()
    first, second = (layer for layer in net.modules() if isinstance(layer, nn.Linear))
    inner = (x.reshape(2, 6) @ first.weight.T + first.bias).clamp(min=0)
    torch.testing.assert_close(net(x), (inner @ second.weight.T + second.bias).clamp(min=0))
    net.train()
    assert not torch.equal(net(x), net(x))


def test_an_mlp_without_layers_gives_the_pixels() -> None:
    x = images(COLOUR)
    assert torch.equal(MLP(COLOUR, hidden=())(x), x.flatten(1))
    assert MLP(COLOUR, hidden=()).num_features == 3072


@pytest.mark.parametrize("kind", SMALL_NETS)
def test_the_seed_decides_and_copies_agree_to_the_bit(kind: type[Backbone]) -> None:
    net, same, other = build(kind, COLOUR), build(kind, COLOUR), build(kind, COLOUR, seed=1)
    features = net(images(COLOUR))
    assert torch.equal(same(images(COLOUR)), features)
    assert not torch.equal(other(images(COLOUR)), features)
    assert torch.equal(copy.deepcopy(net)(images(COLOUR)), features)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(images(COLOUR)), features)


def test_every_parameter_has_a_gradient() -> None:
    for kind in SMALL_NETS:
        net = build(kind, COLOUR).train()
        net(images(COLOUR)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (CifarResNet, {"depth": 30}, "depth 30"),
        (CifarResNet, {"depth": 2}, "depth 2"),
        (ResNet32, {"width": 0}, "ResNet32: width is 0"),
        (ResNet32, {"shortcut": "average"}, "shortcut is 'average'"),
        (ResNet18, {"stem": "large"}, "stem is 'large'"),
        (MLP, {"hidden": (10, 0)}, r"hidden \(10, 0\)"),
        (MLP, {"dropout": 1.0}, "dropout 1.0"),
        (Timm, {"name": "resnt18"}, "resnet18"),
        (Timm, {"name": "resnet18.no_such_tag"}, "resnet18.a1_in1k"),
        (Timm, {"name": "vit_small_patch32_384", "pretrained": True, "weights": "x.pt"}, "one of them"),
        (Timm, {"name": "resnet10t", "img_size": 32}, "img_size"),
        (Timm, {"name": "resnet10t", "kwargs": {"num_classes": 5}}, "num_classes"),
        (Timm, {"name": "resnet10t", "kwargs": {"global_pool": ""}}, "one vector per image"),
        (Timm, {"name": "vit_tiny_patch16_224"}, "give img_size=32"),
        (
            Timm,
            {"name": "resnet10t", "weights": "no_such_file.pt"},
            r"no_such_file.pt cannot be read \(FileNotFoundError\)",
        ),
    ],
)
def test_options_that_cannot_be_are_reported(kind: type[Backbone], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind(COLOUR, **options)


@pytest.mark.parametrize("shape", [(0, 32, 32), (3, 0, 32), (3, 32, -1), (3, 32), ()])
def test_shapes_that_cannot_be_are_reported(shape: Any) -> None:
    for kind in SMALL_NETS:
        if kind is MLP and len(shape) == 2:
            continue  # it takes sequences
        with pytest.raises(ValueError, match=f"{kind.__name__}: image_shape"):
            kind(shape)


@pytest.mark.parametrize("name", ["cl_lightning.models." + kind.__name__ for kind in SMALL_NETS])
def test_a_config_that_names_a_class_gets_that_class_with_its_own_defaults(name: str) -> None:
    class Strategy:
        # another default than the class asked for: its options must not leak into the one that replaces it
        def __init__(self, backbone: Callable[[ImageShape], Backbone] = ResNet32) -> None:
            self.net = backbone(COLOUR)

    class Slim(Strategy):
        def __init__(self, backbone: Callable[[ImageShape], Backbone] = SlimResNet18) -> None:
            super().__init__(backbone)

    expected = next(kind for kind in SMALL_NETS if name.endswith("." + kind.__name__))(COLOUR)
    for strategy in (Strategy, Slim):
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(strategy, "model")
        config = parser.parse_object({"model": {"backbone": {"class_path": name}}})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # renamed `instantiate` in jsonargparse 4.49
            net = parser.instantiate_classes(config).model.net
        assert type(net) is type(expected)
        assert str(net) == str(expected)


# files of weights


def test_weights_in_any_wrapping_are_the_same_weights(tmp_path: Path) -> None:
    net = build(ResNet20, COLOUR, shortcut="conv", seed=3)
    state = {f"module.{key.replace('downsample', 'shortcut')}": value for key, value in net.state_dict().items()}
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    state |= {"module.fc.weight": torch.zeros(10, 64), "module.fc.bias": torch.zeros(10)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "wrapped.pt")
    torch.save(net.state_dict(), tmp_path / "plain.pth")
    save_file(net.state_dict(), tmp_path / "plain.safetensors")
    for name in ("wrapped.pt", "plain.pth", "plain.safetensors"):
        read = build(ResNet20, COLOUR, shortcut="conv", weights=str(tmp_path / name))
        assert torch.equal(read(images(COLOUR)), net(images(COLOUR)))


def test_weights_that_do_not_fit_are_reported_by_key(tmp_path: Path) -> None:
    path = str(tmp_path / "weights.pt")
    state = ResNet20(COLOUR).state_dict()
    weight = state.pop("layer2.1.conv2.weight")
    torch.save(state | {"layer9.weight": weight}, path)
    with pytest.raises(ValueError, match=r"missing layer2\.1\.conv2\.weight; unexpected layer9\.weight; .*shape none"):
        ResNet20(COLOUR, weights=path)
    torch.save(state | {"layer2.1.conv2.weight": weight}, path)
    assert isinstance(ResNet20(COLOUR, weights=path), Backbone)
    with pytest.raises(ValueError, match=r"shape conv1\.weight \(16, 3, 3, 3\) for \(8, 3, 3, 3\)"):
        ResNet20(COLOUR, width=8, weights=path)
    with pytest.raises(ValueError, match=r"ResNet32: .* missing layer1\.3\.conv1\.weight.* and \d+ more"):
        ResNet32(COLOUR, weights=path)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_file_that_holds_no_weights_is_reported(tmp_path: Path, name: str) -> None:
    for content in (b"", b"these are not weights"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read"):
            ResNet20(COLOUR, weights=str(tmp_path / name))


def test_a_file_of_other_things_than_weights_is_reported(tmp_path: Path) -> None:
    for content, words in (({"epoch": 3}, "holds no state dict"), (Path("x"), r"cannot be read \(UnpicklingError\)")):
        torch.save(content, tmp_path / "weights.pt")
        with pytest.raises(ValueError, match=words):
            ResNet20(COLOUR, weights=str(tmp_path / "weights.pt"))


def test_resnet18_with_the_stem_of_imagenet_is_timms(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = timm.create_model("resnet18", zero_init_last=False).state_dict()
    torch.save(state, tmp_path / "weights.pt")
    ours = build(ResNet18, (3, 64, 64), stem="imagenet", weights=str(tmp_path / "weights.pt"))
    theirs = build(Timm, (3, 64, 64), name="resnet18", weights=str(tmp_path / "weights.pt"))
    torch.testing.assert_close(ours(images((3, 64, 64))), theirs(images((3, 64, 64))))


# timm


@pytest.mark.parametrize(
    ("name", "shape", "options", "features"),
    [
        ("resnet10t", (1, 28, 28), {}, 512),
        ("mobilenetv3_small_050", (3, 64, 64), {}, 1024),  # timm's own num_features is 288
        ("convnext_atto", (3, 32, 32), {"drop_path_rate": 0.1}, 320),
        ("vit_tiny_patch16_224", (3, 32, 32), {"img_size": 32, "kwargs": {"patch_size": 8, "depth": 2}}, 192),
        ("resnet10t", (3, 32, 32), {"drop_rate": 0.1, "kwargs": {"global_pool": "catavgmax"}}, 1024),
        ("coat_lite_tiny", (3, 64, 64), {"img_size": 64}, 320),  # has modules that stand twice
    ],
)
def test_timm_models_give_as_many_features_as_they_say(
    name: str, shape: ImageShape, options: dict[str, Any], features: int
) -> None:
    net = build(Timm, shape, name=name, **options)
    assert net.num_features == features
    assert net(images(shape)).shape == (2, features)
    assert all(tensor.device.type == "cpu" for tensor in net.state_dict().values())


def test_timm_models_are_timms_to_the_bit_and_draw_no_number_more() -> None:
    torch.manual_seed(0)
    expected = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=2, drop_path_rate=0.2)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    net = Timm(COLOUR, name="vit_tiny_patch16_224", img_size=32, drop_path_rate=0.2, kwargs={"depth": 2})
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in net.modules())
    assert torch.equal(net.eval()(images(COLOUR)), expected.eval()(images(COLOUR)))
    assert torch.equal(copy.deepcopy(net)(images(COLOUR)), net(images(COLOUR)))


def test_timm_weights_are_cast_and_the_classifier_is_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = timm.create_model("resnet10t", num_classes=7).half().eval()
    save_file(whole.state_dict(), tmp_path / "weights.safetensors")
    net = build(Timm, COLOUR, name="resnet10t", seed=5, weights=str(tmp_path / "weights.safetensors"))
    features = net(images(COLOUR))
    assert features.dtype == torch.float32
    torch.testing.assert_close(whole.float().get_classifier()(features), whole(images(COLOUR)))
    with pytest.raises(ValueError, match=r"Timm: resnet14t: .* missing .*; unexpected"):
        Timm(COLOUR, name="resnet14t", weights=str(tmp_path / "weights.safetensors"))


CLIP: dict[str, Any] = {
    "name": "vit_base_patch16_clip_224.openai",
    "img_size": 32,
    "kwargs": {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3},
}


def test_the_projection_of_an_image_tower_is_kept_and_read_from_a_file(tmp_path: Path) -> None:
    net, file = build(Timm, COLOUR, projection=True, **CLIP), tmp_path / "weights.pt"
    assert (net.num_features, build(Timm, COLOUR, **CLIP).num_features) == (512, 24)
    torch.save(net.model.state_dict(), file)
    read = {"weights": str(file), "seed": 5, **CLIP}
    again, inner = build(Timm, COLOUR, projection=True, **read), build(Timm, COLOUR, **read)
    assert torch.equal(again(images(COLOUR)), net(images(COLOUR)))
    torch.testing.assert_close(net.model.head(inner(images(COLOUR))), net(images(COLOUR)))


def test_a_model_without_a_last_layer_has_no_projection_and_another_size_of_it_is_reported() -> None:
    with pytest.raises(ValueError, match=r"Timm: remove projection: vit_base_patch16_siglip_224\.webli has no last"):
        Timm(COLOUR, projection=True, **{**CLIP, "name": "vit_base_patch16_siglip_224.webli"})
    with pytest.raises(ValueError, match=r"Timm: resnet10t does not accept an option .*num_classes"):
        Timm(COLOUR, name="resnet10t", kwargs={"num_classes": 7})


def test_pretrained_weights_without_a_network_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"^Timm: give .* as weights=.*resnet10t\.c3_in1k cannot be downloaded"):
        Timm(COLOUR, name="resnet10t.c3_in1k", pretrained=True, kwargs={"cache_dir": tmp_path})


# real weights and data


@pytest.fixture(scope="module")
def cifar10(shared_data: Path) -> tuple[Tensor, Tensor]:
    """500 test images of CIFAR-10, normalised as the published nets want them, and their labels."""
    packed = shared_data / "cifar10_test_packed.npz"
    plain = runpy.run_path(str(shared_data / "unpack.py"))["unpack"](packed)
    pixels = torch.from_numpy(plain["x_test"][:500]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (pixels - mean) / std, torch.from_numpy(plain["y_test"][:500]).long()


@pytest.mark.parametrize(("kind", "depth"), [(ResNet20, 20), (ResNet32, 32), (ResNet56, 56)])
def test_published_cifar_weights_reach_their_accuracy(
    kind: type[Backbone], depth: int, shared_data: Path, cifar10: tuple[Tensor, Tensor]
) -> None:
    path = shared_data / "models" / f"cifar10_resnet{depth}.pt"
    net = kind(COLOUR, weights=str(path)).eval()
    state = torch.load(path, weights_only=True)
    x, y = cifar10
    with torch.no_grad():
        logits = F.linear(net(x), state["linear.weight"], state["linear.bias"])
    assert (logits.argmax(1) == y).float().mean() > 0.88


def test_a_mobilenet_from_a_file_is_timms(shared_data: Path) -> None:
    path = shared_data / "models" / "mobilenetv2_100_imagenet_fp16.pt"
    whole = timm.create_model("mobilenetv2_100", pad_type="same").eval()
    whole.load_state_dict(torch.load(path, weights_only=True))
    options: dict[str, Any] = {"name": "mobilenetv2_100", "weights": str(path), "kwargs": {"pad_type": "same"}}
    net = build(Timm, (3, 96, 96), **options)
    features = net(images((3, 96, 96)))
    assert (net.num_features, features.dtype) == (1280, torch.float32)
    torch.testing.assert_close(whole.get_classifier()(features), whole(images((3, 96, 96))))


def test_a_vit_from_a_file_is_timms(shared_data: Path) -> None:
    path = shared_data / "models" / "vit_p8_32_tinyimagenet_fp16.pt"
    whole = timm.models.vision_transformer.VisionTransformer(img_size=32, num_classes=200, **TINY_VIT).eval()
    whole.load_state_dict(torch.load(path, weights_only=True))
    net = build(Timm, COLOUR, name="vit_tiny_patch16_224", weights=str(path), img_size=32, kwargs=TINY_VIT)
    assert net.num_features == 192
    torch.testing.assert_close(whole.head(net(images(COLOUR))), whole(images(COLOUR)))
    with pytest.raises(ValueError, match=r"shape pos_embed \(1, 17, 192\) for \(1, 65, 192\)"):
        Timm((3, 64, 64), name="vit_tiny_patch16_224", weights=str(path), img_size=64, kwargs=TINY_VIT)
