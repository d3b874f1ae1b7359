"""RoTTA, robust test-time adaptation in dynamic scenarios (Yuan, Xie, Li, CVPR 2023, arXiv:2303.13899).

For streams whose domains change and whose batches hold few classes. A mean teacher theta' in eval mode predicts each
batch; the samples enter a memory that is balanced over the predicted classes and prefers recent and certain samples
(``CategoryBalancedMemory``). After every n samples theta is trained on all M items x_i of the memory, with a view
aug(x_i):

    L = 1/M sum_i w_i CE(softmax f_theta'(x_i), f_theta(aug(x_i))),   w_i = exp(-a_i / N) / (1 + exp(-a_i / N))
    theta' <- m theta' + (1 - m) theta                                  parameters only, not buffers

a_i is the number of samples that arrived since x_i, itself included, N the size of the memory. theta are the scales and
shifts of the normalisation layers. In this step both networks use robust batch normalisation: running statistics, which
start from the source, are moved towards the statistics of the memory (theta': of x_i, theta: of aug(x_i)), and
then normalise:

    mu <- (1 - a) mu + a mu_B,   var <- (1 - a) var + a var_B

n -> every, N -> memory_size, m -> teacher_momentum, a -> momentum, lambda_t -> time_weight, lambda_u ->
uncertainty_weight. The memory is the same on every process, and each one trains on its share of the items.
Departs from the authors' code:
- a batch leads to one step at most, after all its samples have entered the memory; the code takes several steps in the
  middle of a batch of more than n samples. With batches of n samples both are the same;
- the entropy is exact; the code adds 1e-6 to the probabilities;
- apart from normalisation, networks are in eval mode; in the code dropout, if a network has it, is on;
- views are made as in ``CoTTA``, with its departures.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from cl_lightning.checks import at_least
from cl_lightning.losses import entropy
from cl_lightning.memory import CategoryBalancedMemory
from cl_lightning.models import set_statistics
from cl_lightning.strategies.base import sum_of_zeros
from cl_lightning.strategies.test_time.base import ADAPT, TestTimeAdaptation, Trained
from cl_lightning.strategies.test_time.mean_teacher import MeanTeacherAdaptation, consistency
from cl_lightning.strategies.test_time.parts.views import viewed
from cl_lightning.strategy import Batch, Output

_MEMORY, _VIEW = 0xC6, 0xC7  # salts


def timeliness(ages: Tensor, size: int) -> Tensor:
    """Weights ``exp(-a / N) / (1 + exp(-a / N))`` of items, float32, in (0, 0.5].

    Args:
        ages: a, the number of samples that arrived since each item, itself included; int64 ``(n,)``.
        size: N, the size of the memory.
    """
    return torch.sigmoid(-ages.float() / size)


class RoTTA(MeanTeacherAdaptation):
    """Mean teacher on a class-balanced memory of recent, certain samples, with robust batch normalisation.

    Filters choose items of the memory. Episodic resets (``reset="batch"``) also clear the memory.

    Args:
        memory_size: N, at least 1.
        every: n, at least 1: number of samples between two steps; a larger batch leads to one step.
        time_weight: lambda_t, at least 0: weight of the age in the score of an item.
        uncertainty_weight: lambda_u, at least 0: weight of the entropy in it.
        momentum: a, in (0, 1]: weight of the memory in the running statistics of a step.
        teacher_momentum: m, in [0, 1].
        params: Parameters that are trained, see ``TestTimeAdaptation``.
        kwargs: Options of ``TestTimeAdaptation`` without ``statistics``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time", paper="Yuan et al., CVPR 2023, arXiv:2303.13899", keeps_exemplars=True, inputs=("image",)
    )

    def __init__(
        self,
        *,
        memory_size: int = 64,
        every: int = 64,
        time_weight: float = 1.0,
        uncertainty_weight: float = 1.0,
        momentum: float = 0.05,
        teacher_momentum: float = 0.999,
        params: Literal["norm", "early_norm", "all"] | list[str] = "norm",
        **kwargs: Any,
    ) -> None:
        chosen: Trained = params
        at_least(self, 1, memory_size=memory_size, every=every)
        at_least(self, 0, time_weight=time_weight, uncertainty_weight=uncertainty_weight)
        # Statistics move, so a reset restores them; here they move in a step alone.
        super().__init__(
            statistics="moving", momentum=momentum, teacher_momentum=teacher_momentum, params=chosen, **kwargs
        )
        self.every = every
        self.memory = CategoryBalancedMemory(
            memory_size, time_weight=time_weight, uncertainty_weight=uncertainty_weight
        )
        self._due = False  # whether this batch is replaced by the memory
        self._due_in_step = False  # whether a batch of this step was: gradients may be accumulated

    def prepare_batch(self, batch: Batch) -> Batch:
        """Predict the batch, store its samples, and return the items of the memory, or no rows if no step is due."""
        if self.phase.name != ADAPT:
            return batch
        output = self.of_teacher(batch.images)
        if self.predict_when == "before":
            self._predict_stream(output, batch)
        self._predicted = True
        before = int(self.memory.num_seen) // self.every
        if batch.first_pass:
            labels, unsure = output.logits.argmax(dim=1), entropy(output.logits)
            self.memory.arrive(batch.raw, labels, batch.tasks, unsure, batch.draw, self.num_source)
        self._due = int(self.memory.num_seen) // self.every > before
        if not self._due:
            return batch.select(slice(0, 0))
        self._due_in_step = True
        share = batch.draw.share(len(self.memory), _MEMORY)
        items = self.memory.at(torch.arange(share.start, share.stop, device=self.memory.labels.device), share)
        set_statistics(self.network, "robust")  # in the forward pass that follows
        return items.replace(images=viewed(self, items, share.fork(_VIEW)))

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.phase.name == ADAPT and not self._due:
            return {"nothing": sum_of_zeros(value for value in self.parameters() if value.requires_grad)}
        return super().losses(batch, output)

    def adapt(self, batch: Batch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.teacher.network is not None
        set_statistics(self.teacher.network, "robust")
        target = self.of_teacher(self.data.finish(batch).images).logits
        self._choose_statistics()
        ages = int(self.memory.num_seen) - batch.extra["places"]
        return target, {"consistency": timeliness(ages, self.memory.size) * consistency(output.logits, target)}

    def edit_gradients(self, batch: Batch) -> None:
        super().edit_gradients(batch)
        due, self._due_in_step = self._due_in_step, False
        if self.phase.name == ADAPT and not due:
            self._skip_step()

    def reset(self) -> None:
        super().reset()
        self.memory.clear()
