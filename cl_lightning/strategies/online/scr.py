"""Supervised Contrastive Replay, SCR (Mai et al., CVPR-W 2021, arXiv:2103.13885), for online streams.

A step uses the batch and samples of a memory, each in two views: un-augmented and strongly augmented, N rows in total.
With u_i = g(f(x_i)) / ||g(f(x_i))||, f the backbone and g a projection that is used in training only,

    L = -1/N sum_i 1/|P_i| sum_{p in P_i} log( exp(u_i . u_p / tau) / sum_{a != i} exp(u_i . u_a / tau) )

with P_i the other rows of the class of row i; the other view of a sample is one of them. A test image is classified by
the nearest class mean of the features f of the samples in the memory:

    y* = argmin_c || phi(x) - mu_c ||,   mu_c = mean of phi over the samples of class c,   phi = f / ||f||

with mu_c normalised to norm 1 again, computed with the present network. There is no linear classifier whose rows favour
the classes of the last batches. tau -> temperature, |R| -> replay_size.

In the released code the un-augmented rows and the augmented rows are two passes of the network, so that batch
normalisation takes the statistics of each; ``separate_passes=True`` does the same.
Departs from the authors' code: the first step of the stream, with an empty memory, trains on its batch alone, while it
has no loss there. The review trick, an epoch on the memory at the end of each task, is left out, since it needs to know
when a task ends. The augmentation of the data module is not used. With several epochs over the stream, batches are
offered to the memory in the first epoch only.
With several processes the rows of all processes are contrasted. If a batch of the stream has fewer samples than there
are processes, each process contrasts its own rows.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.checks import above, at_least
from cl_lightning.losses import full_precision, rows_of_all, supervised_contrastive
from cl_lightning.models import perceptron
from cl_lightning.strategies.online.two_views import MemoryMeans, TwoViews
from cl_lightning.strategy import Batch, Output, Traits


class SCR(TwoViews, MemoryMeans):
    """Supervised contrastive loss of a batch and a memory in two views, and the nearest mean of the memory's classes.

    Args:
        memory_size: Number of samples in the memory, over all processes, at least 1.
        replay_size: |R|, samples drawn from the memory per step, over all processes, at least 1; None for the size of
            the batch.
        temperature: tau, above 0.
        projection_hidden: Number of hidden units of g, at least 1; None for the number of features.
        projection_size: Number of outputs of g, at least 1.
        separate_passes: Whether the un-augmented and the augmented rows are two passes, as in the authors' code.
        kwargs: Options of ``TwoViews``: ``transforms``, and of ``Replay``. The head is a ``NearestMeanHead``.
    """

    traits = Traits(
        family="online",
        paper="Mai et al., CVPR-W 2021, arXiv:2103.13885",
        keeps_exemplars=True,
        task_free=True,
        inputs=("image",),
    )

    def __init__(
        self,
        *,
        memory_size: int = 1000,
        replay_size: int | None = 100,
        temperature: float = 0.07,
        projection_hidden: int | None = None,
        projection_size: int = 128,
        separate_passes: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(memory_size=memory_size, replay_size=replay_size, **kwargs)
        above(self, 0, temperature=temperature)
        at_least(self, 1, projection_hidden=projection_hidden, optional=True)
        at_least(self, 1, projection_size=projection_size)
        self.temperature, self.separate_passes = temperature, separate_passes
        self.projection_sizes = (projection_hidden, projection_size)
        self.projection: nn.Module  # g

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        (hidden, size), width = self.projection_sizes, self.network.head.num_features
        self.projection = perceptron(width, hidden or width, size)

    def trainable(self) -> Iterable[nn.Parameter]:
        yield from super().trainable()
        yield from self.projection.parameters()

    def prepare_batch(self, batch: Batch) -> Batch:
        order = ("stream", "replay", "strong stream", "strong replay")
        return self.joined_views(batch, order, 2 if self.separate_passes else 1)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        rows, factor = rows_of_all(batch)
        embeddings = full_precision(self.projection(output.features))
        tau = self.temperature
        contrast = supervised_contrastive(rows(embeddings), rows(batch.labels), tau, base_temperature=tau)
        return {"contrast": factor * contrast}

    def bytes_kept(self) -> dict[str, int]:
        return {**super().bytes_kept(), "heads": sum(value.nbytes for value in self.projection.state_dict().values())}
