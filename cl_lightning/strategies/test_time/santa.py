"""SANTA, source anchoring and target alignment (Chakrabarty, Sreenivas, Biswas, TMLR 2023).

Scales and shifts of the normalisation layers, and a projector, are trained so that predictions agree with the
frozen source network, the anchor, and features with source prototypes. With predictions p of the network for x, p~ for
an augmented view of x, and p_a of the anchor for x,

    L = mean_i [ -1/2 sum_c p_c log p_a,c - 1/2 sum_c p~_c log p_a,c ] + contrast

``contrast`` is ``PrototypeContrast``. The gradient passes through p and p~, which weight the log-probabilities
of the anchor. Both networks normalise with the statistics of the batch. The first forward pass predicts the batch.
"""

from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.checks import at_least
from cl_lightning.losses import full_precision
from cl_lightning.strategies.test_time.base import ADAPT, TestTimeAdaptation, Trained
from cl_lightning.strategies.test_time.parts.contrast import PrototypeContrast
from cl_lightning.strategies.test_time.parts.views import viewed
from cl_lightning.strategy import Batch, Output

_VIEW = 0xC5  # salt


def anchored(logits: Tensor, anchor: Tensor) -> Tensor:
    """``-sum_c p_c log p_a,c`` of each row, ``(B,)``; no gradient passes through the anchor."""
    return -(full_precision(logits).softmax(dim=1) * F.log_softmax(full_precision(anchor.detach()), dim=1)).sum(dim=1)


class SANTA(TestTimeAdaptation):
    """Predictions are anchored at the source network, features at source prototypes.

    Args:
        contrast_weight: Weight of the contrast, at least 0.
        temperature: T of the contrast, above 0.
        source_samples: Number of source images for the prototypes, at least 1.
        params: Parameters that are trained, see ``TestTimeAdaptation``.
        kwargs: Options of ``TestTimeAdaptation``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time", paper="Chakrabarty et al., TMLR 2023", transductive=True, inputs=("image",)
    )
    needs_source: ClassVar[bool] = True

    def __init__(
        self,
        *,
        contrast_weight: float = 1.0,
        temperature: float = 0.1,
        source_samples: int = 100_000,
        params: Literal["norm", "early_norm", "all"] | list[str] = "norm",
        **kwargs: Any,
    ) -> None:
        chosen: Trained = params
        super().__init__(params=chosen, **kwargs)
        at_least(self, 0, contrast_weight=contrast_weight)
        self.contrast_weight = contrast_weight
        self.contrast = PrototypeContrast(source_samples, temperature)

    def trainable(self) -> list[nn.Parameter]:
        further = list(self.contrast.parameters()) if self.phase.name == ADAPT and self.contrast_weight else []
        return [*super().trainable(), *further]

    def adapt(self, batch: Batch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        anchor = self.source(batch.images).logits[:, : self.num_source]
        view = self.forward_source_classes(viewed(self, batch, batch.draw.fork(_VIEW)))
        terms = {"anchor": (anchored(output.logits, anchor) + anchored(view.logits, anchor)) / 2}
        if self.contrast_weight:
            terms["contrast"] = self.contrast_weight * self.contrast(batch, output.features, view.features)
        return output.logits, terms
