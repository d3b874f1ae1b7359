"""Base of methods for streams without boundaries that train one network at a time, and add one when data change."""

from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import Tensor, nn

from cl_lightning.batch import Batch, ImageShape
from cl_lightning.models import Mixture, Network
from cl_lightning.strategies.base import sum_of_zeros
from cl_lightning.strategy import Replay, Task


class GrowingMixture(Replay):
    """A ``Mixture`` of networks, of which the current one is trained; a subclass decides which one is current.

    In ``prepare_batch``, which every process calls, a subclass names the modules that the losses of the step depend on
    (``train_parts``). All other modules get no gradient, so that neither momentum nor weight decay changes them.

    Args:
        members: Largest number of networks, at least 1.
        kwargs: Options of ``Replay``.
    """

    def __init__(self, *, members: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_members = members
        if self.loss_classes != "all" or self.freeze_backbone:
            wrong = "freeze_backbone is True" if self.freeze_backbone else f"loss_classes is {self.loss_classes!r}"
            name = type(self).__name__
            raise ValueError(
                f"{name}: {wrong}, but a network learns its part of the stream as a whole; use the default"
            )
        self._trained: set[nn.Module] = set()

    @property
    def mixture(self) -> Mixture:
        """The network: all members."""
        return cast(Mixture, self.network)

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        members = [self.network]
        while len(members) < self.max_members:
            backbone = self.build_backbone(image_shape)
            members.append(Network(backbone, self.build_head(backbone.num_features)))
        self.network = Mixture(members)

    def begin_task(self, task: Task) -> None:
        self.mixture.grow(task.num_new)

    def parts(self) -> list[nn.Module]:
        """All modules that are trained at some time."""
        return list(self.mixture.members)

    def train_parts(self, *parts: nn.Module) -> None:
        """Add modules to those that the losses since the last optimizer step depend on."""
        self._trained |= set(parts)

    def trainable(self) -> Iterable[nn.Parameter]:
        return (parameter for part in self.parts() for parameter in part.parameters())

    def with_all_gradients(self, loss: Tensor) -> Tensor:
        """The loss, with a gradient of 0 for the other modules: distributed training waits for each gradient."""
        others = list(self._others())
        return loss + sum_of_zeros(others) if others else loss

    def edit_gradients(self, batch: Batch) -> None:
        for parameter in self._others():
            parameter.grad = None
        self._trained.clear()

    def _others(self) -> Iterator[nn.Parameter]:
        return (parameter for part in self.parts() if part not in self._trained for parameter in part.parameters())
