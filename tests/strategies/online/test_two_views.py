"""What the contrastive methods for online streams share: two views of each sample, and the means of a memory."""

import pytest
import torch

from cl_lightning.batch import Draw
from cl_lightning.strategies.online.two_views import strong_augmentation


def test_the_strong_view_has_the_numbers_of_the_paper():
    crop, flip, jitter, grey = strong_augmentation(24, 32).transforms
    assert (crop.size, crop.scale, crop.ratio) == ((24, 32), (0.2, 1.0), (3 / 4, 4 / 3))
    assert (flip.p, jitter.p, grey.p) == (0.5, 0.8, 0.2)
    bounds = dict(zip(jitter.columns.tolist(), jitter.bounds[:, 1].tolist(), strict=True))
    assert bounds == pytest.approx({0: 0.4, 1: 0.4, 2: 0.4, 3: 0.1})  # brightness, saturation, contrast, hue


def test_the_strong_view_differs_from_row_to_row_and_is_the_same_for_the_same_draw():
    image = torch.randint(256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images, transform = image.expand(64, -1, -1, -1), strong_augmentation(16, 16)
    once, again, other = (transform(images, Draw.of(64, key)) for key in (1, 1, 2))
    assert once.shape == images.shape
    assert once.dtype == torch.uint8
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert len(torch.unique(once.flatten(1), dim=0)) == 64
    grey = (once[:, :1] == once).all(dim=(1, 2, 3)).double().mean()  # a grey image has three equal channels
    assert 0.08 < float(grey) < 0.35
