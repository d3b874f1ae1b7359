"""Class means with cosine similarity, "Decoupled-Cosine" in few-shot papers (as in CEC: Zhang et al., CVPR 2021).

In the base session, with many classes and many images per class, a cosine classifier is trained:

    L = CE(s cos(f(x), w), y)

Then the backbone f is frozen, and the weights of each class are replaced by the mean of its features:

    w_c <- mu_c = 1/n_c sum_{y_i = c} f(x_i),   score_c(x) = cos(f(x), mu_c)

A later session with a few images per class takes no optimizer step: its class means are computed in one forward pass of
un-augmented images in eval mode. Means are of raw features; the cosine normalises them. s -> scale. The method is
first-session adaptation of the whole backbone.
Departs from the published code, which selects the epoch of the base session with the best test accuracy: here the last
epoch is used.
"""

import functools
from typing import Any

from cl_lightning.checks import above
from cl_lightning.memory import PrototypeHead
from cl_lightning.models import CosineHead
from cl_lightning.strategies.pretrained.first_session import FirstSessionAdaptation


class ProtoCosine(FirstSessionAdaptation):
    """A cosine classifier is trained on the base session; later sessions use class means on the frozen backbone.

    Args:
        scale: s, above 0; 16 in the papers for CIFAR-100, 32 for larger images.
        session_epochs: Number of epochs of the base session; None for the number of the Trainer.
        kwargs: Options of ``ContinualStrategy``.
    """

    traits = FirstSessionAdaptation.traits.but(
        family="few-shot", paper="baseline of Zhang et al., CVPR 2021, arXiv:2104.03047", needs_pretrained=False
    )

    def __init__(self, *, scale: float = 16.0, session_epochs: int | None = None, **kwargs: Any) -> None:
        above(self, 0, scale=scale)
        super().__init__(
            head=functools.partial(PrototypeHead, metric="cosine"),
            session_head=functools.partial(CosineHead, scale=scale),
            session_epochs=session_epochs,
            **kwargs,
        )
