"""Dark Experience Replay, DER and DER++ (Buzzega et al., NeurIPS 2020, arXiv:2004.07211).

A memory keeps raw samples x' together with the logits z' that the network f gave for them at the time. With (x, y) from
the stream, (x', z') and (x'', y'') two independent samples of the memory, newly augmented,

    L = CE(f(x), y) + alpha * mean_c (f_c(x') - z'_c)^2 + beta * CE(f(x''), y'')

each the mean over its samples. alpha -> logit_weight, beta -> label_weight; DER is beta = 0. After each step its batch
is offered to a reservoir, un-augmented, with the logits that the step computed on the augmented view.
Departs from the paper: the head grows, so z' lacks the classes that came later. In the authors' code the head has all
outputs from the start; cross-entropy has pushed those of classes to come down, and they are stored and held there. Here
the lowest logit of z' stands for them (``later``): left free, nothing keeps old samples from the new classes, and DER,
without labels, loses most of what it has. One forward pass takes all three parts, so that batch normalisation sees them
together. The mean over the classes makes the best alpha grow with their number.
In training over several epochs, or steps on each batch, a reservoir fed in ``every`` one (the authors' way) takes each
copy of a sample for a sample of its own, and holds logits from along the trajectory. Fed in the ``last`` one it holds
each sample of the stream with equal probability, with the logits of a trained network; fed in the ``first`` one it is
the memory of ``ER``, whose logits are of a network that has not learnt the task. (Nothing but the name is shared with
Dynamically Expandable Representation, also called DER.)
"""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cl_lightning.batch import Batch, cat
from cl_lightning.losses import LaterLogits, logit_matching
from cl_lightning.memory import Memory, Policy, check_replay
from cl_lightning.network import Output
from cl_lightning.strategy import ContinualStrategy

Feed = Literal["every", "first", "last"]

_DARK = 0xDE2  # salt of the second draw from the memory


class DERpp(ContinualStrategy):
    """Cross-entropy on the batch and on a memory, and the memory's logits held where they were.

    Args:
        memory_size: In samples, over all processes; 0 is fine-tuning.
        logit_weight: alpha, at least 0.
        label_weight: beta, at least 0.
        policy: Which samples a full memory keeps; None for a reservoir.
        replay_size: Samples of each draw from the memory, over all processes; None for as many as the batch has.
        feed: Epochs of a phase in which the memory is fed.
        later: Where logits of classes that came after a sample was stored are held, see ``logit_matching``.
        kwargs: Of the base.
    """

    family: ClassVar[str] = "rehearsal"
    paper: ClassVar[str] = "Buzzega et al., NeurIPS 2020, arXiv:2004.07211"
    keeps_exemplars: ClassVar[bool] = True

    def __init__(
        self,
        *,
        memory_size: int = 500,
        logit_weight: float = 0.1,
        label_weight: float = 0.5,
        policy: Policy | None = None,
        replay_size: int | None = None,
        feed: Feed = "every",
        later: LaterLogits = "lowest",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        name = type(self).__name__
        if logit_weight < 0 or label_weight < 0:
            raise ValueError(f"{name}: logit_weight={logit_weight}, label_weight={label_weight}; at least 0 is allowed")
        check_replay(name, self.visible if label_weight > 0 else "all", replay_size)  # without labels, any will do
        if feed not in ("every", "first", "last"):
            raise ValueError(f"{name}: feed is {feed!r}; use 'every', 'first' or 'last'")
        if later not in ("lowest", "zero", "free"):
            raise ValueError(f"{name}: later is {later!r}; use 'lowest', 'zero' or 'free'")
        self.memory = Memory(memory_size, policy)
        self.logit_weight, self.label_weight = logit_weight, label_weight
        self.replay_size, self.feed, self.later = replay_size, feed, later
        self.uses_old_logits = logit_weight > 0
        self.plain_first_task = False  # the memory is replayed as soon as it is fed
        self._parts: dict[str, Batch] = {}
        self._weight = 1.0
        self._logits: Tensor | None = None

    def prepare(self, batch: Batch) -> Batch:
        self._parts, self._weight, self._logits = {"ce": batch}, batch.weight, None
        if len(self.memory) == 0:
            return batch
        assert self.augment is not None
        count = self.replay_size or batch.draw.total
        draws = {"replay": (self.label_weight, batch.draw), "dark": (self.logit_weight, batch.draw.fork(_DARK))}
        for name, (weight, draw) in draws.items():
            if weight > 0:
                self._parts[name] = self.augment(self.memory.sample(count, draw))
        joint = cat(list(self._parts.values()), self.trainer.world_size)
        self._weight = joint.weight
        return joint

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        factors = {"ce": 1.0, "replay": self.label_weight, "dark": self.logit_weight}
        pieces = torch.split(output.logits, [len(part) for part in self._parts.values()])
        self._logits, terms = pieces[0].detach().float(), {}
        for (name, part), logits in zip(self._parts.items(), pieces, strict=True):
            if name == "dark":
                loss = logit_matching(logits, part.extra["logits"], later=self.later)
            else:
                loss = self.classification_loss(output._replace(logits=logits), part)
            # The base weighs by this process's share of all rows; each part has a share of its own.
            terms[name] = factors[name] * part.weight / self._weight * loss
        return terms

    def observe(self, batch: Batch) -> None:
        if {"every": True, "first": self.first_sight, "last": self.last_sight}[self.feed]:
            logits = self._logits
            if logits is None:  # this process has no rows in this step, but takes part in the exchange
                logits = torch.zeros(0, self.network.head.num_columns, device=self.device)
            self.memory.add(batch.raw, batch.labels, batch.tasks, batch.draw, logits=logits)


class DER(DERpp):
    """Dark Experience Replay: the logits of a memory held where they were, without its labels.

    Args:
        memory_size: In samples, over all processes; 0 is fine-tuning.
        logit_weight: alpha, at least 0.
        policy: Which samples a full memory keeps; None for a reservoir.
        replay_size: Samples drawn from the memory per step, over all processes; None for as many as the batch has.
        feed: Epochs of a phase in which the memory is fed.
        later: Where logits of classes that came after a sample was stored are held, see ``logit_matching``.
        kwargs: Of the base.
    """

    def __init__(
        self,
        *,
        memory_size: int = 500,
        logit_weight: float = 0.3,
        policy: Policy | None = None,
        replay_size: int | None = None,
        feed: Feed = "every",
        later: LaterLogits = "lowest",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            memory_size=memory_size,
            logit_weight=logit_weight,
            label_weight=0.0,
            policy=policy,
            replay_size=replay_size,
            feed=feed,
            later=later,
            **kwargs,
        )
