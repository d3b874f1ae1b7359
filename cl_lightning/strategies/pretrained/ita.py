"""ITA: Incremental Task Arithmetic (Porrello et al., "A Second-Order Perspective on Model Compositionality and
Incremental Learning", ICLR 2025, arXiv:2405.16350).

Each task trains the backbone from the pretrained weights theta_0, held where the Fisher information of earlier tasks is
large, and the mean of the task vectors predicts:

    theta_t = theta_0 + tau_t,   theta = theta_0 + 1/T sum_t tau_t

For a quadratic loss with Hessian H the composition is better than the mean of its parts by
``1/2 sum_{t < t'} 1/T^2 (tau_t - tau_t')^T H (tau_t - tau_t')``, so the parts are good in composition where all of them
are near theta_0 in the metric of H. A task has three phases:

    probe   CE over the classes of the task trains the rows of these classes; the backbone is theta_0
    align   CE over all classes trains the head on features drawn for all classes, logits z / (0.1 ||z||); theta_0
    train   CE over the classes of the task trains theta_0 + tau_t and the rows of these classes, and each step
            p <- p - (lr / lr_0) g,  g = alpha F_past * tau_t, each tensor scaled down to the norm ``pull_limit``

The pull is not a part of the loss: it passes the optimizer by, so that Adam does not normalise it. lr / lr_0 is the
factor of the schedule. alpha -> pull_weight. F_past is the mean over the samples of the tasks before t of

    F = E_c~p [ (d log p(c | x) / d theta)^2 ]     at theta_0 with the aligned head, p over the classes of the task

All F are taken at theta_0, so that features of earlier classes do not drift and F_past * tau_t is the gradient of
``1/2 tau_t^T F_past tau_t``. The head is not composed. :meth:`ITA.compose` writes another composition into the network:
without a task (unlearning) or of some tasks alone (specialisation).
The running statistics of batch normalisation begin each task as before the first one, and are computed again for the
composed weights on the images of the task, because images of earlier tasks are gone; with ``freeze_norm`` they stay.
Validation during a task, and curves of ``ContinualEvaluation``, measure theta_0 + tau_t.
tau_t is the change of all weights that ``lr_factors`` leaves trainable, or, with ``peft``, the matrices s B_t A_t of a
new ``LoRA`` for each task in the frozen backbone. F is computed for the whole matrices, the pull reaches A and B by
the chain rule, ``pull_limit`` holds for each A and B, and A_t and B_t are kept instead of tau_t:

    g_B = s (alpha F_past * tau) A^T,   g_A = s B^T (alpha F_past * tau)

Departs from the paper: modules of (IA)^3 are not offered. Features are drawn from one normal distribution per class,
not from a mixture of five. The first task has no F_past and no pull; the released code has one of factor 1e-5. It also
has a second head for ``probe`` and ``align``, at which F is taken and to which the head trained from new rows is
pulled; here there is one head. Rows of earlier classes are not in the loss of ``train`` and need no pull.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from cl_lightning.batch import Batch, ImageShape
from cl_lightning.checks import above, at_least, one_of
from cl_lightning.data import GaussianFeatures
from cl_lightning.distributed import all_sum
from cl_lightning.losses import cross_entropy
from cl_lightning.memory import (
    Importance,
    WeightSets,
    fisher_diagonal,
    network_tensors,
    shifted,
    task_vector,
    write_weights,
)
from cl_lightning.memory.sensitivity import Labels
from cl_lightning.memory.weight_space import average
from cl_lightning.models import AdaptedBackbone, LoRA, PeftFactory, in_eval_mode
from cl_lightning.strategies.base import trained_weights
from cl_lightning.strategies.pretrained.alignment import AlignedClassifier
from cl_lightning.strategies.pretrained.slca import normalised_logits
from cl_lightning.strategy import Output, Phase, PhaseOptions, Task, Traits

_BACKBONE, _PEFT = "backbone.", "backbone.peft."


@torch.no_grad()
def limited(vector: dict[str, Tensor], limit: float) -> dict[str, Tensor]:
    """Each tensor of a vector divided by ``max(1, ||v|| / limit)``, with its own norm.

    Args:
        vector: v by name; at least one.
        limit: Largest norm, above 0.
    """
    factors = [(limit / norm).clamp(max=1.0) for norm in torch._foreach_norm(list(vector.values()))]
    return {name: value * factor for (name, value), factor in zip(vector.items(), factors, strict=True)}


class ITA(AlignedClassifier):
    """Fine-tuning of each task from the pretrained weights, held by the Fisher information; the mean of the networks.

    Args:
        pull_weight: alpha, at least 0. A step multiplies tau by ``1 - alpha F``: values above ``2 / max F`` diverge.
        pull_limit: Largest norm of the pull of a tensor in a step, above 0.
        probe_options: Options of the phase ``probe``; 0 epochs to leave it out. The default optimizer is SGD with
            learning rate 0.01.
        align_options: Options of the phase ``align`` in the first task; 0 epochs to leave it out in all tasks. The
            default optimizer is SGD with learning rate 0.01 and momentum 0.9.
        align_more: Further epochs of ``align`` for each earlier task, at least 0.
        align_samples: Number of features drawn per class and epoch, at least 1.
        align_temperature: Factor of ||z||, above 0.
        jitter: Variance that is added to the distributions of features in each direction, above 0.
        fisher_labels: Labels of F: ``exact`` expectation, one backward pass per class, ``sampled``, ``predicted`` or
            ``empirical``.
        fisher_samples: Number of images of a task for F, at least 1; None for all.
        peft: Builds the ``LoRA`` of each task for the backbone; None to train the backbone itself.
        kwargs: Options of the base class.

    Attributes:
        weights: The sets ``start`` (theta_0 and its running statistics), ``task_0``, ``task_1``, ... (tau of each task,
            or its A and B) and, while a task is trained, ``fisher`` (F of the task).
        importance: F_past and theta_0 of the weights.
        counts: Number of images of F_past and of F of the task, int64 ``(2,)``.
    """

    traits = Traits(family="pretrained", paper="Porrello et al., ICLR 2025, arXiv:2405.16350", needs_pretrained=True)

    counts: Tensor

    def __init__(
        self,
        *,
        pull_weight: float = 0.02,
        pull_limit: float = 100.0,
        probe_options: PhaseOptions = PhaseOptions(epochs=3),
        align_options: PhaseOptions = PhaseOptions(epochs=10, batch_size=256),
        align_more: int = 5,
        align_samples: int = 256,
        align_temperature: float = 0.1,
        jitter: float = 1e-4,
        fisher_labels: Labels = "exact",
        fisher_samples: int | None = None,
        peft: PeftFactory | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            loss_classes="current",
            align_options=align_options.filled(functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)),
            align_samples=align_samples,
            jitter=jitter,
            **kwargs,
        )
        at_least(self, 0, pull_weight=pull_weight, align_more=align_more)
        above(self, 0, pull_limit=pull_limit, align_temperature=align_temperature)
        one_of(self, get_args(Labels), fisher_labels=fisher_labels)
        at_least(self, 1, fisher_samples=fisher_samples, optional=True)
        self.pull_weight, self.pull_limit = pull_weight, pull_limit
        self.probe_options = probe_options.filled(functools.partial(torch.optim.SGD, lr=0.01))
        self.align_more, self.align_temperature = align_more, align_temperature
        self.fisher_labels, self.fisher_samples = fisher_labels, fisher_samples
        self.peft = peft
        if peft is not None:
            self.build_backbone = functools.partial(AdaptedBackbone, backbone=self.build_backbone, peft=peft)
        self.weights, self.importance = WeightSets(), Importance()
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        if self.peft is not None and not isinstance(self._adapted.peft, LoRA):
            raise ValueError(
                f"{type(self).__name__}: peft is {type(self._adapted.peft).__name__}; use LoRA, or null to train the "
                "backbone itself"
            )

    @property
    def _adapted(self) -> AdaptedBackbone:
        backbone = self.network.backbone
        assert isinstance(backbone, AdaptedBackbone)
        return backbone

    @property
    def lora(self) -> LoRA | None:
        """The LoRA of the task that is trained; None without ``peft``."""
        return None if self.peft is None else cast(LoRA, self._adapted.peft)

    def frozen(self) -> Iterable[nn.Module]:
        return super().frozen() if self.peft is None else [self._adapted.base]

    def phases(self, task: Task) -> list[Phase]:
        found = []
        if self.probe_options.epochs != 0:
            found.append(Phase("probe", self.probe_options, freezes=self._whole_backbone))
        if self.align_options.epochs != 0:
            epochs = self.align_options.epochs
            options = replace(
                self.align_options, epochs=None if epochs is None else epochs + self.align_more * task.index
            )
            found.append(Phase("align", options, trains=self.network.head.parameters, features=self.drawn_features))
        return [*found, Phase()]

    def begin_task(self, task: Task) -> None:
        if task.is_first:
            tensors = network_tensors(self.network)
            kept = (name for name in tensors if name.startswith(_BACKBONE) and not name.startswith(_PEFT))
            self.weights.keep("start", {name: tensors[name] for name in kept})
        else:
            write_weights(self.network, self.weights["start"])
            if self.peft is not None:
                new = self.peft(self._adapted.base)
                new.remove()
                self._adapted.peft.load_state_dict(new.state_dict())
        super().begin_task(task)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.phase.name == "train" and self.pull_weight and not int(self.counts[1]):
            fisher, count = self._fisher()  # of theta_0: the phase has not taken a step
            self.weights.keep("fisher", fisher)
            self.counts[1] = count

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.phase.features is not None:
            logits = normalised_logits(output.logits, [output.logits.shape[1]], self.align_temperature)
            return {"ce": cross_entropy(logits, batch.labels)}  # over all classes
        return {"ce": self.classification_loss(output, batch)}  # over the classes of the task

    @torch.no_grad()
    def edit_gradients(self, batch: Batch) -> None:
        if self.phase.name != "train" or not self.pull_weight or not self.importance:
            return
        trained = trained_weights(self.network)
        pull = self._pull(trained)
        pull = limited(pull, self.pull_limit) if pull else {}
        rates = {  # lr / lr_0
            id(parameter): group["lr"] / (group.get("initial_lr") or group["lr"] or 1.0)
            for group in self.trainer.optimizers[0].param_groups
            for parameter in group["params"]
        }
        for name, value in pull.items():
            trained[name].sub_(value, alpha=rates[id(trained[name])])

    def _pull(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """g of the trained weights by name: ``alpha F_past * tau``, or its chain rule for A and B."""
        if self.lora is None:
            return self.importance.gradient(trained, self.pull_weight / 2)
        omegas = self.importance.omegas
        parameters = {name: value for name, value in trained.items() if name.startswith(_PEFT)}
        if not parameters:
            return {}
        with torch.enable_grad():
            changes = {name: change for name, change in self._changes().items() if name in omegas}
        pulls = self._matrix_pull({name: change.detach() for name, change in changes.items()}, omegas)
        found = torch.autograd.grad(
            list(changes.values()), list(parameters.values()), [pulls[name] for name in changes], allow_unused=True
        )
        return {name: value for name, value in zip(parameters, found, strict=True) if value is not None}

    def _matrix_pull(self, changes: Mapping[str, Tensor], omegas: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """g of the matrices of the task, tau, by name."""
        return {name: self.pull_weight * omegas[name] * change for name, change in changes.items()}

    def _changes(self) -> dict[str, Tensor]:
        """tau of the LoRA of the task by the names of the weights, with gradient."""
        assert self.lora is not None
        names = {id(module): name for name, module in self.network.named_modules()}
        return {f"{names[id(layer)]}.weight": change for layer, change in self.lora.changes()}

    @torch.no_grad()
    def task_change(self, index: int) -> dict[str, Tensor]:
        """tau of a task that has ended, by the names of the weights."""
        kept = self.weights[f"task_{index}"]
        if self.lora is None:
            return kept
        present = {name: value.clone() for name, value in network_tensors(self.lora).items()}
        write_weights(self.lora, kept)
        found = self._changes()
        write_weights(self.lora, present)
        return found

    def end_phase(self, phase: Phase) -> None:
        """No statistics of the trained backbone: features are drawn for theta_0."""

    def drawn_features(self) -> GaussianFeatures:
        with in_eval_mode(self.network):
            self.learn_statistics()  # of theta_0, the same when the phase is resumed
        return super().drawn_features()

    def end_task(self, task: Task) -> None:
        start = self.weights["start"]
        if self.lora is None:
            trained = {name: value for name, value in self.network.named_parameters() if name in start}
            self.weights.keep(f"task_{task.index}", task_vector(trained, {name: start[name] for name in trained}))
        else:
            self.weights.keep(f"task_{task.index}", network_tensors(self.lora))
        if int(self.counts[1]):
            share = int(self.counts[0]) / int(self.counts.sum())
            self.importance.average(start, self.weights["fisher"], share)
            self.weights.drop("fisher")
            self.counts[0] += self.counts[1]
            self.counts[1] = 0
        if not task.is_first:  # the composition of one task is its own network
            self.compose(range(task.index + 1))
            if not self.freeze_backbone and self.lora is None:
                self.passes.refit_norms(self._frozen_norms())
        super().end_task(task)

    @torch.no_grad()
    def compose(self, tasks: Sequence[int]) -> None:
        """Write ``theta_0 + 1/n sum tau_t`` over n of the tasks into the backbone, theta_0 for none of them.

        Heads and running statistics stay as they are. The end of a later task composes all tasks again.

        Args:
            tasks: Indices of different tasks that have ended.

        Raises:
            ValueError: If a task has no task vector, or occurs twice.
        """
        chosen = list(tasks)
        for index in chosen:
            if f"task_{index}" not in self.weights or chosen.count(index) > 1:
                known = sum(f"task_{number}" in self.weights for number in range(len(self.task_columns)))
                raise ValueError(f"ITA: compose got {chosen}; give different tasks from 0 to {known - 1}")
        start = self.weights["start"]
        merged = average([self.task_change(index) for index in chosen]) if chosen else {}
        composed = shifted({name: start[name] for name in merged}, merged)
        parameters = dict(self.network.named_parameters())
        write_weights(self.network, {name: value for name, value in start.items() if name in parameters} | composed)
        for up in [] if self.lora is None else self.lora.up_weights():
            up.zero_()  # the composition holds the change of the newest task

    def _whole_backbone(self) -> Iterable[nn.Module]:
        return [self.network.backbone]

    def _fisher(self) -> tuple[dict[str, Tensor], Tensor]:
        """F of the trained weights of the backbone on the images of the task, and their number, of all processes."""
        count = torch.zeros((), dtype=torch.int64, device=self.device)

        def counted() -> Iterator[Batch]:
            for batch in self.passes.batches(samples=self.fisher_samples):
                count.add_(len(batch))
                yield batch

        if self.lora is None:
            trained = trained_weights(self.network)
            chosen = {name: value for name, value in trained.items() if name.startswith(_BACKBONE)}
        else:
            weights = dict(self.network.named_parameters())
            chosen = {name: weights[name] for name in self._changes()}
        if not chosen:
            return {}, count
        found = fisher_diagonal(
            self.network, chosen, counted(), labels=self.fisher_labels, loss_classes=self.loss_columns()
        )
        return found, all_sum(count)
