"""Relational Experience Replay, RER (Wang et al. 2021, arXiv:2112.15402), on ER and DER++.

A small network, the relation replay net, weighs the loss of each new sample and of the stored samples that it is paired
with. Row i of the batch is paired with row i of each draw from the memory; with l_i the k losses of the rows and n_i
the norms of their logits, both as constants,

    w_i = sigmoid( V ( relu(A l_i) + relu(B n_i) ) ) in (0, 1)^k         A, B, V linear maps, with biases
    L = sum_j mean_i w_ij l_ij

R-ER has k = 2, the cross-entropy of the new sample and of a stored one; R-DER has k = 3, and the squared error to the
stored logits of another one (``DERpp``). In the first task, and in the first floor(E / 2) of E epochs of each task, the
weights are fixed: 1 for the new sample, ``label_weight``, ``logit_weight``. From the second task on, the net learns in
every floor(E / 10)-th step, before the step of the network theta. On fresh draws from the memory it minimises

    CE (R-ER), or squared error + CE (R-DER), at theta' = theta - lr grad_theta sum_j mean_i w_ij l_ij

by Adam. The gradient is exact: theta' is linear in the weights, so with g the gradient of the outer loss at theta',

    d outer / d w_ij = -lr / B < g, grad_theta l_ij >

``virtual="head"`` takes the virtual step on the head alone, the authors' fast variant. lr is the learning rate of the
optimizer. The virtual steps leave the running statistics of batch normalisation as they are.
Departs from the authors' code: a memory with fewer samples than the batch repeats them, there the batch is cut; the
interval is at least 1 step; the net learns on the pairs of the coming step, there on other draws; and the learnt
weights are used from epoch floor(E / 2) on, there from the epoch after it.
"""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from cl_lightning.batch import Batch, Draw, join, mix
from cl_lightning.checks import above, at_least, one_of
from cl_lightning.distributed import all_sum
from cl_lightning.losses import full_precision, logit_errors
from cl_lightning.strategies.base import adam_step, mean_gradient, output_at, trained_weights, virtual_step
from cl_lightning.strategies.base.replay import UpdateMemory
from cl_lightning.strategies.rehearsal.derpp import DERpp
from cl_lightning.strategy import Output, Replay, Task, Traits

_INITIAL, _REPEATED, _OUTER, _OUTER_DARK = 0x4E1, 0x4E2, 0x4E3, 0x4E4
_PARTS = ("stream", "dark", "replay")


class RelationNet(nn.Module):
    """Weights of the losses of paired samples, and the state of the Adam optimizer (Kingma & Ba, ICLR 2015) that
    learns them.

    Args:
        count: k, number of losses per pair.
        hidden: Width of the hidden layer.
        lr: Learning rate.
        weight_decay: Factor of the squared norm of the parameters in the loss, times 2.
    """

    kept_as: ClassVar[str] = "relation net"
    moments: Tensor
    steps: Tensor

    def __init__(self, count: int, *, hidden: int = 16, lr: float = 1e-3, weight_decay: float = 1e-4) -> None:
        super().__init__()
        self.of_losses, self.of_norms = nn.Linear(count, hidden), nn.Linear(count, hidden)
        self.output = nn.Linear(hidden, count)
        self.lr, self.weight_decay = lr, weight_decay
        self.requires_grad_(False)  # learns in steps of its own
        size = sum(value.numel() for value in self.parameters())
        self.register_buffer("moments", torch.zeros(2, size))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def num_bytes(self) -> int:
        return sum(value.nbytes for value in self.state_dict().values())

    @torch.no_grad()
    def reset(self, key: int) -> None:
        """Uniform initial parameters, as ``torch.nn.Linear`` has them, by a key of the random numbers."""
        for number, layer in enumerate((self.of_losses, self.of_norms, self.output)):
            bound = layer.in_features**-0.5
            for place, value in enumerate(layer.parameters()):
                uniform = Draw.of(1, key, number, place).rand(*value.shape)[0]
                value.copy_((2 * uniform - 1) * bound)
        self.moments.zero_()
        self.steps.zero_()

    def forward(self, losses: Tensor, norms: Tensor) -> Tensor:
        """w of some pairs, ``(B, k)``, from their losses and the norms of their logits, ``(B, k)`` each."""
        with torch.autocast(losses.device.type, enabled=False):
            hidden = self.of_losses(losses).relu() + self.of_norms(norms).relu()
            weights: Tensor = self.output(hidden).sigmoid()
        return weights

    def learn(self, losses: Tensor, norms: Tensor, slopes: Tensor) -> None:
        """A step of Adam; every process must call it.

        Args:
            losses, norms: Of this process's pairs, ``(b, k)``.
            slopes: Derivative of the outer loss with respect to the weights of these pairs, ``(b, k)``.
        """
        leaves = {name: value.detach().clone().requires_grad_() for name, value in self.named_parameters()}
        with torch.enable_grad():
            total = (slopes * functional_call(self, leaves, (losses, norms))).sum()
            found = torch.autograd.grad(total, list(leaves.values()))
        gradient = all_sum(torch.cat([value.flatten() for value in found]))
        gradients, first, second = (self._like_parameters(flat) for flat in (gradient, *self.moments))
        adam_step(list(self.parameters()), gradients, (first, second), self.steps, self.lr, self.weight_decay)

    def _like_parameters(self, flat: Tensor) -> list[Tensor]:
        """Views of a vector with a number for each parameter, in the shapes of the parameters."""
        parts = torch.split(flat, [value.numel() for value in self.parameters()])
        return [part.view_as(value) for part, value in zip(parts, self.parameters(), strict=True)]


def slopes_of(losses: Tensor, parameters: Iterable[Tensor], direction: Iterable[Tensor]) -> Tensor:
    """Derivative of each loss along a direction of the parameters, ``< direction, grad l_ij >``.

    Args:
        losses: l with their graph, ``(B, k)``.
        parameters: Tensors that the losses depend on.
        direction: A tensor for each parameter.
    """
    ones = torch.ones_like(losses, requires_grad=True)
    gradients = torch.autograd.grad(
        (ones * losses).sum(), list(parameters), create_graph=True, allow_unused=True, materialize_grads=True
    )
    products = [(one * other).sum() for one, other in zip(gradients, direction, strict=True)]
    (slopes,) = torch.autograd.grad(torch.stack(products).sum(), ones)
    return slopes


class RER(DERpp):
    """Replay in which a small network, learnt by a virtual step, weighs the losses of paired new and stored samples.

    Args:
        logit_weight: Fixed weight of the stored logits, at least 0; 0 for R-ER, above 0 for R-DER.
        label_weight: Fixed weight of the stored labels, at least 0.
        hidden: Width of the relation replay net, at least 1.
        relation_lr: Its learning rate, above 0.
        relation_decay: Its weight decay, at least 0.
        fixed_epochs: Number of epochs of each task with fixed weights, at least 0; None for half of the epochs.
        learn_every: Number of steps of the network to one of the relation replay net, at least 1; None for a tenth of
            the number of epochs.
        virtual: Whether the virtual step changes the whole ``network`` or the ``head`` alone.
        update_memory: As in ``Replay``.
        kwargs: Options of ``DERpp``, apart from ``replay_size``.
    """

    traits = Traits(family="rehearsal", paper="Wang et al. 2021, arXiv:2112.15402", keeps_exemplars=True)

    def __init__(
        self,
        *,
        logit_weight: float = 0.0,
        label_weight: float = 1.0,
        hidden: int = 16,
        relation_lr: float = 1e-3,
        relation_decay: float = 1e-4,
        fixed_epochs: int | None = None,
        learn_every: int | None = None,
        virtual: Literal["network", "head"] = "network",
        update_memory: UpdateMemory = "first",
        **kwargs: Any,
    ) -> None:
        super().__init__(logit_weight=logit_weight, label_weight=label_weight, update_memory=update_memory, **kwargs)
        if self.replay_size is not None:
            raise ValueError(
                f"RER: replay_size is {self.replay_size}, but each sample of the batch is paired with a stored one; "
                "leave it out"
            )
        if self.loss_classes != "all":
            raise ValueError(
                f"RER: loss_classes is {self.loss_classes!r}, but losses of all classes are weighed; use 'all'"
            )
        if not logit_weight and not label_weight:
            raise ValueError("RER: logit_weight and label_weight are 0, so that nothing is replayed; give one of them")
        at_least(self, 1, hidden=hidden)
        at_least(self, 1, learn_every=learn_every, optional=True)
        at_least(self, 0, fixed_epochs=fixed_epochs, optional=True)
        at_least(self, 0, relation_decay=relation_decay)
        above(self, 0, relation_lr=relation_lr)
        one_of(self, ("network", "head"), virtual=virtual)
        self.fixed_epochs, self.learn_every, self.virtual = fixed_epochs, learn_every, virtual
        count = 1 + (logit_weight > 0) + (label_weight > 0)
        self.relation = RelationNet(count, hidden=hidden, lr=relation_lr, weight_decay=relation_decay)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if task.is_first:
            self.relation.reset(mix(self.seed, _INITIAL))

    @property
    def _epochs(self) -> int:
        return max(self.phase.options.epochs or 0, 0)

    def _weighs(self, batch: Batch) -> bool:
        """Whether the losses of a prepared batch have the learnt weights."""
        fixed = self._epochs // 2 if self.fixed_epochs is None else self.fixed_epochs
        return len(batch.parts) > 1 and not self.task.is_first and self.epoch >= fixed

    def draw(self, batch: Batch, *salt: int, tasks: Iterable[int] | None = None) -> Batch | None:
        held, draw = len(self.memory), batch.draw.fork(*salt) if salt else batch.draw
        if not 0 < held < draw.total:
            return super().draw(batch, *salt, tasks=tasks)
        order = torch.randperm(held, generator=draw.fork(_REPEATED).generator())
        rows = order[torch.arange(draw.start, draw.stop) % held]
        return self.memory.at(rows.to(self.memory.labels.device), draw.fork(_REPEATED))

    def prepare_batch(self, batch: Batch) -> Batch:
        joint = super().prepare_batch(batch)
        every = self._epochs // 10 if self.learn_every is None else self.learn_every
        if len(joint.parts) > 1 and not self.task.is_first and self.trainer.global_step % max(every, 1) == 0:
            self._learn_relation(batch, joint)
        return joint

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if not self._weighs(batch):
            return super().losses(batch, output)
        losses, norms = self.sample_losses(batch, output)
        weights = self.relation(losses.detach(), norms.detach())
        self._logits = batch.part("stream", output).output.logits.detach().float()
        means = (weights * losses).mean(dim=0)
        parts = [name for name in _PARTS if name in batch.parts]
        shares = [batch.part(name, output).share for name in parts]
        names = [{"stream": "ce"}.get(name, name) for name in parts]
        return {name: share * mean for name, share, mean in zip(names, shares, means.unbind(), strict=True)}

    def sample_losses(self, batch: Batch, output: Output) -> tuple[Tensor, Tensor]:
        """l and n of the pairs of a joint batch, ``(B, k)`` each: new samples, stored logits, stored labels."""
        losses, norms = [], []
        for name in _PARTS:
            if name not in batch.parts:
                continue
            samples, of_part, _ = batch.part(name, output)
            logits = full_precision(of_part.logits)
            if name == "dark":
                stored = samples.extra["logits"]
                losses.append(logit_errors(logits, stored, new_class_targets=self.new_class_targets))
            else:
                each = F.cross_entropy(logits, samples.labels, reduction="none", ignore_index=-1)
                weights = self.data.weights_of(samples)
                losses.append(each if weights is None else weights * each)
            norms.append(logits.norm(dim=1))
        return torch.stack(losses, dim=1), torch.stack(norms, dim=1)

    def offer(self, batch: Batch, **extra: Tensor) -> None:
        if self.logit_weight > 0:
            super().offer(batch, **extra)
        else:
            Replay.offer(self, batch, **extra)

    def _learn_relation(self, batch: Batch, joint: Batch) -> None:
        """A step of the relation replay net, on the pairs of the coming step and on fresh draws."""
        network, weights = self.network, trained_weights(self.network)
        if self.virtual == "head":
            weights = {name: value for name, value in weights.items() if name.startswith("head.")}
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        count = len(joint.parts)
        losses = norms = torch.zeros(0, count, device=self.device)
        loss = None
        if len(joint):
            losses, norms = self.sample_losses(joint, output_at(network, weights, joint.images))
            loss = (self.relation(losses.detach(), norms.detach()) * losses).mean(dim=0).sum()
        gradient = mean_gradient(loss, weights, batch.weight, retain_graph=True)
        after = {name: value.detach().requires_grad_() for name, value in virtual_step(weights, gradient, lr).items()}
        direction = mean_gradient(*self._outer_loss(batch, after))
        slopes = losses.detach()
        if len(joint):
            slopes = slopes_of(losses, weights.values(), direction.values())
        self.relation.learn(losses.detach(), norms.detach(), -lr / batch.draw.total * slopes)

    def _outer_loss(self, batch: Batch, weights: dict[str, Tensor]) -> tuple[Tensor | None, dict[str, Tensor], float]:
        """Loss of fresh draws at other weights; these weights; the weight of this process's mean."""
        fresh = join(
            {
                "dark": self.replay(batch, _OUTER_DARK) if self.logit_weight > 0 else None,
                "replay": self.replay(batch, _OUTER) if self.label_weight > 0 else None,
            }
        )
        if not len(fresh):
            return None, weights, fresh.weight
        output = output_at(self.network, weights, fresh.images)
        losses, _ = self.sample_losses(fresh, output)
        shares = [fresh.part(name, output).share for name in _PARTS if name in fresh.parts]
        return (losses.mean(dim=0) * losses.new_tensor(shares)).sum(), weights, fresh.weight
