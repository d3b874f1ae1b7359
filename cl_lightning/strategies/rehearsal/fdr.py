"""Function Distance Regularisation, FDR (Benjamin, Rolnick & Kording, ICLR 2019, arXiv:1805.08289).

When a task ends, a memory takes raw samples x' of the task and the logits z' that the network f gives them then. With
(x, y) from the stream, and (x', z') drawn from the memory and augmented,

    L = CE(f(x), y) + alpha * mean || softmax(f(x')) - softmax(z') ||_2

alpha -> distance_weight. The distance is the Euclidean norm of the difference of the two vectors of probabilities, not
its square, so a sample whose output has changed little is pulled back with the same force as any other. The memory
holds equal numbers of samples of each task so far, and no labels of it are used. Use SGD without momentum: when a new
class has taken all probability of a sample, the gradient of the softmax vanishes, and momentum leads there.

In the code of the mammoth framework, a step on CE(f(x), y) is followed by a second optimizer step on the distance at
the new weights (and alpha is not used). ``two_steps=True`` computes the gradient of the distance at
theta - lr grad CE and takes one step with the sum of both gradients, which is equal for plain SGD with one learning
rate; momentum then counts one step instead of two.
Departs from the paper: the stored outputs are computed in eval mode on images without augmentation (in mammoth in
training mode on augmented ones); the head grows, so z' has no logits of classes that arrive later. Their probability in
softmax(z') is 0, as it nearly is where the head has all outputs from the start and all of them are trained.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import join
from cl_lightning.checks import at_least
from cl_lightning.losses import full_precision, mean_over_rows
from cl_lightning.strategies.base import TaskEndReplay, mean_gradient, output_at, trained_weights, virtual_step
from cl_lightning.strategy import Batch, Output, Traits


def function_distance(logits: Tensor, stored: Tensor) -> Tensor:
    """Euclidean distance between the probabilities now and at the time of storage, mean over the batch; in [0, sqrt 2].

        L = 1/B sum_i || softmax(z_i) - softmax(z'_i) ||_2

    Args:
        logits: z, ``(B, C)``.
        stored: z', ``(B, C')`` with ``C' <= C``. Columns that were unknown when a row was stored are nan or missing;
            their probability is 0.

    Returns:
        A scalar, with the gradient 0 for rows whose probabilities are equal.
    """
    z = F.pad(full_precision(stored.detach()), (0, logits.shape[1] - stored.shape[1]), value=torch.nan)
    before = z.masked_fill(z.isnan(), -torch.inf).softmax(dim=1)
    return mean_over_rows(torch.linalg.vector_norm(full_precision(logits).softmax(dim=1) - before, dim=1))


class FDR(TaskEndReplay):
    """Cross-entropy on the batch, and the distance of the predicted probabilities on a memory to the stored ones.

    Args:
        distance_weight: alpha, at least 0.
        two_steps: Whether the distance is taken at the weights after a step of plain SGD on the cross-entropy.
        kwargs: Options of ``TaskEndReplay``; with ``memory_size`` 0 the method is fine-tuning.
    """

    traits = Traits(family="rehearsal", paper="Benjamin et al., ICLR 2019, arXiv:1805.08289", keeps_exemplars=True)

    def __init__(self, *, distance_weight: float = 1.0, two_steps: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        at_least(self, 0, distance_weight=distance_weight)
        self.distance_weight, self.two_steps = distance_weight, two_steps
        self.traits = self.traits.but(uses_old_logits=distance_weight > 0)
        self._second: tuple[Batch, dict[str, Tensor]] | None = None

    def prepare_batch(self, batch: Batch) -> Batch:
        replay = self.replay(batch) if self.distance_weight > 0 else None
        if replay is None or not self.two_steps:
            self._second = None
            return join({"stream": batch, "replay": replay})
        weights = trained_weights(self.network)
        ce = None
        if len(batch):
            ce = self.classification_loss(output_at(self.network, weights, batch.images), batch)
        lr = self.trainer.optimizers[0].param_groups[0]["lr"]
        self._second = replay, virtual_step(weights, mean_gradient(ce, weights, batch.weight), lr)
        return join({"stream": batch})

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        samples, of_part, share = batch.part("stream", output)
        terms = {"ce": share * self.classification_loss(of_part, samples)}
        if self._second is not None:
            samples, weights = self._second
            share = samples.weight / batch.weight
            of_part = output_at(self.network, weights, samples.images, update_statistics=True)
        elif "replay" in batch.parts:
            samples, of_part, share = batch.part("replay", output)
        else:
            return terms
        distance = function_distance(of_part.logits, samples.extra["logits"])
        return {**terms, "distance": self.distance_weight * share * distance}
