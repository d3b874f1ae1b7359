"""A linear head on frozen pretrained features: the baseline of methods that train prompts or adapters.

    L(x, y) = CE(W f(x) + b, y),    f frozen

The softmax is over the classes of the current task (``loss_classes="current"``, the local cross-entropy of prompt
methods: rows of earlier classes get no gradient and stay as they are), or over all classes seen so far (``"all"``: the
loss lowers the logits of earlier classes, which have no samples, and they are forgotten). The gain of a prompt method
over the local form is due to its prompts. Since features do not change, they can be stored (``loop.feature_cache``).
"""

from typing import Any, Literal, get_args

from torch import Tensor

from cl_lightning.checks import one_of
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Traits

ProbeClasses = Literal["current", "all"]


class LinearProbe(ContinualStrategy):
    """Cross-entropy of a linear head on the features of a frozen pretrained backbone.

    Args:
        loss_classes: Classes of the cross-entropy: the classes of the ``current`` task, or ``all`` classes seen so far.
        kwargs: Options of the base class, without ``freeze_backbone``.
    """

    traits = Traits(family="pretrained", paper="baseline", needs_pretrained=True, losses_use_images=False)

    def __init__(self, *, loss_classes: ProbeClasses = "current", **kwargs: Any) -> None:
        one_of(self, get_args(ProbeClasses), loss_classes=loss_classes)
        super().__init__(loss_classes=loss_classes, freeze_backbone=True, **kwargs)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}
