"""First-session adaptation: a pretrained backbone is adapted to the first task only, all else is solved in closed form.

    task 1    min CE(v(phi*(x)), y) over what ``peft`` has put into phi (all of phi for ``WholeModel``) and over v
    then      v is thrown away, phi* is frozen; z(x) = phi*(x), or [phi(x); phi*(x)] with ``concatenate``
    each task a head is solved from sums over z of its images, un-augmented, in eval mode

v -> session_head, its input with ``session_dropout``. What ``peft`` leaves as it is stays in eval mode meanwhile: the
running statistics of normalisation do not move. APER, FSA and RanPAC are this with other parts, of which each can be
exchanged, but for the head and the features of RanPAC, which make it.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from cl_lightning.backbones import ImageShape
from cl_lightning.batch import Batch
from cl_lightning.closed_form import LDAHead
from cl_lightning.heads import CosineHead, Head
from cl_lightning.network import Network, Output
from cl_lightning.peft import AdaptedBackbone, PeftFactory, WholeModel
from cl_lightning.strategy import ContinualStrategy, HeadFactory, Phase
from cl_lightning.stream import Task


class FirstSessionHead(Head):
    """A head for the first task, which is thrown away, then another one that lasts.

    Args:
        session: Trained in the first task; it takes the features that are adapted.
        lasting: Learns from statistics; it takes the features that follow from that.
        dropout: Share of features set to 0 before the first head, while it is trained.

    Attributes:
        in_session: Whether the first one is in use.
    """

    needs_statistics = True

    def __init__(self, session: Head, lasting: Head, *, dropout: float = 0.0) -> None:
        super().__init__(lasting.num_features)
        self.session, self.lasting, self.dropout = session, lasting, nn.Dropout(dropout)
        self.needs_all_rows = lasting.needs_all_rows
        self.in_session = True

    def grow(self, num_new: int) -> None:
        self.lasting.grow(num_new)
        if self.in_session:
            self.session.grow(num_new)

    def finish(self) -> None:
        """Throw the first head away."""
        self.session.blocks = nn.ModuleList()
        self.in_session = False

    @property
    def prototypes(self) -> Any:
        """Class means of the head that lasts, or None."""
        return getattr(self.lasting, "prototypes", None)

    def block_sizes(self) -> list[int]:
        return self.lasting.block_sizes()

    def weight(self) -> Tensor:
        return self.session.weight() if self.in_session else self.lasting.weight()

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.session(self.dropout(features)) if self.in_session else self.lasting(features)
        return logits

    def classify(self, features: Tensor) -> Tensor:
        return self.session.classify(features) if self.in_session else self.lasting.classify(features)

    def fit_features(self, features: Tensor, labels: Tensor) -> None:
        self.lasting.fit_features(features, labels)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self.in_session = any(key.startswith(f"{prefix}session.blocks.") for key in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)


class FirstSessionAdaptation(ContinualStrategy):
    """A backbone that is adapted to the first task only, under a head that is solved.

    Args:
        peft: What is put into the backbone, built for it; None to train all of it (``WholeModel``).
        head: Builds the head that lasts, one that learns from statistics; None for ``LDAHead``.
        session_head: Builds the head that the first task is trained with; None for ``CosineHead`` with a scale that
            begins at 1 and is learnt.
        session_dropout: Dropout before it, in [0, 1).
        session_epochs: Epochs of the phase ``adapt``; None for those of the Trainer.
        concatenate: Whether the head that lasts takes the features of the backbone as it was beside the adapted ones.
        adapt: Whether there is anything adapted at all; if not, nothing is trained.
        kwargs: Of the base.
    """

    family: ClassVar[str] = "pretrained"
    paper: ClassVar[str] = "Panos et al., ICCV 2023, arXiv:2303.13199; and others"
    needs_pretrained: ClassVar[bool] = True
    plain_first_task = False

    def __init__(
        self,
        *,
        peft: PeftFactory | None = None,
        head: HeadFactory | None = None,
        session_head: HeadFactory | None = None,
        session_dropout: float = 0.0,
        session_epochs: int | None = None,
        concatenate: bool = False,
        adapt: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(head=head or LDAHead, visible="all", freeze_backbone=False, **kwargs)
        name = type(self).__name__
        if not 0 <= session_dropout < 1 or (session_epochs is not None and session_epochs < 1):
            raise ValueError(
                f"{name}: session_dropout={session_dropout}, session_epochs={session_epochs}; in [0, 1), at least 1 or "
                "null"
            )
        self.peft: PeftFactory = peft or WholeModel
        self.build_session_head = session_head or functools.partial(CosineHead, scale=1.0, learn_scale=True)
        self.session_dropout, self.session_epochs = session_dropout, session_epochs
        self.adapt = adapt
        if adapt:
            self.build_backbone = functools.partial(
                AdaptedBackbone, backbone=self.build_backbone, peft=self.peft, concatenate=concatenate
            )

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        if not self.network.head.needs_statistics:
            name = type(self.network.head).__name__
            raise ValueError(
                f"{type(self).__name__}: {name} learns from no statistics; use LDAHead, RidgeHead or PrototypeHead"
            )
        if self.adapt:
            session = self.build_session_head(self._adapted.width)
            head = FirstSessionHead(session, self.network.head, dropout=self.session_dropout)
            self.network = Network(self._adapted, head)

    @property
    def backbone_is_fixed(self) -> bool:
        return not self.adapt or not self._session_head.in_session

    def phases(self, task: Task) -> list[Phase]:
        return [Phase("adapt", self.session_epochs)] if self.adapt and task.is_first else []

    def frozen(self) -> Iterable[nn.Module]:
        return [*self._adapted.unadapted(), *self.frozen_norms()] if self.adapt else [self.network.backbone]

    def trainable(self) -> Iterable[nn.Parameter]:
        yield from self._adapted.adapted_parameters()
        yield from self._session_head.session.parameters()

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}

    def end_phase(self, phase: Phase) -> None:
        self._adapted.finish()
        self._session_head.finish()

    def bytes_kept(self) -> dict[str, int]:
        kept = super().bytes_kept()
        original = self._adapted.original if self.adapt else None
        if original is not None:
            kept["teachers"] = kept.get("teachers", 0) + sum(value.nbytes for value in original.state_dict().values())
        return kept

    @property
    def _adapted(self) -> AdaptedBackbone:
        backbone = self.network.backbone
        assert isinstance(backbone, AdaptedBackbone)
        return backbone

    @property
    def _session_head(self) -> FirstSessionHead:
        head = self.network.head
        assert isinstance(head, FirstSessionHead)
        return head
