"""Base of methods that keep an approximation of the loss of all earlier tasks (sequential maximum a posteriori).

With l_t the negative log-likelihood of task t, a *sum* over its N_t samples, and a Gaussian prior of precision p,

    L_t(theta) = L_{t-1}(theta) + l_t(theta),   L_{-1}(theta) = p / 2 ||theta||^2

is minimised by the parameters that are optimal for all tasks so far. Without earlier data L_{t-1} is replaced by an
approximation that is made when task t-1 ends, with weight lambda; a step minimises the mean over a batch of

    CE(f(x; theta), y) + lambda L_{t-1}(theta) / N_t        (lambda = 1 for the prior, in the first task)

Theta are the parameters of the head, on a frozen backbone, or of a small network as a whole. With ``num_classes`` the
head has rows for all classes of the stream from the start, as in the paper, and the softmax is over all of them, so
that earlier losses know what a new class takes from the old ones. Rows of a head that grows have had no part in earlier
losses: their prior is added to L_{t-1}.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from cl_lightning.batch import Batch
from cl_lightning.checks import at_least
from cl_lightning.models import LinearHead, Network, Output
from cl_lightning.strategy import ContinualStrategy, Task

_ROWS = 512  # rows of a batch of features


def consolidated(network: Network) -> dict[str, nn.Parameter]:
    """The parameters theta by their names in the head, with a frozen backbone, or in the network."""
    module: nn.Module = network.head if network.backbone_is_frozen else network
    return dict(module.named_parameters())


def flat(parameters: Mapping[str, Tensor]) -> Tensor:
    """Parameters as one vector ``(P,)``, float64, with gradient; rows of a grown head come last."""
    return torch.cat([parameter.flatten().double() for parameter in parameters.values()])


class Likelihood:
    """Summed negative log-likelihood of labelled inputs as a function of a flat parameter vector, in float64.

    Args:
        network: In eval mode. With a frozen backbone the inputs are features, else images.
    """

    def __init__(self, network: Network) -> None:
        self.module: nn.Module = network.head if network.backbone_is_frozen else network
        self.parameters = consolidated(network)
        self._buffers = {
            name: buffer.double() if buffer.is_floating_point() else buffer
            for name, buffer in self.module.named_buffers()
        }

    def __call__(self, theta: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """``sum_i -log p(y_i | x_i; theta)``, in nats.

        Args:
            theta: ``(P,)``, float64.
            inputs: Features ``(n, d)`` or images ``(n, C, H, W)``.
            labels: Columns, int64 ``(n,)``; rows with label -1 are left out.
        """
        parts = torch.split(theta, [parameter.numel() for parameter in self.parameters.values()])
        named = {
            name: part.view(parameter.shape)
            for (name, parameter), part in zip(self.parameters.items(), parts, strict=True)
        }
        output = functional_call(self.module, {**named, **self._buffers}, (inputs.double(),))
        logits: Tensor = output.logits if isinstance(output, Output) else output
        return F.cross_entropy(logits, labels, reduction="sum", ignore_index=-1)


class WholeHead(LinearHead):
    """Linear classifier with a row for every class of the stream from the start; predictions are over those seen.

    Attributes:
        seen: Number of classes seen so far, int64.
    """

    seen: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self._columns = 0

    def show(self, num_seen: int) -> None:
        """Predict among the first ``num_seen`` classes from now on."""
        self._columns = num_seen
        self.seen.fill_(num_seen)

    def classify(self, features: Tensor) -> Tensor:
        return super().classify(features)[:, : self._columns]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if (seen := state_dict.get(f"{prefix}seen")) is not None:
            self._columns = int(seen)


class SequentialMAP(ContinualStrategy):
    """Cross-entropy, and an approximation of the summed loss of the earlier tasks and the prior.

    A subclass defines ``earlier_loss`` and makes the approximation in ``end_task``.

    Args:
        strength: lambda, at least 0: 1 for the exact recursion.
        prior_precision: p, at least 0.
        num_classes: Number of all classes of the stream, for which the head has rows from the start, as in the paper;
            None to let the head grow.
        freeze_backbone: Whether the parameters are of the head alone.
        max_parameters: Largest number P of parameters that are consolidated.
        kwargs: Options of the base class.
    """

    def __init__(
        self,
        *,
        strength: float = 1.0,
        prior_precision: float = 1.0,
        num_classes: int | None = None,
        freeze_backbone: bool = True,
        max_parameters: int = 20_000,
        **kwargs: Any,
    ) -> None:
        head = LinearHead if num_classes is None else WholeHead
        super().__init__(head=head, freeze_backbone=freeze_backbone, loss_classes="all", **kwargs)
        at_least(self, 1, num_classes=num_classes, optional=True)
        at_least(self, 0, strength=strength)
        at_least(self, 0, prior_precision=prior_precision)
        at_least(self, 1, max_parameters=max_parameters)
        self.num_classes = num_classes
        self.strength, self.prior_precision, self.max_parameters = strength, prior_precision, max_parameters

    def begin_task(self, task: Task) -> None:
        head, name = self.network.head, type(self).__name__
        if isinstance(head, WholeHead):
            if task.num_seen > (self.num_classes or 0):
                raise ValueError(
                    f"{name}: num_classes is {self.num_classes}, but the stream has {task.num_seen} classes or more; "
                    "give the number of all its classes"
                )
            head.grow((self.num_classes or 0) - head.num_columns)
            head.show(task.num_seen)
        else:
            super().begin_task(task)
        if (count := len(self.theta())) > self.max_parameters:
            raise ValueError(
                f"{name}: {count:,} parameters are consolidated; freeze the backbone, use a smaller network, or raise "
                f"max_parameters, which is {self.max_parameters:,}"
            )

    def theta(self) -> Tensor:
        """The parameters that are consolidated, ``(P,)``, float64, with gradient."""
        return flat(consolidated(self.network))

    def task_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs of a :class:`Likelihood` and labels of this process's share of the task, un-augmented, in batches."""
        if self.network.backbone_is_frozen:
            features, labels = self.passes.features()
            yield from zip(torch.split(features, _ROWS), torch.split(labels, _ROWS), strict=True)
        else:
            yield from ((batch.images, batch.labels) for batch in self.passes.batches())

    def earlier_loss(self, theta: Tensor) -> Tensor:
        """Approximation of lambda L_{t-1} for parameters ``(P,)``, a scalar."""
        raise NotImplementedError

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        stream, task = self.data.module.stream, self.task.index
        count = len(stream.train[task]) - len(stream.unlabelled[task])
        earlier = self.earlier_loss(self.theta()) / max(count, 1)
        return {"ce": self.classification_loss(output, batch), "earlier": earlier.to(output.logits.dtype)}
