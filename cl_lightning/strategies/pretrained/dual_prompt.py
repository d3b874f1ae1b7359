"""DualPrompt (Wang et al., ECCV 2022, arXiv:2204.04799): general prefixes, and expert prefixes selected by the image.

A frozen transformer f takes an image twice: without prompts, for a query q, and with prefixes in its attention layers.
The general prefixes g are shared by all tasks, the expert e^t is trained by task t:

    q(x) = f(x),   s(x) = argmax_t cos(q, k_t),   predictions are W f(x; g, e^s)
    L = CE(W f(x; g, e^t), y over the classes of task t) - lambda 1/B sum_i cos(q_i, k_t)

A prefix p extends keys and values of an attention layer to [K; p_K] and [V; p_V]. Trained are g, e^t, k_t and the rows
of the head of the task. Each task has a new optimizer. The expert of a task begins as a copy of the expert of the task
before, its key does not. If the task of an image is known (the task-aware accuracy), its expert is used.
lambda -> key_weight.

As in the authors' JAX code: prefixes of 5 keys and 5 values, general ones in blocks 0 and 1, experts in blocks 2 to 4,
lambda = 1, prefixes and keys drawn from U(0, 0.01), the head initially 0. The ports to PyTorch have lambda = 0.1 and
U(-1, 1); they also reshape the prefixes without a permutation, so that the keys of half of a batch are used as values
and the reverse (not done here). In the published numbers the images of a test batch vote on one expert
(``batchwise_prompt=True``): predictions then depend on the batch, and leak its task if test data are sorted by class.
Departs from the code, which has a pool of a fixed number of experts: here each task adds one.
"""

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from cl_lightning.checks import at_least
from cl_lightning.models import ExpertPrompts, LinearHead, most_frequent
from cl_lightning.strategies.pretrained.prompted import PromptedStrategy
from cl_lightning.strategy import Batch, HeadFactory, Output, Task


class DualPrompt(PromptedStrategy):
    """General prefixes in a frozen transformer, and an expert prefix per task, selected by the similarity of its key.

    With ``batchwise_prompt=True`` predictions depend on the test batch.

    Args:
        general_length: Number of keys, and of values, of a general prefix; 0 for none.
        general_blocks: Indices of the blocks with general prefixes.
        expert_length: Number of keys, and of values, of an expert, at least 1.
        expert_blocks: Indices of the blocks with experts.
        key_weight: lambda, at least 0.
        batchwise_prompt: Whether all images of a test batch use the expert that most of them select.
        low: Smallest initial value of prefixes and keys.
        high: Largest initial value of prefixes and keys.
        head: Builds the classifier; None for a ``LinearHead`` with initial rows 0.
        kwargs: Options of ``PromptedStrategy``.
    """

    traits = PromptedStrategy.traits.but(
        family="pretrained", paper="Wang et al., ECCV 2022, arXiv:2204.04799", task_ids="inferred"
    )

    def __init__(
        self,
        *,
        general_length: int = 5,
        general_blocks: Sequence[int] = (0, 1),
        expert_length: int = 5,
        expert_blocks: Sequence[int] = (2, 3, 4),
        key_weight: float = 1.0,
        batchwise_prompt: bool = False,
        low: float = 0.0,
        high: float = 0.01,
        head: HeadFactory | None = None,
        **kwargs: Any,
    ) -> None:
        at_least(self, 0, key_weight=key_weight)
        prompts = functools.partial(
            ExpertPrompts,
            general_length=general_length,
            general_blocks=list(general_blocks),
            expert_length=expert_length,
            expert_blocks=list(expert_blocks),
            low=low,
            high=high,
        )
        super().__init__(prompts=prompts, head=head or functools.partial(LinearHead, init_std=0.0), **kwargs)
        self.key_weight, self.batchwise_prompt = key_weight, batchwise_prompt
        self.traits = self.traits.but(transductive=batchwise_prompt)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self._prompts.grow()

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        ce = self.classification_loss(output, batch)
        return {"ce": ce, "keys": -self.key_weight * self._prompts.take_matched()}

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        prompts = self._prompts
        if tasks is not None:
            prompts.choice = tasks
        elif self.batchwise_prompt:
            selected = prompts.select(self.prompted.look_ahead(images))
            votes = torch.zeros(len(prompts.keys), dtype=torch.int64, device=selected.device)
            prompts.choice = most_frequent(votes.index_add_(0, selected, torch.ones_like(selected)), 1)[0]
        return super().predict(images)

    @property
    def _prompts(self) -> ExpertPrompts:
        return cast(ExpertPrompts, self.prompted.prompts)
