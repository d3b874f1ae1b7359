"""Base class of methods that compare the features of a frozen image tower with embeddings of the class names."""

from typing import Any

from cl_lightning.batch import ImageShape
from cl_lightning.models import TextHead, head_as
from cl_lightning.strategy import ContinualStrategy, HeadFactory


class TextTower(ContinualStrategy):
    """A frozen image tower, and a head whose rows are embeddings of the class names, from a file.

    No text encoder is needed: ``docs/text_embeddings.md`` shows how to write the file. Features and embeddings of CLIP
    are in one space if the backbone is an image tower of CLIP with its projection,
    ``Timm(name="vit_base_patch16_clip_quickgelu_224.openai", pretrained=True, projection=True)``.

    Args:
        head: Builds a ``TextHead``. The scale of CLIP is ``scale=100`` with ``learn_scale=False``.
        kwargs: Options of the base class, without ``freeze_backbone``.

    Raises:
        ValueError: If the head is another one, when the network is built.
    """

    def __init__(self, *, head: HeadFactory | None = None, **kwargs: Any) -> None:
        super().__init__(head=head, freeze_backbone=True, **kwargs)

    @property
    def text_head(self) -> TextHead:
        """The head of the network."""
        return head_as(self.network, TextHead, self, "whose rows are embeddings of the class names")

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        _ = self.text_head  # raises for another head
