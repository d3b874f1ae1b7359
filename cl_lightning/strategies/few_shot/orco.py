"""OrCo, orthogonality and contrast (Ahmed, Kukleva & Schiele, CVPR 2024, arXiv:2403.18550).

N unit vectors v are reserved for all classes before the stream, as far from each other as they can be:

    min R(v),   R(v) = 1/N sum_i log sum_j exp(v_i . v_j),   ``target_steps`` gradient steps of rate 1, ||v_i|| = 1

In the base session the backbone f is trained with two views of each image, without a classifier,

    L = a SupCon + (1 - a) SimCLR,   of a projection that is removed afterwards

and is frozen. Then, and in each later session, the classes that begin get free targets, by the assignment with the
largest sum of cosines with the mean vectors of the classes, and a projector g is trained. With h = g(f(x)) / ||.|| of
two views,

    L = SupCon( {h, two copies of each free v + eps (U(0, 1) - 1/2), normalised} ) + CE(h . v, y) + R(v')

v' are all targets, where the mean of the vectors h of a class replaces its target if the batch has the class. Later
sessions begin with the g of the base session, and train it on the images of the session and on exemplars. They use the
means of new classes alone in R, and w_n mean CE of new classes + w_b mean CE of base classes. Assigned targets do not
change. score_c(x) = h . v_c. N -> num_targets, a -> supervised_share, eps -> perturbation, w_n -> novel_weight,
w_b -> base_weight, T of all contrasts -> temperature. CE is of cosines without a factor.
Chosen here: 5 herded exemplars of each class, base classes included; the mean vectors are of normalised vectors.
Departs from the authors' code: the projector of the last epoch is used instead of the best one by test accuracy.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Batch, Draw, cat
from cl_lightning.checks import above, at_least, one_of, within
from cl_lightning.distributed import world_size
from cl_lightning.losses import cross_entropy, full_precision, rows_of_all, supervised_contrastive
from cl_lightning.memory import class_means
from cl_lightning.models import Head, TargetHead, Temporary, frozen_copy, head_as, in_eval_mode, perceptron
from cl_lightning.strategies.base.schedules import CosineOverPhase
from cl_lightning.strategies.few_shot.tuned_sessions import batch_means
from cl_lightning.strategy import ExemplarReplay, Output, Phase, PhaseOptions, Task, Traits

_VIEW, _PERTURB = 0x09C0, 0x09C1  # salts


def spread(vectors: Tensor) -> Tensor:
    """R: mean over the rows i of ``log sum_j exp(v_i . v_j)``, j = i included, a scalar, of unit vectors ``(N, e)``.

    It is at least ``log(e + (N - 1) exp(-1 / (N - 1)))``, which a regular simplex attains.
    """
    return (vectors @ vectors.T).logsumexp(dim=1).mean()


def spread_targets(count: int, size: int, *, steps: int, key: int = 0) -> Tensor:
    """Unit vectors that minimise :func:`spread`, float64 ``(N, e)``, from random ones by steps of rate 1.

    Args:
        count: N, at least 2.
        size: e.
        steps: Number of steps.
        key: Seed.
    """
    vectors = F.normalize(Draw.of(count, key).randn(size).double(), dim=1)
    for _ in range(steps):
        # The gradient of R, by hand: with p the softmax of each row of v v^T, (p + p^T) v / N.
        weights = (vectors @ vectors.T).softmax(dim=1)
        vectors = F.normalize(vectors - (weights + weights.T) @ vectors / count, dim=1)
    return vectors


def assignment(means: Tensor, targets: Tensor) -> Tensor:
    """Target of each class for the largest sum of cosines (Hungarian method), int64 ``(c,)``, on the CPU.

    Args:
        means: Mean vectors of the classes, ``(c, e)``.
        targets: Unit vectors, ``(n, e)``, n at least c.
    """
    cosines = F.normalize(means.double(), dim=1) @ targets.double().T
    rows, chosen = linear_sum_assignment(cosines.cpu().numpy(), maximize=True)
    assert rows.tolist() == list(range(len(means)))
    return torch.from_numpy(chosen)


class ReservedTargetHead(TargetHead):
    """Cosines with targets of which each class gets one when its task begins; the assigned ones come first.

    Args:
        num_features: Size of a feature vector, d.
        size: N, number of targets, at least 2.
        dimensions: e, size of a target.
        hidden: Number of hidden units of the projector g.
        steps: Number of steps that spread the targets.

    Attributes:
        targets: ``(N, e)``; the rows of classes with a target first, by their columns.
    """

    def __init__(self, num_features: int, *, size: int, dimensions: int, hidden: int, steps: int) -> None:
        projector = perceptron(num_features, hidden, dimensions)
        targets = spread_targets(size, dimensions, steps=steps)
        super().__init__(num_features, targets=targets, projection=projector, cosine=True)
        self.register_buffer("targets", self.targets)  # in the state dict, since their order changes

    def grow(self, num_new: int) -> None:
        self.check_room(self.num_columns + num_new)
        Head.grow(self, num_new)

    @property
    def waits(self) -> bool:
        """Whether the newest classes have no targets yet; synchronises with the device."""
        return bool(self.blocks) and not bool(self._weights()[-1].any())

    def assign(self, means: Tensor) -> None:
        """Give free targets to the newest classes.

        Args:
            means: Their mean vectors, ``(c, e)``, the same on every process.
        """
        rows = self._weights()[-1]
        start = self.num_columns - len(rows)
        chosen = assignment(means, self.targets[start:]).to(rows.device)
        free = torch.ones(self.size - start, dtype=torch.bool, device=rows.device).index_fill_(0, chosen, False)
        rest = self.targets[start:]
        rows.copy_(rest[chosen])
        self.targets = torch.cat([self.targets[:start], rest[chosen], rest[free]])

    @property
    def free(self) -> Tensor:
        """Targets of no class, ``(N - columns, e)``."""
        return self.targets[self.num_columns :]


class OrCo(ExemplarReplay):
    """Reserved targets that are assigned to classes; contrast with free targets, cross-entropy, and a spreading loss.

    Args:
        num_targets: N, at least 2 and at least the number of classes of the stream.
        embedding_size: e, size of a target, at least 1; 256 in the paper for CUB-200.
        hidden_size: Number of hidden units of g and of the projection of the first phase, at least 1.
        target_steps: Number of steps that spread the targets, at least 0; 5000 in the paper for CUB-200.
        supervised_share: a, in [0, 1].
        temperature: T, above 0.
        perturbation: eps, at least 0; 0.01 in the paper for larger images.
        novel_weight: w_n, at least 0.
        base_weight: w_b, at least 0; 0.6 in the paper for CUB-200.
        tune_backbone: Whether the phase ``align`` trains the backbone too, as in the paper for CUB-200.
        pretrain_options: Options of the first phase, ``pretrain``; 0 epochs for a pretrained backbone.
        align_options: Options of the phase ``align`` of the base session. The default is 10 epochs.
        session_options: Options of the phase ``session``; 0 epochs for no training after the base session. The default
            is 100 epochs. In both phases the default optimizer is SGD with learning rate 0.1, momentum 0.9 and
            dampening 0.9, with a cosine schedule, in sessions after 10 epochs of warm-up.
        memory_size: As in ``ExemplarReplay``.
        exemplars_per_class: As in ``ExemplarReplay``.
        kwargs: Options of ``ExemplarReplay``.
    """

    traits = Traits(family="few-shot", paper="Ahmed et al., CVPR 2024, arXiv:2403.18550", keeps_exemplars=True)

    def __init__(
        self,
        *,
        num_targets: int = 100,
        embedding_size: int = 128,
        hidden_size: int = 2048,
        target_steps: int = 1000,
        supervised_share: float = 0.9,
        temperature: float = 0.07,
        perturbation: float = 9e-5,
        novel_weight: float = 0.5,
        base_weight: float = 0.0,
        tune_backbone: bool = False,
        pretrain_options: PhaseOptions = PhaseOptions(),
        align_options: PhaseOptions = PhaseOptions(epochs=10),
        session_options: PhaseOptions = PhaseOptions(epochs=100),
        memory_size: int = 500,
        exemplars_per_class: int | None = 5,
        **kwargs: Any,
    ) -> None:
        at_least(self, 2, num_targets=num_targets)
        at_least(self, 1, embedding_size=embedding_size, hidden_size=hidden_size)
        at_least(self, 0, target_steps=target_steps, perturbation=perturbation)
        at_least(self, 0, novel_weight=novel_weight, base_weight=base_weight)
        within(self, "[0, 1]", supervised_share=supervised_share)
        above(self, 0, temperature=temperature)
        head = functools.partial(
            ReservedTargetHead, size=num_targets, dimensions=embedding_size, hidden=hidden_size, steps=target_steps
        )
        super().__init__(head=head, memory_size=memory_size, exemplars_per_class=exemplars_per_class, **kwargs)
        one_of(self, ("all",), loss_classes=self.loss_classes)
        self.embedding_size, self.hidden_size = embedding_size, hidden_size
        self.supervised_share, self.temperature, self.perturbation = supervised_share, temperature, perturbation
        self.novel_weight, self.base_weight, self.tune_backbone = novel_weight, base_weight, tune_backbone
        sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.9)
        self.pretrain_options = pretrain_options
        self.align_options = align_options.filled(sgd, CosineOverPhase)
        self.session_options = session_options.filled(sgd, functools.partial(CosineOverPhase, warmup=10))
        self.contrast_projection = Temporary(self._new_projection)  # of the phase pretrain
        self.base_projector = Temporary(self._projector)  # from the end of the base session on

    def _new_projection(self) -> nn.Module:
        return perceptron(self.network.head.num_features, self.hidden_size, self.embedding_size)

    def _projector(self) -> nn.Module:
        return frozen_copy(self.head.projection)

    @property
    def head(self) -> ReservedTargetHead:
        """The head of the network."""
        return head_as(self.network, ReservedTargetHead, self, "whose targets are assigned to classes")

    @property
    def backbone_is_final(self) -> bool:
        return self.freeze_backbone or not self.task.is_first

    def phases(self, task: Task) -> list[Phase]:
        projector = Phase("session", self.session_options, trains=self._of_projector, freezes=self._backbone)
        if not task.is_first:
            return [projector] if self.session_options.epochs != 0 else []
        first = Phase("pretrain", self.pretrain_options, trains=self._of_pretraining)
        align = Phase("align", self.align_options, trains=self._of_alignment, freezes=self._frozen_in_alignment)
        pretrains = self.pretrain_options.epochs != 0 and not self.freeze_backbone
        return [first] * pretrains + [align] * (self.align_options.epochs != 0)

    def _of_pretraining(self) -> Iterable[nn.Parameter]:
        return [*self.network.backbone.parameters(), *self.contrast_projection.parameters()]

    def _of_alignment(self) -> Iterable[nn.Parameter]:
        tuned = self.network.backbone.parameters() if self.tune_backbone else ()
        return [*tuned, *self.head.projection.parameters()]

    def _of_projector(self) -> Iterable[nn.Parameter]:
        return self.head.projection.parameters()

    def _backbone(self) -> Iterable[nn.Module]:
        return [self.network.backbone]

    def _frozen_in_alignment(self) -> Iterable[nn.Module]:
        return self._frozen_norms() if self.tune_backbone and not self.freeze_backbone else [self.network.backbone]

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if task.is_first:
            self.contrast_projection.create()
        else:
            assert self.base_projector.module is not None
            self.head.projection.load_state_dict(self.base_projector.module.state_dict())

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.phase.name != "pretrain":
            self.assign_targets()

    @torch.no_grad()
    def assign_targets(self) -> None:
        """Give targets to the classes of the task, unless they have them already; every process must call it."""
        head, new = self.head, self.task.num_new
        if not new or not head.waits:  # a resumed phase has them in its checkpoint
            return
        with in_eval_mode(self.network):
            features, labels = self.passes.features()
            vectors = F.normalize(head.embed(features), dim=1)
        head.assign(class_means(vectors, labels, head.num_columns)[-new:])

    def prepare_batch(self, batch: Batch) -> Batch:
        second = self.data.augment(batch.replace(draw=batch.draw.fork(_VIEW)))
        return cat([batch, second], world_size())

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        rows, factor = rows_of_all(batch)
        if self.phase.name == "pretrain":
            z, labels = rows(self.contrast_projection(output.features)), rows(batch.labels)
            draw = batch.draw
            images = rows(torch.arange(draw.start, draw.stop, device=z.device).repeat(2))
            share, contrast = self.supervised_share, self._contrast
            return {
                "supervised": factor * share * contrast(z, labels),
                "views": factor * (1 - share) * contrast(z, images),
            }
        h = F.normalize(full_precision(rows(self.head.embed(output.features))), dim=1)
        labels = rows(batch.labels)
        with torch.autocast(h.device.type, enabled=False):
            return {name: factor * term for name, term in self.alignment(h, labels, batch.draw).items()}

    def _contrast(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return supervised_contrastive(embeddings, labels, self.temperature, base_temperature=self.temperature)

    def alignment(self, h: Tensor, labels: Tensor, draw: Draw) -> dict[str, Tensor]:
        """Terms of the loss of the projector.

        Args:
            h: Unit vectors of two views of all images of a step, ``(n, e)``.
            labels: Columns, int64 ``(n,)``, at least 0.
            draw: Random numbers of the step; its key alone is used.
        """
        head, later = self.head, self.phase.name == "session"
        assigned, free, columns = head.weight().to(h.dtype), head.free.to(h.dtype), head.num_columns
        noise = Draw.of(2 * len(free), draw.fork(_PERTURB).key).rand(h.shape[1]).to(h) - 0.5
        perturbed = F.normalize(free.repeat(2, 1) + self.perturbation * noise, dim=1)
        own = torch.arange(columns, columns + len(free), device=h.device).repeat(2)
        terms = {"contrast": self._contrast(torch.cat([h, perturbed]), torch.cat([labels, own]))}
        base = self.task_columns[0]
        base = F.pad(base, (0, columns - len(base)))
        cosines = h @ assigned.T
        if later:
            weights = ((~base, self.novel_weight), (base, self.base_weight))
            found = [weight * _mean_of(cosines, labels, among) for among, weight in weights if weight]
            terms["ce"] = sum(found, cosines.new_zeros(()))
        else:
            terms["ce"] = cross_entropy(cosines, labels)
        moved = torch.arange(head.block_sizes()[0] if later else 0, columns, device=h.device)
        vectors = torch.cat([F.normalize(batch_means(h, labels, assigned, moved), dim=1), free])
        terms["spread"] = spread(vectors)
        return terms

    def end_phase(self, phase: Phase) -> None:
        super().end_phase(phase)
        if phase.name == "pretrain":
            self.contrast_projection.remove()

    def end_task(self, task: Task) -> None:
        self.assign_targets()  # where no phase has done it
        super().end_task(task)
        if task.is_first:
            self.contrast_projection.remove()
            self.base_projector.create()

    def bytes_kept(self) -> dict[str, int]:
        projector = sum(tensor.nbytes for tensor in self.base_projector.state_dict().values())
        return {**super().bytes_kept(), "heads": projector}


def _mean_of(logits: Tensor, labels: Tensor, among: Tensor) -> Tensor:
    """Mean cross-entropy over the rows of some classes, 0 without any: logits ``(n, C)``, mask ``(C,)``."""
    return cross_entropy(logits, torch.where(among[labels], labels, -1))
