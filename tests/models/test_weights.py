"""Weight files: prefixes of keys, checkpoints of runs, channels, and names of timm."""

import os
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from cl_lightning.models import LinearHead, Network, ResNet18, ResNet20, Timm
from cl_lightning.models.backbones import read_classifier

COLOUR = (3, 32, 32)


def seeded(seed: int = 0, **options: object) -> ResNet20:
    torch.manual_seed(seed)
    return ResNet20(COLOUR, **options)


def under(prefix: str, net: nn.Module) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in net.state_dict().items()}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "model.",
        "encoder.",
        "backbone.",
        "module.backbone.",
        "model._orig_mod.",
        "0.",
        "net.encoder.body.",
    ],
)
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "net"])
def test_weights_under_any_prefix_are_found(tmp_path: Path, prefix: str, wrapper: str | None) -> None:
    state = {**under(prefix, seeded(3)), f"{prefix}fc.weight": torch.zeros(5, 64)}
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "w.pt")
    assert_same(seeded(1, weights=str(tmp_path / "w.pt")), seeded(3))


def test_what_lies_outside_the_prefix_is_reported(tmp_path: Path) -> None:
    state = {
        **under("encoder.", seeded(3)),
        "projector.0.weight": torch.zeros(2, 2),
        "classifier.weight": torch.zeros(5, 64),
    }
    torch.save(state, tmp_path / "w.pt")
    with pytest.warns(
        UserWarning, match=r"w\.pt: the weights with 'encoder\.' are read, others left out: projector\.0\.weight$"
    ):
        assert_same(seeded(1, weights=str(tmp_path / "w.pt")), seeded(3))


def test_weights_under_two_prefixes_are_refused_unless_they_are_equal(tmp_path: Path) -> None:
    path = str(tmp_path / "w.pt")
    torch.save({"student": under("", seeded(3)), "teacher": under("", seeded(4))}, path)
    with pytest.raises(
        ValueError, match=r"has weights of this network under 'student\.', 'teacher\.'; save the keys of one"
    ):
        seeded(1, weights=path)
    torch.save({**under("a.", seeded(3)), **under("bb.", seeded(3))}, path)
    with pytest.warns(UserWarning, match="the weights with 'a.' are read"):
        assert_same(seeded(1, weights=path), seeded(3))
    torch.save({**under("", seeded(3)), **under("ema.", seeded(4))}, path)
    with pytest.raises(ValueError, match=r"unexpected ema\.conv1\.weight"):
        seeded(1, weights=path)


def test_keys_that_are_missing_are_named_under_the_nearest_prefix(tmp_path: Path) -> None:
    state = under("model.", seeded(3))
    del state["model.layer2.1.conv2.weight"]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(
        ValueError, match=r"\(keys with 'model\.'\) .* missing layer2\.1\.conv2\.weight; unexpected none"
    ):
        seeded(1, weights=str(tmp_path / "w.pt"))


def test_the_backbone_and_the_whole_head_of_a_run_are_found(tmp_path: Path) -> None:
    head = LinearHead(64)
    head.grow(2)
    head.grow(3)
    state = {**under("network.", Network(seeded(3), head)), **under("teacher.network.backbone.", seeded(4))}
    torch.save({"state_dict": state, "cl_lightning": {"schema": 1}, "optimizer_states": []}, tmp_path / "last.ckpt")
    path = str(tmp_path / "last.ckpt")
    assert_same(seeded(1, weights=path), seeded(3))
    weight, bias = read_classifier(path, 64)
    assert torch.equal(weight, head.weight())
    assert bias is not None
    assert bias.shape == (5,)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_weights_for_colours_are_adapted_to_other_channels_as_by_timm(tmp_path: Path, channels: int) -> None:
    torch.manual_seed(0)
    whole = timm.create_model("resnet18", num_classes=3)
    torch.save(whole.state_dict(), tmp_path / "w.pt")
    expected = timm.models.adapt_input_conv(channels, whole.conv1.weight.detach())
    shape = (channels, 32, 32)
    for net in (
        Timm(shape, name="resnet18", weights=str(tmp_path / "w.pt")).model,
        ResNet18(shape, stem="imagenet", weights=str(tmp_path / "w.pt")),
    ):
        assert torch.equal(net.conv1.weight, expected)
        assert torch.equal(net.layer1[0].conv1.weight, whole.layer1[0].conv1.weight)
    if channels == 1:
        gray = torch.randn(2, 1, 32, 32)
        net = Timm(shape, name="resnet18", weights=str(tmp_path / "w.pt")).eval()
        whole.eval().reset_classifier(0)
        torch.testing.assert_close(net(gray), whole(gray.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_a_named_pipe_in_place_of_weights_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt is no file; give the path"):
        seeded(weights=str(tmp_path / "w.pt"))


def test_earlier_names_of_timm_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def create(name: str, **options: object) -> nn.Module:
        asked.append(name)
        return nn.Flatten()

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.warns(
        UserWarning, match=r"vit_base_patch16_224_in21k is called vit_base_patch16_224\.augreg_in21k in timm"
    ):
        Timm(COLOUR, name="vit_base_patch16_224_in21k", pretrained=True)
    Timm(COLOUR, name="timm/vit_base_patch16_224.augreg_in21k", pretrained=True)
    assert asked == ["vit_base_patch16_224.augreg_in21k"] * 2
    monkeypatch.setattr(timm.models, "get_deprecated_models", lambda: {"gone_net": None})
    with pytest.raises(ValueError, match="gone_net was removed from timm"):
        Timm(COLOUR, name="gone_net")
    with pytest.raises(ValueError, match=r"no weights 'resnet18\.nowhere'; for this model it has .*resnet18\.a1_in1k"):
        Timm(COLOUR, name="resnet18.nowhere")
