"""Continual Bias Adaptor, CBA (Wang et al., ICCV 2023, arXiv:2308.06925), on Experience Replay.

While the network is trained, a small network g_omega corrects its logits, so that it absorbs the bias towards new
classes; it is left out at test time. With z = f_theta(x) and samples R of a memory, the network minimises

    L(theta, omega) = CE(z'; B) + CE(z'; R),    z' = z + g_omega(softmax(z)),    g_omega as a constant

and from the second task on, before the step of the network, the adaptor is trained such that a step of the classifier
phi, the head of the network, lowers the loss of the uncorrected logits on further samples R' of the memory:

    phi' = phi - lr * grad_phi L(theta, omega)                   features and softmax(z) as constants
    omega <- Adam step on grad_omega CE(f_theta,phi'; R')

g_omega(p) = W_2 max(0, W_1 p + b_1) + b_2 with ``hidden`` units. lr is the present learning rate of the network,
``adaptor_lr`` the rate of Adam. The outer step is taken every ``interval`` steps. 5 is what the authors' code intends;
its counter stands still, so that it takes the step always, which ``interval=1`` does.
Departs from the authors' code: there g has an output for each class of the stream from the start; here it grows with
the head, and new entries are drawn with the deviation of Xavier's normal initialisation for the new size. Batch and R
are one forward pass, there two. The features of the outer step are computed in training mode, without a change of the
running statistics. The variants on DER++ and CLS-ER are not part of it.
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from cl_lightning.batch import Batch, Draw, join
from cl_lightning.checks import above, at_least
from cl_lightning.distributed import all_gather_together, alone
from cl_lightning.losses import full_precision
from cl_lightning.memory import NamedBuffers
from cl_lightning.models import Output
from cl_lightning.strategies.base import adam_step, output_at, trained_weights
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.strategy import Task, Traits

_OUTER, _INIT = 0xCBA, 0xCBB  # salts of the draw of R', and of the initial weights of the adaptor

Tensors = dict[str, Tensor]


def correction(omega: Tensors, probabilities: Tensor) -> Tensor:
    """g_omega(p), ``(n, C)``, of ``p (n, C)``."""
    hidden = F.linear(probabilities, omega["in.weight"], omega["in.bias"]).relu()
    return F.linear(hidden, omega["out.weight"], omega["out.bias"])


class BiasAdaptor(NamedBuffers):
    """Weights of g_omega, which grow with the classes, and their Adam state; the same on every process.

    Args:
        hidden: Number of hidden units.
    """

    kept_as: ClassVar[str] = "bias adaptor"
    steps: Tensor

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.register_buffer("steps", torch.zeros(()))

    @property
    def omega(self) -> Tensors:
        """``in.weight (hidden, C)``, ``in.bias (hidden,)``, ``out.weight (C, hidden)`` and ``out.bias (C,)``."""
        return self._get("omega")

    def grow(self, columns: int, *key: int) -> None:
        """Enlarge g to ``columns`` classes; new entries are drawn with the given key, and their Adam state is 0."""
        old, device = self.omega, self.steps.device
        start = len(old["out.bias"]) if old else 0
        if columns == start:
            return
        deviation = (2 / (columns + self.hidden)) ** 0.5
        new = deviation * Draw.of(2 * (columns - start), *key).randn(self.hidden).to(device)
        entries = {"in.weight": new[: columns - start].T, "out.weight": new[columns - start :]}
        entries |= {"in.bias": new.new_zeros(0 if old else self.hidden), "out.bias": new.new_zeros(columns - start)}
        for name, added in entries.items():
            axis = 1 if name == "in.weight" else 0
            kinds = {"omega": added, "first": torch.zeros_like(added), "second": torch.zeros_like(added)}
            for kind, value in kinds.items():
                held = self._get(kind).get(name)
                self._set(kind, name, value if held is None else torch.cat([held, value], dim=axis))

    def step(self, gradients: Tensors, lr: float) -> None:
        """A step of Adam."""
        values, *moments = ([self._get(kind)[name] for name in gradients] for kind in ("omega", "first", "second"))
        adam_step(values, gradients.values(), (moments[0], moments[1]), self.steps, lr)


class CBA(ER):
    """Cross-entropy on the batch and on a memory, of logits that an adaptor corrects, which is trained bi-level.

    Args:
        hidden: Number of hidden units of the adaptor, at least 1.
        adaptor_lr: Learning rate of the adaptor, above 0.
        interval: Number of optimizer steps per step of the adaptor, at least 1.
        reduction: As in ``ER``.
        kwargs: Options of ``ER``, apart from ``replay_by``.
    """

    traits = Traits(family="online", paper="Wang et al., ICCV 2023, arXiv:2308.06925", keeps_exemplars=True)

    def __init__(
        self,
        *,
        hidden: int = 256,
        adaptor_lr: float = 0.001,
        interval: int = 5,
        reduction: Literal["joint", "sum"] = "sum",
        **kwargs: Any,
    ) -> None:
        if kwargs.get("replay_by", "step") != "step":
            raise ValueError(
                "CBA: replay_by is 'loader', but the adaptor needs samples of the memory apart; use 'step'"
            )
        super().__init__(reduction=reduction, **kwargs)
        at_least(self, 1, hidden=hidden, interval=interval)
        above(self, 0, adaptor_lr=adaptor_lr)
        self.adaptor_lr, self.interval = adaptor_lr, interval
        self.adaptor = BiasAdaptor(hidden)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.adaptor.grow(self.network.head.num_columns, self.seed, _INIT, task.index)

    def prepare_batch(self, batch: Batch) -> Batch:
        joint = super().prepare_batch(batch)
        due = not self.task.is_first and self.trainer.global_step % self.interval == 0
        fresh = self.replay(batch, _OUTER) if due else None
        if fresh is not None:
            self.adapt(joint, fresh)
        return joint

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        with torch.no_grad(), torch.autocast(output.logits.device.type, enabled=False):
            shift = correction(self.adaptor.omega, full_precision(output.logits).softmax(dim=1))
        return super().losses(batch, output._replace(logits=full_precision(output.logits) + shift))

    def adapt(self, joint: Batch, fresh: Batch) -> None:
        """Take a step of the adaptor.

        Args:
            joint: This process's rows of the batch and of the samples R of the memory.
            fresh: This process's rows of R'.
        """
        features = self.features(joint)
        parts = {name: self.gathered(part, features[rows]) for name, (rows, part) in joint.parts.items()}
        further = self.gathered(fresh, self.features(fresh))
        head = {name: full_precision(value.detach()) for name, value in trained_weights(self.network.head).items()}
        if not head:
            return
        with alone(), torch.enable_grad(), torch.autocast(self.device.type, enabled=False):
            omega = {name: value.detach().requires_grad_() for name, value in self.adaptor.omega.items()}
            loss = self.outer_loss(omega, head, join(parts), further)
            found = torch.autograd.grad(loss, list(omega.values()))
        self.adaptor.step(dict(zip(omega, found, strict=True)), self.adaptor_lr)

    def outer_loss(self, omega: Tensors, head: Tensors, joint: Batch, further: Batch) -> Tensor:
        """Loss on R' after a step of the classifier, with a graph to omega.

        Args:
            omega: Weights of the adaptor.
            head: Weights phi of the head, by name.
            joint: Batch and R of all processes; features in place of images.
            further: R' of all processes; features in place of images.
        """
        phi = {name: value.requires_grad_() for name, value in head.items()}
        logits = functional_call(self.network.head, phi, (joint.images,))
        shifted = logits + correction(omega, logits.detach().softmax(dim=1))
        terms = super().losses(joint, Output(joint.images, shifted))
        slopes = torch.autograd.grad(torch.stack(list(terms.values())).sum(), list(phi.values()), create_graph=True)
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        moved = {name: value - lr * slope for (name, value), slope in zip(phi.items(), slopes, strict=True)}
        after = functional_call(self.network.head, moved, (further.images,))
        return self.classification_loss(Output(further.images, after), further)

    @torch.no_grad()
    def features(self, samples: Batch) -> Tensor:
        """Features of the samples of this process, ``(n, d)``."""
        if not len(samples):
            return torch.zeros(0, self.network.head.num_features, device=self.device)
        return full_precision(output_at(self.network, {}, samples.images).features)

    def gathered(self, part: Batch, features: Tensor) -> Batch:
        """The rows of all processes, with features in place of images."""
        rows = all_gather_together([features, part.labels, part.tasks])
        indices = torch.full_like(rows[1], -1)
        return Batch(rows[0], rows[1], rows[2], indices, rows[0], Draw.of(len(indices), part.draw.key))
