"""Few-shot sessions that train a part of the backbone: the base class of SoftNet and WaRP."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_lightning.batch import Batch
from cl_lightning.distributed import all_gather_rows, gather_rows, world_size
from cl_lightning.losses import cross_entropy
from cl_lightning.memory import Held
from cl_lightning.models import batch_norms, in_eval_mode
from cl_lightning.strategies.few_shot.proto_cosine import ProtoCosine
from cl_lightning.strategy import Output, Phase, PhaseOptions, Task


def batch_means(features: Tensor, labels: Tensor, means: Tensor, columns: Tensor) -> Tensor:
    """Class means in which the means of given classes are the means of their rows in a batch, with gradient.

    Args:
        features: Of all rows of the batch, ``(n, d)``.
        labels: Columns, int64 ``(n,)``.
        means: Present means of all classes, ``(C, d)``, which the other classes keep.
        columns: Classes to replace, int64 ``(c,)``; one without rows keeps its mean.

    Returns:
        ``(C, d)``.
    """
    member = (labels == columns[:, None]).to(features.dtype)  # (c, n)
    counts = member.sum(1, keepdim=True)
    fresh = torch.where(counts > 0, member @ features / counts.clamp(min=1), means[columns])
    return means.index_copy(0, columns, fresh)


class TunedSessions(ProtoCosine):
    """Class means; each later session trains a part of the backbone, whose other weights do not change by a bit.

    A subclass names the parameters, their masks and the scores that the loss of a session compares. Batch
    normalisation keeps its statistics in a session, and images are not augmented.

    Args:
        session_options: Epochs, optimizer and schedule of the phase ``session``; 0 epochs for no training after the
            base session.
        kwargs: Options of ``ProtoCosine``.
    """

    traits = ProtoCosine.traits.but(family="")  # a base class, which is not listed

    def __init__(self, *, session_options: PhaseOptions, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not self.adapt:
            raise ValueError(
                f"{type(self).__name__}: adapt is False, but the base session trains the backbone; use True"
            )
        self.session_options = session_options
        self._held: Held | None = None

    # ------------------------------------------------------------------ to be overridden

    def session_parameters(self) -> Mapping[str, nn.Parameter]:
        """Parameters that a session trains, by name."""
        raise NotImplementedError

    def session_masks(self) -> dict[str, Tensor]:
        """Entries of these parameters that a session trains, bool, by name."""
        raise NotImplementedError

    def session_scores(self, features: Tensor, labels: Tensor) -> Tensor:
        """Scores of all classes so far, ``(n, C)``, of all rows of a step: features ``(n, d)``, columns ``(n,)``."""
        raise NotImplementedError

    # ------------------------------------------------------------------ the sessions

    @property
    def backbone_is_final(self) -> bool:
        return super().backbone_is_final and self.session_options.epochs == 0

    def phases(self, task: Task) -> list[Phase]:
        if task.is_first or self.session_options.epochs == 0:
            return super().phases(task)
        return [
            Phase(
                "session",
                self.session_options,
                trains=lambda: self.session_parameters().values(),
                freezes=self.session_frozen,
                unaugmented=True,
            )
        ]

    def session_frozen(self) -> Iterable[nn.Module]:
        """Modules that are in eval mode and without gradient in a session."""
        return batch_norms(self.network.backbone)

    @property
    def in_session(self) -> bool:
        """Whether the present phase is a later session."""
        return self.phase.name == "session"

    def on_train_start(self) -> None:
        super().on_train_start()
        self._held = None
        if self.in_session and self.prototypes.known_columns().max() < min(self.task.columns):
            self.measure()  # a resumed session has these means in its checkpoint

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if not self.in_session:
            return super().losses(batch, output)
        features, labels, share = output.features, batch.labels, 1.0
        if batch.draw.total >= world_size():  # a process without rows takes no part in an exchange
            # The base class multiplies by the weight of the rows of this process; this loss is of all rows.
            features, labels, share = gather_rows(features), all_gather_rows(labels), batch.weight
        return {"session": cross_entropy(self.session_scores(features, labels), labels) / share}

    def edit_gradients(self, batch: Batch) -> None:
        super().edit_gradients(batch)
        if self.in_session:
            if self._held is None:
                self._held = Held(dict(self.session_parameters()), self.session_masks())
            self._held.mask_gradients()

    def after_step(self, batch: Batch) -> None:
        super().after_step(batch)
        if self._held is not None:
            self._held.restore()

    def end_phase(self, phase: Phase) -> None:
        self._held = None
        if phase.name != "session":
            super().end_phase(phase)

    def end_task(self, task: Task) -> None:
        self.measure()

    def measure(self) -> None:
        """Compute the means of the classes of the task with the present backbone."""
        with in_eval_mode(self.network):
            features, labels = self.passes.features()
        self.prototypes.update(features, labels, num_classes=self.network.head.num_columns, replace=True)
