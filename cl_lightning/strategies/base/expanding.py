"""Base class of methods that replay herded exemplars and add a feature extractor in each task."""

import functools
from collections.abc import Iterable
from typing import Any, ClassVar, cast

from torch import nn

from cl_lightning.batch import ImageShape
from cl_lightning.models import ExpandableBackbone, Head, LinearHead
from cl_lightning.strategies.base.replay import ExemplarReplay
from cl_lightning.stream import Task


class ExpandingReplay(ExemplarReplay):
    """Herded exemplars and a backbone with an extractor per task; the base of DERExpand, MEMO, TagFex, BEEF and FOSTER.

    In each task after the first one, an extractor is added as a copy of an earlier one, and the head is resized for the
    additional features. All earlier extractors are frozen, in eval mode.

    Args:
        memory_size: K, in samples, over all classes and processes, at least 0.
        kwargs: Options of the base class, apart from ``freeze_backbone``; the head must be a ``LinearHead``.
    """

    shares_stem: ClassVar[bool] = False
    """Whether an extractor is only the last stage of the backbone, see ``share_stem`` of ``ExpandableBackbone``."""
    copied_extractor: ClassVar[int] = -1
    """Number of the extractor of which a new one is a copy; -1 for the newest one."""

    def __init__(self, *, memory_size: int = 2000, **kwargs: Any) -> None:
        super().__init__(memory_size=memory_size, **kwargs)
        if self.freeze_backbone:
            raise ValueError(
                f"{type(self).__name__}: freeze_backbone is True, but each task trains a backbone; use False"
            )
        self.build_backbone = functools.partial(
            ExpandableBackbone, extractor=self.build_backbone, share_stem=self.shares_stem
        )

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        head = self.network.head
        if not isinstance(head, LinearHead) or head.needs_statistics:
            name = type(self).__name__
            raise ValueError(f"{name}: head is {type(head).__name__}; use a LinearHead, which can take more features")

    @property
    def backbone(self) -> ExpandableBackbone:
        """The backbone of the network."""
        return cast(ExpandableBackbone, self.network.backbone)

    def extractor_head(self) -> Head:
        """A head without classes on the features of one extractor."""
        return self.build_head(self.backbone.width)

    def begin_task(self, task: Task) -> None:
        if not task.is_first:
            self.backbone.expand(self.copied_extractor)
            cast(LinearHead, self.network.head).resize(self.backbone.num_features)
        super().begin_task(task)

    def frozen(self) -> Iterable[nn.Module]:
        return [*super().frozen(), *self.backbone.earlier]
