"""Semantic Drift Compensation: class means are corrected for the drift of the features."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.callback import ContinualCallback
from cl_lightning.callbacks._snapshot import Snapshot
from cl_lightning.checks import above
from cl_lightning.distributed import all_gather_together
from cl_lightning.memory import Prototypes, kernel_drift
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


def spherical_drift(old: Tensor, new: Tensor, prototypes: Tensor, sigma: float) -> Tensor:
    """:func:`~cl_lightning.memory.kernel_drift` of vectors divided by their norms.

    The displacement of a prototype's direction is multiplied by the norm of the prototype. The result scales with the
    prototypes and does not depend on the scale of the features.

    Args:
        old, new: Features of the same images before and after training on the task, ``(n, d)``.
        prototypes: Class means in the old feature space, ``(c, d)``.
        sigma: Width of the kernel on the unit sphere, above 0.

    Returns:
        Displacements ``(c, d)``, to be added to the prototypes.
    """
    length = prototypes.norm(dim=1, keepdim=True)
    moved: Tensor = length * kernel_drift(F.normalize(old), F.normalize(new), F.normalize(prototypes), sigma)
    return moved


class DriftCompensation(ContinualCallback):
    """Corrects the means of earlier classes for the drift of the features during a task.

    With f' and f the backbone before and after a task, x_i its images and p_c the mean of class c,

        w_ci = exp(-|| f'(x_i) - p_c ||^2 / (2 sigma^2)),   p_c <- p_c + sum_i w_ci (f(x_i) - f'(x_i)) / sum_i w_ci

    for the classes of earlier tasks (SDC: Yu et al., CVPR 2020, arXiv:2004.00440). The embeddings of the paper have
    norm 1, and its sigma is 0.2 to 0.3. With ``normalise``, features and means of any norm are divided by their norms
    before they are compared, and the direction of a mean is corrected. Use False for a backbone with normalised
    features, or for a sigma in the unit of the features. Departs from the paper, which trains normalised embeddings by
    a triplet loss and freezes batch normalisation after the first task: here the training of the strategy is unchanged,
    including batch normalisation, and means are of raw features.

    Works with any strategy whose head keeps class means (``PrototypeHead``). If a class of an earlier task occurs
    again, the drift of its mean is multiplied by the share of its earlier samples. During a task a copy of the network
    is kept on the CPU; it is not kept between tasks. The drift is computed in two passes over the un-augmented training
    data of the task. Features are gathered from all processes, so that the means are the same on each of them.

    Args:
        sigma: Width of the kernel, above 0, in the unit of the features; on the unit sphere with ``normalise``.
        normalise: Whether features and means are divided by their norms.
    """

    paper: str = "Yu et al., CVPR 2020, arXiv:2004.00440"

    def __init__(self, *, sigma: float = 0.3, normalise: bool = True) -> None:
        above(self, 0, sigma=sigma)
        self.sigma, self.normalise = sigma, normalise
        self.before = Snapshot()
        self._means: Tensor | None = None  # means and counts at the start of the task
        self._counts: Tensor | None = None

    def on_task_start(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        prototypes = self._prototypes(strategy)
        if not task.is_first:
            self.before.learn_from(strategy.network)
            self._means, self._counts = prototypes.means.clone(), prototypes.counts.clone()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.before.restore(pl_module.network)  # type: ignore[arg-type]

    @torch.no_grad()
    def on_task_end(self, trainer: Trainer, strategy: "ContinualStrategy", task: Task) -> None:
        before = self.before.to(strategy.device).network
        if before is None or self._means is None or self._counts is None:
            return
        old, new = all_gather_together(strategy.passes.features(network)[0] for network in (before, strategy.network))
        prototypes, drift = self._prototypes(strategy), spherical_drift if self.normalise else kernel_drift
        earlier = self._counts.to(strategy.device)
        columns = earlier.nonzero().squeeze(1)
        moved = drift(old, new, self._means.to(strategy.device)[columns], self.sigma)  # (classes before, d)
        share = earlier[columns] / prototypes.counts[columns]  # 1 unless the class occurs again
        prototypes.means[columns] += share[:, None] * moved
        self.before.forget()
        self._means, self._counts = None, None

    def bytes_kept(self) -> dict[str, int]:
        return {"teachers": self.before.num_bytes()}

    def state_dict(self) -> dict[str, Any]:
        network = self.before.state()
        return {"network": network, "means": self._means, "counts": self._counts} if network else {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.before.keep(state_dict["network"])
        self._means, self._counts = state_dict["means"], state_dict["counts"]

    @staticmethod
    def _prototypes(strategy: "ContinualStrategy") -> Prototypes:
        try:
            prototypes = strategy.prototypes
        except ValueError as error:
            raise ValueError(f"DriftCompensation: there are no class means to correct; {error}") from None
        assert isinstance(prototypes, Prototypes)
        return prototypes
