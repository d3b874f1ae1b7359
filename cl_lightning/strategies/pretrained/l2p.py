"""Learning to Prompt, L2P (Wang et al., CVPR 2022, arXiv:2112.08654).

A frozen transformer f sees an image as it is, for a query q, and again beside prompts of a pool whose keys are nearest:

    q(x) = f(x),   S = the N of the M keys k_m with the largest cos(q, k_m),   z(x) = mean of the output at prompts S
    L = CE(W z(x), y over the classes of the task) - lambda 1/B sum_i sum_{m in S_i} cos(q_i, k_m)

Trained are the prompts (first term), the keys (second term; which ones are chosen has no gradient) and the rows of the
head of the task. The optimizer begins anew with each task. lambda -> key_weight, M -> pool_size, N -> selected.

``vote="training"``: in a training step all samples take the N prompts that are chosen most often in the whole batch, on
all processes; predictions are made of each image's own. With ``never`` each image takes its own in training too; with
``always`` a batch of images to predict votes as well, as published numbers have it: then predictions depend on the
batch, which tells what is in it where test data are sorted by class.
As in the authors' JAX code prompts come in after the positions, and are M = 10 of L = 10 tokens, N = 4, lambda = 1. The
ports to PyTorch have prompts before the patches under resized positions (not done here), L = 5, N = 5, lambda = 0.1 and
values from U(-1, 1). In JAX prompts and keys begin as U(0, 0.01), and the head at 0. ``readout="token"`` reads out the
class token. N L tokens should be few beside those of the image, as 40 are beside 197 in the paper. Few keys may come to
take all images: ``prompts/used`` is logged in each epoch, e to the entropy of the shares of the prompts, in 1 .. M.
"""

import functools
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from cl_lightning.batch import Batch
from cl_lightning.distributed import all_sum
from cl_lightning.heads import LinearHead
from cl_lightning.network import Output
from cl_lightning.prompts import PromptPool, most_frequent
from cl_lightning.strategies.pretrained.prompted import PromptedStrategy, tiny_transformer
from cl_lightning.strategy import HeadFactory

Vote = Literal["training", "always", "never"]


class L2P(PromptedStrategy):
    """Prompts from a pool, chosen by what a frozen transformer makes of an image.

    With ``vote="always"`` predictions depend on the test batch.

    Args:
        pool_size: M, number of prompts.
        length: L, tokens of a prompt.
        selected: N, prompts that an image takes, in 1 .. M.
        key_weight: lambda, at least 0.
        vote: When the samples of a batch take the same prompts.
        readout: Features are the mean over the ``prompt`` tokens, or the class ``token``.
        low: Least value of prompts and keys at the beginning.
        high: Largest value of them at the beginning.
        head: Builds the classifier; None for a ``LinearHead`` whose rows begin at 0.
        kwargs: Of ``PromptedStrategy``.
    """

    family: ClassVar[str] = "pretrained"
    paper: ClassVar[str] = "Wang et al., CVPR 2022, arXiv:2112.08654"

    def __init__(
        self,
        *,
        pool_size: int = 10,
        length: int = 10,
        selected: int = 4,
        key_weight: float = 1.0,
        vote: Vote = "training",
        readout: Literal["prompt", "token"] = "prompt",
        low: float = 0.0,
        high: float = 0.01,
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        if key_weight < 0 or vote not in ("training", "always", "never"):
            raise ValueError(
                f"L2P: key_weight={key_weight}, vote={vote!r}; at least 0, one of training, always and never"
            )
        prompts = functools.partial(
            PromptPool, size=pool_size, length=length, selected=selected, readout=readout, low=low, high=high
        )
        super().__init__(prompts=prompts, head=head or functools.partial(LinearHead, init_std=0.0), **kwargs)
        self.key_weight, self.vote = key_weight, vote
        self.uses_test_batch = vote == "always"
        self.ranks_agree = vote != "always"  # each process votes on its own part of a batch to predict

    @classmethod
    def conformance_options(cls) -> dict[str, Any]:
        return {"backbone": tiny_transformer(), "pool_size": 5, "length": 2, "selected": 2}

    def prepare(self, batch: Batch) -> Batch:
        if self.vote != "never":
            votes = torch.zeros(len(self._pool.keys), dtype=torch.int64, device=self.device)
            if len(batch):
                votes += self._pool.votes(self.prompted.look_ahead(batch.images))
            choice = most_frequent(all_sum(votes), self._pool.selected)
            self._pool.choice = choice if len(batch) else None  # without samples there is no pass that takes it
        return batch

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        ce = self.classification_loss(output, batch)
        return {"ce": ce, "keys": -self.key_weight * self._pool.take_matched()}

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        share = all_sum(self._pool.selections.double())
        self._pool.selections.zero_()
        share = share / share.sum().clamp(min=1)
        used = float(torch.special.entr(share).sum().exp())
        for logger in self.loggers:
            logger.log_metrics({"prompts/used": used}, step=self.trainer.global_step)

    def predict(self, images: Tensor) -> Tensor:
        if self.vote == "always":
            votes = self._pool.votes(self.prompted.look_ahead(images))
            self._pool.choice = most_frequent(votes, self._pool.selected)
        return super().predict(images)

    @property
    def _pool(self) -> PromptPool:
        return cast(PromptPool, self.prompted.prompts)
