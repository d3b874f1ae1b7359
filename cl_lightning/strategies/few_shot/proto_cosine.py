"""Prototypes under cosines, "Decoupled-Cosine" of the few-shot papers (as in CEC: Zhang et al., CVPR 2021).

The base session, of many classes with many images, is trained under a cosine classifier,

    L = CE(s cos(f(x), w), y)

then the means of the features of each class take the place of its row, and the backbone f is frozen:

    w_c <- mu_c = 1/n_c sum_{y_i = c} f(x_i),   score_c(x) = cos(f(x), mu_c)

A later session of a few images a class is one forward pass, un-augmented and in eval mode, and takes no step. Means are
those of raw features, the cosine normalises them. s -> scale. It is first-session adaptation of a whole backbone.
Departs from the published code, which chooses the best epoch of the base session by test accuracy: the last one counts.
"""

import functools
from typing import Any, ClassVar

from cl_lightning.heads import CosineHead, PrototypeHead
from cl_lightning.strategies.pretrained.first_session import FirstSessionAdaptation


class ProtoCosine(FirstSessionAdaptation):
    """A cosine classifier on the base session, then class means on a frozen backbone.

    Args:
        scale: s, positive; 16 in the papers for CIFAR-100, 32 for larger images.
        session_epochs: Epochs of the base session; None for those of the Trainer.
        kwargs: Of ``ContinualStrategy``.
    """

    family: ClassVar[str] = "few-shot"
    paper: ClassVar[str] = "baseline of Zhang et al., CVPR 2021, arXiv:2104.03047"
    needs_pretrained: ClassVar[bool] = False

    def __init__(self, *, scale: float = 16.0, session_epochs: int | None = None, **kwargs: Any) -> None:
        if not scale > 0:
            raise ValueError(f"{type(self).__name__}: scale is {scale}; it must be positive, such as 16")
        super().__init__(
            head=functools.partial(PrototypeHead, metric="cosine"),
            session_head=functools.partial(CosineHead, scale=scale),
            session_epochs=session_epochs,
            **kwargs,
        )
