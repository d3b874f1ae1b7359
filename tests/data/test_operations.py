"""Transforms that draw operations, AutoAugment and RandAugment, and crops of padded images."""

import math

import pytest
import torch
from support.pictures import levels_apart, pictures
from torch import Tensor
from torchvision.transforms import AutoAugmentPolicy, v2
from torchvision.transforms.v2 import functional as tv

from cl_lightning.batch import Draw
from cl_lightning.data import AutoAugment, RandAugment, RandomResizedCrop
from cl_lightning.data import auto_augment as module
from cl_lightning.data.transforms import OPERATIONS, change


def smooth(rows: int, side: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (rows, 3, side // 2, side // 2), dtype=torch.uint8, generator=generator)
    return tv.resize(coarse, [side, side], antialias=True)


def test_the_policy_is_torchvisions() -> None:
    theirs = v2.AutoAugment(AutoAugmentPolicy.CIFAR10)
    ours = [tuple((name, p, strength or None) for name, p, strength in pair) for pair in module.CIFAR10_POLICY]
    assert ours == [tuple((name, p, strength or None) for name, p, strength in pair) for pair in theirs._policies]


def test_the_amounts_are_torchvisions() -> None:
    space = v2.AutoAugment._AUGMENTATION_SPACE
    names = list(OPERATIONS)
    for pair in module.CIFAR10_POLICY:
        for name, probability, strength in pair:
            index, p, amount, signed = module._row(name, probability, strength)
            numbers, theirs_signed = space[name]
            values = numbers(10, 331, 331)
            assert (p, names[index]) == (probability, "Solarize" if name == "Invert" else name)
            assert signed == theirs_signed
            if name == "Solarize":
                assert abs(1 - amount - float(values[strength])) < 1e-6  # a threshold
            elif name == "Posterize":
                assert 8 - round(amount) == int(values[strength])  # bits that stay
            elif name == "Invert":
                assert amount == 1
            else:
                scale = 331 if name.startswith("Translate") else 1  # here a share of the side
                assert abs(amount * scale - (float(values[strength]) if values is not None else 0)) < 1e-4


def test_inversion_is_the_strongest_solarisation() -> None:
    images = smooth(3)
    index, _, amount, _ = module._row("Invert", 1.0, 0)
    changed = change(images, torch.full((3,), index), torch.full((3,), amount))
    assert torch.equal(changed, 255 - images)


def test_operations_follow_the_pair_the_chances_and_the_signs_that_are_drawn() -> None:
    rows = 400
    images, draw = smooth(rows), Draw.of(rows, 5)
    pairs, chance = draw.fork(0).randint(25), draw.fork(1).rand(2)
    negative = draw.fork(2).rand(2) < 0.5
    expected = images.clone()
    for row in range(rows):
        for place in range(2):
            name, probability, strength = module.CIFAR10_POLICY[int(pairs[row])][place]
            if chance[row, place] < probability:
                index, _, amount, signed = module._row(name, probability, strength)
                amount = -amount if signed and negative[row, place] else amount
                expected[row] = change(expected[row : row + 1], torch.tensor([index]), torch.tensor([amount]))[0]
    assert torch.equal(AutoAugment()(images, draw), expected)


def test_it_changes_images_as_much_as_torchvisions() -> None:
    image = smooth(1)
    torch.manual_seed(0)
    reference = v2.AutoAugment(AutoAugmentPolicy.CIFAR10)
    theirs = torch.cat([reference(image) for _ in range(1000)])
    result = AutoAugment()(image.expand(4000, -1, -1, -1), Draw.of(4000, 0))
    change_ = [(batch.int() - image.int()).abs().float().mean((1, 2, 3)) for batch in (result, theirs)]
    error = (change_[0].var() / 4000 + change_[1].var() / 1000).sqrt()
    assert abs(change_[0].mean() - change_[1].mean()) < 4 * error
    torch.testing.assert_close(change_[0].std(), change_[1].std(), rtol=0.1, atol=0)


def test_a_padded_crop_is_the_crop_of_the_padded_image() -> None:
    images, draw = smooth(50), Draw.of(50, 1)
    padded = tv.pad(images, [4])
    expected = RandomResizedCrop(32)(padded, draw)
    assert torch.equal(RandomResizedCrop(32, padding=4)(images, draw), expected)
    assert not torch.equal(RandomResizedCrop(32)(images, draw), expected)
    assert (expected[:, :, 0] == 0).all(dim=(1, 2)).any()  # some boxes begin in the black border


# RandAugment


STRENGTH = 9 / 30
REFERENCE = {
    "Identity": lambda x, sign: x,
    "ShearX": lambda x, sign: tv.affine(x, 0, [0, 0], 1, [math.degrees(math.atan(sign * 0.09)), 0], center=[0, 0]),
    "ShearY": lambda x, sign: tv.affine(x, 0, [0, 0], 1, [0, math.degrees(math.atan(sign * 0.09))], center=[0, 0]),
    "TranslateX": lambda x, sign: tv.affine(x, 0, [int(sign * 150 / 331 * STRENGTH * x.shape[-1]), 0], 1, [0, 0]),
    "TranslateY": lambda x, sign: tv.affine(x, 0, [0, int(sign * 150 / 331 * STRENGTH * x.shape[-2])], 1, [0, 0]),
    "Rotate": lambda x, sign: tv.rotate(x, sign * 30 * STRENGTH),
    "Brightness": lambda x, sign: tv.adjust_brightness(x, 1 + sign * 0.9 * STRENGTH),
    "Color": lambda x, sign: tv.adjust_saturation(x, 1 + sign * 0.9 * STRENGTH),
    "Contrast": lambda x, sign: tv.adjust_contrast(x, 1 + sign * 0.9 * STRENGTH),
    "Sharpness": lambda x, sign: tv.adjust_sharpness(x, 1 + sign * 0.9 * STRENGTH),
    "Posterize": lambda x, sign: tv.posterize(x, 8 - round(4 * STRENGTH)),
    "Solarize": lambda x, sign: tv.solarize(x, 255 * (1 - STRENGTH)),
    "AutoContrast": lambda x, sign: tv.autocontrast(x),
    "Equalize": lambda x, sign: tv.equalize(x),
}


@pytest.mark.parametrize("size", [(40, 32), (12, 10)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_of_randaugment_is_torchvisions(name, size):
    most, signed = OPERATIONS[name]
    images = pictures(6, 3, *size)
    images[1] = images[1] // 3 + 60  # low contrast
    images[2] = 90  # one colour
    images[3] = (torch.linspace(0, 1, size[1]).square() * 255).byte()
    for sign in (1, -1) if signed else (1,):
        chosen, amount = torch.full((6,), list(OPERATIONS).index(name)), torch.full((6,), sign * most * STRENGTH)
        numbers = (change(images / 255, chosen, amount) * 255).round().byte()
        for result in (change(images, chosen, amount), numbers):
            # Not all: a coordinate may fall half way between two pixels, where rounding decides.
            assert (levels_apart(result, REFERENCE[name](images, sign)) <= 1).float().mean() > 0.99


def test_the_table_of_operations_is_torchvisions():
    space = v2.RandAugment._AUGMENTATION_SPACE
    assert list(OPERATIONS) == list(space) == list(REFERENCE)
    assert [signed for _, signed in OPERATIONS.values()] == [signed for _, signed in space.values()]


def test_randaugment_changes_images_as_much_as_torchvisions():
    image = pictures(1, height=16, width=16)
    smooth = tv.resize(image, [32, 32], antialias=True)
    torch.manual_seed(0)
    reference = v2.RandAugment()
    theirs = torch.cat([reference(smooth) for _ in range(1000)])
    result = RandAugment()(smooth.expand(8000, -1, -1, -1), Draw.of(8000, 0))
    change = [levels_apart(batch, smooth).float().mean((1, 2, 3)) for batch in (result, theirs)]
    error = (change[0].var() / 8000 + change[1].var() / 1000).sqrt()
    assert abs(change[0].mean() - change[1].mean()) < 4 * error
    torch.testing.assert_close(change[0].std(), change[1].std(), rtol=0.1, atol=0)
    same = [(amount == 0).float().mean() for amount in change]
    assert abs(same[0] - same[1]) < 0.025
    assert torch.equal(RandAugment(num_ops=0)(image, Draw.of(1, 0)), image)


def test_the_sign_of_an_operation_is_a_fair_coin_for_each_image():
    pixel = torch.full((28_000, 1, 1, 1), 128 / 255)  # of one pixel, brightness alone changes this grey
    result = RandAugment(num_ops=1)(pixel, Draw.of(28_000, 0)).flatten() * 255 / 128
    for factor in (0.73, 1.27):
        assert abs(((result - factor).abs() < 1e-4).sum() - 1000) < 130
