"""Contrastive losses of features."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Batch
from cl_lightning.distributed import gather_rows, world_size
from cl_lightning.losses.classification import full_precision


def rows_of_all(batch: Batch) -> tuple[Callable[[Tensor], Tensor], float]:
    """For a loss that compares the rows of a step: a function that gathers rows, and the factor of the loss.

        rows, factor = rows_of_all(batch)
        loss = factor * supervised_contrastive(rows(embeddings), rows(batch.labels))

    The function returns the rows of all processes, with gradient for the rows of this process. It exchanges rows, so
    each process calls it equally often. A process without rows takes no part in the exchange: in a batch of the stream
    with fewer samples than processes the function returns its argument, and the loss is among the own rows.

    Args:
        batch: The batch of the step: the base class multiplies the loss by its weight, and the factor is 1 / weight
            where rows are gathered, else 1.
    """
    if batch.draw.total < world_size():
        return lambda tensor: tensor, 1.0
    return gather_rows, 1 / batch.weight


def supervised_contrastive(
    embeddings: Tensor,
    labels: Tensor,
    temperature: float = 0.1,
    *,
    base_temperature: float = 0.07,
    targets: Tensor | None = None,
) -> Tensor:
    """Supervised contrastive loss (Khosla et al., NeurIPS 2020, arXiv:2004.11362, eq. 2), in nats.

        L = T / T_0 * 1/n sum_i -1/|P_i| sum_{p in P_i} log( exp(z_i z_p / T) / sum_{a != i} exp(z_i z_a / T) )

    with z the L2-normalised embeddings and P_i the other rows with the label of row i. The mean is over the n rows with
    a non-empty P_i; it is 0 without any such row. T_0 = 0.07 is from the authors' code, not from the equation.
    If each label occurs in two rows, the two views of an image, and T_0 = T, this is InfoNCE (SimCLR: Chen et al., ICML
    2020, arXiv:2002.05709). With ``targets``, z_p and z_a are rows of the targets, such as embeddings of a teacher.

    Args:
        embeddings: ``(B, d)``. With two views of each image, pass both, so that each row has a positive.
        labels: Columns, int64 ``(B,)``.
        temperature: T, positive.
        base_temperature: T_0, positive.
        targets: Embeddings of the same rows, ``(B, d)``, without gradient; None for ``embeddings``.

    Returns:
        A scalar.
    """
    z = F.normalize(full_precision(embeddings), dim=1)
    others = z if targets is None else F.normalize(full_precision(targets.detach()), dim=1)
    with torch.autocast(z.device.type, enabled=False):
        similarity = z @ others.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels) & ~itself
    log_p = similarity.masked_fill(itself, -torch.inf).log_softmax(dim=1).masked_fill(~positive, 0.0)
    counts = positive.sum(dim=1)
    loss = -(log_p.sum(dim=1) / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)
    return loss * (temperature / base_temperature)
