"""Learning to Prompt, L2P (Wang et al., CVPR 2022, arXiv:2112.08654).

A frozen transformer f takes an image twice: without prompts, for a query q, and with the prompts of a pool whose keys
have the largest cosine similarity with q:

    q(x) = f(x),   S = the N of the M keys k_m with the largest cos(q, k_m),   z(x) = mean of the output at prompts S
    L = CE(W z(x), y over the classes of the task) - lambda 1/B sum_i sum_{m in S_i} cos(q_i, k_m)

Trained are the prompts (first term), the keys (second term; the selection S has no gradient) and the rows of the head
of the task. Each task has a new optimizer. lambda -> key_weight, M -> pool_size, N -> top_k.

``batchwise_prompt="training"``: in a training step all samples use the N prompts that are selected most often in the
global batch, over all processes; for predictions each image uses its own selection. With ``never`` each image uses its
own selection in training too. With ``always`` the images of a test batch vote too, as in the published numbers:
predictions then depend on the batch, and leak its classes if test data are sorted by class.

As in the authors' JAX code, prompts are inserted after position embeddings are added, with M = 10 prompts of L = 10
tokens, N = 4 and lambda = 1. The ports to PyTorch insert prompts before the patches, with resized position embeddings
(not done here), and have L = 5, N = 5, lambda = 0.1 and initial values from U(-1, 1). The JAX code initialises prompts
and keys from U(0, 0.01), and the head with 0. ``readout="token"`` uses the class token as features. N L should be small
compared with the number of tokens of an image (40 and 197 in the paper). A few keys may be selected for all images:
``prompts/used``, logged in each epoch, is the exponential of the entropy of the shares of the prompts, in 1 .. M.
"""

import functools
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from cl_lightning.checks import at_least, one_of
from cl_lightning.distributed import all_sum
from cl_lightning.models import LinearHead, PromptPool, most_frequent
from cl_lightning.strategies.pretrained.prompted import PromptedStrategy
from cl_lightning.strategy import Batch, HeadFactory, Output

Vote = Literal["training", "always", "never"]


class L2P(PromptedStrategy):
    """Prompts from a pool, selected by the similarity between their keys and the features of a frozen transformer.

    With ``batchwise_prompt="always"`` predictions depend on the test batch.

    Args:
        pool_size: M, number of prompts.
        length: L, number of tokens of a prompt.
        top_k: N, number of prompts per image, in 1 .. M.
        key_weight: lambda, at least 0.
        batchwise_prompt: When all samples of a batch use the same prompts: ``training``, ``always`` or ``never``.
        readout: Features are the mean over the ``prompt`` tokens, or the class ``token``.
        low: Smallest initial value of prompts and keys.
        high: Largest initial value of prompts and keys.
        head: Builds the classifier; None for a ``LinearHead`` with initial rows 0.
        kwargs: Options of ``PromptedStrategy``.
    """

    traits = PromptedStrategy.traits.but(family="pretrained", paper="Wang et al., CVPR 2022, arXiv:2112.08654")

    def __init__(
        self,
        *,
        pool_size: int = 10,
        length: int = 10,
        top_k: int = 4,
        key_weight: float = 1.0,
        batchwise_prompt: Vote = "training",
        readout: Literal["prompt", "token"] = "prompt",
        low: float = 0.0,
        high: float = 0.01,
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        at_least(self, 0, key_weight=key_weight)
        one_of(self, get_args(Vote), batchwise_prompt=batchwise_prompt)
        prompts = functools.partial(
            PromptPool, size=pool_size, length=length, top_k=top_k, readout=readout, low=low, high=high
        )
        super().__init__(prompts=prompts, head=head or functools.partial(LinearHead, init_std=0.0), **kwargs)
        self.key_weight, self.batchwise_prompt = key_weight, batchwise_prompt
        self.traits = self.traits.but(transductive=batchwise_prompt == "always")

    def prepare_batch(self, batch: Batch) -> Batch:
        if self.batchwise_prompt != "never":
            votes = torch.zeros(len(self._pool.keys), dtype=torch.int64, device=self.device)
            if len(batch):
                votes += self._pool.votes(self.prompted.look_ahead(batch.images))
            choice = most_frequent(all_sum(votes), self._pool.top_k)
            self._pool.choice = choice if len(batch) else None  # without samples no forward pass uses it
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

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        if self.batchwise_prompt == "always":
            votes = self._pool.votes(self.prompted.look_ahead(images))
            self._pool.choice = most_frequent(votes, self._pool.top_k)
        return super().predict(images)

    @property
    def _pool(self) -> PromptPool:
        return cast(PromptPool, self.prompted.prompts)
