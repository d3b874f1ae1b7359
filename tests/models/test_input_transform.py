from functools import partial

import pytest
import torch
from support.fakes import normal
from torch import nn
from torch.nn import functional as F

from cl_lightning.models import MLP, AdaptedBackbone, InputTransform


def backbone(shape=(3, 6, 8)):
    return MLP(shape, hidden=()).double()


def inserted(kind, shape=(3, 6, 8), **options):
    """A transformation with parameters that are drawn, and what the model gets of images."""
    model, seen = backbone(shape), []
    made = InputTransform(model, kind=kind, **options).double()
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=number + 1))
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    return model, made, seen


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("add", 3 * 224 * 224),
        ("frame", 3 * (224**2 - 164**2)),
        ("pad", 3 * (224**2 - 164**2)),
        ("affine", 6),
        ("conv", 3 * 3 * 9 + 3),
    ],
)
def test_numbers_of_parameters(kind, count):
    with torch.device("meta"):
        made = InputTransform(MLP((3, 224, 224), hidden=()), kind=kind)
    assert sum(parameter.numel() for parameter in made.parameters()) == count


@pytest.mark.parametrize("kind", ["add", "frame", "affine", "conv"])
def test_initially_it_changes_nothing(kind):
    model, images = backbone(), normal(2, 3, 6, 8)
    before = model(images)
    made = InputTransform(model, kind=kind, frame_width=2 if kind == "frame" else None).double()
    assert torch.equal(model(images), before)
    made.remove()


@pytest.mark.parametrize("kind", ["add", "affine", "conv"])
def test_it_transforms_the_input_of_the_model(kind):
    model, made, seen = inserted(kind)
    images, (site,) = normal(2, 3, 6, 8), made.sites
    model(images)
    if kind == "add":
        expected = images + site.delta
    elif kind == "affine":
        expected = images * site.gamma.view(1, 3, 1, 1) + site.beta.view(1, 3, 1, 1)
    else:
        conv = nn.Conv2d(3, 3, 3, padding="same", dtype=torch.float64)
        conv.load_state_dict({"weight": site.weight, "bias": site.bias})
        expected = images + conv(images)
    torch.testing.assert_close(seen[0], expected)
    with made.disabled():
        model(images)
    assert torch.equal(seen[1], images)


def test_a_frame_surrounds_the_smaller_image():
    model, made, seen = inserted("pad", frame_width=2)
    images, (site,) = normal(2, 3, 6, 8), made.sites
    model(images)
    framed = seen[0]
    assert framed.shape == images.shape
    inner = F.interpolate(images, size=(2, 4), mode="bilinear", antialias=True)
    assert torch.equal(framed[:, :, 2:4, 2:6], inner)
    pixels = torch.cat([framed[:, :, :2], framed[:, :, 4:]], dim=2)
    assert torch.equal(pixels, site.rows.expand(2, -1, -1, -1))
    sides = torch.cat([framed[:, :, 2:4, :2], framed[:, :, 2:4, 6:]], dim=3)
    assert torch.equal(sides, site.columns.expand(2, -1, -1, -1))
    assert all((parameter == 0).all() for parameter in InputTransform(model, kind="pad", frame_width=1).parameters())


def test_a_frame_is_added_to_the_margin_alone():
    model, made, seen = inserted("frame", frame_width=2)
    images, (site,) = normal(2, 3, 6, 8), made.sites
    model(images)
    added = seen[0] - images
    assert not added[:, :, 2:4, 2:6].any()
    torch.testing.assert_close(added[:, :, :2], site.rows[:, :2].expand(2, -1, -1, -1))
    torch.testing.assert_close(added[:, :, 4:], site.rows[:, 2:].expand(2, -1, -1, -1))
    torch.testing.assert_close(added[:, :, 2:4, :2], site.columns[:, :, :2].expand(2, -1, -1, -1))
    torch.testing.assert_close(added[:, :, 2:4, 6:], site.columns[:, :, 2:].expand(2, -1, -1, -1))


def test_the_gradient_of_an_added_image_is_its_closed_form():
    made = AdaptedBackbone((3, 6, 8), backbone=partial(MLP, hidden=()), peft=InputTransform).double()
    head, images, labels = nn.Linear(144, 5).double(), normal(4, 3, 6, 8), torch.tensor([0, 4, 2, 2])
    logits = head(made(images))
    F.cross_entropy(logits, labels).backward()
    error = logits.softmax(dim=1).detach() - F.one_hot(labels, 5)
    torch.testing.assert_close(made.peft.sites[0].delta.grad.flatten(), (error @ head.weight).mean(dim=0))


@pytest.mark.parametrize("kind", ["add", "frame", "pad", "affine", "conv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_model_gets_images_of_the_type_that_arrived(kind, dtype):
    model, made, seen = inserted(kind, frame_width=1 if kind in ("frame", "pad") else None)
    made.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.float32):
        model.to(dtype)(normal(2, 3, 6, 8).to(dtype))
    assert seen[0].dtype == dtype


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "crop"}, "kind is 'crop'"),
        ({"kind": "pad", "frame_width": 0}, "frame_width is 0 with kind 'pad'"),
        ({"kind": "add", "frame_width": 3}, "frame_width is 3 with kind 'add'"),
        ({"kind": "pad", "frame_width": 3}, "give frame_width below 3: with 3 pixels"),
        ({"kind": "pad"}, "with 30 pixels on each side nothing is left of an image of 6 x 8 pixels"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=words):
        InputTransform(backbone(), **options)


def test_a_model_without_the_shape_of_its_images_is_an_error():
    with pytest.raises(ValueError, match="Linear has no image_shape"):
        InputTransform(nn.Linear(3, 2))
