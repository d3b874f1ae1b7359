"""AugMix: the amounts of its operations, the mixture against a plain loop, and the distribution of its weights."""

import math

import pytest
import torch
from support.pictures import pictures
from torchvision.transforms.v2 import functional as tv

from cl_lightning.batch import Draw
from cl_lightning.data import AugMix
from cl_lightning.data import aug_mix as module

# In the order of the draw.
NAMES = "AutoContrast Equalize Posterize Rotate Solarize ShearX ShearY TranslateX TranslateY"


def operation(image: torch.Tensor, name: str, level: float, negative: bool) -> torch.Tensor:
    """An operation on uint8 ``(C, H, W)`` by torchvision, with the ranges of the authors' code."""
    sign, (height, width) = (-1 if negative else 1), image.shape[1:]
    if name == "AutoContrast":
        return tv.autocontrast(image)
    if name == "Equalize":
        return tv.equalize(image)
    if name == "Posterize":
        return tv.posterize(image, 4 - int(level * 4 / 10))
    if name == "Solarize":
        return tv.solarize(image, 255 * (1 - level / 10))
    if name == "Rotate":
        return tv.rotate(image, sign * level * 30 / 10)
    slope = math.degrees(math.atan(sign * level * 0.3 / 10))
    if name == "ShearX":
        return tv.affine(image, 0.0, [0, 0], 1.0, [slope, 0.0], center=[0, 0])
    if name == "ShearY":
        return tv.affine(image, 0.0, [0, 0], 1.0, [0.0, slope], center=[0, 0])
    right = int(level * width / 30) if name == "TranslateX" else 0
    down = int(level * height / 30) if name == "TranslateY" else 0
    return tv.affine(image, 0.0, [sign * right, sign * down], 1.0, [0.0, 0.0])


@pytest.mark.parametrize(("severity", "width", "depth"), [(3.0, 3, None), (10.0, 2, 2), (7.0, 1, 1)])
def test_it_is_the_mixture_of_a_plain_loop(severity, width, depth):
    rows, longest = 40, depth or 3
    images, draw = pictures(rows, height=20, width=16), Draw.of(rows, 4)
    chosen, levels = draw.fork(0).randint(9, width, longest), draw.fork(1).rand(width, longest)
    negative, lengths = draw.fork(2).rand(width, longest) < 0.5, draw.fork(3).randint(3, width) + 1
    uniform, remains = draw.fork(4).rand(width), draw.fork(5).rand()
    result = AugMix(severity, width, depth)(images, draw)
    right = 0
    for row in range(rows):
        shares = [-math.log(1 - float(u)) for u in uniform[row]]
        mixed = torch.zeros(images.shape[1:])
        for chain in range(width):
            image = images[row]
            for place in range(depth or int(lengths[row, chain])):
                level = 0.1 + (severity - 0.1) * float(levels[row, chain, place])
                name = NAMES.split()[chosen[row, chain, place]]
                image = operation(image, name, level, bool(negative[row, chain, place]))
            mixed += shares[chain] / sum(shares) * image.float()
        m = float(remains[row])
        expected = m * images[row].float() + (1 - m) * mixed
        apart = (result[row].float() - expected).abs()
        right += bool((apart < 1.6).float().mean() > 0.97)  # nearest neighbours and thresholds can differ by rounding
    assert right == rows


def test_values_stay_in_range():
    numbers = AugMix(10.0)(pictures(200).double() / 255, Draw.of(200, 1))
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) <= 1 + 1e-6


def test_the_shares_of_chains_and_of_the_image_are_those_of_their_distributions(monkeypatch):
    """With chains whose results are the constants 0, 1 and 2, on a black image."""

    def constant(chains: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.arange(3.0).double().repeat_interleave(len(chains) // 3).view(-1, 1, 1, 1)

    monkeypatch.setattr(module, "change", constant)
    count = 20_000
    result = AugMix(width=3, depth=1)(torch.zeros(count, 1, 1, 1, dtype=torch.float64), Draw.of(count, 2)).flatten()
    # (1 - m) (w_2 + 2 w_3): means 1/2 and 1; E (1 - m)^2 = 1/3, E (w_2 + 2 w_3)^2 = (2 + 8 + 4) / 12.
    assert float(result.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(result.square().mean()) == pytest.approx(14 / 36, abs=0.01)


@pytest.mark.parametrize(("given", "words"), [((0.0,), "severity 0"), ((3.0, 0), "width 0"), ((3.0, 3, 0), "depth 0")])
def test_options_out_of_range_are_errors(given, words):
    with pytest.raises(ValueError, match=words):
        AugMix(*given)
