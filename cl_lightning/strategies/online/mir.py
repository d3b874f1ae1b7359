"""Maximally Interfered Retrieval, MIR (Aljundi et al., NeurIPS 2019, arXiv:1908.04742), on Experience Replay.

Of C candidates, drawn uniformly from the memory, those are replayed whose loss the coming step would increase the most.
With B the batch of the stream and l(theta; x, y) the cross-entropy over all classes seen so far,

    theta' = theta - lr * grad mean_B l(theta)                   a virtual step of plain gradient descent
    s(x) = l(theta'; x, y) - l(theta; x, y)                      for each candidate, without augmentation
    L = CE(B) + CE(R),   R: the candidates of the largest s      as in ``ER``, augmented

lr -> virtual_lr, C -> candidates, and R has ``replay_size`` samples. Scores are computed in eval mode, so that they do
not depend on the other candidates, and running statistics do not change; the gradient of the virtual step takes the
statistics of the batch. With as many candidates as replayed samples the method is ER.
``candidates_of`` leaves out samples of the current task, as the authors do; the method then needs task ids. The variant
that compares with the lowest loss so far is not part of it.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Batch
from cl_lightning.checks import at_least, one_of
from cl_lightning.distributed import all_gather_rows
from cl_lightning.losses import full_precision
from cl_lightning.models import in_eval_mode
from cl_lightning.strategies.base import output_at, step_on, trained_weights
from cl_lightning.strategies.rehearsal.er import ER
from cl_lightning.strategy import Traits

_CHOSEN = 0x317  # salt of the draw for the augmentation of the chosen samples


class MIR(ER):
    """Replay of the samples of a memory whose loss the step on the batch would increase the most.

    Args:
        candidates: C, number of samples that are scored, over all processes, at least 1.
        virtual_lr: Learning rate of the virtual step, at least 0; None for the learning rate of the optimizer.
        candidates_of: ``all`` tasks, or ``earlier`` tasks only.
        reduction: As in ``ER``.
        kwargs: Options of ``ER``, apart from ``replay_by``.
    """

    traits = Traits(
        family="online", paper="Aljundi et al., NeurIPS 2019, arXiv:1908.04742", keeps_exemplars=True, task_free=True
    )

    def __init__(
        self,
        *,
        candidates: int = 50,
        virtual_lr: float | None = None,
        candidates_of: Literal["all", "earlier"] = "all",
        reduction: Literal["joint", "sum"] = "sum",
        **kwargs: Any,
    ) -> None:
        if kwargs.get("replay_by", "step") != "step":
            raise ValueError("MIR: replay_by is 'loader', but each step chooses what it replays; use 'step'")
        super().__init__(reduction=reduction, **kwargs)
        at_least(self, 1, candidates=candidates)
        at_least(self, 0, virtual_lr=virtual_lr, optional=True)
        one_of(self, ("all", "earlier"), candidates_of=candidates_of)
        if self.replay_size is not None and self.replay_size > candidates:
            raise ValueError(
                f"MIR: replay_size is {self.replay_size}, of {candidates} candidates; use at most as many, or more "
                "candidates"
            )
        self.candidates, self.virtual_lr, self.candidates_of = candidates, virtual_lr, candidates_of
        self.traits = self.traits.but(task_free=candidates_of == "all")

    def draw(self, batch: Batch, *salt: int, tasks: Iterable[int] | None = None) -> Batch | None:
        if self.candidates_of == "earlier":
            tasks = range(self.task.index)
        draw = batch.draw.fork(*salt) if salt else batch.draw
        rows, share = self.memory.pick(self.candidates, draw, tasks=tasks)
        count = min(self.replay_size or batch.draw.total, share.total)
        if count == 0:
            return None
        drawn = self.memory.at(rows, share)
        scores = all_gather_rows(self.scores(batch, drawn)).to(rows.device)
        chosen = all_gather_rows(rows)[scores.argsort(descending=True, stable=True)[:count]]
        share = draw.share(count, _CHOSEN)
        return self.memory.at(chosen[share.start : share.stop], share)

    def scores(self, batch: Batch, samples: Batch) -> Tensor:
        """s of each sample, float32 ``(n,)``: how much a step on the batch would increase its loss, in nats.

        Args:
            batch: This process's rows of the batch, with finished images.
            samples: This process's rows of the candidates, with raw images.
        """
        network, weights = self.network, trained_weights(self.network)
        moved = step_on(self, batch, self.virtual_lr)
        images = self.data.finish(samples).images
        with torch.no_grad(), in_eval_mode(network):
            before, after = (
                F.cross_entropy(
                    full_precision(output_at(network, values, images).logits), samples.labels, reduction="none"
                )
                for values in (weights, moved)
            )
        return after - before
