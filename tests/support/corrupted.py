"""Streams of corrupted digits, begun at a task, and what they serve."""

from typing import Any

import torch
from torch import Tensor

from cl_lightning.datamodules.corruptions import CorruptionStream
from cl_lightning.datamodules.digits import Digits
from support.adaptation import stream


def begun(task: int, data: CorruptionStream | None = None, **options: Any) -> CorruptionStream:
    made = data or stream(**options)
    made.make_stream(0)
    made.begin(made.stream.tasks[task])
    made.begin_phase(0, None, 0)
    return made


def raw(data: CorruptionStream) -> Tensor:
    return torch.cat([batch.raw for batch in data.train_dataloader()])


def labels(data: CorruptionStream) -> list[int]:
    return torch.cat([batch.labels for batch in data.train_dataloader()]).tolist()


TEST = Digits().source(train=False)
