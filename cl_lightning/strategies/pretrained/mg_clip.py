"""MG-CLIP: "Mind the Gap: Preserving and Compensating for the Modality Gap in CLIP-Based Continual Learning" (Huang et
al., ICCV 2025, arXiv:2507.09118), on stored text.

A LoRA in the frozen image tower f, shared by all tasks, is trained with the text embeddings e_c of the class names,
and only as long as the gap between images and the text of other classes hardly moves:

    L = CE(s cos(f(x), e_c), y over the classes of the task)            phases train_1, train_2, ..., an epoch each
    first task: stop after the epoch in which |m - m_0| / |m_0| > gap_limit,   m = mean_{x, c != y} cos(f(x), e_c)

with m_0 before training; all later tasks have as many epochs. What text cannot separate then, a classifier in the space
of images compensates for. Its rows v_c start as the class means of f and are trained in the phase ``visual``, the
rows of the task alone:

    L = CE(cos(f(x), v_c), y over the classes of the task)
    p(c | x) = ( softmax_c(s cos(f(x), e)) + w softmax_c(cos(f(x), v)) ) / (1 + w)       over all classes

w -> visual_weight. The rows of earlier tasks stay, so that f must not move much: this is what the limit is for.
Only summaries of the paper and its settings were available. m is the mean over the images and classes of the first
task; w = 4, rank 8 in the projections of keys and values, and the epochs and learning rates are the settings.
Departs from the paper: it has a LoRA in the text encoder too, which is needed at each step; here the text is stored.
Each epoch is a phase, whose optimizer starts anew. Where images and text are not in one space, the projection of
``TextHead`` is trained with the LoRA in the first task, as the scale is if it is learnt, and both are fixed afterwards.
m_0 has no meaning then, and one epoch may exceed the limit.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import ImageShape
from cl_lightning.checks import at_least
from cl_lightning.distributed import all_sum
from cl_lightning.losses import full_precision
from cl_lightning.models import AdaptedBackbone, CosineHead, Head, LoRA, Network, PeftFactory, TextHead, head_as
from cl_lightning.strategy import (
    Batch,
    ContinualStrategy,
    HeadFactory,
    Output,
    Phase,
    PhaseOptions,
    Task,
    Traits,
)

VISUAL = "visual"


class TextAndVisualHead(Head):
    """Cosines to text embeddings, and for predictions a mixture of their probabilities and of a visual classifier.

    Args:
        text: Gives the logits.
        visual_weight: w, at least 0.

    Attributes:
        visual: The classifier in the space of images.
    """

    needs_names = True

    def __init__(self, text: TextHead, *, visual_weight: float) -> None:
        super().__init__(text.num_features)
        self.text, self.visual, self.visual_weight = text, CosineHead(text.num_features, scale=1.0), visual_weight

    def grow(self, num_new: int) -> None:
        self.text.grow(num_new)
        self.visual.grow(num_new)

    def fill_names(self, names: Sequence[str]) -> None:
        self.text.fill_names(names)

    def block_sizes(self) -> list[int]:
        return self.text.block_sizes()

    def weight(self) -> Tensor:
        return self.text.weight()

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.text(features)
        return logits

    def classify(self, features: Tensor) -> Tensor:
        """Logarithms of the probabilities p, ``(B, columns)``."""
        with torch.autocast(features.device.type, enabled=False):
            features = full_precision(features)
            text, visual = (head(features).softmax(dim=1) for head in (self.text, self.visual))
            mixed: Tensor = ((text + self.visual_weight * visual) / (1 + self.visual_weight)).log()
        return mixed

    @torch.no_grad()
    def start_rows(self, features: Tensor, labels: Tensor) -> None:
        """Set the newest visual rows to the means of the features of their classes; unchanged where there are none."""
        rows = cast(nn.Parameter, self.visual.blocks[-1].weight)
        first = self.visual.num_columns - len(rows)
        for place in range(len(rows)):
            if bool((chosen := labels == first + place).any()):
                rows[place] = features[chosen].double().mean(dim=0)


def relative_move(value: Tensor, reference: Tensor) -> Tensor:
    """``|m - m_0| / |m_0|``."""
    return (value - reference).abs() / reference.abs()


class MGCLIP(ContinualStrategy):
    """LoRA in an image tower, trained for as few epochs as keep the modality gap, and a classifier of images.

    Args:
        gap_limit: Relative change of m at which the first task stops, at least 0; 0 to leave the tower as it is.
        epoch_limit: Largest number of epochs of the tower in a task, at least 1.
        visual_weight: w, at least 0; 0 for text alone.
        visual_options: Options of the phase ``visual``; 0 epochs for class means. The default optimizer is Adam with
            learning rate 5e-4.
        peft: Builds the module in the tower; None for ``LoRA`` of rank 8 in the projections of keys and values.
        head: Builds a ``TextHead``. The scale of CLIP is ``scale=100`` with ``learn_scale=False``.
        optimizer: Builds the optimizer of the tower; None for Adam with learning rate 0.001.
        kwargs: Options of the base class, without ``loss_classes`` and ``freeze_backbone``.

    Attributes:
        gap: m_0, and m after the last epoch of the first task, float64 ``(2,)``.
        epochs: Number of epochs of the tower in each task, int64; -1 while the first task is trained.
        started: Number of tasks whose visual rows have been set, int64.
    """

    traits = Traits(
        family="pretrained",
        paper="Huang et al., ICCV 2025, arXiv:2507.09118",
        needs_pretrained=True,
        scenarios=("class-incremental", "online"),
    )

    gap: Tensor
    epochs: Tensor
    started: Tensor

    def __init__(
        self,
        *,
        gap_limit: float = 0.1,
        epoch_limit: int = 5,
        visual_weight: float = 4.0,
        visual_options: PhaseOptions = PhaseOptions(epochs=3),
        peft: PeftFactory | None = None,
        head: HeadFactory | None = None,
        optimizer: OptimizerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        adam = functools.partial(torch.optim.Adam, lr=1e-3)
        super().__init__(
            loss_classes="current", freeze_backbone=False, head=head, optimizer=optimizer or adam, **kwargs
        )
        at_least(self, 0, gap_limit=gap_limit, visual_weight=visual_weight)
        at_least(self, 1, epoch_limit=epoch_limit)
        self.gap_limit, self.epoch_limit, self.visual_weight = gap_limit, epoch_limit, visual_weight
        self.visual_options = visual_options.filled(functools.partial(torch.optim.Adam, lr=5e-4))
        module = peft or functools.partial(LoRA, rank=8, parts="kv")
        self.build_backbone = functools.partial(AdaptedBackbone, backbone=self.build_backbone, peft=module)
        self.register_buffer("gap", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("epochs", torch.tensor(-1))
        self.register_buffer("started", torch.tensor(0))

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        text = head_as(self.network, TextHead, self, "whose rows are embeddings of the class names")
        self.network = Network(self.network.backbone, TextAndVisualHead(text, visual_weight=self.visual_weight))

    @property
    def parts(self) -> TextAndVisualHead:
        """The head."""
        return cast(TextAndVisualHead, self.network.head)

    @property
    def adapted(self) -> AdaptedBackbone:
        """The tower with its LoRA."""
        return cast(AdaptedBackbone, self.network.backbone)

    def phases(self, task: Task) -> list[Phase]:
        count = self.epoch_limit if self.gap_limit else 0
        found = [
            Phase(f"train_{number + 1}", PhaseOptions(epochs=1), needed=functools.partial(self._needed, number))
            for number in range(count)
        ]
        if self.visual_options.epochs != 0 and task.num_new:
            rows = self._visual_rows
            found.append(Phase(VISUAL, self.visual_options, trains=rows, freezes=lambda: [self.network.backbone]))
        return found

    def _needed(self, number: int) -> bool:
        """Whether the epoch of this number, from 0, takes place."""
        return int(self.epochs) < 0 or number < int(self.epochs)

    def _visual_rows(self) -> Iterable[nn.Parameter]:
        return self.parts.visual.blocks[-1].parameters()

    def frozen(self) -> Iterable[nn.Module]:
        return self.adapted.unadapted()

    def trainable(self) -> Iterable[nn.Parameter]:
        yield from self.adapted.adapted_parameters()
        if self.task.is_first:
            yield from self.parts.text.parameters()

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.phase.name == VISUAL:
            self._start_rows()
        elif self.task.is_first and self.phase.name == "train_1" and not bool(self.gap[0]):
            self.gap[0] = self._other_cosine()

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.phase.name == VISUAL:
            output = output._replace(logits=self.parts.visual(output.features))
        return {"ce": self.classification_loss(output, batch)}

    def end_phase(self, phase: Phase) -> None:
        if phase.name == VISUAL or not self.task.is_first:
            return
        self.eval()
        self.gap[1] = self._other_cosine()
        self.train()
        number = int(phase.name.removeprefix("train_"))
        if number == self.epoch_limit or bool(relative_move(self.gap[1], self.gap[0]) > self.gap_limit):
            self.epochs.fill_(number)

    def end_task(self, task: Task) -> None:
        self._start_rows()
        super().end_task(task)

    def _start_rows(self) -> None:
        """Set the visual rows of the task to class means, once."""
        if self.task.num_new and int(self.started) == self.task.index:
            self.parts.start_rows(*self.passes.all_features())
        self.started.fill_(max(int(self.started), self.task.index + 1))

    @torch.no_grad()
    def _other_cosine(self) -> Tensor:
        """m: mean cosine of the images of the task and the text of the other classes of the task."""
        features, labels = self.passes.features()
        text = self.parts.text
        rows = F.normalize(full_precision(text.embed(features)), dim=1)
        cosines = F.linear(rows, F.normalize(text.weight(), dim=1).to(rows)).double()
        columns = torch.arange(cosines.shape[1], device=labels.device)
        counted = (labels >= 0)[:, None] & self.task_columns[-1] & (labels[:, None] != columns)
        sums = all_sum(torch.stack([(cosines * counted).sum(), counted.sum().double()]))
        return sums[0] / sums[1].clamp(min=1)
