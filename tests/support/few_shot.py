"""Few-shot streams of digits: six classes, then two sessions of two classes with five images each."""

from functools import partial
from typing import Any

import torch

from cl_lightning.loop import TaskLoop
from cl_lightning.models import MLP
from cl_lightning.strategy import ContinualStrategy
from cl_lightning.stream import FewShot
from support.runs import loop

OPTIONS: dict[str, Any] = {
    "backbone": partial(MLP, hidden=(64,)),
    "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
}


def sessions(strategy: ContinualStrategy, *callbacks: Any, until: int | None = None, **options: Any) -> TaskLoop:
    """Learn them, up to the session ``until``."""
    scenario = FewShot(**{"base": 6, "way": 2, "shot": 5, **options.pop("scenario", {})})
    chosen = {"max_epochs": 5, "data": {"scenario": scenario, "batch_size": 64}, **options}
    made = loop(strategy, *callbacks, options={"stop_after_task": until}, **chosen)
    made.fit()
    return made
