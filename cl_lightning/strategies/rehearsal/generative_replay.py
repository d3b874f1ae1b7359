"""Deep Generative Replay (Shin, Lee, Kim & Kim, NeurIPS 2017, arXiv:1705.08690).

A generator G takes the place of a memory: images x' that the generator of the earlier tasks draws, with the labels
y' = argmax f_old(x') of the network before the task (the solver), are replayed to the network and to the generator:

    L(f) = r mean CE(f(x), y)  +  (1 - r) mean CE(f(x'), y')                                          eq. (1)
    L(G) = r mean L_G(x)  +  (1 - r) mean L_G(x')

in task t, counted from 1, with r = 1 / t -> new_weight. No image is kept. The network is trained in the phase
``train``, the generator in the phase ``generator``; both replay the generator before the task.
Departs from the paper: G is a variational autoencoder, as in most later comparisons, instead of a Wasserstein GAN.
Generated images are rounded to 256 levels, and augmented for the network as images of a memory are.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cl_lightning.batch import ImageShape, join
from cl_lightning.checks import at_least, within
from cl_lightning.memory import Teacher
from cl_lightning.models import VAE, frozen_copy
from cl_lightning.strategies.base import check_loss_classes
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Phase, PhaseOptions, Task, Traits

_IMAGES, _NOISE = 0x6E1, 0x6E2  # salts of the draws
_GENERATOR_OPTIONS = PhaseOptions()


class GenerativeReplay(ContinualStrategy):
    """Replay of images from a generator, with labels of the network before the task, to both network and generator.

    Args:
        generator: Builds the generator for the shape of the images; None for ``VAE``.
        replay_size: Number of images generated per step, over all processes, at least 1; None for the size of the
            batch.
        new_weight: r, in [0, 1]; None for 1 / t.
        generator_options: Options of the phase ``generator``, at least 1 epoch; the default is Adam with learning rate
            0.001, for the epochs of the Trainer.
        kwargs: Options of the base class.
    """

    traits = Traits(family="rehearsal", paper="Shin et al., NeurIPS 2017, arXiv:1705.08690", inputs=("image",))

    def __init__(
        self,
        *,
        generator: Callable[[ImageShape], VAE] | None = None,
        replay_size: int | None = None,
        new_weight: float | None = None,
        generator_options: PhaseOptions = _GENERATOR_OPTIONS,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_loss_classes(self)
        at_least(self, 1, replay_size=replay_size, optional=True)
        within(self, "[0, 1]", new_weight=new_weight, optional=True)
        at_least(self, 1, **{"generator_options.epochs": generator_options.epochs}, optional=True)
        self.build_generator: Callable[[ImageShape], VAE] = generator or VAE
        self.replay_size, self.new_weight = replay_size, new_weight
        self.generator_options = generator_options.filled(functools.partial(torch.optim.Adam, lr=1e-3))
        self.teacher = Teacher()  # the solver of the earlier tasks
        self.generator: VAE
        self.previous: VAE  # the generator of the earlier tasks

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.generator = self.build_generator(image_shape)
        self.previous = frozen_copy(self.generator)

    def phases(self, task: Task) -> list[Phase]:
        return [
            Phase(),
            Phase(
                "generator",
                self.generator_options,
                trains=self.generator.parameters,
                freezes=lambda: [self.network],
                unaugmented=True,
            ),
        ]

    def generate(self, batch: Batch) -> Batch:
        """Draw images from the generator of the earlier tasks, and label them by the network before the task.

        Args:
            batch: Batch of the stream as it arrived for the step.

        Returns:
            This process's share of the images, augmented in the phase ``train``.
        """
        draw = batch.draw.share(self.replay_size or batch.draw.total, _IMAGES)
        count = draw.stop - draw.start
        pixels = self.previous.sample(draw.randn(self.previous.latent).to(self.device))
        raw = (255 * pixels).round().to(torch.uint8)
        unknown = torch.full((count,), -1, device=self.device)
        share = count * self.trainer.world_size / draw.total
        drawn = self.data.finish(Batch(raw, unknown, unknown, unknown, raw, draw, weight=share))
        labels = self.teacher(drawn.images).logits.argmax(dim=1)
        drawn = drawn.replace(labels=labels, tasks=self.task_columns.byte().argmax(dim=0)[labels])
        return drawn if self.phase.unaugmented else self.data.augment(drawn)

    def prepare_batch(self, batch: Batch) -> Batch:
        if batch.raw.shape[1:] != self.generator.image_shape:
            raise ValueError(
                f"GenerativeReplay: images are {tuple(batch.raw.shape[1:])} and resized to "
                f"{self.generator.image_shape}; give images of the size of the network, without data.resize"
            )
        return join({"stream": batch, "replay": None if self.task.is_first else self.generate(batch)})

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        new = 1 / (self.task.index + 1) if self.new_weight is None else self.new_weight
        weights = {"stream": 1.0} if self.task.is_first else {"stream": new, "replay": 1 - new}
        terms = {}
        for name, weight in weights.items():
            samples, of_part, share = batch.part(name, output)
            if self.phase.name == "generator":
                noise = samples.draw.fork(_NOISE).randn(self.generator.latent).to(self.device)
                loss = self.generator.loss(samples.raw / 255, noise)
            else:
                loss = self.classification_loss(of_part, samples)
            terms[name] = weight * share * loss
        return terms

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.teacher.learn_from(self.network)
        self.previous.load_state_dict(self.generator.state_dict())
