import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from support.pictures import levels_apart, pictures
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as tv

from cl_lightning.batch import Draw, mix
from cl_lightning.data import (
    AlternatingFlip,
    AugMix,
    AutoAugment,
    ColorJitter,
    Compose,
    Context,
    Cutout,
    Normalize,
    RandAugment,
    RandomCrop,
    RandomGrayscale,
    RandomHorizontalFlip,
    RandomResizedCrop,
    RandomRotation,
    RandomVerticalFlip,
    ToFloat,
    Transform,
    permute_pixels,
    rotate_images,
)
from cl_lightning.data import transforms as ours
from cl_lightning.data.pixels import resized_crop, shift_images
from cl_lightning.data.transforms import described

EXAMPLES: list[Transform] = [
    Compose([RandomCrop(2), RandomHorizontalFlip(), RandomHorizontalFlip(), ToFloat(), Normalize([0.5], [0.2])]),
    ToFloat(),
    Normalize([0.5], [0.2]),
    RandomCrop(2, "reflect"),
    RandomHorizontalFlip(),
    RandomVerticalFlip(),
    AlternatingFlip(),
    RandomResizedCrop(7),
    RandomResizedCrop(7, padding=3),
    RandomRotation(40),
    Cutout(4),
    ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
    RandomGrayscale(0.5),
    RandAugment(),
    AutoAugment(),
    AugMix(),
]
TO_FLOAT = (Compose, ToFloat, Normalize)


def names(transforms: list[Transform]) -> list[str]:
    return [type(transform).__name__ for transform in transforms]


def context(rows: int, epoch: int = 0, seed: int = 0) -> Context:
    return Context(torch.arange(rows), epoch, seed)


def subclasses(base: type) -> set[type]:
    return {base}.union(*(subclasses(child) for child in base.__subclasses__()))


# What every transform keeps to


def test_every_transform_has_an_example():
    modules = (ours.__name__, AutoAugment.__module__, AugMix.__module__)
    here = {item for item in subclasses(Transform) - {Transform} if item.__module__ in modules}
    assert here == {type(example) for example in EXAMPLES}


@pytest.mark.parametrize("transform", EXAMPLES, ids=names(EXAMPLES))
@pytest.mark.parametrize("channels", [1, 3])
def test_the_shares_of_two_processes_are_the_batch_of_one(transform, channels):
    images, draw, cut = pictures(16, channels), Draw.of(16, 3), 6
    whole = transform(images, draw, context(16, 1))
    shares = [
        transform(images[rows], replace(draw, start=rows.start, stop=rows.stop), Context(torch.arange(16)[rows], 1))
        for rows in (slice(0, cut), slice(cut, 16))
    ]
    torch.testing.assert_close(torch.cat(shares), whole, rtol=0, atol=1e-6 if whole.is_floating_point() else 0)


@pytest.mark.parametrize("transform", EXAMPLES, ids=names(EXAMPLES))
def test_the_key_decides_the_result_and_the_input_is_left_alone(transform):
    for images in (pictures(16), pictures(16).float() / 255):
        before = images.clone()
        result = transform(images, Draw.of(16, 1), context(16))
        assert torch.equal(images, before)
        assert torch.equal(result, transform(images, Draw.of(16, 1), context(16)))
        if not isinstance(transform, (ToFloat, Normalize, AlternatingFlip)):
            assert not torch.equal(result, transform(images, Draw.of(16, 2), context(16)))


@pytest.mark.parametrize("transform", EXAMPLES, ids=names(EXAMPLES))
def test_augmentations_keep_the_type_of_the_images_and_give_the_same_on_bytes_and_numbers(transform):
    images, draw = pictures(16), Draw.of(16, 1)
    result = transform(images, draw, context(16))
    assert result.dtype == (torch.float32 if isinstance(transform, TO_FLOAT) else torch.uint8)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-5), (torch.bfloat16, 0.02)):
        numbers = transform((images / 255).to(dtype), draw, context(16))
        assert numbers.dtype == dtype
        if isinstance(transform, TO_FLOAT):
            torch.testing.assert_close(numbers.float(), result, rtol=0, atol=5 * tolerance)
        elif isinstance(
            transform, AutoAugment | AugMix
        ):  # an equalised image shows how the operation before it was rounded
            assert dtype == torch.bfloat16 or ((numbers.float() - result / 255).abs() < 2 / 255).float().mean() > 0.9
        elif dtype != torch.bfloat16 or not isinstance(transform, RandAugment):  # thresholds turn rounding into jumps
            levels = 1.5 if isinstance(transform, RandAugment) else 0.5  # each of its two operations rounds bytes
            torch.testing.assert_close(numbers.float(), result / 255, rtol=0, atol=levels / 255 + tolerance)


@pytest.mark.parametrize("transform", EXAMPLES, ids=names(EXAMPLES))
def test_the_layout_in_memory_does_not_matter(transform):
    images, draw = pictures(16), Draw.of(16, 1)
    turned = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(transform(turned, draw, context(16)), transform(images, draw, context(16)))


@pytest.mark.parametrize("transform", EXAMPLES, ids=names(EXAMPLES))
def test_an_empty_share_gives_an_empty_batch(transform):
    assert len(transform(pictures(0), Draw(1, 4, 4, 8), context(0))) == 0


@pytest.mark.parametrize("transform", EXAMPLES, ids=names(EXAMPLES))
def test_work_is_done_on_the_device_of_the_images_and_never_waits_for_their_values(transform, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know the meta device
    images = pictures(16).to("meta")  # a device without values: reading one, or mixing it with the CPU, fails
    assert transform(images, Draw.of(16, 0), context(16)).device.type == "meta"


def test_each_row_is_transformed_on_its_own():
    images = pictures(1).expand(64, -1, -1, -1)
    for transform in (RandomCrop(2), RandomResizedCrop(8), RandomRotation(30), ColorJitter(0.4, 0.4, 0.4, 0.1)):
        assert len(transform(images, Draw.of(64, 0)).flatten(1).unique(dim=0)) > 10


def test_rows_and_draw_must_agree():
    with pytest.raises(ValueError, match="RandomCrop: 3 images, 4 rows"):
        RandomCrop()(pictures(3), Draw.of(4, 0))
    with pytest.raises(ValueError, match=r"RandomCrop: torch.int64 \(3, 3, 12, 10\)"):
        RandomCrop()(pictures(3).long(), Draw.of(3, 0))


def test_a_config_builds_a_list_of_transforms():
    parser = ArgumentParser()
    parser.add_argument("--transforms", type=list[Transform])
    arguments: list[dict[str, Any]] = [
        {"class_path": "cl_lightning.data.RandomResizedCrop", "init_args": {"size": [8, 6], "scale": [0.5, 1]}},
        {"class_path": "cl_lightning.data.ColorJitter", "init_args": {"brightness": 0.2, "hue": [0, 0.1]}},
        {"class_path": "cl_lightning.data.Normalize", "init_args": {"mean": [0.5, 0.4, 0.3], "std": [1, 1, 1]}},
    ]
    instantiate = (
        getattr(parser, "instantiate", None) or parser.instantiate_classes
    )  # its name before jsonargparse 4.49
    built = instantiate(parser.parse_object({"transforms": arguments})).transforms
    assert Compose(built)(pictures(4), Draw.of(4, 0)).shape == (4, 3, 8, 6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Compose([Normalize([0], [1]), RandAugment()]), "Compose: RandAugment after Normalize"),
        (lambda: Normalize([0.5, 0.5], [1.0]), "2 means, 1 stds"),
        (lambda: Normalize([], []), "0 means"),
        (lambda: Normalize([0.5], [0.0]), "std above 0"),
        (lambda: Normalize([125.3], [63.0]), "divide by 255"),
        (lambda: RandomCrop(0), "padding 0"),
        (lambda: RandomCrop(4, "wrap"), "mode wrap"),  # type: ignore[arg-type]
        (lambda: RandomHorizontalFlip(1.5), "p 1.5"),
        (lambda: RandomVerticalFlip(-0.5), "p -0.5"),
        (lambda: RandomResizedCrop(0), "size 0"),
        (lambda: RandomResizedCrop(8, scale=(0.5, 1.2)), "scale"),
        (lambda: RandomResizedCrop(8, ratio=(2, 1)), "ratio"),
        (lambda: RandomRotation(-5), "degrees -5"),
        (lambda: Cutout(0), "size 0"),
        (lambda: ColorJitter(brightness=-0.1), "brightness -0.1"),
        (lambda: ColorJitter(hue=0.6), "hue 0.6"),
        (lambda: RandAugment(magnitude=31), "magnitude 31 of 31 bins"),
    ],
)
def test_a_wrong_option_is_reported_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_what_depends_on_the_images_is_an_error_at_the_first_batch():
    with pytest.raises(ValueError, match="2 means, 3 channels"):
        Normalize([0.5, 0.5], [1.0, 1.0])(pictures(2), Draw.of(2, 0))
    with pytest.raises(ValueError, match="padding 10, images 12 x 10"):
        RandomCrop(10, "reflect")(pictures(2), Draw.of(2, 0))
    with pytest.raises(ValueError, match="4 channels"):
        RandomGrayscale()(pictures(2, channels=4), Draw.of(2, 0))


# Compose and Normalize


def test_compose_gives_each_place_its_own_numbers():
    images, draw = pictures(32), Draw.of(32, 5)
    expected = RandomCrop(2)(RandomCrop(2)(images, draw.fork(0)), draw.fork(1))
    assert torch.equal(Compose([RandomCrop(2), RandomCrop(2)])(images, draw), expected)
    assert torch.equal(Compose([])(images, draw), images)


def test_normalize_is_torchvisions_on_bytes_and_numbers():
    images, mean, std = pictures(4), [0.507, 0.487, 0.441], [0.268, 0.257, 0.276]
    expected = tv.normalize(images.double() / 255, mean, std)
    for given in (images, images.double() / 255):
        result = Normalize(mean, std)(given, Draw.of(4, 0))
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-6)
    single = Normalize([0.5], [0.25])(images, Draw.of(4, 0))
    torch.testing.assert_close(single, (images / 255 - 0.5) / 0.25)


# Geometry


@pytest.mark.parametrize(("mode", "fill"), [("zeros", "constant"), ("reflect", "reflect")])
def test_crops_are_torchvisions_crops_of_the_padded_image(mode, fill):
    images, padding = pictures(81), 4
    offsets = torch.cartesian_prod(torch.arange(9), torch.arange(9))
    padded = tv.pad(images, [padding], padding_mode=fill)
    expected = [tv.crop(row, int(y), int(x), *images.shape[-2:]) for row, (y, x) in zip(padded, offsets, strict=True)]
    assert torch.equal(shift_images(images, offsets - padding, mode), torch.stack(expected))


def test_every_offset_of_a_crop_is_equally_likely():
    places = torch.arange(1, 82, dtype=torch.uint8).view(1, 1, 9, 9).expand(8100, -1, -1, -1)
    centre = RandomCrop(4)(places, Draw.of(8100, 0))[:, 0, 4, 4]  # the centre shows each of the 81 pixels
    counts = torch.bincount(centre.long(), minlength=82)[1:]
    assert (counts - 100).square().sum() / 100 < 124.8  # chi-square, 80 degrees of freedom, 99.9 %


def test_flips_are_torchvisions_flips_of_the_drawn_rows():
    images, draw = pictures(64), Draw.of(64, 0)
    expected = [tv.horizontal_flip(row) if u < 0.3 else row for row, u in zip(images, draw.rand(), strict=True)]
    assert torch.equal(RandomHorizontalFlip(0.3)(images, draw), torch.stack(expected))
    assert torch.equal(RandomHorizontalFlip(0.0)(images, draw), images)
    assert torch.equal(RandomHorizontalFlip(1.0)(images, draw), images.flip(-1))
    turned = RandomHorizontalFlip(0.3)(images.transpose(-1, -2), draw).transpose(-1, -2)
    assert torch.equal(RandomVerticalFlip(0.3)(images, draw), turned)


def mirrored(indices: Tensor, epoch: int, key: int = 0, seed: int = 0) -> Tensor:
    row = torch.tensor([0, 1], dtype=torch.uint8).expand(len(indices), 1, 1, 2)
    return AlternatingFlip()(row, Draw.of(len(indices), key), Context(indices, epoch, seed))[:, 0, 0, 0] == 1


def test_two_consecutive_epochs_show_both_views_of_every_image_once():
    indices = torch.arange(10_000)
    first = mirrored(indices, epoch=0, key=1)
    for epoch in range(1, 5):
        assert torch.equal(mirrored(indices, epoch, key=1 + epoch), first ^ (epoch % 2 == 1))
    assert abs(first.float().mean() - 0.5) < 0.02
    assert abs((first[1:] == first[:-1]).float().mean() - 0.5) < 0.02


def test_the_coin_is_the_top_bit_of_splitmix64():
    indices, mask = [*range(200), 10**9, 2**40 + 3], (1 << 64) - 1

    def top_bit(index: int, seed: int) -> bool:
        z = (index * 0x9E3779B97F4A7C15 + mix(seed)) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        return bool(((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask & (1 << 63))

    for seed in (0, 7, 123456789):
        assert ours._coin(torch.tensor(indices), seed).tolist() == [top_bit(index, seed) for index in indices]


def test_the_coin_belongs_to_seed_and_index_not_to_the_batch():
    indices = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(mirrored(indices, 0, key=1), mirrored(torch.arange(1000), 0, key=2)[indices])
    assert abs((mirrored(indices, 0) == mirrored(indices, 0, seed=1)).float().mean() - 0.5) < 0.06


def test_samples_without_an_index_flip_at_random():
    memory = torch.full((1000,), -1)
    assert abs(mirrored(memory, 0).float().mean() - 0.5) < 0.06
    assert abs((mirrored(memory, 0, key=1) == mirrored(memory, 1, key=2)).float().mean() - 0.5) < 0.06


def test_alternating_flip_asks_for_its_context():
    with pytest.raises(ValueError, match="AlternatingFlip: no context"):
        AlternatingFlip()(pictures(2), Draw.of(2, 0))


def test_boxes_are_distributed_as_torchvisions():
    scale, ratio, size = (0.08, 1.0), (3 / 4, 4 / 3), (40, 32)
    ours_ = RandomResizedCrop(8, scale, ratio).boxes(Draw.of(20_000, 0), *size).double()
    torch.manual_seed(0)
    reference = v2.RandomResizedCrop(8, scale, ratio)
    image = torch.zeros(1, *size)
    drawn = [reference.make_params([image]) for _ in range(4000)]
    theirs = torch.tensor([[box[key] for key in ("top", "left", "height", "width")] for box in drawn]).double()
    error = (theirs.var(0) / len(theirs) + ours_.var(0) / len(ours_)).sqrt()
    assert ((ours_.mean(0) - theirs.mean(0)).abs() < 4 * error).all()
    torch.testing.assert_close(ours_.std(0), theirs.std(0), rtol=0.06, atol=0)
    for axis in (0, 1):  # a box touches either border equally often
        start, rest = ours_[:, axis], size[axis] - ours_[:, axis] - ours_[:, axis + 2]
        assert torch.minimum(start, rest).min() == 0
        assert abs((start == 0).double().mean() - (rest == 0).double().mean()) < 0.02
    assert (ours_[:, 2:].prod(1) / math.prod(size)).max() > 0.95


@pytest.mark.parametrize("size", [(4, 64), (64, 4)])
def test_where_no_box_fits_the_centre_is_taken(size):
    boxes = RandomResizedCrop(8, scale=(0.9, 1.0)).boxes(Draw.of(5, 0), *size)
    box = v2.RandomResizedCrop(8, scale=(0.9, 1.0)).make_params([torch.zeros(1, *size)])
    expected = torch.tensor([box[key] for key in ("top", "left", "height", "width")])
    assert torch.equal(boxes, expected.expand(5, 4))


@pytest.mark.parametrize("antialias", [True, False])
def test_resized_crops_are_torchvisions(antialias):
    images = pictures(40, height=30, width=24).double() / 255
    boxes = RandomResizedCrop(8).boxes(Draw.of(40, 0), 30, 24)
    for size in ((8, 8), (6, 20), (40, 50)):
        expected = [
            tv.resized_crop(image, *box.tolist(), size=list(size), antialias=antialias)
            for image, box in zip(images, boxes, strict=True)
        ]
        torch.testing.assert_close(resized_crop(images, boxes, size, antialias), torch.stack(expected))


def test_resizing_keeps_its_precision_under_autocast():
    images, transform, draw = pictures(4), RandomResizedCrop(8), Draw.of(4, 0)
    expected = transform(images, draw)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(transform(images, draw), expected)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_rotations_are_torchvisions(mode):
    images = pictures(1).double() / 255
    for angle in (-170.0, -33.0, 7.5, 90.0, 120.0):
        expected = tv.rotate(images, angle, InterpolationMode(mode))
        torch.testing.assert_close(rotate_images(images, angle, mode), expected)
        fixed = RandomRotation((angle, angle), mode)(images, Draw.of(1, 0))
        torch.testing.assert_close(fixed, expected, rtol=0, atol=1e-4)


def test_quarter_turns_of_square_images_lose_nothing():
    images = pictures(5, height=28, width=28)
    for turns in range(4):
        assert torch.equal(rotate_images(images, 90 * turns), torch.rot90(images, turns, (-2, -1)))


def test_a_domain_has_one_permutation_for_all_images_and_channels():
    images = pictures(6, height=5, width=4)
    permuted = permute_pixels(images, seed=3)
    order = permute_pixels(torch.arange(20).view(5, 4), seed=3).flatten()
    assert torch.equal(order.sort().values, torch.arange(20))
    assert torch.equal(permuted.flatten(2), images.flatten(2)[:, :, order])
    assert not torch.equal(permuted, permute_pixels(images, seed=4))
    assert permute_pixels(torch.arange(9).view(3, 3), seed=0).tolist() == [[3, 1, 2], [7, 5, 8], [4, 0, 6]]


def test_cutout_blackens_a_square_centred_on_each_pixel_with_equal_probability():
    images, size = torch.ones(9000, 2, 10, 10), 4
    black = Cutout(size)(images, Draw.of(9000, 0)) == 0
    assert torch.equal(black[:, 0], black[:, 1])
    heights, widths = black[:, 0].any(2).sum(1), black[:, 0].any(1).sum(1)
    assert torch.equal(black[:, 0].sum((1, 2)), heights * widths)
    for counts in (heights, widths):  # cut to 2 at the start, to 3 next to it and at the end
        share = torch.bincount(counts, minlength=size + 1) / 9000
        torch.testing.assert_close(share, torch.tensor([0, 0, 0.1, 0.2, 0.7]), rtol=0, atol=0.02)
    corner = ((heights == 2) & (widths == 2)).float().mean()  # the two axes are independent
    assert abs(corner - 1 / 100) < 0.005


# Colours


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("brightness", tv.adjust_brightness),
        ("contrast", tv.adjust_contrast),
        ("saturation", tv.adjust_saturation),
        ("hue", tv.adjust_hue),
    ],
)
def test_each_part_of_the_jitter_is_torchvisions(name, reference):
    images = pictures(8).float() / 255
    images[0], images[1, 0] = 0.5, images[1, 1]  # grey, and ties between channels
    for amount in (-0.5, -0.2, 0.0, 0.3, 0.5) if name == "hue" else (0.0, 0.4, 1.0, 1.7):
        result = ColorJitter(**{name: (amount, amount)})(images, Draw.of(8, 0))
        torch.testing.assert_close(result, reference(images, amount), rtol=0, atol=1e-5)


def test_the_amounts_of_the_jitter_fill_their_range():
    images = torch.full((4000, 3, 1, 1), 0.5)
    factors = ColorJitter(brightness=0.4)(images, Draw.of(4000, 0))[:, 0, 0, 0] / 0.5
    assert 0.6 <= factors.min() < 0.61
    assert 1.39 < factors.max() <= 1.4
    assert abs(factors.mean() - 1) < 0.015
    changed = (ColorJitter(brightness=0.4, p=0.3)(images, Draw.of(4000, 0)) != images).flatten(1).any(1)
    assert abs(changed.float().mean() - 0.3) < 0.03


PAIRS = {
    "brightness-contrast": ({"brightness": 1.5}, {"contrast": 0.5}),
    "saturation-hue": ({"saturation": 1.8}, {"hue": 0.2}),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_the_order_of_the_jitter_is_drawn_for_each_image(pair):
    images = pictures(1).float().expand(200, -1, -1, -1) / 255
    parts = [(name, amount) for part in PAIRS[pair] for name, amount in part.items()]
    result = ColorJitter(**{name: (amount, amount) for name, amount in parts})(images, Draw.of(200, 0))
    share = []
    for order in (parts, parts[::-1]):
        expected = images[:1]
        for name, amount in order:
            expected = getattr(tv, f"adjust_{name}")(expected, amount)
        share.append((result - expected).abs().amax((1, 2, 3)) < 1e-5)
    assert (share[0] ^ share[1]).all()
    assert 70 < share[0].sum() < 130


def test_transforms_that_differ_in_a_late_digit_are_not_the_same():
    assert described(ColorJitter(0.4)) == described(ColorJitter(0.4))
    assert described(ColorJitter(0.4)) != described(ColorJitter(0.400001))


def test_a_jitter_of_nothing_changes_nothing():
    images = pictures(4)
    assert torch.equal(ColorJitter()(images, Draw.of(4, 0)), images)


def test_grey_is_torchvisions_grey():
    images, draw = pictures(200), Draw.of(200, 0)
    grey = tv.rgb_to_grayscale(images, num_output_channels=3)
    assert levels_apart(RandomGrayscale(1.0)(images, draw), grey).max() <= 1
    changed = (RandomGrayscale(0.3)(images, draw) != images).flatten(1).any(1)
    assert torch.equal(changed, draw.rand() < 0.3)


def test_defaults_are_the_usual_ones_and_limits_hold_for_each_channel():
    assert (RandomCrop().padding, RandomHorizontalFlip().p) == (4, 0.5)
    crop = RandomResizedCrop(32)
    assert (crop.scale, crop.ratio) == ((0.08, 1.0), (3 / 4, 4 / 3))  # of torchvision
    assert RandomCrop(1)(torch.zeros(2, 3, 8, 8), Draw.of(2, 0)).shape == (2, 3, 8, 8)
    assert Normalize([1.0, 0.2], [1.0, 0.1]).std == (1.0, 0.1)
    for mean, std in (([0.5, 0.5], [0.2, 0.0]), ([0.5, 1.1], [0.2, 0.2]), ([0.5, 0.5], [0.2, 1.5])):
        with pytest.raises(ValueError, match="std above 0 and both at most 1"):
            Normalize(mean, std)


def test_boxes_have_the_given_areas_and_a_ratio_of_1_is_square():
    draw = Draw.of(4000, 1)
    areas = RandomResizedCrop(8, scale=(0.2, 0.4)).boxes(draw, 200, 200)[:, 2:].prod(1) / 200**2
    assert 0.197 < areas.min() < 0.203
    assert 0.397 < areas.max() < 0.403
    assert float(areas.mean()) == pytest.approx(0.3, abs=0.005)
    tall, wide = RandomResizedCrop(8, ratio=(1.0, 1.0)).boxes(draw, 50, 50)[:, 2:].unbind(1)
    assert torch.equal(tall, wide)


def test_angles_are_uniform_in_their_range(monkeypatch):
    angles = []
    monkeypatch.setattr(ours.pixels, "rotate", lambda values, angle, interpolation: (angles.append(angle), values)[1])
    draw, images = Draw.of(4000, 2), torch.zeros(4000, 1, 2, 2)
    for degrees, low, high in (((20.0, 40.0), 20, 40), (15.0, -15, 15)):
        RandomRotation(degrees)(images, draw)
        angle = angles.pop()
        assert low <= angle.min() < low + 0.05 < high - 0.05 < angle.max() <= high
        assert float(angle.double().mean()) == pytest.approx((low + high) / 2, abs=0.5)


def test_a_jitter_has_the_bounds_of_torchvision():
    jitter = ColorJitter(0.4, 1.5, (0.5, 0.7), 0.1)
    found = dict(zip(jitter.columns.tolist(), jitter.bounds.tolist(), strict=True))  # less the neutral value
    torchvision = v2.ColorJitter(0.4, 1.5, (0.5, 0.7), 0.1)
    for column, name, neutral in ((0, "brightness", 1), (2, "contrast", 1), (1, "saturation", 1), (3, "hue", 0)):
        assert [bound + neutral for bound in found[column]] == pytest.approx(getattr(torchvision, name))
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match="ColorJitter: p "):
            ColorJitter(0.4, p=p)


def test_the_centre_of_a_cutout_is_uniform_over_the_pixels():
    found = Cutout(4)(torch.ones(20_000, 1, 8, 8), Draw.of(20_000, 3))
    covered = (found == 0).any(dim=3).float().mean(dim=(0, 1))  # by row; a centre c covers the rows c - 2 .. c + 1
    torch.testing.assert_close(covered, torch.tensor([3, 4, 4, 4, 4, 4, 3, 2]) / 8, rtol=0, atol=0.02)
