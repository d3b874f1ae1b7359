"""Test-time streams of corrupted digits for a small network, trained once on clean ones, for tests of adaptation."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.data import TensorSource
from cl_lightning.datamodules.corruptions import CorruptionStream
from cl_lightning.datamodules.digits import Digits
from cl_lightning.loop import TaskLoop
from cl_lightning.models import Backbone, CifarResNet, Output
from cl_lightning.strategies.test_time.base import TestTimeAdaptation
from support.runs import loop as digits_loop
from support.shared import made_once

NAMES = ["gaussian_noise", "contrast"]


@cache
def source_file() -> Path:
    """State dict of a network for digits, its classifier as ``linear``."""
    path = Path(tempfile.mkdtemp(prefix="digits_source_")) / "source.pt"
    torch.save(made_once("source network for digits", _source), path)
    return path


def _source() -> dict[str, Tensor]:
    source = Digits().source(train=True)
    images, labels = normalised(source.images), torch.from_numpy(source.labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, head = CifarResNet((1, 8, 8), depth=8, width=4), nn.Linear(16, 10)
        optimizer = torch.optim.Adam([*net.parameters(), *head.parameters()], lr=0.01)
        for _ in range(8):
            for rows in torch.randperm(len(images)).split(64):
                nn.functional.cross_entropy(head(net(images[rows])), labels[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
    return {**net.state_dict(), **{f"linear.{name}": value for name, value in head.state_dict().items()}}


def normalised(images: Tensor) -> Tensor:
    return (images.float() / 255 - 0.305) / 0.376


def backbone(image_shape: ImageShape) -> Backbone:
    return CifarResNet(image_shape, depth=8, width=4, weights=str(source_file()))


def tiny_resnet(image_shape: ImageShape) -> Backbone:
    """The same architecture, not trained."""
    return CifarResNet(image_shape, depth=8, width=4)


class OtherLabels(Digits):
    """Digits whose test labels are shuffled."""

    def source(self, *, train: bool) -> TensorSource:
        source = super().source(train=train)
        if not train:
            source.labels = np.random.default_rng(0).permutation(source.labels)
        return source


def stream(base: Any = None, **options: Any) -> CorruptionStream:
    chosen: dict[str, Any] = {"corruptions": NAMES, "batch_size": 60, "samples": 200, "seed": 0}
    return CorruptionStream(base or Digits(), **{**chosen, **options})


def watching(cls: type[TestTimeAdaptation], **options: Any) -> Any:
    """A strategy on the trained network that notes the scores that count, by task."""

    class Scored(cls):  # type: ignore[misc, valid-type]
        def _score(self, scores, batch):
            self.noted.setdefault(self.task.index, []).append(scores.detach().clone())
            super()._score(scores, batch)

    made = Scored(**{"backbone": backbone, "source_head": str(source_file()), **options})
    made.noted = {}
    return made


def adapt(strategy: Any, data: CorruptionStream | None = None, **options: Any) -> TaskLoop:
    """Go through a stream; what counts is on ``strategy.noted`` and in ``matrix.online_error``."""
    made = digits_loop(strategy, **options)
    made.datamodule = data or stream()
    made.fit()
    return made


def online_errors(*methods: tuple[type[TestTimeAdaptation], dict[str, Any]]) -> list[float]:
    """Mean online error of each method with its options on all test images, in batches of 71."""
    data = {"samples": None, "batch_size": 71}
    made = [adapt(watching(cls, **options), stream(**data)) for cls, options in methods]
    return [one.matrix.measures()["mean_online_error"] for one in made]


def scores(strategy: Any) -> Tensor:
    return torch.cat([part for parts in strategy.noted.values() for part in parts])


def source_network(statistics: str = "batch") -> nn.Module:
    """The same network in plain torch, in eval mode; with batch statistics its norms have no running ones."""
    net, head = backbone((1, 8, 8)), nn.Linear(16, 10)
    state = torch.load(source_file(), weights_only=True)
    head.load_state_dict({name: state[f"linear.{name}"] for name in ("weight", "bias")})
    for module in net.modules():
        if statistics == "batch" and isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = net, head

        def forward(self, images: Tensor) -> Output:
            features = self.backbone(images)
            return Output(features, self.head(features))

    return Plain().eval()


def batches(data: CorruptionStream) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of each batch of the domains, in order, as a data module that was begun gives them."""
    found = []
    for task in data.stream.tasks[1:]:
        data.begin(task)
        data.begin_phase(0, None, 0)
        found += [(normalised(batch.raw), batch.labels) for batch in data.train_dataloader()]
    return found
