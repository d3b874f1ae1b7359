"""What methods have in common that put prompts into a frozen transformer which sees each image twice."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, cast

from torch import nn

from cl_lightning.backbones import Timm
from cl_lightning.prompts import PromptedBackbone, Prompts
from cl_lightning.strategy import ContinualStrategy


def tiny_transformer() -> Callable[..., Timm]:
    """Builds a transformer of timm, for tests in seconds."""
    size = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
    return functools.partial(Timm, name="vit_tiny_patch16_224", kwargs=size)


class PromptedStrategy(ContinualStrategy):
    """Trains prompts and the rows of the head of the task, by cross-entropy over the classes of the task.

    Args:
        prompts: Builds what is put into the backbone.
        kwargs: Of ``ContinualStrategy``. The backbone must be a transformer of timm.
    """

    needs_pretrained: ClassVar[bool] = True
    plain_first_task = False

    def __init__(self, *, prompts: Callable[[nn.Module], Prompts], **kwargs: Any) -> None:
        super().__init__(visible="current", freeze_backbone=False, **kwargs)
        self.build_backbone = functools.partial(PromptedBackbone, backbone=self.build_backbone, prompts=prompts)

    def frozen(self) -> Iterable[nn.Module]:
        return [self.prompted.base]

    @property
    def prompted(self) -> PromptedBackbone:
        return cast(PromptedBackbone, self.network.backbone)
