"""LAF: Label-Agnostic Forgetting (Shen et al., ICLR 2024, arXiv:2404.00506).

Tasks are learnt by joint training. At a request to forget the samples D_f, with D_r the samples that are kept, the
network f = head(e(x)) is changed without labels. Phase ``represent``, on the features before the request:

    two autoencoders, VAE_r of D_r and D_f together, VAE_f of D_f:    L = |x - x^|^2 + kl_weight * KL

Phase ``unlearn``: a step has a batch of D_r and one of D_f of the same size, and the two losses take turns,

    extractor    L_ue = S_r(e(x_r)) - S_f(e(x_f)),    S_k(z) = sum_i exp( m_i / (m_i + 1) ),  m_i = |z_i - VAE_k(z_i)|^2
    alignment    L_ra = sum_i log( exp(d_i^r) / sum_j exp(d_j^f / T) ),    d = 1 - cos(e(x), e_before(x))

S_r keeps the features of D_r where VAE_r knows them, and -S_f moves the features of D_f away from what VAE_f knows;
L_ra holds the features of D_r and lets go of those of D_f. Each loss has an Adam of its own (``AlternatingAdam``). With
``repair_epochs`` (LAF+R) the head is then trained on D_r with labels. T -> temperature.

The method updates by both losses on each pair of batches; here a pair serves one of them, so that ``unlearn``
has twice the epochs of the paper. Our choices: the autoencoders reconstruct at the mean of the posterior, and
``bounded=False`` leaves out the sigmoid of their output, which presumes features in [0, 1]. Sums over the batch make
the learning rates depend on its size, as in the paper. The samples of D_f, and what the autoencoders learn of them, are
held during the request alone. Forgetting is approximate.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import ImageShape, join
from cl_lightning.checks import above, at_least
from cl_lightning.losses import full_precision, mean_over_rows, rows_of_all
from cl_lightning.memory import Memory, Teacher
from cl_lightning.models import FeatureVAE
from cl_lightning.optim import AlternatingAdam
from cl_lightning.strategies.base import Unlearns
from cl_lightning.strategies.baselines.joint import Joint
from cl_lightning.strategy import Batch, Output, Phase, PhaseOptions, Task, Traits

_FORGET, _NOISE = 0x1AF0, 0x1AF1  # salts of the draws of D_f and of the noise of the autoencoders


def extractor_scores(errors: Tensor) -> Tensor:
    """``exp( m / (m + 1) )`` of squared errors m, ``(B,)``, each in [1, e)."""
    return (errors / (errors + 1)).exp()


class LAF(Unlearns, Joint):
    """Joint training; a request moves the features of the forgotten samples away, without labels.

    Args:
        hidden: Units of the layers of the autoencoders between features and latent variables.
        latent: Latent dimensions, at least 1; 8 for MNIST, 16 for CIFAR in the paper.
        kl_weight: Weight of the divergence of the posterior, at least 0.
        bounded: Whether a sigmoid is the output of the autoencoders.
        temperature: T, above 0; from 5 to 20 in the paper.
        extractor_lr, alignment_lr: Learning rates of the two losses, above 0.
        represent_options: Options of the phase ``represent``.
        unlearn_epochs: Epochs of the phase ``unlearn`` over the samples that are kept, at least 1.
        repair_epochs: Epochs of the phase ``repair``, at least 0; 0 is LAF without repair.
        kwargs: Options of ``Joint``.
    """

    traits = Traits(family="unlearning", paper="Shen et al., ICLR 2024, arXiv:2404.00506", needs_all_data=True)
    vae_kept: FeatureVAE
    vae_forgotten: FeatureVAE

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (128, 32),
        latent: int = 8,
        kl_weight: float = 0.025,
        bounded: bool = True,
        temperature: float = 5.0,
        extractor_lr: float = 5e-5,
        alignment_lr: float = 1e-4,
        represent_options: PhaseOptions = PhaseOptions(epochs=10),
        unlearn_epochs: int = 40,
        repair_epochs: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        at_least(self, 1, latent=latent, unlearn_epochs=unlearn_epochs)
        at_least(self, 0, kl_weight=kl_weight, repair_epochs=repair_epochs)
        above(self, 0, temperature=temperature, extractor_lr=extractor_lr, alignment_lr=alignment_lr)
        self.hidden, self.latent, self.kl_weight, self.bounded = tuple(hidden), latent, kl_weight, bounded
        self.temperature, self.extractor_lr, self.alignment_lr = temperature, extractor_lr, alignment_lr
        self.represent_options = represent_options.filled(torch.optim.Adam)
        self.unlearn_epochs, self.repair_epochs = unlearn_epochs, repair_epochs
        self.teacher = Teacher()  # empty, as the memory, except during a request
        self.forgotten = Memory(0)

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        with torch.random.fork_rng(devices=[]):  # learning is the same with and without the autoencoders
            self._renew_autoencoders()

    def _renew_autoencoders(self) -> None:
        width, latent, weight = self.network.head.num_features, self.latent, self.kl_weight
        self.vae_kept, self.vae_forgotten = (
            FeatureVAE(width, hidden=self.hidden, latent=latent, kl_weight=weight, bounded=self.bounded).to(self.device)
            for _ in range(2)
        )

    # ------------------------------------------------------------------ a request

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if task.request == "forget":
            self.teacher.learn_from(self.network)
            self.forgotten = Memory(len(self.data.stream.train[task.index]))

    def phases(self, task: Task) -> list[Phase]:
        if task.learns:
            return super().phases(task)
        if task.request == "keep":
            return []
        unlearn = PhaseOptions(epochs=self.unlearn_epochs, optimizer=self._optimizer)
        repair = PhaseOptions(epochs=self.repair_epochs)
        found = [
            Phase(
                "represent", options=self.represent_options, trains=self._autoencoders, freezes=lambda: [self.network]
            ),
            Phase("unlearn", options=unlearn),
        ]
        heads = self.network.head.parameters
        return [*found, Phase("repair", options=repair, trains=heads)] if self.repair_epochs else found

    def _autoencoders(self) -> Iterable[nn.Parameter]:
        return [*self.vae_kept.parameters(), *self.vae_forgotten.parameters()]

    def _optimizer(self, parameters: Any) -> AlternatingAdam:
        return AlternatingAdam(parameters, lr=self.extractor_lr, second_lr=self.alignment_lr)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.task.request == "forget" and not len(self.forgotten):
            for batch in self.passes.batches():  # the samples of the request
                self.forgotten.add(batch.raw, batch.labels, batch.tasks, batch.draw)

    def end_task(self, task: Task) -> None:
        super().end_task(task)
        if task.request == "forget":
            self.forgotten, self.teacher = Memory(0), Teacher()
            self._renew_autoencoders()

    # ------------------------------------------------------------------ a step

    def prepare_batch(self, batch: Batch) -> Batch:
        if self.task.request != "forget" or self.phase.name == "repair":
            return batch
        drawn = self.forgotten.sample(batch.draw.total, batch.draw.fork(_FORGET))
        return join({"kept": batch, "forgotten": self.data.augment(drawn)})

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if "forgotten" not in batch.parts:
            return super().losses(batch, output)
        (kept, of_kept, share), (forgotten, of_forgotten, its) = (
            batch.part(name, output) for name in ("kept", "forgotten")
        )
        x_r, x_f = full_precision(of_kept.features), full_precision(of_forgotten.features)
        if self.phase.name == "represent":
            return self._autoencoder_losses(kept, x_r, share, forgotten, x_f, its)
        if not self.turn:
            kept_score = share * _total(extractor_scores(self.vae_kept.errors(x_r)), kept)
            return {
                "kept": kept_score,
                "forgotten": -its * _total(extractor_scores(self.vae_forgotten.errors(x_f)), forgotten),
            }
        with torch.no_grad():
            before = self.teacher(batch.images).features
        distance = 1 - F.cosine_similarity(full_precision(output.features), full_precision(before), dim=1)
        d_r, d_f = distance[: len(kept)], distance[len(kept) :]
        rows, factor = rows_of_all(forgotten)
        level = (rows(d_f) / self.temperature).logsumexp(dim=0) * factor * its
        return {"distance": share * _total(d_r, kept), "level": -kept.draw.total * level}

    @property
    def turn(self) -> int:
        """Whose turn the step is: 0 for the loss of the extractor, 1 for the alignment."""
        optimizer: Any = self.trainer.optimizers[0]
        turn: int = getattr(optimizer, "optimizer", optimizer).turn
        return turn

    def _autoencoder_losses(
        self, kept: Batch, x_r: Tensor, share: float, forgotten: Batch, x_f: Tensor, its: float
    ) -> dict[str, Tensor]:
        """Losses of the autoencoders; each sample of D_r and D_f has the same weight in the loss of VAE_r."""
        noise_r, noise_f = (part.draw.fork(_NOISE).randn(self.latent, device=x_r.device) for part in (kept, forgotten))
        sizes = [len(self.data.stream.train[t.index]) for t in self.data.stream.tasks[: self.task.index] if t.learns]
        of_f = len(self.forgotten) / (sum(sizes) - len(self.data.stream.forgotten(self.task.index - 1)))
        loss_r, loss_f = self.vae_kept.loss(x_r, noise_r), self.vae_kept.loss(x_f, noise_f)
        own = self.vae_forgotten.loss(x_f, noise_f)
        return {"vae_kept": (1 - of_f) * share * loss_r + of_f * its * loss_f, "vae_forgotten": its * own}


def _total(values: Tensor, batch: Batch) -> Tensor:
    """Sum over the rows of all processes, as their number times the mean over the rows of this process."""
    return mean_over_rows(values) * batch.draw.total
