"""A teacher that says what it is told to, and losses of a strategy on given logits, without a network or a run."""

import torch
from torch import Tensor, nn

from cl_lightning.network import Output
from cl_lightning.strategy import ContinualStrategy


class Teaches(nn.Module):
    """Stands for the network before the task.

    Args:
        logits: What it says, whatever the images.
    """

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Output:
        return Output(images, self.logits)


def losses(
    strategy: ContinualStrategy, logits: Tensor, labels: Tensor, taught: Tensor | None = None
) -> dict[str, Tensor]:
    """Terms of the loss where the network says ``logits`` and the teacher, if there is one, ``taught``."""
    if taught is not None:
        strategy.teacher = Teaches(taught)
    batch = type("Rows", (), {"images": logits, "labels": labels, "tasks": torch.zeros_like(labels)})
    return strategy.losses(batch, Output(logits, logits))  # type: ignore[arg-type]
