"""Images of shapes on textures, drawn by a program: classes of pixels, or several labels per image."""

import colorsys
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np

from cl_lightning.checks import at_least, one_of, within
from cl_lightning.data import RandomHorizontalFlip, Targets, TensorSource, Transform
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.stream import DatasetInfo, LabelSets, Scenario

Grid = np.ndarray
_SHAPES: dict[str, Callable[[Grid, Grid], Grid]] = {
    "disk": lambda u, v: u**2 + v**2 < 0.81,
    "bar": lambda u, v: (abs(u) < 1) & (abs(v) < 0.28),
    "ring": lambda u, v: (u**2 + v**2 < 0.9) & (u**2 + v**2 > 0.3),
    "square": lambda u, v: np.maximum(abs(u), abs(v)) < 0.75,
    "cross": lambda u, v: ((abs(u) < 0.25) & (abs(v) < 0.95)) | ((abs(v) < 0.25) & (abs(u) < 0.95)),
    "triangle": lambda u, v: (v > -0.6) & (v < 0.9 - 1.6 * abs(u)),
    "half disk": lambda u, v: (u**2 + v**2 < 0.95) & (v > 0),
    "frame": lambda u, v: (np.maximum(abs(u), abs(v)) < 0.85) & (np.maximum(abs(u), abs(v)) > 0.5),
    "corner": lambda u, v: (np.maximum(abs(u), abs(v)) < 0.85) & ((u < -0.35) | (v < -0.35)),
    "star": lambda u, v: np.hypot(u, v) < 0.6 + 0.38 * np.cos(5 * np.arctan2(v, u)),
    "stripes": lambda u, v: (np.maximum(abs(u), abs(v)) < 0.85) & (np.cos(7.5 * u) > 0),
    "moon": lambda u, v: (u**2 + v**2 < 0.95) & ((u - 0.55) ** 2 + v**2 > 0.5),
}
NAMES = tuple(_SHAPES)
_COLOURS = np.array([colorsys.hsv_to_rgb(place / len(NAMES), 0.7, 1.0) for place in range(len(NAMES))])
_BATCH = 256  # images that are drawn at once


class Shapes(ContinualDataModule):
    """Colour images of one to a few shapes of 12 classes on a texture; no download, the same images on every machine.

    Shapes differ in place, size, angle and colour, later ones cover earlier ones, and the texture is a wave of two
    darker colours with noise. The classes, in this order: disk, bar, ring, square, cross, triangle, half disk, frame,
    corner, star, stripes, moon. Each class has a hue of its own, from which the colours of its shapes deviate; without
    it only the shape tells the class, which takes many more epochs to learn.

    Args:
        targets: ``pixels``: a mask with the class of each pixel, 0 for the background, which is a class of its own; or
            ``labels``: all classes in the image.
        classes: Number of classes of shapes, in 2 .. 12.
        train, test: Number of training and test images, at least 1.
        size: Height and width of an image, in pixels, at least 16.
        most: Largest number of shapes in an image, at least 1.
        jitter: Standard deviation of the three channels of a shape's colour around the colour of its class, at least 0;
            None for colours that do not depend on the class.
        noise: Standard deviation of the noise of each pixel, as a share of the range of a channel, in [0, 1].
        data_seed: Seed of the images; the seed of the run does not change them.
        kwargs: Options of :class:`ContinualDataModule`; the scenario is ``LabelSets`` by default, overlapped, with four
            tasks, or two or three where four do not divide the classes.

    Raises:
        ValueError: If an option is outside its range.
    """

    mean: ClassVar[tuple[float, ...]] = (0.5, 0.5, 0.5)
    std: ClassVar[tuple[float, ...]] = (0.25, 0.25, 0.25)

    def __init__(
        self,
        *,
        targets: Literal["pixels", "labels"] = "pixels",
        classes: int = 12,
        train: int = 1600,
        test: int = 400,
        size: int = 64,
        most: int = 3,
        jitter: float | None = 0.1,
        noise: float = 0.05,
        data_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        one_of(self, ("pixels", "labels"), targets=targets)
        at_least(self, 1, train=train, test=test, most=most)
        at_least(self, 16, size=size)
        at_least(self, 0, jitter=jitter, optional=True)
        within(self, "[0, 1]", noise=noise)
        if not 2 <= classes <= len(NAMES):
            raise ValueError(f"Shapes: classes is {classes}; it must be in 2 .. {len(NAMES)}")
        self.targets, self.classes, self.counts = targets, classes, {True: train, False: test}
        self.size, self.most, self.jitter, self.noise, self.data_seed = size, most, jitter, noise, data_seed

    def default_transforms(self) -> list[Transform]:
        return [RandomHorizontalFlip()]

    def default_scenario(self, info: DatasetInfo) -> Scenario:
        tasks = next((count for count in (4, 3, 2) if self.classes % count == 0), 1)
        return LabelSets(tasks=tasks, background="background" if self.targets == "pixels" else None)

    def source(self, *, train: bool) -> TensorSource:
        count = self.counts[train]
        parts = [
            self._drawn(min(_BATCH, count - start), [self.data_seed, int(train), start])
            for start in range(0, count, _BATCH)
        ]
        images, masks = (np.concatenate(part) for part in zip(*parts, strict=True))
        names: tuple[str, ...] = ("background", *NAMES[: self.classes])
        if self.targets == "pixels":
            targets = Targets("pixels", masks, len(names), "Shapes")
        else:
            names = names[1:]
            sets = np.stack([(masks == place + 1).any(axis=(1, 2)) for place in range(len(names))], axis=1)
            targets = Targets("labels", sets, len(names), "Shapes")
        return TensorSource(images, targets.labels(), class_names=names, targets=targets, name="Shapes")

    def _drawn(self, count: int, seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Images and masks: uint8 ``(count, 3, size, size)``, and uint8 ``(count, size, size)``, 0 for background."""
        random = np.random.default_rng(seed)
        grid = (np.arange(self.size) + 0.5) / self.size * 2 - 1
        y, x = np.meshgrid(grid, grid, indexing="ij")

        def uniform(low: float, high: float, *shape: int) -> np.ndarray:
            return random.uniform(low, high, (count, *shape))[..., None, None]

        angle, waves, phase = uniform(0, np.pi), uniform(2, 6), uniform(0, 2 * np.pi)
        wave = np.sin(waves * (x * np.cos(angle) + y * np.sin(angle)) * np.pi + phase) / 2 + 0.5
        first, second = uniform(0.1, 0.6, 3), uniform(0.1, 0.6, 3)
        images = first + (second - first) * wave[:, None]
        masks = np.zeros((count, self.size, self.size), np.uint8)
        number = random.integers(1, self.most + 1, count)
        for place in range(self.most):
            label = random.integers(0, self.classes, count)
            radius, turn = uniform(0.25, 0.45), uniform(0, 2 * np.pi)
            across, down = x - uniform(-0.65, 0.65), y - uniform(-0.65, 0.65)
            u = (across * np.cos(turn) + down * np.sin(turn)) / radius
            v = (down * np.cos(turn) - across * np.sin(turn)) / radius
            colour = uniform(0.3, 1.0, 3)
            if self.jitter is not None:
                deviation = self.jitter * random.standard_normal((count, 3))
                colour = (_COLOURS[label] + deviation)[..., None, None]
            for name in range(self.classes):
                rows = np.flatnonzero((label == name) & (place < number))
                inside = _SHAPES[NAMES[name]](u[rows], v[rows])
                masks[rows] = np.where(inside, name + 1, masks[rows])
                images[rows] = np.where(inside[:, None], colour[rows], images[rows])
        images += self.noise * random.standard_normal(images.shape)
        return (images.clip(0, 1) * 255).round().astype(np.uint8), masks
