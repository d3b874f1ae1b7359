"""First-session adaptation: a pretrained backbone is adapted to the first task only; the head has a closed form.

    task 1     min CE(v(phi*(x)), y) over the parameters of ``peft`` in phi (all of phi for ``WholeModel``) and of v
    then       v is removed, phi* is frozen; z(x) = phi*(x), or [phi(x); phi*(x)] with ``concatenate``
    each task  a head is solved from sums over z of its images, un-augmented, in eval mode

v -> session_head, its input with dropout ``session_dropout``. Modules that ``peft`` does not train are in eval mode
during task 1: the running statistics of normalisation do not change. APER, FSA and RanPAC are special cases with other
defaults; each part is an option, except the final head and the features of RanPAC.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.checks import at_least, within
from cl_lightning.models import AdaptedBackbone, CosineHead, Head, LDAHead, Network, PeftFactory, WholeModel
from cl_lightning.strategy import Batch, ContinualStrategy, HeadFactory, Output, Phase, PhaseOptions, Task, Traits


class FirstSessionHead(Head):
    """A temporary head, trained in the first task, and a final head that is solved from statistics after it.

    Args:
        temporary: Trained in the first task, on the adapted features phi*(x).
        final: Solved from statistics of z(x); its ``num_features`` is the width of z.
        dropout: Dropout probability of the input of ``temporary`` during training.

    Attributes:
        in_session: Whether the temporary head is in use.
    """

    needs_statistics = True

    def __init__(self, temporary: Head, final: Head, *, dropout: float = 0.0) -> None:
        super().__init__(final.num_features)
        self.temporary, self.final, self.dropout = temporary, final, nn.Dropout(dropout)
        self.needs_all_rows = final.needs_all_rows
        self.in_session = True

    def grow(self, num_new: int) -> None:
        self.final.grow(num_new)
        if self.in_session:
            self.temporary.grow(num_new)

    def finish(self) -> None:
        """Remove the temporary head, and use the final head from now on."""
        self.temporary.blocks = nn.ModuleList()
        self.in_session = False

    @property
    def prototypes(self) -> Any:
        """Class means of the final head, or None."""
        return getattr(self.final, "prototypes", None)

    def block_sizes(self) -> list[int]:
        return self.final.block_sizes()

    def weight(self) -> Tensor:
        return self.temporary.weight() if self.in_session else self.final.weight()

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.temporary(self.dropout(features)) if self.in_session else self.final(features)
        return logits

    def classify(self, features: Tensor) -> Tensor:
        return self.temporary.classify(features) if self.in_session else self.final.classify(features)

    def fit_features(self, features: Tensor, labels: Tensor) -> None:
        self.final.fit_features(features, labels)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self.in_session = any(key.startswith(f"{prefix}temporary.blocks.") for key in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)


class FirstSessionAdaptation(ContinualStrategy):
    """A pretrained backbone that is adapted to the first task only, and a head in closed form.

    Args:
        peft: Builds the module that is trained in the backbone; None to train the whole backbone (``WholeModel``).
        head: Builds the final head, which must learn from statistics; None for ``LDAHead``.
        session_head: Builds the temporary head of the first task; None for ``CosineHead`` with a learnt scale,
            initially 1.
        session_dropout: Dropout probability of the input of the temporary head, in [0, 1).
        session_epochs: Epochs of the phase ``adapt``; None for ``max_epochs`` of the Trainer.
        concatenate: Whether the final head takes [phi(x); phi*(x)], the pretrained and the adapted features.
        adapt: Whether to adapt the backbone; without it nothing is trained.
        kwargs: Options of the base class.
    """

    traits = Traits(
        family="pretrained", paper="Panos et al., ICCV 2023, arXiv:2303.13199; and others", needs_pretrained=True
    )

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
        super().__init__(head=head or LDAHead, loss_classes="all", freeze_backbone=False, **kwargs)
        within(self, "[0, 1)", session_dropout=session_dropout)
        at_least(self, 1, session_epochs=session_epochs, optional=True)
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
                f"{type(self).__name__}: head is {name}, which does not learn from statistics; use LDAHead, RidgeHead "
                "or PrototypeHead"
            )
        if self.adapt:
            session = self.build_session_head(self._adapted.width)
            head = FirstSessionHead(session, self.network.head, dropout=self.session_dropout)
            self.network = Network(self._adapted, head)

    @property
    def backbone_is_final(self) -> bool:
        return not self.adapt or not self._session_head.in_session

    def phases(self, task: Task) -> list[Phase]:
        return [Phase("adapt", PhaseOptions(epochs=self.session_epochs))] if self.adapt and task.is_first else []

    def frozen(self) -> Iterable[nn.Module]:
        return [*self._adapted.unadapted(), *self._frozen_norms()] if self.adapt else [self.network.backbone]

    def trainable(self) -> Iterable[nn.Parameter]:
        yield from self._adapted.adapted_parameters()
        yield from self._session_head.temporary.parameters()

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
