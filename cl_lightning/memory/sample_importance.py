"""Memory that keeps the samples whose training lowers the loss of the memory most (CLIB: Koh et al., ICLR 2022)."""

import torch
from torch import Tensor

from cl_lightning.batch import Draw
from cl_lightning.distributed import all_gather_together
from cl_lightning.memory.policies import rank_in_group
from cl_lightning.memory.replay import Memory

_MARK = "window_losses"


def least_important(labels: Tensor, arriving: Tensor, importance: Tensor, count: int) -> Tensor:
    """Rows that leave a full memory, one after another: of the largest class, the one of the least importance.

    The arriving samples count for their classes, and none of them leaves. Among equally large classes the row of the
    least importance leaves. With several arriving samples all of them count from the start.

    Args:
        labels: Columns of the held samples, int64 ``(h,)``.
        arriving: Columns of the arriving samples, int64 ``(n,)``.
        importance: Importances of the held samples, ``(h,)``.
        count: Number of rows that leave, at most h.

    Returns:
        Rows, int64 ``(count,)``, in the order in which they leave.
    """
    order = importance.argsort(stable=True)  # the r-th of a class to leave finds the class r samples smaller
    earlier, _ = rank_in_group(torch.arange(len(order), 0, -1, device=order.device), labels[order])
    sizes = torch.cat([labels, arriving]).bincount()
    size = sizes[labels[order]] - earlier
    return order[size.argsort(descending=True, stable=True)[:count]]


def credited(
    importance: Tensor, used: Tensor, decrease: Tensor, *, momentum: float = 0.9, released: bool = False
) -> Tensor:
    """Importances after the samples in use have lowered the loss.

        I_U <- I_U + (1 - m) (d - mean(I_U)),                released: I_U + (1 - m) (d + mean(I_U) / |U|)

    With a constant decrease d, importances that are equal tend to d.

    Args:
        importance: I, ``(n,)``.
        used: U, which samples were in use, bool ``(n,)``; without any nothing changes.
        decrease: d, a scalar.
        momentum: m, in [0, 1).
        released: Whether the form of the authors' code is used, in which importances grow at a constant loss.
    """
    count = used.sum().clamp(min=1)
    mean = torch.where(used, importance, 0.0).sum() / count
    change = decrease + mean / count if released else decrease - mean
    return torch.where(used, importance + (1 - momentum) * change, importance)


def mean_decrease(before: Tensor, now: Tensor) -> Tensor:
    """Mean decrease of the losses of the samples that have both, a float64 scalar; nan if there are none.

    Args:
        before: Earlier losses, ``(n,)``; nan for a sample without one.
        now: Present losses, ``(n,)``.
    """
    return (before.double() - now.double()).nanmean()


class ImportanceMemory(Memory):
    """Memory of equal classes in which each sample has an importance, the decrease of the loss that it brings.

    An arriving sample is always stored. A full memory first loses the sample of the least importance of its largest
    class, where the arriving sample counts (:func:`least_important`). The new sample has the mean importance of the
    samples of its class that the memory still holds, or of all held samples if there are none.

    :meth:`use` marks samples that a step trains on. :meth:`credit` compares the losses of all samples with their losses
    at the call before, and changes the importances of the marked samples (:func:`credited`).

    Args:
        size: Maximum number of samples, over all processes, at least 1.
        momentum: m, in [0, 1).
        released: As for :func:`credited`.

    Attributes:
        fields: Of each sample ``importance``, ``losses`` at the latest :meth:`credit`, nan if there was none since it
            arrived, ``window_losses`` at the latest :meth:`begin_window` likewise, and whether it is ``used``.
    """

    def __init__(self, size: int, *, momentum: float = 0.9, released: bool = False) -> None:
        super().__init__(size)
        self.momentum, self.released = momentum, released

    @torch.no_grad()
    def add(
        self, images: Tensor, labels: Tensor, tasks: Tensor, draw: Draw, *, gathered: bool = False, **fields: Tensor
    ) -> None:
        """Add samples as :meth:`Memory.add`; of more samples than the memory has room for, the last ones are stored."""
        rows = {"images": images, "labels": labels, "tasks": tasks, **fields}
        if not gathered:
            rows = dict(zip(rows, all_gather_together(rows.values()), strict=True))
        rows = {name: value[-self.size :] for name, value in rows.items()}
        arriving = rows["labels"]
        if (excess := len(self) + len(arriving) - self.size) > 0:
            leaves = least_important(self.labels, arriving, self.fields["importance"], excess)
            stays = torch.ones_like(self.labels, dtype=torch.bool).index_fill_(0, leaves, False)
            # A stable sort, not `nonzero`, which would synchronise with a GPU.
            self.keep(stays.logical_not().to(torch.uint8).argsort(stable=True)[: len(self) - excess])
        importance = self._of_new(arriving)
        unknown = torch.full_like(importance, torch.nan)
        super().add(
            **rows,
            draw=draw,
            gathered=True,
            importance=importance,
            losses=unknown,
            **{_MARK: unknown},
            used=torch.zeros_like(arriving, dtype=torch.bool),
        )

    def _of_new(self, labels: Tensor) -> Tensor:
        """Importance of each arriving sample, float32 ``(n,)``."""
        if len(self) == 0:
            return torch.zeros(len(labels), device=labels.device)
        held = self.fields["importance"]
        same = labels[:, None] == self.labels  # (n, held)
        same |= ~same.any(dim=1, keepdim=True)
        # Relative to one of them, so that the mean of equal numbers is this number to the bit: a difference of its
        # rounding would decide which sample leaves.
        one = held[same.to(torch.uint8).argmax(dim=1)]
        return one + (same * (held - one[:, None])).sum(dim=1) / same.sum(dim=1)

    def use(self, rows: Tensor, where: Tensor | None = None) -> None:
        """Mark samples that a step trains on.

        Args:
            rows: Rows of all processes, int64 ``(n,)``.
            where: Whether each of these rows is used, bool ``(n,)``, without a synchronisation; None for all.
        """
        if where is None:
            self.fields["used"][rows] = True
        else:
            marked = torch.zeros_like(self.labels).index_add_(0, rows, where.long()) > 0
            self.fields["used"].logical_or_(marked)

    def credit(self, losses: Tensor) -> None:
        """Credit the samples that were used since the last call with the decrease of the mean loss.

        The decrease is the mean over the samples that were in the memory at the last call; without any, nobody is
        credited.

        Args:
            losses: Present loss of each sample, ``(held,)``, the same on every process.
        """
        fields = self.fields
        decrease = mean_decrease(fields["losses"], losses)
        changed = credited(
            fields["importance"], fields["used"], decrease.float(), momentum=self.momentum, released=self.released
        )
        fields["importance"].copy_(torch.where(decrease.isnan(), fields["importance"], changed))
        fields["losses"].copy_(losses)
        fields["used"].zero_()

    def begin_window(self) -> Tensor:
        """Mean decrease of the losses since the last call, of the samples held since then; a float64 scalar.

        nan if no sample was held since then. The losses are the losses of the latest :meth:`credit`.
        """
        fields = self.fields
        decrease = mean_decrease(fields[_MARK], fields["losses"])
        fields[_MARK].copy_(fields["losses"])
        return decrease
