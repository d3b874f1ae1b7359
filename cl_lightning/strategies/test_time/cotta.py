"""CoTTA, continual test-time domain adaptation (Wang et al., CVPR 2022, arXiv:2203.13591).

A student theta is trained on the predictions of a mean teacher theta'. With the source network theta_0 and a batch x:

    z' = 1/N sum_k f_theta'(aug_k(x))  if  mean_i max_c softmax(f_theta_0(x_i))_c < p_th,  else  f_theta'(x)
    L = -mean_i sum_c softmax(z'_i)_c log softmax(f_theta(x_i))_c          a step on all parameters of theta
    theta' <- m theta' + (1 - m) theta                                      parameters only, not buffers
    theta <- M theta_0 + (1 - M) theta,   M ~ Bernoulli(p_r) elementwise    restoration

The prediction is z'. All three networks normalise with the statistics of the test batch. m -> teacher_momentum,
p_r -> restore, p_th -> threshold, N -> views. Views are computed only for batches below the threshold; the comparison
synchronises with the device. The parameters of a view (colours, angle, ...) are drawn once per batch, noise per pixel.
Draws depend on the step alone, so any number of processes restores the same weights.
Departs from the authors' code:
- the networks are in eval mode; in the code dropout, if a network has it, is on;
- pixels outside the image repeat its edge during the rotation, where the code pads the image before; blur follows the
  rotation;
- the translation is up to 1/8 of the image, our reading of 1/16 of the padded image, and not rounded to whole pixels.
"""

import math
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Draw, mix
from cl_lightning.checks import at_least, within
from cl_lightning.data.pixels import change_colours_, hue
from cl_lightning.distributed import all_sum
from cl_lightning.losses import full_precision, mean_over_rows
from cl_lightning.memory import Teacher
from cl_lightning.strategies.test_time.base import ADAPT, TestTimeAdaptation, Trained
from cl_lightning.strategy import Batch, Output, Task

_VIEWS, _RESTORE, _NOISE = 0xC0, 0xC1, 0xC2  # salts


def consistency(logits: Tensor, target: Tensor, *, symmetric: bool = False) -> Tensor:
    """Cross-entropy between the softmax of teacher and student for each row, ``(B,)``, in nats.

    Args:
        logits: Logits of the student, ``(B, C)``.
        target: Logits of the teacher, ``(B, C)``; no gradient passes through them.
        symmetric: Whether to return the mean of both directions: teacher as target, and student as target.
    """
    student, teacher = (F.log_softmax(full_precision(values), dim=1) for values in (logits, target.detach()))
    forward = -(teacher.exp() * student).sum(dim=1)
    return (forward - (student.exp() * teacher).sum(dim=1)) / 2 if symmetric else forward


@torch.no_grad()
def move_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """``theta' <- m theta' + (1 - m) theta``, in place, for all parameters of the teacher, paired by name."""
    names = [name for name, _ in teacher.named_parameters()]
    pairs = [(teacher.get_parameter(name), student.get_parameter(name).detach()) for name in names]
    mine, theirs = (list(column) for column in zip(*pairs, strict=True))
    torch._foreach_lerp_(mine, theirs, 1 - momentum)


@torch.no_grad()
def restore(parameters: dict[str, nn.Parameter], source: nn.Module, share: float, key: int) -> None:
    """Reset each weight to its source value with probability ``share``, in place, the same on every process.

    Args:
        parameters: Parameters by name.
        source: Source network with parameters of the same names; parameters that it lacks are not reset.
        share: Probability for each weight, in [0, 1].
        key: Seed of the random mask.
    """
    known = dict(source.named_parameters())
    device = next(iter(parameters.values())).device
    generator = torch.Generator(device).manual_seed(key)
    for name, value in parameters.items():
        mask = torch.rand(value.shape, generator=generator, device=device) < share
        if name in known:
            value.copy_(torch.where(mask, known[name], value))


class View(NamedTuple):
    """Parameters of an augmentation, drawn once for all images of a batch.

    Attributes:
        brightness, contrast, saturation: Factors; 1 for no change.
        hue: Rotation of the hue, in [-0.5, 0.5].
        gamma: Exponent of the pixel values.
        order: Order in which brightness, contrast, saturation, hue and gamma (0 to 4) are applied.
        angle: Rotation in degrees, counter-clockwise.
        scale: Scale factor of the image; 1 for no change.
        shift: Translation to the right and down, after rotation and scaling, as shares of width and height.
        blur: Standard deviation of the Gaussian kernel, in pixels.
        mirrored: Whether the image is flipped horizontally.
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
        """Draw the parameters from the ranges of the authors' code, with ``key`` as seed."""
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
        # The grid holds source positions of pixels, in half sides: x' = R^-1 (x - t), since t follows the rotation.
        x, y = (2 * share for share in self.shift)
        ratio = images.shape[2] / images.shape[3]
        first, second = (cos, -sin * ratio), (sin / ratio, cos)
        back = torch.tensor([[*row, -row[0] * x - row[1] * y] for row in (first, second)], dtype=torch.float64)
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
        draw: Draw of these rows; its key is the seed of the parameters that are drawn once for the batch.

    Returns:
        ``(B, C, H, W)`` in [0, 1].
    """
    if not len(images):
        return images
    with torch.autocast(images.device.type, enabled=False):  # errors of half precision exceed the noise
        images = View.drawn(draw.key).of(images)
    noise = draw.fork(_NOISE).randn(*images.shape[1:], device=images.device)
    return (images + 0.005 * noise).clamp(0, 1)


class CoTTA(TestTimeAdaptation):
    """Consistency with an augmentation-averaged mean teacher, and stochastic restoration of source weights.

    Args:
        teacher_momentum: m, in [0, 1].
        restore: p_r, in [0, 1]: at each step each weight is reset to its source value with this probability. 0.01 in
            the paper for CIFAR, 0.001 for ImageNet.
        threshold: p_th: 0.92 for CIFAR-10, 0.72 for CIFAR-100, 0.1 for ImageNet (5 % of the source images are below).
        views: N, at least 0; 0 for a mean teacher without augmentation.
        symmetric: Whether the loss is the mean of both directions, as in the paper for ImageNet.
        params: Parameters that are trained, see ``TestTimeAdaptation``.
        kwargs: Options of ``TestTimeAdaptation``.
    """

    traits = TestTimeAdaptation.traits.but(
        family="test-time", paper="Wang et al., CVPR 2022, arXiv:2203.13591", transductive=True
    )
    needs_source: ClassVar[bool] = True

    def __init__(
        self,
        *,
        teacher_momentum: float = 0.999,
        restore: float = 0.01,
        threshold: float = 0.92,
        views: int = 32,
        symmetric: bool = False,
        params: Literal["norm", "all"] | list[str] = "all",
        **kwargs: Any,
    ) -> None:
        chosen: Trained = params
        super().__init__(params=chosen, **kwargs)
        within(self, "[0, 1]", teacher_momentum=teacher_momentum, restore=restore)
        at_least(self, 0, views=views)
        self.teacher_momentum, self.restore, self.threshold = teacher_momentum, restore, threshold
        self.views, self.symmetric = views, symmetric
        self.teacher = Teacher()
        self._last_step = 0

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
                    total += self._of_teacher(self.data.finish(view).images).logits
                return total / self.views
        return self._of_teacher(batch.images).logits

    def _of_teacher(self, images: Tensor) -> Output:
        output: Output = self.teacher(images)
        return output._replace(logits=full_precision(output.logits[:, : self.num_source]))

    def forward_source_classes(self, images: Tensor) -> Output:
        return self._of_teacher(images) if self.teacher and self.adapting else super().forward_source_classes(images)

    def on_train_start(self) -> None:
        self._last_step = self.trainer.global_step

    def after_step(self, batch: Batch) -> None:
        if (
            self.phase.name == ADAPT and self.trainer.global_step > self._last_step
        ):  # otherwise gradients are accumulated
            self._last_step = self.trainer.global_step
            assert self.teacher.network is not None
            assert self.source.network is not None
            move_teacher(self.teacher.network, self.network, self.teacher_momentum)
            if self.restore:
                key = mix(batch.draw.key, _RESTORE)
                restore(self.trained_parameters(), self.source.network, self.restore, key)
        super().after_step(batch)

    def reset(self) -> None:
        super().reset()
        assert self.teacher.network is not None
        self._restore_source(self.teacher.network)

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        if task.is_first:
            self.teacher.learn_from(self.network)
