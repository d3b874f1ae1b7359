"""RMT, robust mean teacher (Döbler, Marsden, Yang, CVPR 2023, arXiv:2211.13081).

A student is trained on the predictions of a mean teacher, on source prototypes, and on images of the source. With
logits z of the student for x, z~ for an augmented view of x, z' of the teacher for x, and SCE the symmetric
cross-entropy,

    L = mean_i [ 1/2 SCE(z_i, z'_i) + 1/2 SCE(z~_i, z'_i) ] + contrast + CE(f(x_s), y_s)

``contrast`` is ``PrototypeContrast``; (x_s, y_s) are as many source images as the batch has, from
``memory_size`` stored ones (0: source-free, without the last term), in a forward pass of their own. All parameters of
the student are trained. The score is z + z', from before the step. m -> teacher_momentum.
Departs from the authors' code: the student does not see source images with a rising learning rate before the stream
(warm-up).
"""

from typing import Any, Literal

from torch import Tensor, nn

from cl_lightning.checks import at_least
from cl_lightning.losses import cross_entropy
from cl_lightning.memory import Memory
from cl_lightning.strategies.test_time.base import ADAPT, TestTimeAdaptation, Trained
from cl_lightning.strategies.test_time.mean_teacher import MeanTeacherAdaptation
from cl_lightning.strategies.test_time.parts.contrast import PrototypeContrast
from cl_lightning.strategies.test_time.parts.losses import symmetric_cross_entropy
from cl_lightning.strategies.test_time.parts.views import viewed
from cl_lightning.strategies.test_time.source_run import needs_training_images
from cl_lightning.strategy import Batch, Output, Task

_VIEW, _SOURCE = 0xC6, 0xC7  # salts


class RMT(MeanTeacherAdaptation):
    """Symmetric cross-entropy with a mean teacher, contrast with source prototypes, replay of source images.

    Args:
        teacher_momentum: m, in [0, 1].
        contrast_weight: Weight of the contrast, at least 0.
        source_weight: Weight of the cross-entropy on source images, at least 0.
        memory_size: Number of source images that are stored, at least 0; 0 for the source-free variant.
        temperature: T of the contrast, above 0.
        source_samples: Number of source images for the prototypes, at least 1.
        params: Parameters that are trained, see ``TestTimeAdaptation``.
        kwargs: Options of ``TestTimeAdaptation``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time",
        paper="Döbler et al., CVPR 2023, arXiv:2211.13081",
        transductive=True,
        keeps_exemplars=True,
        inputs=("image",),
    )

    def __init__(
        self,
        *,
        teacher_momentum: float = 0.999,
        contrast_weight: float = 1.0,
        source_weight: float = 1.0,
        memory_size: int = 2000,
        temperature: float = 0.1,
        source_samples: int = 100_000,
        params: Literal["norm", "early_norm", "all"] | list[str] = "all",
        **kwargs: Any,
    ) -> None:
        chosen: Trained = params
        super().__init__(teacher_momentum=teacher_momentum, params=chosen, **kwargs)
        at_least(self, 0, contrast_weight=contrast_weight, source_weight=source_weight)
        self.contrast_weight, self.source_weight = contrast_weight, source_weight
        self.contrast = PrototypeContrast(source_samples, temperature)
        self.memory = Memory(memory_size)
        self.traits = self.traits.but(keeps_exemplars=memory_size > 0)

    def trainable(self) -> list[nn.Parameter]:
        further = list(self.contrast.parameters()) if self.phase.name == ADAPT and self.contrast_weight else []
        return [*super().trainable(), *further]

    def adapt(self, batch: Batch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        target = self.of_teacher(batch.images).logits
        view = super(MeanTeacherAdaptation, self).forward_source_classes(viewed(self, batch, batch.draw.fork(_VIEW)))
        agreement = symmetric_cross_entropy(output.logits, target) + symmetric_cross_entropy(view.logits, target)
        terms = {"agreement": agreement / 2}
        if self.contrast_weight:
            terms["contrast"] = self.contrast_weight * self.contrast(batch, output.features, view.features)
        if self.source_weight and len(self.memory):
            terms["source"] = self.source_weight * self._of_source(batch)
        return output.logits + target, terms

    def _of_source(self, batch: Batch) -> Tensor:
        """Cross-entropy on source images, as this process's share of the batch of the stream, a scalar."""
        drawn = self.memory.sample(batch.draw.total, batch.draw.fork(_SOURCE))
        images = self.data.finish(drawn).images
        logits = super(MeanTeacherAdaptation, self).forward_source_classes(images).logits
        factor = drawn.weight / batch.weight if batch.weight else 0.0
        return factor * cross_entropy(logits, drawn.labels)

    def forward_source_classes(self, images: Tensor) -> Output:
        student = super(MeanTeacherAdaptation, self).forward_source_classes(images)
        if not (self.teacher and self.adapting):
            return student
        return student._replace(logits=student.logits + self.of_teacher(images).logits)

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        if not (task.is_first and self.memory.size):
            return
        needs_training_images(self, f"memory_size is {self.memory.size}", "--model.memory_size 0")
        for batch in self.passes.batches(samples=self.memory.size):
            self.memory.add(batch.raw, batch.labels, batch.tasks, batch.draw, gathered=False)
