"""Images per second of the training data path alone, beside torchvision's transforms in worker processes.

    python -m benchmarks.data_path                              all rows, with noise for images
    python -m benchmarks.data_path --rows crop_flip --turns 7   some

Both sides deliver whole epochs of shuffled, augmented and normalised batches of 128 in the shapes of CIFAR-100; there
is no network. Here that is one process with one thread, which takes batches out of a uint8 tensor by index and augments
them as a whole. The other side is a ``DataLoader`` with 2 workers that stay alive, each with one thread, whose data set
holds the same images as an array and sends each through PIL and torchvision's transforms. The sides take turns. Results
go to ``docs/benchmarks/data_path.json``, and a table of them into ``docs/benchmarks.md``.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as per_sample

from benchmarks.numbers import store, stored, table
from cl_lightning.data import TensorSource
from cl_lightning.data import transforms as batched
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.stream import ClassIncremental

NAME = "data_path"
SECTION = """## The data path compared with per-sample transforms

Images per second of whole epochs, shuffled, augmented, normalised and in batches of 128, without a network; {images:,}
images of noise in the shape of CIFAR-100. Here: one process, one thread, on the CPU. torchvision: a `DataLoader` with
{workers} persistent workers, images from an array in memory through PIL. Medians of {turns} interleaved turns. The last
two columns are processor time per image over all processes, which depends less on other load of the machine; if each
process has a core of its own, {workers} workers take at least this time divided by {workers}. Written by
`python -m benchmarks.data_path`.

{rows}
"""
BATCH = 128
CLASSES = 100
MEAN, STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
GOAL = 8.0
WARM_UP = 20  # batches


class BlackSquare:
    """Cutout of one image, a tensor ``(C, H, W)``; torchvision has none of its own."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        top, left = (int(torch.randint(length, ())) - self.size // 2 for length in image.shape[1:])
        image[:, max(top, 0) : max(top + self.size, 0), max(left, 0) : max(left + self.size, 0)] = 0
        return image


@dataclass(frozen=True)
class Row:
    """What comes after the crop and the flip.

    Attributes:
        title: In the table.
        here: Transforms of a batch.
        images: Those of torchvision of a PIL image.
        tensors: Those of a tensor in [0, 1].
    """

    title: str
    here: tuple[batched.Transform, ...] = ()
    images: tuple[Any, ...] = ()
    tensors: tuple[Any, ...] = ()


JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
ROWS = {
    "crop_flip": Row("crop, flip"),
    "cutout": Row("crop, flip, cutout of 16", here=(batched.Cutout(16),), tensors=(BlackSquare(16),)),
    "jitter": Row(
        "crop, flip, colour jitter 0.4 with p = 0.8",
        here=(batched.ColorJitter(**JITTER, p=0.8),),
        images=(per_sample.RandomApply([per_sample.ColorJitter(**JITTER)], p=0.8),),
    ),
    "randaugment": Row(
        "crop, flip, RandAugment (2, 9)",
        here=(batched.RandAugment(2, 9),),
        images=(per_sample.RandAugment(2, 9),),
    ),
}


def noise(count: int) -> np.ndarray:
    """uint8 ``(N, H, W, C)``."""
    return np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


class Noise(ContinualDataModule):
    """Noise in the shape of CIFAR-100, all of it in one task."""

    mean, std = MEAN, STD

    def __init__(self, count: int, **options: Any) -> None:
        super().__init__(scenario=ClassIncremental(tasks=1), batch_size=BATCH, **options)
        self.count = count

    def source(self, *, train: bool) -> TensorSource:
        count = self.count if train else CLASSES
        return TensorSource(noise(count), np.arange(count) % CLASSES)


class PerSample(Dataset[tuple[Tensor, int]]):
    """As torchvision's CIFAR data sets: an array, of which each item becomes a PIL image."""

    def __init__(self, count: int, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.targets, self.transform = noise(count), [i % CLASSES for i in range(count)], transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.targets[index]


class Here:
    """Epochs of the data module."""

    def __init__(self, row: Row, count: int) -> None:
        augmentation = [batched.RandomCrop(padding=4), batched.RandomHorizontalFlip(), *row.here]
        self.data = Noise(count, transforms=augmentation)
        self.data.begin(self.data.make_stream(seed=0).tasks[0])
        self.data.begin_phase(0, None, 0)
        self.epochs = 0

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, device = self.epochs, torch.device("cpu")
        loader: Any = self.data.train_dataloader()
        loader.place = lambda: (epoch, 0)
        self.epochs += 1
        for raw in loader:
            moved = self.data.transfer_batch_to_device(raw, device, 0)
            batch = self.data.finish(moved, augment=True, epoch=epoch)
            yield batch.images, batch.labels

    def processes(self) -> list[int]:
        return [os.getpid()]

    def close(self) -> None:
        self.data.close()


class Torchvision:
    """Epochs of a loader with workers."""

    def __init__(self, row: Row, count: int, workers: int) -> None:
        usual = [per_sample.RandomCrop(32, padding=4), per_sample.RandomHorizontalFlip(), *row.images]
        to_tensor = [per_sample.ToTensor(), *row.tensors, per_sample.Normalize(MEAN, STD)]
        data = PerSample(count, per_sample.Compose([*usual, *to_tensor]))
        self.loader = DataLoader(data, BATCH, shuffle=True, num_workers=workers, persistent_workers=True)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.loader

    def processes(self) -> list[int]:
        workers: Any = self.loader._iterator
        return [os.getpid(), *(worker.pid for worker in workers._workers)]

    def close(self) -> None:
        workers: Any = self.loader._iterator
        workers._shutdown_workers()
        self.loader._iterator = None


def processor_seconds(processes: list[int]) -> float:
    """What they have used until now; the number of the clock is that of ``clock_getcpuclockid`` on Linux."""
    return sum(time.clock_gettime(~process << 3 | 2) for process in processes)


def turn(side: Here | Torchvision, count: int) -> tuple[float, float]:
    """Images per second, and processor microseconds per image, of one epoch."""
    before, begun = processor_seconds(side.processes()), time.perf_counter()
    seen = 0
    for images, labels in side.batches():
        assert images.dtype == torch.float32
        assert images.shape == (len(labels), 3, 32, 32)
        seen += len(labels)
    seconds = time.perf_counter() - begun
    assert seen == count
    return count / seconds, 1e6 * (processor_seconds(side.processes()) - before) / count


def compare(row: Row, turns: int, count: int, workers: int) -> dict[str, float]:
    """Medians over turns."""
    sides = (Here(row, count), Torchvision(row, count, workers))
    found: list[list[float]] = []
    for side in sides:
        for _ in itertools.islice(side.batches(), WARM_UP):
            pass
    try:
        for _ in range(turns):
            (here, here_us), (other, other_us) = (turn(side, count) for side in sides)
            found.append([here, other, here / other, here_us, other_us])
    finally:
        for side in sides:
            side.close()
    names = ("here_per_s", "torchvision_per_s", "ratio", "here_processor_us", "torchvision_processor_us")
    return dict(zip(names, (statistics.median(column) for column in zip(*found, strict=True)), strict=True))


def section(results: dict[str, Any]) -> str:
    """Of the page, with all rows that were measured."""
    rows = []
    for name, part in results["rows"].items():
        rates = (f"{part[key]:,.0f}" for key in ("torchvision_per_s", "here_per_s"))
        ratios = (f"{part['ratio']:.1f}", f"{part['goal']:.0f}")
        used = (f"{part[f'{side}_processor_us']:.1f}" for side in ("torchvision", "here"))
        rows.append([ROWS[name].title, *rates, *ratios, *used])
    heads = ["augmentation", "torchvision (1/s)", "here (1/s)", "ratio", "goal", "torchvision (µs)", "here (µs)"]
    return SECTION.format(rows=table(heads, rows), **results["options"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--images", type=int, default=25_000, help="of an epoch")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"images": options.images, "workers": options.workers, "turns": options.turns}
    before = stored(NAME)
    results = {"options": settings, "rows": before["rows"] if before.get("options") == settings else {}}
    for name in options.rows:
        results["rows"][name] = {**compare(ROWS[name], options.turns, options.images, options.workers), "goal": GOAL}
        part = results["rows"][name]
        rates = f"{part['torchvision_per_s']:>9,.0f}/s{part['here_per_s']:>10,.0f}/s"
        print(f"{name:<14}{rates}  {part['ratio']:.2f} (goal {GOAL})", flush=True)
    store(NAME, results)


if __name__ == "__main__":
    main()
