"""Dataset Condensation with Contrastive signals, DCC (Lee, Chun, Jung, Yun & Yoon, ICML 2022, arXiv:2202.02916), as a
memory: a few synthetic images of each class, learnt by gradient matching, are replayed instead of stored samples.

When a task with the classes 1 .. C ends, its images T are condensed to m synthetic images S_c of each class c. They
begin as random images of the class. A new random network theta is drawn K times; with each one n_in steps

    S <- S - lr * dL/dS   (SGD with momentum),         g_c(X) = gradient with respect to theta of mean CE(f(X_c), c)

    L = sum_c D( g_c(T), g_c(S) )                                                          in the warm-up
    L = D( 1/C sum_c g_c(T),  gradient of mean CE(f(S), y) over the images S of all classes )      contrastive

    D(A, B) = sum over layers and rows (outputs of a layer) of 1 - <a, b> / (|a| |b| + 1e-6)

are taken, each followed by training theta on S for ``epochs`` epochs, except after the last one. T_c is a random batch
of the class; D leaves vectors (biases, normalisation) out. The class-wise form holds during the warm-up, in the first
``warm_networks`` networks and in their first ``warm_steps`` steps; the contrastive form also holds the classes apart.
m -> images_per_class, K -> networks, n_in -> steps. The authors' values of (n_in, epochs) for m = 1, 10, 20, 30, 40, 50
are (10, 5), (10, 50), (20, 25), (30, 20), (40, 15), (50, 10).

Images S are float32 in the normalised space of the network's input, without limits; the memory has them as float32
pixels, 4 bytes per value. Each step of a later task draws from them as from any memory, and augments them.
Departs from the paper: the memory joins the batches of later tasks, while the paper's experiment is on data sets in
sequence; theta has an output per class of the task, and a second one if there is a single class, since the loss would
be constant; and there is no differentiable augmentation (DSA) inside the matching.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Draw, ImageShape, join, mix
from cl_lightning.checks import above, at_least, within
from cl_lightning.distributed import all_gather_together, all_sum, world_size
from cl_lightning.memory import Memory, rank_in_group
from cl_lightning.models import Backbone, InstanceNormConvNet, batch_norms, built
from cl_lightning.strategies.base import check_loss_classes
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Task, Traits

_FIRST = 0xDCC  # salt of the choice of the first images


@dataclass(frozen=True)
class Condensation:
    """Options of the condensation of a task.

    Attributes:
        networks: K, at least 1.
        steps: n_in, steps of matching with each network, at least 1.
        epochs: Epochs of training the network on the synthetic images between two steps, at least 0.
        batch_size: Number of images of a class in a step, and of synthetic images in a step of training, at least 1.
        lr: Learning rate of the synthetic images, above 0.
        momentum: Momentum of the synthetic images, in [0, 1).
        network_lr: Learning rate of the network, above 0.
        warm_networks: Networks with class-wise steps, at least 0.
        warm_steps: Class-wise steps of each of these networks, at least 0.
    """

    networks: int = 1000
    steps: int = 10
    epochs: int = 50
    batch_size: int = 256
    lr: float = 0.1
    momentum: float = 0.5
    network_lr: float = 0.01
    warm_networks: int = 250
    warm_steps: int = 10

    def __post_init__(self) -> None:
        at_least(self, 1, networks=self.networks, steps=self.steps, batch_size=self.batch_size)
        at_least(self, 0, epochs=self.epochs, warm_networks=self.warm_networks, warm_steps=self.warm_steps)
        above(self, 0, lr=self.lr, network_lr=self.network_lr)
        within(self, "[0, 1)", momentum=self.momentum)

    def contrasts(self, network: int, step: int) -> bool:
        """Whether a step of a network, both numbered from 0, has the contrastive form."""
        return network >= self.warm_networks or step >= self.warm_steps


def row_distance(first: Iterable[Tensor], second: Iterable[Tensor]) -> Tensor:
    """D above, a scalar, from 0 to twice the number of rows.

    Args:
        first, second: Gradients of the parameters in the same order; vectors are left out.
    """
    distances = [
        (1 - (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()
        for a, b in ((a.flatten(1), b.flatten(1)) for a, b in zip(first, second, strict=True) if a.dim() > 1)
    ]
    return torch.stack(distances).sum()


def matching_loss(
    network: nn.Module, real: Sequence[Tensor], synthetic: Tensor, targets: Tensor, *, contrastive: bool
) -> Tensor:
    """L above, a scalar with a graph to the synthetic images.

    Args:
        network: theta; its parameters require gradients, which are not accumulated.
        real: Batch of images of each class 0 .. C - 1, ``(n_c, *image_shape)`` each.
        synthetic: S, ``(n, *image_shape)``.
        targets: Class of each synthetic image, int64 ``(n,)``; each class has at least one.
        contrastive: Whether the gradients are summed over the classes before they are compared.
    """
    weights = [value for value in network.parameters() if value.dim() > 1]

    def gradient(loss: Tensor, create_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, weights, create_graph=create_graph, allow_unused=True, materialize_grads=True)

    def loss(images: Tensor, label: int) -> Tensor:
        return F.cross_entropy(network(images), torch.full((len(images),), label, device=images.device))

    of_real = [loss(images, label) for label, images in enumerate(real)]
    if contrastive:
        joint = F.cross_entropy(network(synthetic), targets)
        return row_distance(gradient(joint, create_graph=True), gradient(torch.stack(of_real).mean()))
    return torch.stack(
        [
            row_distance(gradient(loss(synthetic[targets == label], label), create_graph=True), gradient(wanted))
            for label, wanted in enumerate(of_real)
        ]
    ).sum()


def condense(
    images: Tensor,
    labels: Tensor,
    first: Tensor,
    build: Callable[[], nn.Module],
    options: Condensation,
    steps: Iterable[int],
    key: int,
) -> Tensor:
    """Synthetic images of some images, float32 ``(n, *image_shape)``. Global random generators are restored.

    Args:
        images: T, as the network receives them, ``(N, *image_shape)``.
        labels: Classes 0 .. C - 1, int64 ``(N,)``; each has at least one image.
        first: Rows of the images at which the synthetic images begin, int64 ``(n,)``; some of each class.
        build: Builds a random network, from images to at least C logits.
        options: Options.
        steps: Numbers 0, 1, ... of the steps; ``options.steps`` of them belong to each network.
        key: Seed of networks and batches.
    """
    own = [(labels == label).nonzero().flatten() for label in range(int(labels.max()) + 1)]
    synthetic, targets = images[first].clone().requires_grad_(), labels[first]
    optimizer = torch.optim.SGD([synthetic], lr=options.lr, momentum=options.momentum)
    devices = [images.device] if images.device.type == "cuda" else []
    network = nn.Module()
    with torch.enable_grad(), torch.random.fork_rng(devices), torch.autocast(images.device.type, enabled=False):
        for number in steps:
            place, step = divmod(number, options.steps)
            torch.manual_seed(mix(key, number))
            if step == 0:
                network = build().to(images.device)
            else:
                _train(network, synthetic.detach(), targets, options)
            real = [images[rows[torch.randperm(len(rows))[: options.batch_size].to(rows.device)]] for rows in own]
            loss = matching_loss(network, real, synthetic, targets, contrastive=options.contrasts(place, step))
            synthetic.grad = torch.autograd.grad(loss, synthetic)[0]
            optimizer.step()
    return synthetic.detach()


def _train(network: nn.Module, images: Tensor, labels: Tensor, options: Condensation) -> None:
    """Train the network on synthetic images, in place, by plain SGD in random batches."""
    weights: list[Tensor] = list(network.parameters())
    for _ in range(options.epochs):
        for rows in torch.split(torch.randperm(len(images)).to(images.device), options.batch_size):
            gradients = torch.autograd.grad(F.cross_entropy(network(images[rows]), labels[rows]), weights)
            with torch.no_grad():
                torch._foreach_add_(weights, gradients, alpha=-options.network_lr)


class SyntheticMemory(Memory):
    """Memory of float32 pixels with black at 0 and white at 1, whose values may be outside of [0, 1]."""

    kept_as: ClassVar[str] = "synthetic images"
    dtype: ClassVar[torch.dtype] = torch.float32


class DatasetCondensation(ContinualStrategy):
    """Replay of synthetic images, to which each task is condensed by matching the gradients of random networks.

    The images of a task are gathered on the device of every process when it ends, and every process computes the same
    steps. Processes average their images, so that they replay the same ones.

    Args:
        images_per_class: m, at least 1; a class with fewer images in a task has as many synthetic ones. A class that
            comes back in a later task has further ones.
        condensation: Options of the condensation. With the defaults a task takes hours on a CPU.
        matching_network: Builds the backbone of the random networks, without batch normalisation; None for
            ``InstanceNormConvNet``.
        replay_size: Number of synthetic images drawn per step, over all processes, at least 1; None for the size of the
            batch.
        kwargs: Options of the base class.
    """

    traits = Traits(family="rehearsal", paper="Lee et al., ICML 2022, arXiv:2202.02916", inputs=("image",))

    def __init__(
        self,
        *,
        images_per_class: int = 10,
        condensation: Condensation = Condensation(),
        matching_network: Callable[[ImageShape], Backbone] | None = None,
        replay_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_loss_classes(self)
        at_least(self, 1, images_per_class=images_per_class)
        at_least(self, 1, replay_size=replay_size, optional=True)
        self.images_per_class, self.condensation, self.replay_size = images_per_class, condensation, replay_size
        self.build_matching: Callable[[ImageShape], Backbone] = matching_network or InstanceNormConvNet
        self.memory = SyntheticMemory(0)

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        with torch.random.fork_rng(devices=[]):  # built for its checks
            network = self._random_network(2)
        if any(batch_norms(network)):
            raise ValueError(
                f"DatasetCondensation: matching_network is {type(network[0]).__name__}, which has batch normalisation: "
                "its gradient on a class depends on the batch; use InstanceNormConvNet or another network without it"
            )

    def _random_network(self, outputs: int) -> nn.Sequential:
        assert self.image_shape is not None
        backbone = built(self.build_matching, self.image_shape)
        return nn.Sequential(backbone, nn.Linear(backbone.num_features, outputs))

    def prepare_batch(self, batch: Batch) -> Batch:
        if batch.raw.shape[1:] != self.image_shape:
            raise ValueError(
                f"DatasetCondensation: images are {tuple(batch.raw.shape[1:])} and resized to {self.image_shape}; give "
                "images of the size of the network, without data.resize"
            )
        return join({"stream": batch, "replay": self.replay(batch) if len(self.memory) else None})

    def replay(self, batch: Batch) -> Batch:
        """Draw synthetic images, uniformly without replacement, and augment them.

        Args:
            batch: Batch of the stream as it arrived for the step.

        Returns:
            This process's share; ``raw`` has the images with 256 levels, as in the stream.
        """
        drawn = self.data.augment(self.memory.sample(self.replay_size or batch.draw.total, batch.draw))
        return drawn.replace(raw=(255 * drawn.raw).round().clamp(0, 255).to(torch.uint8))

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        super().end_task(task)
        parts = [(batch.raw, batch.labels, batch.indices) for batch in self.passes.batches()]
        raw, labels, indices = all_gather_together(torch.cat(column) for column in zip(*parts, strict=True))
        order = indices.argsort()
        raw, labels = raw[order], labels[order]
        first = self._first_rows(labels)
        _, classes = labels.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        black, white = self.data.pixel_range(raw[:1])
        options, count = self.condensation, int(classes.max()) + 1
        synthetic = condense(
            black + (white - black) * (raw / 255),
            classes,
            first,
            lambda: self._random_network(max(count, 2)),
            options,
            self.passes.steps(options.networks * options.steps),
            mix(self.seed, task.index),
        )
        pixels = (all_sum(synthetic) / world_size() - black) / (white - black)
        self.memory.resize(len(self.memory) + len(pixels))
        tasks = torch.full_like(first, task.index)
        self.memory.add(pixels, labels[first], tasks, Draw.of(len(first), self.seed, task.index), gathered=True)

    def _first_rows(self, labels: Tensor) -> Tensor:
        """Rows of ``images_per_class`` random images of each class, int64, by ascending class."""
        keys = Draw.of(len(labels), self.seed, _FIRST, self.task.index).randint((1 << 63) - 1).to(labels.device)
        level, _ = rank_in_group(keys, labels)
        rows = (level < self.images_per_class).nonzero().flatten()
        return rows[labels[rows].argsort(stable=True)]
