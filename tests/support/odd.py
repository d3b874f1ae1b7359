"""Runs on odd data: learnt with the right result, or refused before the first step."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from cl_lightning.datamodules.base import ContinualDataModule
from cl_lightning.loop import TaskLoop
from cl_lightning.strategies.baselines.finetune import Finetune
from support.runs import plain_net


def fast(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05)


def loop(data: ContinualDataModule, method: Any = None, /, **trainer: Any) -> TaskLoop:
    settings: dict[str, Any] = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False}
    settings |= dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return TaskLoop(Trainer(**{**settings, **trainer}), method or Finetune(backbone=plain_net, optimizer=fast), data)


def learnt(data: ContinualDataModule, method: Any = None) -> TaskLoop:
    """Learn the stream, and check that all was seen once and counted once."""
    made = loop(data, method)
    matrix = made.fit()
    stream, found = made.stream, made.results()
    assert matrix.learned == found["finished"] == len(stream)
    assert matrix.totals.tolist() == [len(part) for part in stream.test]
    measured = ~matrix.R_ci.isnan()
    for t in range(len(stream)):
        assert measured[t].tolist() == [i <= t and len(stream.test[i]) > 0 for i in range(len(stream))]
    logits = made.strategy.network(torch.zeros(1, *data.image_shape)).logits
    assert logits.shape == (1, stream.tasks[-1].num_seen)
    assert logits.isfinite().all()
    assert 0 <= found["measures"]["average_accuracy"] <= 1
    return made


def told(data: ContinualDataModule) -> str:
    """The error with which a run ends before its first step."""
    made = loop(data)
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        made.fit()
    assert not made.started
    return str(error.value)
