"""Weight consolidation: a quadratic penalty on changes of weights, by their importance for earlier tasks.

The strategies ``EWC``, ``MAS``, ``SI``, ``RWalk`` and ``L2`` and the callback ``ImportancePenalty`` share it. With P
the quadratic of :class:`~cl_lightning.memory.Importance`, the term added to the loss is

    fisher  lambda/2 P   EWC (Kirkpatrick et al., PNAS 2017, arXiv:1612.00796), online EWC (arXiv:1805.06370)
    mas     lambda/2 P   Memory Aware Synapses (Aljundi et al., ECCV 2018, arXiv:1711.09601)
    si      c P          Synaptic Intelligence (Zenke et al., ICML 2017, arXiv:1703.04200)
    rwalk   lambda P     Riemannian Walk (Chaudhry et al., ECCV 2018, arXiv:1801.10112)
    l2      lambda P     L2 to the previous weights (Smith et al., CVPR-W 2023, arXiv:2203.17269)
"""

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from cl_lightning.batch import Batch
from cl_lightning.checks import at_least, matching, one_of, within
from cl_lightning.memory.importance import Importance
from cl_lightning.memory.paths import PathIntegral, RiemannianWalk
from cl_lightning.memory.sensitivity import Labels, fisher_diagonal, output_norm
from cl_lightning.models import Network

Estimator = Literal["fisher", "mas", "si", "rwalk", "l2"]
Merge = Literal["add", "decay", "average"]
_FACTOR = {"fisher": 0.5, "mas": 0.5, "si": 1.0, "rwalk": 1.0, "l2": 1.0}


class Consolidation(nn.Module):
    """Quadratic penalty on changes of the weights that are important for earlier tasks (EWC, MAS, SI, RWalk, L2).

    Args:
        estimator: How importance is measured.
        weight: lambda or c above, at least 0.
        merge: How the importances of a new task are combined with the earlier ones: ``add`` sums the quadratics, each
            with its anchor (EWC); ``decay`` multiplies the old importances by ``decay``, adds the new ones and sets the
            anchor to the present weights (online EWC; SI and MAS with decay 1); ``average`` weights old and new by
            ``decay`` and ``1 - decay`` (the survey framework of Masana et al.). Ignored by ``l2`` and ``rwalk``, which
            replace anchors and importances; ``rwalk`` averages scores itself.
        decay: Factor in [0, 1] for ``decay`` and ``average``.
        labels: For ``fisher``: labels of the log-likelihood whose gradient is squared, see ``fisher_diagonal``.
        per_sample: Square (or take the absolute value of) the gradient of each sample. False does so for the mean
            gradient of each batch, as several frameworks do: not the Fisher information, but it reproduces their
            numbers.
        on: ``backbone`` applies no penalty to the head; ``all`` also penalises the head's rows of earlier classes. New
            rows have no penalty.
        names: Patterns of parameter names in the network, such as ``backbone.*.attn.qkv.*``: among the weights of
            ``on``, only those that match one of the patterns are penalised; None for all.
        xi: Damping of ``si`` and ``rwalk``, positive.
        clamp: For ``si``: set negative importances, of weights whose changes raised the loss, to 0. The paper keeps
            them negative.
        samples: For ``fisher`` and ``mas``: number of samples of a task on which importance is measured, at least 1,
            drawn by the seed; None for all. Time is proportional to this number.
        rate, interval: For ``rwalk``: alpha and delta_t of :class:`~cl_lightning.memory.RiemannianWalk`.

    Raises:
        ValueError: If an option is outside its range, or, when the first task begins, a pattern matches no parameter.
    """

    def __init__(
        self,
        estimator: Estimator = "fisher",
        weight: float = 1.0,
        *,
        merge: Merge = "add",
        decay: float = 1.0,
        labels: Labels = "sampled",
        per_sample: bool = True,
        on: Literal["backbone", "all"] = "all",
        names: Sequence[str] | None = None,
        xi: float = 0.1,
        clamp: bool = True,
        samples: int | None = None,
        rate: float = 0.9,
        interval: int = 10,
    ) -> None:
        super().__init__()
        at_least(self, 1, samples=samples, optional=True)
        one_of(self, _FACTOR, estimator=estimator)
        one_of(self, get_args(Merge), merge=merge)
        one_of(self, get_args(Labels), labels=labels)
        one_of(self, ("backbone", "all"), on=on)
        at_least(self, 0, weight=weight)
        within(self, "[0, 1]", decay=decay)
        self.estimator, self.weight, self.merge, self.decay = estimator, weight, merge, decay
        self.labels, self.per_sample, self.on, self.samples = labels, per_sample, on, samples
        self.names = None if names is None else tuple(names)
        self.importance = Importance()
        integral, walk = PathIntegral(xi, clamp=clamp), RiemannianWalk(rate=rate, interval=interval, xi=xi)
        self.path = {"si": integral, "rwalk": walk}.get(estimator)
        self._held: dict[str, nn.Parameter] = {}

    def parameters_of(self, network: Network) -> dict[str, nn.Parameter]:
        """Parameters with a penalty, by their names in the network; a frozen backbone has none."""
        parts = {"backbone": not network.backbone_is_frozen, "head": self.on == "all"}
        chosen = {name: p for name, p in network.named_parameters() if parts[name.partition(".")[0]]}
        if self.names is None:
            return chosen
        return {name: chosen[name] for name in matching(self, chosen, names=self.names)}

    def begin_task(self, network: Network, *, anchor_now: bool = False) -> None:
        """Call before the first step of a task.

        Args:
            network: With the head of the new task.
            anchor_now: For ``l2``: anchor the backbone at its present weights, such as pretrained ones before the
                first task.
        """
        parameters = self.parameters_of(network)
        if self.path is not None:
            self.path.begin(parameters)
        if anchor_now and self.estimator == "l2":
            backbone = {name: p for name, p in parameters.items() if name.startswith("backbone.")}
            self.importance.anchor_at(backbone)  # the head's rows are new

    def begin_phase(self, network: Network, *, skips: bool = True) -> None:
        """Call before each fit.

        Args:
            network: As it is trained in the fit.
            skips: Whether a gradient scaler may skip steps.
        """
        self._held = self.parameters_of(network)
        if self.path is not None:
            self.path.skips = skips

    def penalty(self) -> Tensor:
        """The term to add to the loss, a scalar; 0 before the first task has ended."""
        return self.weight * _FACTOR[self.estimator] * self.importance.penalty(self._held)

    def before_step(self) -> None:
        """Call before each optimizer step, with gradients reduced and unscaled but not yet clipped."""
        if self.path is None:
            return
        factor = self.weight * _FACTOR[self.estimator]
        self.path.before_step(self._held, self.importance.gradient(self._held, factor))

    def after_step(self) -> None:
        """Call after each optimizer step."""
        if self.path is not None:
            self.path.after_step(self._held)

    def end_task(
        self,
        network: Network,
        batches: Iterable[Batch],
        loss_classes: Tensor | None = None,
        target: str = "class",
    ) -> None:
        """Measure importance on the task that ends and merge it with the earlier ones; with weight 0, do nothing.

        Args:
            network: In eval mode.
            batches: This process's share of the task's training data, un-augmented.
            loss_classes: For ``fisher``: classes in the softmax of the task's loss, bool ``(C,)``; None for all.
            target: For ``fisher``: what the target of a sample is, see ``fisher_diagonal``.
        """
        if self.weight == 0:
            return
        parameters = self.parameters_of(network)
        if self.estimator == "l2":
            self.importance.anchor_at(parameters)
            return
        if self.path is not None:
            omega = self.path.importance(parameters)
            self.path.reset()
        elif self.estimator == "mas":
            omega = output_norm(network, parameters, batches, per_sample=self.per_sample)
        else:
            omega = fisher_diagonal(
                network,
                parameters,
                batches,
                labels=self.labels,
                per_sample=self.per_sample,
                loss_classes=loss_classes,
                target=target,
            )
        if self.estimator == "rwalk":
            self.importance.merge(parameters, omega, decay=0.0)
        elif self.merge == "add":
            self.importance.add(parameters, omega)
        elif self.merge == "decay":
            self.importance.merge(parameters, omega, decay=self.decay)
        else:
            self.importance.average(parameters, omega, alpha=self.decay)
