"""Base class of methods with prompts in a frozen transformer: one forward pass for the query, one with the prompts."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, cast

from torch import nn

from cl_lightning.models import PromptedBackbone, Prompts
from cl_lightning.strategy import ContinualStrategy, Traits


class PromptedStrategy(ContinualStrategy):
    """Trains prompts and the head's rows of the task by cross-entropy over the classes of the task.

    Args:
        prompts: Builds the prompts for the backbone.
        kwargs: Options of ``ContinualStrategy``. The backbone must be a transformer of timm.
    """

    traits = Traits(needs_pretrained=True)

    def __init__(self, *, prompts: Callable[[nn.Module], Prompts], **kwargs: Any) -> None:
        super().__init__(loss_classes="current", freeze_backbone=False, **kwargs)
        self.build_backbone = functools.partial(PromptedBackbone, backbone=self.build_backbone, prompts=prompts)

    def frozen(self) -> Iterable[nn.Module]:
        return [self.prompted.base]

    def trainable(self) -> Iterable[nn.Parameter]:
        settled = {id(parameter) for parameter in self.prompted.prompts.settled()}
        return (parameter for parameter in super().trainable() if id(parameter) not in settled)

    @property
    def prompted(self) -> PromptedBackbone:
        return cast(PromptedBackbone, self.network.backbone)
