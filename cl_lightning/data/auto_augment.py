"""AutoAugment with the policy that was learnt on CIFAR-10 (Cubuk et al., CVPR 2019, arXiv:1805.09501)."""

import torch
from torch import Tensor

from cl_lightning.batch import Draw
from cl_lightning.data import pixels
from cl_lightning.data.transforms import OPERATIONS, Context, Transform, change

Change = tuple[str, float, int]
# Sub-policies of table 7: two operations, each with its probability and its strength of 0 .. 9; None: no strength.
CIFAR10_POLICY: tuple[tuple[Change, Change], ...] = (
    (("Invert", 0.1, 0), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 0), ("Equalize", 0.9, 0)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 0), ("Equalize", 0.5, 0)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 0), ("AutoContrast", 0.4, 0)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 0)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 0), ("Equalize", 0.6, 0)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 0)),
    (("AutoContrast", 0.8, 0), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 0)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 0), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 0), ("Invert", 0.1, 0)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 0)),
)
_LARGEST = 9
_NAMES = list(OPERATIONS)


def _row(name: str, probability: float, strength: int) -> tuple[int, float, float, bool]:
    """Index into ``OPERATIONS``, probability, amount, and whether the sign of the amount is random."""
    if name == "Invert":  # every value is at least the threshold of the strongest solarisation
        name, strength = "Solarize", _LARGEST
    most, signed = OPERATIONS[name]
    return _NAMES.index(name), probability, most * strength / _LARGEST, signed


# Of the first and of the second operation of all sub-policies.
_COLUMNS = [
    tuple(torch.tensor(column) for column in zip(*(_row(*policy[place]) for policy in CIFAR10_POLICY), strict=True))
    for place in range(2)
]


class AutoAugment(Transform):
    """Apply one of 25 pairs of operations to each image, each operation with its probability (arXiv:1805.09501).

    The policy for CIFAR-10, with the ranges of torchvision: the amount of strength m is m / 9 of the amount at full
    strength, and its sign is random where the operation has one. Geometric operations use nearest-neighbour
    interpolation and fill with black. The code of PyCIL and FOSTER fills with grey (128) and shears with bicubic
    interpolation.
    """

    needs_pixels = True

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        pair = draw.fork(0).randint(len(CIFAR10_POLICY))  # (B,)
        chance, sign = draw.fork(1).rand(2), draw.fork(2).rand(2) < 0.5  # (B, 2) each
        result = images if images.dtype == torch.uint8 else pixels.values_of(images)
        for place, columns in enumerate(_COLUMNS):
            chosen, probability, amount, signed = (column[pair] for column in columns)
            applied = chance[:, place] < probability
            amount = torch.where(signed & sign[:, place], -amount, amount)
            result = change(result, torch.where(applied, chosen, 0), torch.where(applied, amount, 0.0))
        return result.to(images.dtype)
