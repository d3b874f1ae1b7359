"""Semantic Drift Compensation: class means that follow the features."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.callbacks._snapshot import Snapshot
from cl_lightning.distributed import all_gather_together
from cl_lightning.hooks import ContinualCallback
from cl_lightning.prototypes import Prototypes, kernel_drift
from cl_lightning.stream import Task

if TYPE_CHECKING:
    from cl_lightning.strategy import ContinualStrategy


def spherical_drift(old: Tensor, new: Tensor, prototypes: Tensor, sigma: float) -> Tensor:
    """:func:`~cl_lightning.prototypes.kernel_drift` between directions: each vector is divided by its norm.

    The displacement is that of the prototype's direction times the prototype's norm, so it scales with the prototypes
    and does not depend on the scale of the features.

    Args:
        old, new: Features of the same images before and after training on the task, ``(n, d)``.
        prototypes: Class means in the old feature space, ``(c, d)``.
        sigma: Width of the kernel, on the unit sphere.

    Returns:
        Displacements ``(c, d)``, to be added to the prototypes.
    """
    length = prototypes.norm(dim=1, keepdim=True)
    moved: Tensor = length * kernel_drift(F.normalize(old), F.normalize(new), F.normalize(prototypes), sigma)
    return moved


class DriftCompensation(ContinualCallback):
    """Carries the means of earlier classes along as the features change.

    With f' and f the backbone before and after a task, x_i its images and p_c the mean of class c,

        w_ci = exp(-|| f'(x_i) - p_c ||^2 / (2 sigma^2)),   p_c <- p_c + sum_i w_ci (f(x_i) - f'(x_i)) / sum_i w_ci

    for the classes of earlier tasks (SDC: Yu et al., CVPR 2020, arXiv:2004.00440). The paper's embeddings have norm 1
    and its sigma is 0.2 to 0.3. ``normalise`` gives vectors of any norm that norm where they are compared, and moves
    the direction of a mean; leave it out for a backbone whose features are normalised already, or where sigma is chosen
    in the unit of the features. Departs from the paper, which trains normalised embeddings by a triplet loss with batch
    normalisation held after the first task: here the strategy trains as it does, normalisation included, and a mean is
    that of raw features.

    Needs a head that keeps class means (``PrototypeHead``) and works with any strategy. A mean that the task added
    samples to (a class that comes again) is moved by the share of its earlier samples. The copy of the network that
    measures the drift is kept during a task, on the CPU, and not from task to task. It takes two passes over the task's
    un-augmented training data; features are gathered from all processes, so the means stay the same on each.

    Args:
        sigma: Width of the kernel, positive, in the unit of the features; with ``normalise`` on the unit sphere.
        normalise: Divide features and means by their norms.
    """

    paper: str = "Yu et al., CVPR 2020, arXiv:2004.00440"

    def __init__(self, *, sigma: float = 0.3, normalise: bool = True) -> None:
        if not sigma > 0:
            raise ValueError(
                f"DriftCompensation: sigma is {sigma}; it must be positive, about the distance of neighbours"
            )
        self.sigma, self.normalise = sigma, normalise
        self.before = Snapshot()
        self._means: Tensor | None = None  # of the earlier classes, when the task began
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
        old, new = all_gather_together(strategy.features(network)[0] for network in (before, strategy.network))
        prototypes, drift = self._prototypes(strategy), spherical_drift if self.normalise else kernel_drift
        earlier = self._counts.to(strategy.device)
        columns = earlier.nonzero().squeeze(1)
        moved = drift(old, new, self._means.to(strategy.device)[columns], self.sigma)  # (classes before, d)
        share = earlier[columns] / prototypes.counts[columns]  # 1 unless the class came again
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
            raise ValueError(f"DriftCompensation: there are no class means to move; {error}") from None
        assert isinstance(prototypes, Prototypes)
        return prototypes
