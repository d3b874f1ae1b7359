"""A teacher that gives fixed logits, and losses of a strategy on given logits, without a network or a run."""

from torch import Tensor, nn

from cl_lightning.models import Output
from cl_lightning.strategy import ContinualStrategy
from support.fakes import batch_of


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

    def pair(self, images: Tensor, output: Output) -> tuple[Tensor, Tensor]:
        return output.logits[:, : self.logits.shape[1]], self.logits


def losses(
    strategy: ContinualStrategy, logits: Tensor, labels: Tensor, taught: Tensor | None = None
) -> dict[str, Tensor]:
    """Terms of the loss where the network says ``logits`` and the teacher, if there is one, ``taught``."""
    if taught is not None:
        strategy.teacher = Teaches(taught)
    return strategy.losses(batch_of(labels, images=logits), Output(logits, logits))
