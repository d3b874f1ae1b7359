"""DUCT: dual consolidation of representation and classifier (Zhou et al., CVPR 2025, arXiv:2410.00911).

For domain-incremental streams. Each domain t has rows of its own in the head, one per class, and the prediction is the
class of the largest row. Phase ``train`` begins with the pretrained backbone theta_0 and trains it and the rows of the
domain by cross-entropy over these rows. Then the change of the backbone is merged with the earlier ones, by the
similarity of the class means before and after the training:

    phi_t = mean_c cos(mu_c(theta_0), mu_c(theta_t)),   M <- M + alpha phi_t (theta_t - theta_0),   theta = theta_0 + M

Phase ``rows`` trains the rows W_t of the domain alone, on the merged backbone. When the task ends, the rows of each
earlier domain o move towards the transported rows of the new one:

    W_o <- (1 - rho) W_o + rho C_o T^T W_t,   T = argmin_T <T, Q> - eps H(T),   T 1 = 1 / C_t,   T^T 1 = 1 / C_o
    Q_cd = || mu_c(theta_0) - mu_d(theta_0) ||^2 / (mean of Q)     for class c of domain t and class d of domain o

with all class means mu of the domain under the pretrained backbone. alpha -> merge_scale, rho -> row_share,
eps -> transport_reg. Biases of the rows are transported with them.
Departs from the written method: there is the factor C_o, without which rows of T^T W_t are 1/C_o of a weighted mean of
rows; Q is divided by its mean, and Sinkhorn's iterations are computed with logarithms, because exp(-Q / eps) underflows
for usual features. Class means are of un-augmented images. The prediction by the largest row of a class is our reading.
The running statistics of batch normalisation are computed again for the merged weights, on the images of the domain.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.checks import above, at_least, within
from cl_lightning.losses import cross_entropy
from cl_lightning.memory import WeightSets, class_means, network_tensors, shifted, task_vector, write_weights
from cl_lightning.models import LinearHead, transport
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Phase, PhaseOptions, Task, Traits


def transported(old: Tensor, new: Tensor, plan: Tensor, share: float) -> Tensor:
    """``(1 - rho) W_o + rho m T^T W_t`` of the m rows of an earlier domain.

    Args:
        old: W_o, ``(m, d)``.
        new: W_t, ``(n, d)``.
        plan: T, ``(n, m)``.
        share: rho, in [0, 1].
    """
    moved = plan.shape[1] * plan.T @ new.double()
    return torch.lerp(old.double(), moved, share).to(old.dtype)


class DomainRows(nn.Linear):
    """Rows of one domain: a linear classifier over its classes.

    Attributes:
        columns: Column of the class of each row, int64 ``(C_t,)``.
        means: Mean feature of each class under the pretrained backbone, ``(C_t, d)``.
    """

    columns: Tensor
    means: Tensor

    def __init__(self, num_features: int, num_rows: int) -> None:
        super().__init__(num_features, num_rows)
        self.register_buffer("columns", torch.zeros(num_rows, dtype=torch.int64))
        self.register_buffer("means", torch.zeros(num_rows, num_features))


class DomainHead(LinearHead):
    """Linear classifier with rows for each domain: the logit of a class is the largest one of its rows.

    Args:
        num_features: Size of a feature vector, d.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self._columns = 0

    def new_block(self, num_new: int) -> DomainRows:
        return DomainRows(self.num_features, num_new)

    def add_domain(self, columns: Sequence[int]) -> None:
        """Append rows for the classes of these columns."""
        self.grow(len(columns))
        self.newest.columns.copy_(torch.tensor(columns))
        self._columns = max(self._columns, *(column + 1 for column in columns))

    @property
    def num_columns(self) -> int:
        return self._columns

    @property
    def domains(self) -> list[DomainRows]:
        """The rows of each domain, in order."""
        return list(self.blocks)  # type: ignore[arg-type]

    @property
    def newest(self) -> DomainRows:
        return self.domains[-1]

    def forward(self, features: Tensor) -> Tensor:
        best = features.new_full((len(features), self.num_columns), -torch.inf)
        for rows in self.domains:
            own = rows(features).to(best.dtype)
            best = best.index_copy(1, rows.columns, torch.maximum(best.index_select(1, rows.columns), own))
        return best

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        saved = [state_dict[key] for key in state_dict if key.startswith(prefix) and key.endswith(".columns")]
        self._columns = max((int(columns.max()) + 1 for columns in saved), default=0)


class DUCT(ContinualStrategy):
    """Changes of the backbone are summed by similarity, and rows of earlier domains follow by optimal transport.

    Args:
        merge_scale: alpha, at least 0; 0 keeps the pretrained backbone.
        row_share: rho, in [0, 1]; 0 keeps the rows of earlier domains.
        transport_reg: eps, above 0.
        rows_options: Options of the phase ``rows``; 0 epochs to leave it out. The default optimizer is SGD with
            learning rate 0.001, momentum 0.9 and weight decay 5e-4.
        lr_factors: Factors of the learning rate by patterns of names; None for 0.01 for the backbone.
        kwargs: Options of the base class.

    Attributes:
        weights: The sets ``start`` (theta_0 with running statistics) and ``offset`` (M).
    """

    traits = Traits(
        family="pretrained",
        paper="Zhou et al., CVPR 2025, arXiv:2410.00911",
        needs_pretrained=True,
        scenarios=("domain-incremental",),
        remedy="use a method for new classes, such as CoFiMA",
    )

    def __init__(
        self,
        *,
        merge_scale: float = 0.25,
        row_share: float = 0.25,
        transport_reg: float = 0.02,
        rows_options: PhaseOptions = PhaseOptions(epochs=5),
        lr_factors: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        factors = {"backbone.*": 0.01} if lr_factors is None else lr_factors
        super().__init__(head=DomainHead, lr_factors=factors, loss_classes="all", freeze_backbone=False, **kwargs)
        at_least(self, 0, merge_scale=merge_scale)
        within(self, "[0, 1]", row_share=row_share)
        above(self, 0, transport_reg=transport_reg)
        self.merge_scale, self.row_share, self.transport_reg = merge_scale, row_share, transport_reg
        sgd = functools.partial(torch.optim.SGD, lr=0.001, momentum=0.9, weight_decay=5e-4)
        self.rows_options = rows_options.filled(sgd)
        self.weights = WeightSets()

    @property
    def head(self) -> DomainHead:
        head = self.network.head
        assert isinstance(head, DomainHead)
        return head

    def begin_task(self, task: Task) -> None:
        backbone = self.network.backbone
        if task.is_first:
            self.weights.keep("start", network_tensors(backbone))
        else:
            write_weights(backbone, self.weights["start"])
        self.head.add_domain(task.columns)

    def phases(self, task: Task) -> list[Phase]:
        if self.rows_options.epochs == 0:
            return [Phase()]
        own = Phase("rows", self.rows_options, trains=self._rows, freezes=lambda: [self.network.backbone])
        return [Phase(), own]

    def trainable(self) -> Iterator[nn.Parameter]:
        yield from self.network.backbone.parameters()
        yield from self._rows()

    def _rows(self) -> Iterable[nn.Parameter]:
        return self.head.newest.parameters()

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        rows = self.head.newest
        places = torch.full_like(self.task_columns[-1], -1, dtype=torch.int64)  # row of each column
        places[rows.columns] = torch.arange(len(rows.columns), device=places.device)
        labels = torch.where(batch.labels >= 0, places[batch.labels.clamp(min=0)], -1)
        return {"ce": cross_entropy(rows(output.features), labels, weights=self.data.weights_of(batch))}

    def end_phase(self, phase: Phase) -> None:
        if phase.name == "rows":
            return
        backbone, rows, start = self.network.backbone, self.head.newest, self.weights["start"]
        tuned = {name: value.clone() for name, value in network_tensors(backbone).items()}
        self.eval()
        after = self._class_means()
        write_weights(backbone, start)
        before = self._class_means()
        self.train()
        rows.means.copy_(before)
        similarity = float(F.cosine_similarity(before, after, dim=1).mean())  # phi_t
        offset = self.weights["offset"]
        change = task_vector(tuned, start)
        for name, value in change.items():
            value.mul_(self.merge_scale * similarity).add_(offset.get(name, torch.zeros_like(value)))
        self.weights.keep("offset", change)
        write_weights(backbone, shifted(start, change))
        self.passes.refit_norms(self._frozen_norms())

    def _class_means(self) -> Tensor:
        """Means of the classes of the domain, in the order of its rows, ``(C_t, d)``, float64."""
        features, labels = self.passes.features()
        return class_means(features, labels, self.task.num_seen)[self.head.newest.columns]

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        super().end_task(task)
        *earlier, new = self.head.domains
        for old in earlier:
            cost = torch.cdist(new.means.double(), old.means.double()).square().cpu()  # for many small operations
            plan = transport(cost / cost.mean().clamp(min=1e-12), self.transport_reg).to(new.means.device)
            old.weight.copy_(transported(old.weight, new.weight, plan, self.row_share))
            old.bias.copy_(transported(old.bias[:, None], new.bias[:, None], plan, self.row_share)[:, 0])

    def bytes_kept(self) -> dict[str, int]:
        return {**super().bytes_kept(), "prototypes": sum(rows.means.nbytes for rows in self.head.domains)}
