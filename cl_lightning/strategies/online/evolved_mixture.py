"""Evolved mixture model for task-free continual learning (Ye & Bors, ICIP 2022, arXiv:2207.05080).

Components, each a classifier and a variational autoencoder (VAE), of which the newest one is trained on the batch and
on samples R of a memory. When the memory is full, its samples are compared with samples that each component generates:

    d_k = MMD^2(samples of the VAE of component k, samples of the memory)
    d_k above its threshold for all k:  freeze the component, and train a new one
    L = CE(B u R) + generator_weight * L_VAE(B u R)

then two dropouts make room in the memory: a random one, and one of the samples that are most like another. The
component with the largest likelihood of a sample, by the evidence lower bound of its VAE, predicts its class.
HSIC measures the dependence of pairs, and two samples have no pairs; the distance of the paper is read as the
dependence of a sample and the set it is from: MMD^2 = (N^2 / (n1 n2))^2 HSIC(x, l), l in {0, 1}. The kernel is
Gaussian, with w^2 half of the median squared distance of all samples of a comparison.
threshold -> ``threshold``, or with None the quantile of d_k over ``permutations`` of the samples of both sets; samples
of a generator that is not perfect exceed it, and then each component gets a successor after ``warmup`` steps.
Only the abstract of the paper is known. The thresholds, the loss, the prediction, the order of the dropouts and all
values are ours. VAEs and kernels see the pixels of the finished images in [0, 1]. The similarity dropout
compares a sample with the samples that were stored before it, so that one of two equal samples stays. All
``max_components`` networks exist from the start; when all are in use, the newest one is trained on.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from cl_lightning.batch import Batch, Draw, ImageShape
from cl_lightning.checks import at_least, within
from cl_lightning.models import VAE, Output, gaussian_kernel, square_distances, two_sample_distance
from cl_lightning.strategies.online.growing import GrowingMixture
from cl_lightning.strategy import Traits

_NOISE, _ROWS, _SAMPLES, _ORDER, _DROP = 0xE01, 0xE02, 0xE03, 0xE04, 0xE05  # salts of the draws


def thresholds_of(kernel: Tensor, first: int, quantile: float, orders: Tensor) -> Tensor:
    """Quantile of the distance of two samples over random exchanges of their rows.

    Args:
        kernel: Kernel matrix of both samples, ``(N, N)``.
        first: Size of the first sample.
        quantile: In [0, 1].
        orders: Permutations of the rows, int64 ``(P, N)``.

    Returns:
        A scalar.
    """
    members = (orders < first).to(kernel.dtype)
    return two_sample_distance(kernel, members).quantile(quantile)


def least_redundant(kernel: Tensor, number: int) -> Tensor:
    """Rows of the smallest similarity to a row before them, in order.

    Args:
        kernel: Similarities, ``(n, n)``.
        number: Number of rows, at most n.

    Returns:
        int64 ``(number,)``.
    """
    largest = kernel.tril(diagonal=-1).amax(dim=1)
    return largest.argsort(stable=True)[:number].sort().values


class EvolvedMixture(GrowingMixture):
    """Components with generators, and a new one when the memory differs from what all of them generate.

    Args:
        threshold: Distance above which a component is unlike the memory, at least 0; None for the permutation quantile.
        warmup: Steps that a component is trained before the next one may be added, at least 0.
        quantile: Quantile of the permutations, in [0, 1].
        permutations: Number of permutations, at least 1.
        compared: Samples of the memory, and of each component, that are compared, at least 2.
        random_dropout: Probability with which a full memory loses each sample, in [0, 1].
        kept: Share of the memory's size that stays at most, in (0, 1).
        generator_weight: Weight of the loss of the VAE, at least 0.
        max_components: Largest number of components, at least 1.
        generator: Builds a VAE for a shape of images; None for ``VAE``.
        optimizer: As in the base class; None for Adam with learning rate 0.001.
        kwargs: Options of ``Replay``: ``memory_size``, ``replay_size``, ....
    """

    traits = Traits(
        family="online",
        paper="Ye & Bors, ICIP 2022, arXiv:2207.05080",
        keeps_exemplars=True,
        task_free=True,
        inputs=("image",),
    )

    steps: Tensor  # of the current component
    ends: Tensor  # finished pixels of a black and of a white image, (2, C, 1, 1)

    def __init__(
        self,
        *,
        threshold: float | None = 0.2,
        warmup: int = 100,
        quantile: float = 0.95,
        permutations: int = 200,
        compared: int = 500,
        random_dropout: float = 0.25,
        kept: float = 0.5,
        generator_weight: float = 1.0,
        max_components: int = 5,
        generator: Callable[[ImageShape], VAE] | None = None,
        optimizer: OptimizerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        at_least(self, 1, max_components=max_components, permutations=permutations)
        super().__init__(
            members=max_components, optimizer=optimizer or functools.partial(torch.optim.Adam, lr=1e-3), **kwargs
        )
        at_least(self, 0, threshold=threshold, optional=True)
        at_least(self, 0, generator_weight=generator_weight, warmup=warmup)
        at_least(self, 2, compared=compared)
        within(self, "[0, 1]", quantile=quantile, random_dropout=random_dropout)
        within(self, "(0, 1)", kept=kept)
        self.threshold, self.quantile, self.permutations, self.compared = threshold, quantile, permutations, compared
        self.warmup = warmup
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.random_dropout, self.kept, self.generator_weight = random_dropout, kept, generator_weight
        self.build_generator: Callable[[ImageShape], VAE] = generator or VAE
        self.generators: nn.ModuleList
        self._scaled = False

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.generators = nn.ModuleList(self.build_generator(image_shape) for _ in self.mixture.members)
        self.register_buffer("ends", torch.arange(2.0).view(2, 1, 1, 1).repeat(1, image_shape[0], 1, 1))

    def parts(self) -> list[nn.Module]:
        return [*super().parts(), *self.generators]

    def generator_of(self, component: int) -> VAE:
        return cast(VAE, self.generators[component])

    def prepare_batch(self, batch: Batch) -> Batch:
        if not self._scaled:
            raw = batch.raw.new_zeros(2, *batch.raw.shape[1:])
            raw[1] = 255
            unknown = torch.full((2,), -1, device=raw.device)
            finished = self.data.finish(Batch(raw, unknown, unknown, unknown, raw, Draw.of(2, 0)))
            self.ends.copy_(finished.images[..., :1, :1])
            self._scaled = True
        current = self.mixture.current
        self.train_parts(self.mixture.members[current], self.generators[current])
        return super().prepare_batch(batch)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        terms, generator = super().losses(batch, output), self.generator_of(self.mixture.current)
        draws = [part.draw.fork(_NOISE) for _, part in batch.parts.values()]
        noise = torch.cat([draw.randn(generator.latent) for draw in draws]).to(self.device)
        terms["generator"] = self.generator_weight * generator.loss(self.pixels(batch.images), noise)
        return {**terms, "ce": self.with_all_gradients(terms["ce"])}

    def after_step(self, batch: Batch) -> None:
        super().after_step(batch)
        self.steps += 1
        if 0 < self.memory.size <= len(self.memory):
            self.evolve(batch.draw)

    @torch.no_grad()
    def evolve(self, draw: Draw) -> None:
        """Compare the full memory with all components, add one if it is unlike all, and make room in the memory.

        Every process has the same memory and the same networks, and comes to the same result.
        """
        number = len(self.memory)
        order = torch.randperm(number, generator=draw.fork(_ROWS).generator())
        rows = torch.arange(number, device=self.memory.labels.device)
        stored = self.data.finish(self.memory.at(rows, Draw.of(number, 0)))  # all rows on every process
        images = self.pixels(stored.images).flatten(1)  # (n, D)
        some = images[order[: self.compared].to(images.device)]
        trained = int(self.steps) >= self.warmup
        if trained and self.mixture.used < self.max_members and self.unlike_all(some, draw):
            self.mixture.choose(self.mixture.used)
            self.steps.zero_()
        chance = torch.rand(number, generator=draw.fork(_DROP).generator())
        rows = (chance >= self.random_dropout).nonzero().flatten()  # on the CPU: nothing waits
        room = int(self.kept * self.memory.size)
        rows = rows.to(images.device)
        if len(rows) > room:
            kernel = gaussian_kernel(square_distances(images[rows]))
            rows = rows[least_redundant(kernel, room)]
        self.memory.keep(rows)

    def unlike_all(self, images: Tensor, draw: Draw) -> bool:
        """Whether images ``(n, D)`` are further than the threshold from the samples of each component in use."""
        samples = []
        for component in range(self.mixture.used):
            generator = self.generator_of(component)
            seeded = draw.fork(_SAMPLES, component).generator()
            noise = torch.randn(len(images), generator.latent, generator=seeded)
            samples.append(generator.sample(noise.to(images.device)).flatten(1))
        n = len(images)
        kernel = gaussian_kernel(square_distances(torch.cat([images, *samples])))
        first = (torch.arange(2 * n, device=images.device) < n).to(kernel.dtype)
        seeded = draw.fork(_ORDER).generator()
        orders = torch.stack([torch.randperm(2 * n, generator=seeded) for _ in range(self.permutations)])
        far = []
        for component in range(self.mixture.used):
            start = n * (component + 1)
            rows = torch.cat([torch.arange(n), torch.arange(start, start + n)]).to(images.device)
            pair = kernel[rows[:, None], rows]
            distance = two_sample_distance(pair, first[None])[0]
            if self.threshold is None:
                far.append(distance > thresholds_of(pair, n, self.quantile, orders.to(images.device)))
            else:
                far.append(distance > self.threshold)
        return bool(torch.stack(far).all())

    def pixels(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1] of finished images ``(B, C, H, W)``."""
        black, white = self.ends
        pixels: Tensor = ((images.float() - black) / (white - black)).clamp(0, 1)
        return pixels

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        scores = self.mixture.scores_of(images)  # (components in use, B, columns)
        pixels = self.pixels(images)
        with torch.autocast(images.device.type, enabled=False):
            bounds = []
            for component in range(len(scores)):
                generator = self.generator_of(component)
                mean = torch.zeros(len(images), generator.latent, device=images.device)
                bounds.append(-generator.losses(pixels, mean))
        chosen = torch.stack(bounds).argmax(dim=0)
        return scores[chosen, torch.arange(len(images), device=chosen.device)]
