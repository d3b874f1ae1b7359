"""k-FPF, periodic forgetting-prioritised fine-tuning (Zhao et al., "Does Continual Learning Equally Forget All
Parameters?", ICML 2023, arXiv:2304.04158).

Plain training on the stream, without replay, while a reservoir is filled. At k times with equal distances, over the
whole stream and independent of the tasks, the last one at its end, the modules that forget most (all normalisation
layers and the head, or ``names``) are trained on the reservoir for some steps, and training resumes from the result:

    theta_F <- theta_F - lr_s grad [ CE + a * squared error to stored logits ](reservoir),  s = 1..steps

with a learning rate that falls along a half cosine. k -> periods, a -> logit_weight (k-FPF-CE is 0, k-FPF-KD above 0).
k fine-tunings of ``steps`` steps cost k * steps * replay_size samples of the memory, replay costs one draw per step.
The number of steps, their size and the learning rate are not in the sources that were read. See the callback ``FPF``
for a single fine-tuning at each evaluation, after any method with a memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cl_lightning.batch import mix
from cl_lightning.checks import above, at_least, matching
from cl_lightning.strategies.base import finetune_on_memory, norms_and_head
from cl_lightning.strategy import Batch, Output, Replay, Traits

_SEED = 0xF9F1


class KFPF(Replay):
    """Training without replay, and a fine-tuning of the head and the normalisation on a memory from time to time.

    Args:
        periods: k, number of fine-tunings over the stream, at least 0; with 0 the method is fine-tuning.
        steps: Number of steps of each, at least 0.
        lr: Learning rate of the first step, above 0.
        logit_weight: a, at least 0; the memory then stores the logits of its samples.
        names: Patterns of the names of parameters that are trained; None for normalisation layers and the head.
        replay_size: Number of samples per step, at least 1.
        kwargs: Options of ``Replay``.
    """

    traits = Traits(family="rehearsal", paper="Zhao et al., ICML 2023, arXiv:2304.04158", keeps_exemplars=True)

    def __init__(
        self,
        *,
        periods: int = 5,
        steps: int = 300,
        lr: float = 0.1,
        logit_weight: float = 0.0,
        names: Sequence[str] | None = None,
        replay_size: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(replay_size=replay_size, **kwargs)
        at_least(self, 0, periods=periods, steps=steps, logit_weight=logit_weight)
        above(self, 0, lr=lr)
        self.periods, self.steps, self.lr, self.logit_weight = periods, steps, lr, logit_weight
        self.names = names
        self._logits: Tensor | None = None

    def prepare_batch(self, batch: Batch) -> Batch:
        self._logits = None
        return batch  # the memory is used between the steps only

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        self._logits = output.logits.detach().float()
        return super().losses(batch, output)

    def offer(self, batch: Batch, **extra: Tensor) -> None:
        if self.logit_weight:
            nothing = torch.zeros(0, self.network.head.num_columns, device=self.device)
            extra["logits"] = nothing if self._logits is None else self._logits
        super().offer(batch, **extra)

    def after_step(self, batch: Batch) -> None:
        super().after_step(batch)
        trainer: Any = self.trainer
        sizes = [len(part) for part in self.data.module.stream.train]
        step = self.epoch * trainer.num_training_batches + trainer.fit_loop.epoch_loop.batch_idx
        steps = (self.phase.options.epochs or 1) * trainer.num_training_batches
        before = sum(sizes[: self.task.index])
        # Fine-tunings that are due after this step, and before it; the stream is counted in samples times steps.
        after, earlier = (
            self.periods * (before * steps + sizes[self.task.index] * done) // (sum(sizes) * steps)
            for done in (step + 1, step)
        )
        if after > earlier:
            self.finetune()

    def finetune(self) -> None:
        """Train the chosen modules on the memory; the same on every process."""
        names = norms_and_head(self.network)
        if self.names is not None:
            names = matching(self, dict(self.network.named_parameters()), names=self.names)
        finetune_on_memory(
            self,
            self.network,
            self.memory,
            names,
            steps=self.steps,
            batch_size=self.replay_size or 32,
            lr=self.lr,
            key=mix(self.seed, _SEED, self.trainer.global_step),
            logit_weight=self.logit_weight,
        )
