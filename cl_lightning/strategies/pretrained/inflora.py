"""InfLoRA: interference-free low-rank adaptation (Liang & Li, CVPR 2024, arXiv:2404.00228).

In each attention layer of a frozen transformer, a task t adapts the projections of keys and values:

    W <- W + B_t A_t,   A_t (r, d) fixed, B_t (d, r) = 0 at first, one A_t and two B_t for each layer
    A_t = (first r left singular vectors of P C)^T / sqrt(3),     C = sum u u^T over the tokens u that enter the layer
    L = CE over the classes of the task; trained are B_t and the rows of the head of the task

P projects onto the complement of the inputs of earlier tasks, so that the change ``B A u`` is 0 for their inputs u, as
far as the basis holds them. C is of the task's images and the network before the task. When the task ends, C of the
trained network adds to the basis (:class:`DualSpaces`) until it has the share

    eps_t = energy + (1 - energy) t / T,   t = 0 .. T - 1,   T tasks in the stream

r -> rank. When a task ends, B_t A_t is added to W, which changes no output. Two passes over the un-augmented images of
a task are made. Departs from the released code, which stores the used space of the first task as if it were the free
one, if it has more than d / 2 dimensions. A stream that is extended later has another T from then on.
"""

import functools
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from cl_lightning.batch import ImageShape
from cl_lightning.checks import at_least, within
from cl_lightning.memory import DualSpaces, input_grams
from cl_lightning.models import AdaptedBackbone, LoRA, blocks_of, in_eval_mode
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Task, Traits


class InfLoRA(ContinualStrategy):
    """Low-rank adaptation of keys and values in directions that the inputs of earlier tasks do not have.

    Args:
        rank: r, at least 1.
        energy: eps of the first task, in [0, 1].
        kwargs: Options of the base class. The backbone must be a transformer of timm.
    """

    traits = Traits(family="pretrained", paper="Liang & Li, CVPR 2024, arXiv:2404.00228", needs_pretrained=True)

    begun: Tensor

    def __init__(self, *, rank: int = 10, energy: float = 0.95, **kwargs: Any) -> None:
        super().__init__(loss_classes="current", freeze_backbone=False, **kwargs)
        at_least(self, 1, rank=rank)
        within(self, "[0, 1]", energy=energy)
        self.rank, self.energy = rank, energy
        self.spaces = DualSpaces()
        self.register_buffer("begun", torch.zeros((), dtype=torch.int64))  # tasks that have their A
        lora = functools.partial(LoRA, rank=rank, parts="kv")
        self.build_backbone = functools.partial(AdaptedBackbone, backbone=self.build_backbone, peft=lora)

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        blocks_of(self._adapted.base, None, type(self).__name__)

    def frozen(self) -> Iterable[nn.Module]:
        return self._adapted.unadapted()

    def trainable(self) -> Iterable[nn.Parameter]:
        fixed = {id(site.down) for site in self._adapted.peft.sites}
        return (parameter for parameter in super().trainable() if id(parameter) not in fixed)

    def on_train_start(self) -> None:
        super().on_train_start()
        if int(self.begun) <= self.task.index:
            with in_eval_mode(self.network):
                grams = self._grams()
            for site, (name, gram) in zip(self._adapted.peft.sites, grams.items(), strict=True):
                rows = self.spaces.directions(name, gram, self.rank) / 3**0.5
                with torch.no_grad():
                    cast(Tensor, site.down).copy_(rows)  # for keys and for values
            self.begun.fill_(self.task.index + 1)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.spaces.grow(self._grams(), self.energy + (1 - self.energy) * task.index / len(self.data.stream))
        cast(LoRA, self._adapted.peft).fold()

    def _grams(self) -> dict[str, Tensor]:
        """C of each attention layer, in the order of the sites."""
        blocks = blocks_of(self._adapted.base, None, type(self).__name__)
        layers = {f"{number}": cast(nn.Linear, block.get_submodule("attn.qkv")) for number, block in enumerate(blocks)}
        return input_grams(self.network, layers, self.passes.batches())

    @property
    def _adapted(self) -> AdaptedBackbone:
        backbone = self.network.backbone
        assert isinstance(backbone, AdaptedBackbone)
        return backbone
