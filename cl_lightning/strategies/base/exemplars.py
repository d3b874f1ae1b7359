"""Parts of methods with herded exemplars: nearest-mean classifiers, balanced second phases, imprinted cosine heads."""

import functools
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cl_lightning.batch import ImageShape, mix
from cl_lightning.checks import one_of
from cl_lightning.memory import GrowingBuffers, Prototypes, group_ids, herding_per_class, rank_in_group
from cl_lightning.models import CosineHead, head_as
from cl_lightning.strategies.base.phases import Phase, PhaseOptions
from cl_lightning.strategies.base.replay import ExemplarReplay
from cl_lightning.strategies.base.strategy import HeadFactory
from cl_lightning.stream import Task

Classifier = Literal["nme", "head"]
BALANCED = "balanced"
"""Name of the second phase on a class-balanced set."""
NO_PHASE = PhaseOptions(epochs=0)
_IMPRINT = 0x13C


class NearestExemplars(ExemplarReplay):
    """Herded exemplars and classification by their nearest mean (NME; iCaRL, CVPR 2017, arXiv:1611.07725, alg. 1).

        y* = argmin_y || phi(x) - mu_y ||,   mu_y = mean of phi over the exemplars of y,   phi = features / ||features||

    with mu_y normalised to norm 1 again. While a task is trained, its classes have no exemplars: the head predicts.

    Args:
        memory_size: K, as in :class:`ExemplarReplay`.
        classifier: ``nme`` for the nearest mean of exemplars, ``head`` for the head of the network.
        kwargs: Options of the base class.
    """

    def __init__(self, *, memory_size: int = 2000, classifier: Classifier = "nme", **kwargs: Any) -> None:
        super().__init__(memory_size=memory_size, **kwargs)
        one_of(self, get_args(Classifier), classifier=classifier)
        if classifier == "nme" and memory_size < 1:
            raise ValueError(
                f"{type(self).__name__}: memory_size is {memory_size}, but classifier 'nme' needs at least one "
                "exemplar per class"
            )
        self.classifier: Classifier = classifier
        self.means: Prototypes

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.means = Prototypes(self.network.head.num_features)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.means = Prototypes(self.network.head.num_features)  # the network changes, so the means are no longer valid

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        if self.classifier == "nme":
            self.measure_exemplar_means(self.means)

    def predict_within_task(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        return self.network.classify(images)

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        if len(self.means) == 0:
            return self.network.classify(images)
        # The nearest mean among unit vectors has the largest cosine:
        # argmin_y || phi(x) - mu_y || = argmax_y <phi(x), mu_y> for phi and mu of norm 1.
        return self.means.scores(self.network.backbone(images), self.network.head.num_columns, "cosine")


class BalancedSet(GrowingBuffers):
    """Class-balanced training set of a second phase: exemplars, and as many herded samples of each class of the task.

    It has the same number of samples in each list of exemplars (the first ones) and of each class of the task: the
    number of samples of the smallest of them.

    Attributes:
        chosen: Which samples of the task are in the set, bool ``(n,)``, in the order of the training loader; empty
            until :meth:`choose` is called. It is in the checkpoint: when a run is resumed inside the second phase, the
            features have changed since.
    """

    chosen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("chosen", torch.zeros(0, dtype=torch.bool))

    @torch.no_grad()
    def choose(self, strategy: ExemplarReplay) -> None:
        """Choose samples of the task by herding on the features of the network, the same on every process.

        Every process must call it, with the network in eval mode.
        """
        features, labels, indices = strategy.passes.all_indexed_features()
        quota = min(self._held(strategy).min(), labels.bincount()[labels].min())
        herded = indices[herding_per_class(features, labels, int(quota))]
        pool = strategy.data.module.statistics_dataloader().plan.indices.to(herded.device)  # as Phase.samples gets them
        self.chosen = torch.isin(pool, herded).to(self.chosen.device)

    def clear(self) -> None:
        """Forget the choice, at the end of the phase."""
        self.chosen = self.chosen[:0]

    def samples(self, labels: Tensor, replayed: Tensor, *, strategy: ExemplarReplay) -> Tensor:
        """Mask of the samples of the set, as ``Phase.samples`` returns it."""
        memory, chosen = strategy.memory, self.chosen.cpu()
        quota = int(labels[~replayed][chosen].bincount().max())
        level, _ = rank_in_group(memory.keys, group_ids(memory.labels, memory.tasks, "both"))
        return torch.cat([chosen, (level < quota).cpu()])

    @staticmethod
    def _held(strategy: ExemplarReplay) -> Tensor:
        """Number of exemplars in each list."""
        memory = strategy.memory
        return group_ids(memory.labels, memory.tasks, "both").unique(return_counts=True)[1]  # type: ignore[no-untyped-call,no-any-return]


def balanced_phase(
    strategy: ExemplarReplay, task: Task, subset: BalancedSet, options: PhaseOptions, *, head_only: bool
) -> list[Phase]:
    """The second phase of a task on a class-balanced set: no phase in the first task, or for 0 epochs.

    The strategy calls ``subset.choose`` at the end of the first phase and ``subset.clear`` at the end of this phase:
    :func:`end_balanced` does both.

    Args:
        strategy: The strategy.
        task: The task.
        subset: Its balanced set, a submodule.
        options: Options of the phase; 0 epochs to leave it out.
        head_only: Whether only the rows of the head are trained, rows of old classes too, with the backbone frozen in
            eval mode; the scale of a cosine head is not.
    """
    if task.is_first or options.epochs == 0:
        return []
    return [
        Phase(
            BALANCED,
            options,
            trains=strategy.network.head.blocks.parameters if head_only else None,
            freezes=(lambda: [strategy.network.backbone]) if head_only else None,
            samples=functools.partial(subset.samples, strategy=strategy),
            needed=lambda: len(strategy.memory) > 0,
        )
    ]


def end_balanced(strategy: ExemplarReplay, subset: BalancedSet, phase: Phase) -> None:
    """Choose the balanced set after the phase before the balanced one; forget it after the balanced phase."""
    if phase.name == BALANCED:
        subset.clear()
    elif not strategy.task.is_first and len(strategy.memory):
        strategy.eval()
        subset.choose(strategy)
        strategy.train()


class CosineExemplars(NearestExemplars):
    """A cosine head whose new rows are imprinted, whose old rows are frozen; the base of LUCIR and PODNet.

    The rows of earlier classes are not trained in the first phase, but the gradient of their logits still trains the
    backbone. In an optional second phase all rows are trained on a class-balanced set with the backbone frozen.

    Args:
        imprint: Whether the rows of new classes start in the directions of their features (``CosineHead.imprint``),
            from the second task on; False for random rows.
        balanced_options: Options of the second phase; 0 epochs to leave it out.
        head: Builds a :class:`CosineHead`; None for one row per class and a learnt scale that starts at 1.
        kwargs: Options of the base class.
    """

    imprinted: Tensor

    def __init__(
        self,
        *,
        imprint: bool = True,
        balanced_options: PhaseOptions = NO_PHASE,
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(head=head or functools.partial(CosineHead, scale=1.0, learn_scale=True), **kwargs)
        self.imprints, self.balanced_options = imprint, balanced_options
        self.balanced = BalancedSet()
        self.register_buffer("imprinted", torch.zeros((), dtype=torch.int64))  # tasks whose rows are set

    @property
    def cosine_head(self) -> CosineHead:
        """The head of the network."""
        return head_as(self.network, CosineHead, self, "whose rows can be imprinted")

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        _ = self.cosine_head  # raises for another head

    def phases(self, task: Task) -> list[Phase]:
        return [Phase(), *balanced_phase(self, task, self.balanced, self.balanced_options, head_only=True)]

    def trainable(self) -> Iterable[nn.Parameter]:
        blocks = list(self.network.head.blocks)
        frozen = {id(parameter) for block in blocks[:-1] for parameter in block.parameters()}
        yield from (parameter for parameter in super().trainable() if id(parameter) not in frozen)

    def on_train_start(self) -> None:
        super().on_train_start()
        if not self.imprints or self.task.is_first or int(self.imprinted) >= self.task.index:
            return  # rows that were set before the run was interrupted have been trained since
        self.eval()
        features, labels, _ = self.passes.all_indexed_features()
        self.cosine_head.imprint(features, labels, key=mix(self.seed, _IMPRINT, self.task.index))
        self.imprinted.fill_(self.task.index)
        self.train()

    def end_phase(self, phase: Phase) -> None:
        super().end_phase(phase)
        if self.balanced_options.epochs != 0:
            end_balanced(self, self.balanced, phase)
