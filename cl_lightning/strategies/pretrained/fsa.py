"""First Session Adaptation (Panos et al., ICCV 2023, arXiv:2303.13199).

A pretrained backbone is trained on the first task under a linear classifier with dropout. Trained are FiLM layers
(FSA-FiLM: scale and shift per channel after normalisation; everything else is frozen and in eval mode) or the whole
backbone (FSA, ``peft=WholeModel``). After that the classifier is linear discriminant analysis on sums over the features
h of all classes so far:

    Sigma = (sum h h^T - n mu mu^T) / (n - 1) + ridge I,   score_c = mu_c^T Sigma^-1 h - 1/2 mu_c^T Sigma^-1 mu_c

Sigma is the covariance of all features, not the covariance within classes, and ridge is 1, as in the released code;
choose another ridge for features whose variance is not about 1. Departs from the code, which keeps the images of all
tasks: sums give the same result. In the EfficientNet-B0 of the paper FiLM layers follow only the stem, the depthwise
convolutions and the last convolution: option ``targets`` of ``FiLM``.
"""

from typing import Any

from cl_lightning.models import FiLM, LDAHead, LinearHead, PeftFactory
from cl_lightning.strategies.pretrained.first_session import FirstSessionAdaptation
from cl_lightning.strategy import HeadFactory


class FSA(FirstSessionAdaptation):
    """FiLM layers trained on the first task, and linear discriminant analysis on the features of all tasks.

    Args:
        peft: Builds the module for the backbone; None for ``FiLM``.
        head: Builds the final head; None for ``LDAHead``.
        session_head: Builds the temporary head of the first task; None for ``LinearHead``.
        session_dropout: Dropout probability of the input of the temporary head, in [0, 1).
        kwargs: Options of ``FirstSessionAdaptation``.
    """

    traits = FirstSessionAdaptation.traits.but(paper="Panos et al., ICCV 2023, arXiv:2303.13199")

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
