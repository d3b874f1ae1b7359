"""OnePrompt (Huang, Chen & Hsu, ICLR 2024, arXiv:2402.04129): one set of prefixes that all tasks train.

    L = CE(W f(x; p), y over the classes of the task),    a prefix extends K and V of a block to [K; p_K] and [V; p_V]

f is a frozen transformer. The prefixes p and the rows of the head of the task are trained; there is no pool, no key and
no query, so an image passes through the transformer once. Features of earlier tasks drift, which the paper accepts.
It is DualPrompt (arXiv:2204.04799) with an expert that all tasks share.

As in the paper's code: prefixes of 5 keys and values in blocks 0 and 1, of 20 in blocks 2 to 4, drawn from U(0, 1); a
new optimizer for each task. Its learning rate follows ``QuarterCosineOverPhase`` as in CODA-Prompt.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from cl_lightning.models import AdaptedBackbone, Prefix
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Traits


class OnePrompt(ContinualStrategy):
    """Prefixes in a frozen transformer, shared by all tasks, trained by cross-entropy over the classes of the task.

    Args:
        lengths: Number of keys, and of values, of the prefix of each of ``blocks``, at least 1.
        blocks: Indices of the blocks with a prefix.
        low: Smallest initial value of prefixes.
        high: Largest initial value of prefixes.
        kwargs: Options of the base class. The backbone must be a transformer of timm.
    """

    traits = Traits(family="pretrained", paper="Huang et al., ICLR 2024, arXiv:2402.04129", needs_pretrained=True)

    def __init__(
        self,
        *,
        lengths: Sequence[int] = (5, 5, 20, 20, 20),
        blocks: Sequence[int] = (0, 1, 2, 3, 4),
        low: float = 0.0,
        high: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss_classes="current", freeze_backbone=False, **kwargs)
        prefix = functools.partial(Prefix, length=list(lengths), blocks=list(blocks), low=low, high=high)
        self.build_backbone = functools.partial(AdaptedBackbone, backbone=self.build_backbone, peft=prefix)

    def frozen(self) -> Iterable[nn.Module]:
        backbone = self.network.backbone
        assert isinstance(backbone, AdaptedBackbone)
        return [backbone] if self.phase.features is not None else backbone.unadapted()

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}
