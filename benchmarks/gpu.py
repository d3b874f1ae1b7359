"""Images per second of training on a GPU beside a bare loop, and the share of a step that no kernel fills.

    python -m benchmarks.gpu                                       ResNet-18, images of 32 x 32, bf16
    python -m benchmarks.gpu --device cpu --images 512 --batch 64  without a GPU: tries the command, and keeps nothing

Four sides take turns: the bare loop and a run of the task loop, each with and without ``torch.compile``. All have the
same network in channels_last, crops and mirror images on the device, autocast to bf16 and fused SGD; the bare loop does
nothing else, and has all images on the device from the start. Images are noise, all of one task. The first epoch warms
up (and compiles); the time is that of the others. What kernels take is told by torch's profiler in a run of its own,
since that slows down what is not a kernel. Results go to ``docs/benchmarks/gpu.json``, and a table of them into
``docs/benchmarks.md``.
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.numbers import store, table
from cl_lightning.data import RandomCrop, RandomHorizontalFlip, TensorSource, pixels
from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.loop import LoopOptions, TaskLoop
from cl_lightning.models import ResNet18
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.stream import ClassIncremental

NAME = "gpu"
SECTION = """## On a GPU

ResNet-18 (CIFAR form, 100 classes), {images:,} images of noise of 32 x 32, crops and mirror images on the device,
batches of {batch}, bf16-mixed, channels_last, fused SGD, {name}, torch {torch}. The bare loop does nothing but that,
and has all images on the device from the start. Medians of {turns} interleaved turns of {epochs} epochs, the first one
left out. Outside kernels: the share of a step's time in which no kernel runs. Written by `python -m benchmarks.gpu`.

{rows}
"""
SHAPE, CLASSES, PADDING = (3, 32, 32), 100, 4
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@dataclass
class Setting:
    """What all sides have in common: sizes, and where they run."""

    device: torch.device
    images: int
    batch: int
    epochs: int
    marks: list[float] = field(default_factory=list)

    def mark(self, *_: Any) -> None:
        """Note the time, when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.marks.append(time.perf_counter())


class Noise(ContinualDataModule):
    """Noise of 100 classes in one task."""

    mean, std = MEAN, STD

    def __init__(self, count: int, **options: Any) -> None:
        transforms = [RandomCrop(PADDING), RandomHorizontalFlip()]
        super().__init__(scenario=ClassIncremental(tasks=1), transforms=transforms, **options)
        self.count = count

    def source(self, *, train: bool) -> TensorSource:
        count = self.count if train else CLASSES
        return TensorSource(noise(count), np.arange(count) % CLASSES)


class Marks(Callback):
    """Marks the start of each epoch and the end of the last."""

    def __init__(self, setting: Setting) -> None:
        self.on_train_epoch_start = setting.mark  # type: ignore[method-assign]
        self.on_train_end = setting.mark  # type: ignore[method-assign]


def noise(count: int) -> np.ndarray:
    """uint8 ``(N, C, H, W)``."""
    return np.random.default_rng(0).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)


def here(compiled: bool, setting: Setting) -> None:
    """A run of the task loop."""
    trainer = Trainer(
        max_epochs=setting.epochs,
        accelerator="gpu" if setting.device.type == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        logger=False,
        callbacks=[Marks(setting)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = Noise(setting.images, batch_size=setting.batch)
    options = LoopOptions(channels_last=True, compile="inductor" if compiled else None)
    TaskLoop(trainer, Finetune(backbone=ResNet18, optimizer=sgd), data, options=options).fit()


def bare(compiled: bool, setting: Setting) -> None:
    """The same by hand."""
    device, count = setting.device, setting.images
    images, labels = torch.from_numpy(noise(count)).to(device), (torch.arange(count) % CLASSES).to(device)
    backbone = ResNet18(SHAPE)
    network = nn.Sequential(backbone, nn.Linear(backbone.num_features, CLASSES)).to(device).train()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compiled:
        backbone.compile(backend="inductor")
    optimizer = sgd(network.parameters())
    mean, std = (torch.tensor(part, device=device).view(-1, 1, 1) for part in (MEAN, STD))
    for _ in range(setting.epochs):
        setting.mark()
        for rows in torch.split(torch.randperm(count), setting.batch):
            place = rows.to(device, non_blocking=True)
            raw, targets = images.index_select(0, place), labels.index_select(0, place)
            raw = pixels.shift_images(raw, torch.randint(-PADDING, PADDING + 1, (len(rows), 2)))
            raw = pixels.choose(torch.rand(len(rows)) < 0.5, raw.flip(-1), raw)
            inputs = raw.float().div_(255).sub_(mean).div_(std).contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                loss = F.cross_entropy(network(inputs), targets)
            loss.backward()
            optimizer.step()
    setting.mark()


SIDES: dict[str, Callable[[Setting], None]] = {
    "bare loop": partial(bare, False),
    "here": partial(here, False),
    "bare loop, compiled": partial(bare, True),
    "here, compiled": partial(here, True),
}


def seconds(side: Callable[[Setting], None], setting: Setting) -> float:
    """Of an epoch, the median of all but the first."""
    setting.marks.clear()
    side(setting)
    spans = np.diff(setting.marks)
    return float(np.median(spans[1:]))


def kernels(side: Callable[[Setting], None], setting: Setting) -> float:
    """Seconds that kernels take in the second epoch of a run of two."""
    short = Setting(setting.device, setting.images, setting.batch, epochs=2)
    profiler = profile(activities=[ProfilerActivity.CUDA])
    mark = short.mark

    def watched(*_: Any) -> None:
        mark()
        if len(short.marks) == 2:
            profiler.start()
        elif len(short.marks) == 3:
            profiler.stop()

    short.mark = watched  # type: ignore[method-assign]
    side(short)
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6


def measure(setting: Setting, names: list[str], turns: int) -> dict[str, dict[str, float]]:
    """Images per second of each side, and the share of its time outside kernels where there is a GPU."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(turns):
        for name in names:
            found[name].append(seconds(SIDES[name], setting))
            print(f"{name:<22}{setting.images / found[name][-1]:>12,.0f} images/s", flush=True)
    results = {}
    for name, times in found.items():
        median = statistics.median(times)
        results[name] = {"images_per_second": setting.images / median}
        if setting.device.type == "cuda":
            results[name]["outside_kernels"] = 1 - kernels(SIDES[name], setting) / median
    return results


def section(results: dict[str, Any]) -> str:
    """Of the page."""
    rows, parts = [], results["sides"]
    for name, part in parts.items():
        base = parts["bare loop, compiled" if "compiled" in name else "bare loop"]
        ratio = part["images_per_second"] / base["images_per_second"]
        outside = f"{100 * part['outside_kernels']:.0f} %"
        rows.append([name, f"{part['images_per_second']:,.0f}", f"{ratio:.2f}", outside])
    text = table(["side", "images/s", "beside the bare loop", "outside kernels"], rows)
    return SECTION.format(rows=text, **{name: value for name, value in results.items() if name != "sides"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=4, help="from 2; the first one is not counted")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--eager", action="store_true", help="nothing compiled")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu tries the command, and keeps nothing")
    if options.epochs < 2:
        parser.error(f"--epochs {options.epochs}; at least 2, since the first one is not counted")
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    setting = Setting(torch.device(options.device), options.images, options.batch, options.epochs)
    names = [name for name in SIDES if not (options.eager and "compiled" in name)]
    sides = measure(setting, names, options.turns)
    if options.device == "cuda":
        sizes = {name: getattr(options, name) for name in ("images", "batch", "epochs", "turns")}
        about = {"name": torch.cuda.get_device_name(), "torch": torch.__version__}
        store(NAME, {**about, **sizes, "sides": sides})


if __name__ == "__main__":
    main()
