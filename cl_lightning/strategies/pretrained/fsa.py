"""First Session Adaptation (Panos et al., ICCV 2023, arXiv:2303.13199).

A pretrained backbone learns the first task under a linear classifier with dropout, by FiLM layers (FSA-FiLM: scale and
shift per channel after normalisation, all else frozen and in eval mode) or as a whole (FSA, ``peft=WholeModel``). From
then on the classifier is linear discriminant analysis on sums over the features h of all classes so far:

    Sigma = (sum h h^T - n mu mu^T) / (n - 1) + ridge I,   score_c = mu_c^T Sigma^-1 h - 1/2 mu_c^T Sigma^-1 mu_c

The covariance is that of all features, not that within classes, and ridge is 1, as in the released code; where features
have another scale than a variance of 1, choose another one. Departs from the code, which keeps the images of all tasks:
sums give the same. The paper has EfficientNet-B0, where FiLM layers follow the stem, the depthwise convolutions and the
last convolution only: ``targets``.
"""

from typing import Any, ClassVar

from cl_lightning.closed_form import LDAHead
from cl_lightning.heads import LinearHead
from cl_lightning.peft import SSF, FiLM, PeftFactory
from cl_lightning.strategies.pretrained.first_session import FirstSessionAdaptation
from cl_lightning.strategy import HeadFactory


class FSA(FirstSessionAdaptation):
    """FiLM layers trained on the first task, then linear discriminant analysis.

    Args:
        peft: What is put into the backbone; None for ``FiLM``.
        head: Builds the head that lasts; None for ``LDAHead``.
        session_head: Builds the head of the first task; None for ``LinearHead``.
        session_dropout: Dropout before it.
        kwargs: Of ``FirstSessionAdaptation``.
    """

    paper: ClassVar[str] = "Panos et al., ICCV 2023, arXiv:2303.13199"

    def __init__(
        self,
        *,
        peft: PeftFactory | None = None,
        head: HeadFactory | None = None,
        session_head: HeadFactory | None = None,
        session_dropout: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            peft=peft or FiLM,
            head=head or LDAHead,
            session_head=session_head or LinearHead,
            session_dropout=session_dropout,
            **kwargs,
        )

    @classmethod
    def conformance_options(cls) -> dict[str, Any]:
        return {"peft": SSF, "session_dropout": 0.0}  # a net without norms; dropout draws per process
