"""CoTTA, continual test-time domain adaptation (Wang et al., CVPR 2022, arXiv:2203.13591).

A student theta learns from a mean teacher theta', which predicts. With theta_0 the source network and a batch x:

    z' = 1/N sum_k f_theta'(aug_k(x))  if  mean_i max_c softmax(f_theta_0(x_i))_c < p_th,  else  f_theta'(x)
    L = -mean_i sum_c softmax(z'_i)_c log softmax(f_theta(x_i))_c          a step on all parameters of theta
    theta' <- m theta' + (1 - m) theta                                      parameters, no statistics
    theta <- M theta_0 + (1 - M) theta,   M ~ Bernoulli(p_r) elementwise    restoration

and the prediction is z'. All three normalise by the test batch. m -> teacher_momentum, p_r -> restore, p_th ->
threshold, N -> views. Views of the batch are made only where they are used, for which the confidence of the source is
waited for. What is drawn for a view (colours, angle, ...) is drawn once for a batch, noise for each pixel. Draws depend
on the step alone: any number of processes restores the same weights.
Departs from the authors' code: the networks are in eval mode (there dropout, where a network has it, is on); edges are
prolonged while an image is turned, not by padding before, and blur comes after that; of the translation, 1/16 of the
padded image there, we read 1/8 of the image, and it is not rounded to whole pixels.
"""

import math
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Batch, Draw, mix
from cl_lightning.distributed import all_sum
from cl_lightning.losses import full_precision, mean_over_rows
from cl_lightning.network import Output
from cl_lightning.pixels import change_colours_, hue
from cl_lightning.strategies.test_time.base import ADAPT, TestTimeAdaptation, Trained, tiny_resnet
from cl_lightning.stream import Task
from cl_lightning.teacher import Teacher

_VIEWS, _RESTORE, _NOISE = 0xC0, 0xC1, 0xC2  # salts


def consistency(logits: Tensor, target: Tensor, *, symmetric: bool = False) -> Tensor:
    """Cross-entropy of each row with the softmax of another network's logits, ``(B,)``, in nats.

    Args:
        logits: Of the student, ``(B, C)``.
        target: Of the teacher, ``(B, C)``; takes no gradient.
        symmetric: Half of that, and half of it with the roles exchanged.
    """
    student, teacher = (F.log_softmax(full_precision(values), dim=1) for values in (logits, target.detach()))
    forward = -(teacher.exp() * student).sum(dim=1)
    return (forward - (student.exp() * teacher).sum(dim=1)) / 2 if symmetric else forward


@torch.no_grad()
def move_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """``theta' <- m theta' + (1 - m) theta``, over the parameters that the teacher has, by name."""
    names = [name for name, _ in teacher.named_parameters()]
    pairs = [(teacher.get_parameter(name), student.get_parameter(name).detach()) for name in names]
    mine, theirs = (list(column) for column in zip(*pairs, strict=True))
    torch._foreach_lerp_(mine, theirs, 1 - momentum)


@torch.no_grad()
def restore(parameters: dict[str, nn.Parameter], source: nn.Module, share: float, key: int) -> None:
    """Set a random share of the weights back, in place, the same on every process.

    Args:
        parameters: By name.
        source: Where they are taken from, under the same names; names that it lacks are left out.
        share: Chance of each weight, in [0, 1].
        key: Of the drawing.
    """
    known = dict(source.named_parameters())
    device = next(iter(parameters.values())).device
    generator = torch.Generator(device).manual_seed(key)
    for name, value in parameters.items():
        mask = torch.rand(value.shape, generator=generator, device=device) < share
        if name in known:
            value.copy_(torch.where(mask, known[name], value))


class View(NamedTuple):
    """What is drawn once for a batch of a view.

    Attributes:
        brightness, contrast, saturation: Factors; 1 for none.
        hue: Turn of the colours, in [-0.5, 0.5].
        gamma: Exponent of the values.
        order: In which brightness, contrast, saturation, hue and gamma (0 to 4) follow one another.
        angle: Rotation in degrees, against the clock.
        scale: Size of the image; 1 for as it is.
        shift: Translation to the right and down, as shares of the sides.
        blur: Standard deviation of the kernel, in pixels.
        mirrored: Whether left and right change places.
    """

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    gamma: float = 1.0
    order: tuple[int, ...] = (0, 1, 2, 3, 4)
    angle: float = 0.0
    scale: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    blur: float = 0.001
    mirrored: bool = False

    @classmethod
    def drawn(cls, key: int) -> "View":
        """With the ranges of the authors' code; the key decides."""
        generator = torch.Generator().manual_seed(key)

        def uniform(low: float, high: float) -> float:
            return low + (high - low) * float(torch.rand((), generator=generator))

        return cls(
            brightness=uniform(0.6, 1.4),
            contrast=uniform(0.7, 1.3),
            saturation=uniform(0.5, 1.5),
            hue=uniform(-0.06, 0.06),
            gamma=uniform(0.7, 1.3),
            order=tuple(torch.randperm(5, generator=generator).tolist()),
            angle=uniform(-15, 15),
            scale=uniform(0.9, 1.1),
            shift=(uniform(-1 / 8, 1 / 8), uniform(-1 / 8, 1 / 8)),
            blur=uniform(0.001, 0.5),
            mirrored=uniform(0, 1) < 0.5,
        )

    def of(self, images: Tensor) -> Tensor:
        """The view of images ``(B, C, H, W)`` in [0, 1], at least one, without noise."""
        images = images.clamp(0, 1)
        brightness, contrast, saturation = self.brightness - 1, self.contrast - 1, self.saturation - 1
        amounts = torch.tensor([[[brightness, 0, 0]], [[0, 0, contrast]], [[0, saturation, 0]]], dtype=torch.float64)
        amounts = amounts.to(images, non_blocking=True)
        for place in self.order:
            if place < len(amounts):
                images = change_colours_(images, amounts[place])
            elif place == len(amounts):
                images = hue(images, images.new_full((1, 1), self.hue)).clamp(0, 1)
            else:
                images = images.clamp(min=1e-8) ** self.gamma
        turn = math.radians(self.angle)
        cos, sin = math.cos(turn) / self.scale, math.sin(turn) / self.scale
        x, y = (-2 * share for share in self.shift)  # the grid tells where a pixel comes from, in halves of the side
        back = torch.tensor([[cos, -sin, x], [sin, cos, y]], dtype=torch.float64)
        back = back.to(images, non_blocking=True).expand(len(images), 2, 3)
        grid = F.affine_grid(back, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        line = torch.exp(-torch.arange(-2, 3, device=images.device).square() / (2 * self.blur**2))
        kernel = ((line[:, None] * line) / line.sum() ** 2).expand(images.shape[1], 1, 5, 5)
        images = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), kernel.to(images), groups=images.shape[1])
        return images.flip(-1) if self.mirrored else images


def random_view(images: Tensor, draw: Draw) -> Tensor:
    """One augmentation of a whole batch: colours, gamma, a small affine map, blur, flip, noise.

    Args:
        images: ``(B, C, H, W)`` in [0, 1].
        draw: Of these rows; what is drawn once for the batch comes from its key.

    Returns:
        ``(B, C, H, W)`` in [0, 1].
    """
    if not len(images):
        return images
    with torch.autocast(images.device.type, enabled=False):  # half precision errs by more than the noise
        images = View.drawn(draw.key).of(images)
    noise = draw.fork(_NOISE).randn(*images.shape[1:], device=images.device)
    return (images + 0.005 * noise).clamp(0, 1)


class CoTTA(TestTimeAdaptation):
    """A mean teacher over augmented views, and weights that fall back to those of the source now and then.

    Args:
        teacher_momentum: m, in [0, 1].
        restore: p_r, in [0, 1]: 0.01 in the paper for CIFAR, 0.001 for ImageNet.
        threshold: p_th; 0.92 for CIFAR-10, 0.72 for CIFAR-100, 0.1 for ImageNet (5 % of the source's images are below).
        views: N; 0 for none, a plain mean teacher.
        symmetric: Whether the loss is the mean of both directions, as for ImageNet.
        trained: See the base.
        kwargs: Of ``TestTimeAdaptation``.
    """

    family: ClassVar[str] = "test-time"
    paper: ClassVar[str] = "Wang et al., CVPR 2022, arXiv:2203.13591"
    uses_test_batch = True
    needs_source: ClassVar[bool] = True

    def __init__(
        self,
        *,
        teacher_momentum: float = 0.999,
        restore: float = 0.01,
        threshold: float = 0.92,
        views: int = 32,
        symmetric: bool = False,
        trained: Literal["norm", "all"] | list[str] = "all",
        **kwargs: Any,
    ) -> None:
        chosen: Trained = trained
        super().__init__(trained=chosen, **kwargs)
        if not 0 <= teacher_momentum <= 1 or not 0 <= restore <= 1 or views < 0:
            raise ValueError(
                f"CoTTA: teacher_momentum={teacher_momentum}, restore={restore}, views={views}; the first two are in "
                "[0, 1], the last is at least 0"
            )
        self.teacher_momentum, self.restore, self.threshold = teacher_momentum, restore, threshold
        self.views, self.symmetric = views, symmetric
        self.teacher = Teacher()
        self._last_step = 0

    @classmethod
    def conformance_options(cls) -> dict[str, Any]:
        return {"backbone": tiny_resnet, "views": 2, "teacher_momentum": 0.9}

    def adapt(self, batch: Batch, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        target = self._target(batch)
        return target, {"consistency": mean_over_rows(consistency(output.logits, target, symmetric=self.symmetric))}

    @torch.no_grad()
    def _target(self, batch: Batch) -> Tensor:
        """z', ``(B, classes of the source)``."""
        if self.views:
            source = full_precision(self.source(batch.images).logits[:, : self.num_source])
            confidence = all_sum(source.softmax(dim=1).amax(dim=1).sum()) / batch.draw.total
            if bool(confidence < self.threshold):
                raw = batch.raw if batch.raw.is_floating_point() else batch.raw.float() / 255
                total = torch.zeros_like(source)
                for number in range(self.views):
                    view = batch.replace(raw=random_view(raw, batch.draw.fork(_VIEWS, number)))
                    total += self._of_teacher(self.finish(view).images).logits
                return total / self.views
        return self._of_teacher(batch.images).logits

    def _of_teacher(self, images: Tensor) -> Output:
        output: Output = self.teacher(images)
        return output._replace(logits=full_precision(output.logits[:, : self.num_source]))

    def respond(self, images: Tensor) -> Output:
        return self._of_teacher(images) if self.teacher and self.adapting else super().respond(images)

    def on_train_start(self) -> None:
        self._last_step = self.trainer.global_step

    def observe(self, batch: Batch) -> None:
        if self.phase.name == ADAPT and self.trainer.global_step > self._last_step:  # else gradients are accumulated
            self._last_step = self.trainer.global_step
            assert self.teacher.network is not None
            assert self.source.network is not None
            move_teacher(self.teacher.network, self.network, self.teacher_momentum)
            if self.restore:
                key = mix(batch.draw.key, _RESTORE)
                restore(self.trained_parameters(), self.source.network, self.restore, key)
        super().observe(batch)

    def reset(self) -> None:
        super().reset()
        assert self.teacher.network is not None
        self._put_back(self.teacher.network)

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        if task.is_first:
            self.teacher.learn_from(self.network)
