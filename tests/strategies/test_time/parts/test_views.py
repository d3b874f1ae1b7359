import itertools

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_gamma,
    adjust_hue,
    adjust_saturation,
    affine,
)

from cl_lightning.batch import Draw
from cl_lightning.strategies.test_time.parts.views import View, random_view


def test_views_are_images_drawn_once_for_a_batch():
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    views = [random_view(images, Draw.of(6, seed)) for seed in range(8)]
    for view in views:
        assert view.shape == images.shape
        assert 0 <= view.min() <= view.max() <= 1
        assert not torch.equal(view, images)
    assert not torch.equal(views[0], views[1])
    assert torch.equal(views[0], random_view(images, Draw.of(6, 0)))
    draw = Draw.of(6, 0)
    part = Draw(draw.key, 2, 5, 6)  # another process's share
    torch.testing.assert_close(random_view(images[2:5], part), views[0][2:5])
    assert random_view(images[:, :1], Draw.of(6, 0)).shape == (6, 1, 16, 16)
    assert len(random_view(images[:0], Draw(0, 3, 3, 6))) == 0


def test_the_noise_of_a_view_is_normal_with_its_deviation():
    grey = torch.full((4, 3, 32, 32), 0.4)
    noise = random_view(grey, Draw.of(4, 5)).double()
    noise = noise - noise.mean((0, 2, 3), keepdim=True)  # colours change by the same amount everywhere
    assert float(noise.std()) == pytest.approx(0.005, rel=0.03)
    assert float((noise.abs() < 0.005).double().mean()) == pytest.approx(0.6827, abs=0.02)


PLAIN = View(blur=1e-3)


def test_each_part_of_a_view_is_what_it_says():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(PLAIN.of(images), images, **close)
    moved = PLAIN._replace(shift=(1 / 8, -1 / 16)).of(images)  # 4 pixels to the right, 2 up
    torch.testing.assert_close(moved[..., :-2, 4:], images[..., 2:, :-4], **close)
    edge = images[..., 2:, :1].expand(-1, -1, -1, 4)  # goes on
    torch.testing.assert_close(moved[..., :-2, :4], edge, **close)
    torch.testing.assert_close(PLAIN._replace(angle=90.0).of(images), images.rot90(1, (2, 3)), **close)
    torch.testing.assert_close(PLAIN._replace(mirrored=True).of(images), images.flip(3), **close)
    torch.testing.assert_close(PLAIN._replace(gamma=1.3).of(images), images**1.3, **close)
    torch.testing.assert_close(PLAIN._replace(brightness=0.6).of(images), 0.6 * images, **close)
    flat = torch.full((1, 3, 32, 32), 0.4, dtype=torch.float64)
    torch.testing.assert_close(PLAIN._replace(scale=0.9, angle=12.0, blur=0.5).of(flat), flat, **close)
    turned = PLAIN._replace(hue=1 / 3).of(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8))
    torch.testing.assert_close(turned[0, :, 4, 4], torch.tensor([0.0, 1.0, 0.0]), **close)  # red to green


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
@pytest.mark.parametrize(
    ("angle", "scale", "across", "down"), [(15.0, 1.1, 3, -2), (-90.0, 0.9, -3, 1), (0.0, 1.0, 2, 1)]
)
def test_the_affine_map_is_that_of_torchvision(height, width, angle, scale, across, down):
    images = torch.zeros(2, 3, height, width, dtype=torch.float64)  # black at the edge, which both repeat outside
    images[..., 2:-2, 2:-2] = torch.rand(2, 3, height - 4, width - 4, generator=torch.Generator().manual_seed(0))
    view = PLAIN._replace(angle=angle, scale=scale, shift=(across / width, down / height))
    expected = affine(  # clockwise
        images, -angle, [across, down], scale, [0.0, 0.0], interpolation=InterpolationMode.BILINEAR
    )
    torch.testing.assert_close(view.of(images), expected, rtol=0, atol=1e-6)


def test_contrast_and_saturation_match_torchvision():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for found, expected in (
        (PLAIN._replace(contrast=0.7), adjust_contrast(images, 0.7)),
        (PLAIN._replace(saturation=1.5), adjust_saturation(images, 1.5)),
        (PLAIN._replace(brightness=1.4), adjust_brightness(images, 1.4)),
    ):
        torch.testing.assert_close(found.of(images), expected, rtol=0, atol=1e-6)
    both = PLAIN._replace(contrast=0.7, saturation=1.5, order=(2, 0, 1, 3, 4)).of(images)
    torch.testing.assert_close(both, adjust_contrast(adjust_saturation(images, 1.5), 0.7), rtol=0, atol=1e-6)


def test_colours_are_those_of_torchvision_in_every_order():
    images = torch.rand(1, 3, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    changes = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.5, "hue": 0.05, "gamma": 1.2}
    by_torchvision = [adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue, adjust_gamma]
    for order in itertools.permutations(range(5)):
        expected = images
        for place in order:
            expected = by_torchvision[place](expected, list(changes.values())[place])
        found = PLAIN._replace(**changes, order=order).of(images)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # measured: 2e-6


def test_a_blurred_point_is_the_kernel():
    point = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    point[..., 4, 4] = 1.0
    found = PLAIN._replace(blur=0.5).of(point)[0, 0]
    line = torch.exp(-2 * torch.arange(-4.0, 5, dtype=torch.float64).square()).where(
        torch.arange(9).sub(4).abs() <= 2, 0
    )
    torch.testing.assert_close(found, torch.outer(line, line) / line.sum() ** 2, rtol=0, atol=1e-6)


def test_views_are_as_large_as_they_are_drawn_to_be():
    views = [View.drawn(key) for key in range(500)]
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.7, 1.3),
        ("saturation", 0.5, 1.5),
        ("hue", -0.06, 0.06),
        ("gamma", 0.7, 1.3),
        ("angle", -15, 15),
        ("scale", 0.9, 1.1),
        ("blur", 0.001, 0.5),
    ):
        values = torch.tensor([getattr(view, name) for view in views])
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
    shifts = torch.tensor([view.shift for view in views])
    assert (shifts.amax(0) <= 0.125).all()
    assert (shifts.amax(0) > 0.12).all()
    assert (shifts.amin(0) >= -0.125).all()
    assert (shifts.amin(0) < -0.12).all()
    assert all(sorted(view.order) == [0, 1, 2, 3, 4] for view in views)
    assert 200 < sum(view.mirrored for view in views) < 300
    assert len({view.order for view in views}) > 100


def test_a_view_is_the_same_in_half_precision():
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        half = random_view(images, Draw.of(4, 3))
    assert torch.equal(half, random_view(images, Draw.of(4, 3)))
