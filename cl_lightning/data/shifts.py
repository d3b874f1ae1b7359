"""Domain shifts of raw images by task, for streams whose domains are made from one data set."""

import torch
from torch import Tensor

from cl_lightning.data.pixels import permute_pixels, rotate_images
from cl_lightning.stream import Stream


class Shifts:
    """Domain shift of raw images by task: a fixed permutation of the pixels or a rotation."""

    def __init__(self, stream: Stream) -> None:
        self.shifts = stream.shifts
        self._orders: dict[int, Tensor] = {}

    def __call__(self, images: Tensor, tasks: Tensor) -> Tensor:
        result = images.clone()
        for task in sorted(set(tasks.tolist())):
            if self.shifts[task] is not None:
                rows = tasks == task
                result[rows] = self._shifted(images[rows], task)
        return result

    def _shifted(self, images: Tensor, task: int) -> Tensor:
        shift = self.shifts[task]
        assert shift is not None
        if shift.kind == "rotate":
            return rotate_images(images, float(shift.value))
        if task not in self._orders:  # drawn once instead of per batch
            places = torch.arange(images.shape[-2] * images.shape[-1]).view(images.shape[-2:])
            self._orders[task] = permute_pixels(places, int(shift.value)).flatten()
        return images.flatten(-2).index_select(-1, self._orders[task]).view(images.shape)
