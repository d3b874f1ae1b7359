"""Zero-shot classification by text embeddings of the class names (CLIP: Radford et al., ICML 2021, arXiv:2103.00020).

    score_c(x) = s cos(f(x), e_c),   e_c = norm( mean_m norm(T_cm) )

with f the image tower of a model of images and text, and T_cm the embedding of a text with the name of class c in
template m, from a file. Nothing is trained or stored: the baseline of all methods on such a model. The scores are of
the classes seen so far; the accuracy among given classes does not depend on the order of the classes or on their split
into tasks, and never changes.
f and e_c must be in one space: for an image tower that was not trained with the text encoder, or for names that the
text encoder does not know, the accuracy is near chance. A backbone whose features have another size is refused.
"""

from typing import Any

from torch import nn

from cl_lightning.batch import ImageShape
from cl_lightning.strategies.pretrained.text import TextTower
from cl_lightning.strategy import Phase, Task, Traits


class ZeroShot(TextTower):
    """Cosines of the features of a frozen image tower to text embeddings of the class names, without training.

    Args:
        kwargs: Options of ``TextTower``.
    """

    traits = Traits(family="pretrained", paper="Radford et al., ICML 2021, arXiv:2103.00020", needs_pretrained=True)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(loss_classes="all", **kwargs)

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        head = self.text_head
        if not isinstance(head.projection, nn.Identity):
            raise ValueError(
                f"ZeroShot: give an image tower and text embeddings of one model: features have {head.num_features} "
                f"numbers, embeddings {head.num_embedding}; the Timm backbones of CLIP need projection true"
            )

    def phases(self, task: Task) -> list[Phase]:
        return []
