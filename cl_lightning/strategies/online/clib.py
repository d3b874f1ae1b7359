"""Continual Learning for i-Blurry, CLIB (Koh et al., ICLR 2022, arXiv:2110.10031).

Each sample of the stream is put into a memory, and the network is trained on samples of the memory alone. A full memory
loses, from its largest class, the sample whose training lowers the loss of the memory least. With l_i the
cross-entropy of sample i of the memory, un-augmented and in eval mode, and U the samples that the steps of a period
have trained on,

    d = mean_i (l_i before the period - l_i now)      over the samples that were held all the time
    I_U <- I_U + (1 - m) (d - mean(I_U))               importances of the samples: averages of the d that they bring
    L = CE(R),   R: samples of the memory, with CutMix

m -> importance_momentum, R has ``replay_size`` samples, the period has ``period`` optimizer steps. A new sample has the
mean importance of its class (``ImportanceMemory``). The learning rate alternates between a high and a low one every
``rate_periods`` periods, and both are shifted to the one that lowers the loss of the memory more (``AlternatingRate``).
A step follows each batch of the stream: k steps per sample of the paper are ``Online`` with ``batch_size: 1`` and
``passes: k``, and one step for four samples is ``batch_size: 4``.

The authors' code has I_U + (1 - m) (d + mean(I_U) / |U|), by which importances grow at a constant loss;
``released=True`` does the same. Departs from it: the head has the classes of a task from its start, not from their
first sample; the samples of a batch arrive together, so that all of them count for the size of their classes; of two
classes of equal size the least important sample leaves, not a sample of the first class; a sample that takes the place
of another one is not credited for it; the first period knows no decrease, and credits nobody; the high rate is the
first one after a shift; an optimizer begins again with each task.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Batch, Draw, mix
from cl_lightning.checks import above, at_least, within
from cl_lightning.data import cutmix, mixed_loss
from cl_lightning.distributed import all_gather_rows, rank, world_size
from cl_lightning.losses import full_precision
from cl_lightning.memory import ImportanceMemory
from cl_lightning.strategies.base import AlternatingRate, MemoryReplay, check_loss_classes, of_memory
from cl_lightning.strategy import Output, Traits


class CLIB(MemoryReplay):
    """Training on a memory alone, which keeps the samples that lower its loss most, at a learning rate that is tested.

    Args:
        memory_size: Number of samples in the memory, over all processes, at least 1.
        replay_size: Number of samples of a step, over all processes, at least 1.
        importance_momentum: m, in [0, 1).
        period: Number of optimizer steps between two updates of the importances, at least 1. Each one costs a forward
            pass of the whole memory.
        adaptive_rate: Whether the learning rate is adapted; it then has no schedule.
        rate_periods: Number of periods between two changes of the rate, at least 1.
        mix_probability: Probability of CutMix in a step, in [0, 1].
        mix_alpha: alpha of CutMix, above 0.
        released: Whether importances are updated as in the authors' code.
        kwargs: Options of ``MemoryReplay``, apart from ``policy``.
    """

    traits = Traits(
        family="online", paper="Koh et al., ICLR 2022, arXiv:2110.10031", keeps_exemplars=True, task_free=True
    )

    def __init__(
        self,
        *,
        memory_size: int = 500,
        replay_size: int = 16,
        importance_momentum: float = 0.9,
        period: int = 5,
        adaptive_rate: bool = True,
        rate_periods: int = 10,
        mix_probability: float = 0.5,
        mix_alpha: float = 1.0,
        released: bool = False,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("policy") is not None:
            raise ValueError(
                f"{type(self).__name__}: remove policy: the memory keeps the samples of the largest importance"
            )
        super().__init__(memory_size=memory_size, replay_size=replay_size, **kwargs)
        check_loss_classes(self)
        at_least(self, 1, memory_size=memory_size, replay_size=replay_size, period=period, rate_periods=rate_periods)
        within(self, "[0, 1)", importance_momentum=importance_momentum)
        within(self, "[0, 1]", mix_probability=mix_probability)
        above(self, 0, mix_alpha=mix_alpha)
        schedule = next((name for name in ("scheduler", "first_scheduler") if kwargs.get(name) is not None), None)
        if adaptive_rate and schedule is not None:
            raise ValueError(
                f"{type(self).__name__}: remove {schedule}, or use adaptive_rate false: the learning rate is adapted"
            )
        self.memory: ImportanceMemory = ImportanceMemory(memory_size, momentum=importance_momentum, released=released)
        self.rate = AlternatingRate() if adaptive_rate else None
        self.period, self.rate_periods = period, rate_periods
        self.mix_probability, self.mix_alpha = mix_probability, mix_alpha
        self._stepped = False  # whether the optimizer has stepped since the last batch
        self.traits = self.traits.but(task_free=self.loss_classes == "all")

    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        if self.rate is not None:
            self.rate.begin(made)  # type: ignore[arg-type]
        return made

    def prepare_batch(self, batch: Batch) -> Batch:
        if batch.first_pass:
            self.offer(batch)
        return cutmix(self.data.augment(self.draw(batch)), self.mix_probability, self.mix_alpha)

    def draw(self, batch: Batch, *salt: int, tasks: Iterable[int] | None = None) -> Batch:
        """Draw the samples of a step; every process gets an equal share, whatever its share of the batch is."""
        equal = Draw(mix(batch.draw.key, *salt), rank(), rank() + 1, world_size())
        rows, share = self.memory.pick(self.replay_size or 1, equal, tasks=tasks)
        self.memory.use(all_gather_rows(rows))
        return self.memory.at(rows, share)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": mixed_loss(partial(self.classification_loss, output), batch)}

    def edit_gradients(self, batch: Batch) -> None:
        self._stepped = True

    def after_step(self, batch: Batch) -> None:
        stepped, self._stepped = self._stepped, False
        steps = self.trainer.global_step
        if not stepped or steps % self.period:
            return
        self.memory.credit(self.sample_losses())
        if self.rate is not None and steps % (self.period * self.rate_periods) == 0:
            self.rate.end_period(float(self.memory.begin_window()))
            for optimizer in self.trainer.optimizers:
                self.rate.set(optimizer)

    def sample_losses(self) -> Tensor:
        """Cross-entropy of each sample of the memory, float32 ``(held,)``, in nats, the same on every process.

        Images are un-augmented, and the network is in eval mode.
        """

        def losses(samples: Batch) -> Tensor:
            return self.loss_of(full_precision(self.network(samples.images).logits), samples.labels)

        return of_memory(self, self.memory, losses)

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of samples of the memory, ``(B,)``, in nats, of logits ``(B, C)`` and columns ``(B,)``."""
        return F.cross_entropy(logits, labels, reduction="none")
