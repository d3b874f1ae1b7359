"""AugMix: chains of random operations, mixed with each other and with the image (Hendrycks et al., ICLR 2020).

    x' = m x + (1 - m) sum_k w_k g_k(x),   w ~ Dirichlet(1, .., 1),   m ~ Beta(1, 1)

Each of the chains g_k applies 1 to 3 operations, drawn with replacement. arXiv:1912.02781.
"""

import torch
from torch import Tensor

from cl_lightning.batch import Draw
from cl_lightning.data import pixels
from cl_lightning.data.transforms import OPERATIONS, Context, Transform, change

# Amount at level 0 and slope of the amount at level 10, without operations that the corruptions of benchmarks use.
STRENGTHS: dict[str, tuple[float, float]] = {
    "AutoContrast": (0.0, 0.0),
    "Equalize": (0.0, 0.0),
    "Posterize": (4.0, 4.0),
    "Rotate": (0.0, 30.0),
    "Solarize": (0.0, 1.0),
    "ShearX": (0.0, 0.3),
    "ShearY": (0.0, 0.3),
    "TranslateX": (0.0, 1 / 3),
    "TranslateY": (0.0, 1 / 3),
}
_PLACES = torch.tensor([list(OPERATIONS).index(name) for name in STRENGTHS])
_LEAST, _SLOPE = (torch.tensor(column) for column in zip(*STRENGTHS.values(), strict=True))
_SIGNED = torch.tensor([OPERATIONS[name][1] for name in STRENGTHS])
_WHOLE = torch.tensor([name == "Posterize" for name in STRENGTHS])
_LOWEST = 0.1  # level


class AugMix(Transform):
    """Mix an image with chains of random operations on it (arXiv:1912.02781).

    The operations are those of the authors without changes of colour, contrast, brightness and sharpness; their ranges
    are recalled, not read. The level of an operation is uniform between 0.1 and ``severity``; at level 10 an image is
    rotated by 30 degrees, sheared by 0.3, shifted by a third of its side, and all values are inverted. The sign of
    geometric operations is random. Interpolation is by nearest neighbour. Images in [0, 1] stay in [0, 1]; for a linear
    normalisation, mixing before it equals mixing after it.

    Args:
        severity: Highest level, in [0.1, 10].
        width: Number of chains, at least 1.
        depth: Number of operations of each chain, at least 1; None to draw 1, 2 or 3 for each chain.
    """

    needs_pixels = True

    def __init__(self, severity: float = 3.0, width: int = 3, depth: int | None = None) -> None:
        if not (_LOWEST <= severity <= 10 and width >= 1 and (depth is None or depth >= 1)):
            raise ValueError(
                f"AugMix: severity {severity}, width {width}, depth {depth}; give a severity in [0.1, 10], width and "
                "depth of at least 1"
            )
        self.severity, self.width, self.depth = severity, width, depth

    def apply(self, images: Tensor, draw: Draw, context: Context | None) -> Tensor:
        longest, count, shape = self.depth or 3, self.width, (self.width, self.depth or 3)
        chosen = draw.fork(0).randint(len(STRENGTHS), *shape)  # (B, width, depth)
        level = _LOWEST + (self.severity - _LOWEST) * draw.fork(1).rand(*shape)
        amounts = _SLOPE[chosen] * (level / 10)
        amounts = _LEAST[chosen] + torch.where(_WHOLE[chosen], amounts.floor(), amounts)
        amounts = torch.where(_SIGNED[chosen] & (draw.fork(2).rand(*shape) < 0.5), -amounts, amounts)
        places = _PLACES[chosen]
        if self.depth is None:
            beyond = torch.arange(longest) > draw.fork(3).randint(3, count)[..., None]
            places, amounts = places.masked_fill(beyond, 0), amounts.masked_fill(beyond, 0.0)
        start = images if images.dtype == torch.uint8 else pixels.values_of(images)
        chains = start.repeat(count, 1, 1, 1)  # the first chain of all images, the second one, ...
        for place in range(longest):
            chains = change(chains, places[..., place].T.flatten(), amounts[..., place].T.flatten())
        weights = (-torch.log1p(-draw.fork(4).rand(count))).clamp(min=1e-12)  # normalised exponentials are Dirichlet(1)
        weights = pixels.to_device_of(weights / weights.sum(dim=1, keepdim=True), images)  # (B, width)
        remains = pixels.to_device_of(draw.fork(5).rand(), images)[:, None, None, None]  # Beta(1, 1) is uniform
        values = pixels.values_of(chains).view(count, *images.shape)
        mixed = (weights.T[..., None, None, None] * values).sum(dim=0)
        return pixels.like(torch.lerp(mixed, pixels.values_of(images), remains), images)
