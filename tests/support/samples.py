"""Streams of samples that are no images: vectors, sequences, maps and tokens of the digits of the suite."""

from typing import Any

import torch

from cl_lightning.data import ArraySource, Kind, SampleSource
from cl_lightning.testing.bench import TinyDigits


class OtherDigits(TinyDigits):
    """The stream of the suite, whose images are given as samples of another kind.

    A vector has the 64 grey values, a sequence 8 channels of length 8, an image is a map of 8 x 8 floating-point
    numbers, and tokens are the 64 grey values in 17 steps.

    Args:
        kind: What a sample is.
        options: Options of ``TinyDigits``.
    """

    _any_kind = True

    def __init__(self, kind: Kind, **options: Any) -> None:
        super().__init__(**{"transforms": [], "mean": [5.0], "std": [6.0], **options})
        self.of_kind = kind

    def source(self, *, train: bool) -> SampleSource:
        digits = super().source(train=train)
        values = torch.round(digits.take(torch.arange(len(digits.labels))).squeeze(1) * (16 / 255))
        samples = values.flatten(1) if self.of_kind in ("vector", "tokens") else values
        if self.of_kind == "tokens":
            samples = samples.long()
        if self.of_kind == "image":
            samples = samples.unsqueeze(1)
        return ArraySource(samples, digits.labels, kind=self.of_kind, class_names=digits.class_names)
