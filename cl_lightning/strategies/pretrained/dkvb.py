"""Discrete key-value bottleneck, DKVB (Träuble et al., ICML 2023, arXiv:2207.11240).

A frozen backbone f and C codebooks, each with a fixed random projection W_c, K fixed keys E_ck, and for each key a row
V_ck with a number for each class. A sample reads one row of each codebook, the row of the nearest key, and a step
changes only the rows that its samples read:

    z_c = W_c^T f(x),   k_c = argmin_k || z_c - E_ck ||^2,   logits = 1/C sum_c V_c,k_c,   L = CE(logits, y)

with label smoothing. W_c is standard normal, with columns scaled to norm 1; V is 0 at first, also for new classes. Only
V is trained, by SGD without momentum and weight decay. A prediction reads only keys that training samples have read.

Before the first step the keys are fitted to projections of unlabelled images, in ``key_epochs`` epochs. They start from
N(0, 1). A batch of b projections, n_k of which are nearest to key k, with the sum s_k, moves each codebook by

    N_k <- g N_k + (1 - g) n_k,   S_k <- g S_k + (1 - g) s_k,   N and S from 0
    E_k <- S_k / M_k,   M_k = (N_k + eps) / (sum N + K eps) sum N,   eps = 10^-5
    E_k <- a random projection of the batch, where N_k < 0.1 b / K

C -> codebooks, K -> keys, size of E_ck -> key_dim, g -> key_decay, label smoothing -> label_smoothing. The gradient of
a row is of the order 1 / (C B) for B samples per step, so that either the learning rate or the number of epochs is
large. The unlabelled images are ``key_images``, by default the training images of the first task, which are biased
towards its classes; the paper takes another data set. Nothing else depends on tasks. Since features do not change, they
can be stored (``loop.feature_cache``).
Departs from the paper: the number of classes is not known in advance, so that the softmax is over the classes seen so
far. Pooled features are read, not the positions of a feature map, and values are averaged: decoders of concatenated
values are not implemented. A sample with a hidden label does not count as a reader of its keys. In the authors' code S
starts from the first keys, whose share of S shrinks by g in each step.
"""

import functools
import zipfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import Draw, mix
from cl_lightning.checks import at_least, reason, within
from cl_lightning.data import TensorSource
from cl_lightning.distributed import all_sum
from cl_lightning.losses import cross_entropy, full_precision
from cl_lightning.models import Head
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Traits

_SMOOTHING, _DEAD = 1e-5, 0.1  # eps, and the share of an equal load below which a key is replaced
_DISTANCES = 2**24  # distances in memory at a time
_KEYS, _ORDER, _FRESH = 0xD74B1, 0xD74B2, 0xD74B3  # salts
_ARRAYS = ("x_train", "images", "x_test")


def nearest_keys(codes: Tensor, keys: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Nearest key of each projection in each codebook, int64 ``(C, B)``; the first one of equal distances.

    Args:
        codes: z, ``(C, B, d_k)``.
        keys: E, ``(C, K, d_k)``.
        allowed: Keys that may be found, bool ``(C, K)``; None for all. In a codebook without any, the first one.
    """
    step = max(1, _DISTANCES // max(1, codes.shape[1] * keys.shape[1]))
    found = []
    for start in range(0, len(keys), step):
        part = slice(start, start + step)
        # From differences, not from products, whose rounding depends on the number of rows.
        gaps = torch.cdist(codes[part], keys[part], compute_mode="donot_use_mm_for_euclid_dist")
        if allowed is not None:
            gaps = gaps.masked_fill(~allowed[part, None], torch.inf)
        found.append(gaps.argmin(dim=2))
    return torch.cat(found)


def moved_keys(
    keys: Tensor, sizes: Tensor, sums: Tensor, codes: Tensor, fresh: Tensor, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the keys of some codebooks; the equations are in the docstring of the module.

    Args:
        keys: E, ``(C, K, d_k)``.
        sizes: N, ``(C, K)``.
        sums: S, ``(C, K, d_k)``.
        codes: z of a batch, ``(C, b, d_k)``.
        fresh: Projections that replace keys with few samples, ``(C, K, d_k)``.
        decay: g.

    Returns:
        The new keys, sizes and sums.
    """
    count = keys.shape[1]
    hits = F.one_hot(nearest_keys(codes, keys), count).to(codes.dtype)  # a product, since sums by index depend on order
    sizes = decay * sizes + (1 - decay) * hits.sum(dim=1)
    sums = decay * sums + (1 - decay) * hits.mT @ codes
    total = sizes.sum(dim=1, keepdim=True)
    smoothed = (sizes + _SMOOTHING) / (total + count * _SMOOTHING) * total
    dead = sizes < _DEAD * codes.shape[1] / count
    return torch.where(dead[..., None], fresh, sums / smoothed[..., None]), sizes, sums


class _Values(nn.Module):
    def __init__(self, num_new: int, codebooks: int, keys: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_new, codebooks, keys))


class KeyValueBottleneck(Head):
    """Codebooks of fixed keys with trained values: the logits are the mean of the values of the nearest keys.

    Args:
        num_features: Size of a feature vector, d.
        codebooks: C, at least 1.
        keys: K, at least 1.
        key_dim: d_k, at least 1.

    Attributes:
        projections: W, ``(C, d, d_k)``.
        keys: E, ``(C, K, d_k)``.
        usage: Number of times that training samples have read a key, over all processes, int64 ``(C, K)``.
        fitted: Whether the keys have been fitted to features, bool scalar.
        found: Keys that the samples of the last pass have read, int64 ``(C, B)``.

    Raises:
        ValueError: If an option is out of range.
    """

    projections: Tensor
    keys: Tensor
    usage: Tensor
    fitted: Tensor

    def __init__(self, num_features: int, *, codebooks: int = 256, keys: int = 4096, key_dim: int = 14) -> None:
        super().__init__(num_features)
        at_least(self, 1, codebooks=codebooks, keys=keys, key_dim=key_dim)
        self.size = (codebooks, keys)
        self.register_buffer("projections", F.normalize(torch.randn(codebooks, num_features, key_dim), dim=1))
        self.register_buffer("keys", torch.randn(codebooks, keys, key_dim))
        self.register_buffer("usage", torch.zeros(codebooks, keys, dtype=torch.int64))
        self.register_buffer("fitted", torch.tensor(False))
        self.found = torch.zeros(codebooks, 0, dtype=torch.int64)

    def new_block(self, num_new: int) -> nn.Module:
        return _Values(num_new, *self.size)

    def project(self, features: Tensor) -> Tensor:
        """z, at least float32, ``(C, B, d_k)``, of features ``(B, d)``."""
        features = full_precision(features)
        with torch.autocast(features.device.type, enabled=False):
            return features @ self.projections.to(features.dtype)

    def forward(self, features: Tensor) -> Tensor:
        return self._read(features, None)

    def classify(self, features: Tensor) -> Tensor:
        """Scores ``(B, columns)`` from keys that training samples have read."""
        return self._read(features, self.usage > 0)

    def _read(self, features: Tensor, allowed: Tensor | None) -> Tensor:
        if not self.blocks:
            return full_precision(features).new_zeros(len(features), 0)
        codes = self.project(features)
        self.found = nearest_keys(codes, self.keys.to(codes.dtype), allowed)
        places = self._places().T  # (B, C)
        values = [F.embedding(places, block.flatten(1).T).to(codes.dtype) for block in self._weights()]
        return torch.cat([rows.mean(dim=1) for rows in values], dim=1)

    def _places(self) -> Tensor:
        """Rows of ``found`` in a table of the keys of all codebooks, int64 ``(C, B)``."""
        codebooks, keys = self.size
        return self.found + keys * torch.arange(codebooks, device=self.found.device)[:, None]

    @torch.no_grad()
    def observe(self, labels: Tensor) -> None:
        """Count the keys that the last pass has read. Every process must call this.

        Args:
            labels: Columns of the samples of this process, int64 ``(B,)``; samples with label -1 do not count.
        """
        hits = torch.zeros_like(self.usage).flatten()
        known = (labels >= 0).long().expand_as(self.found)
        hits.index_add_(0, self._places().flatten(), known.flatten())
        self.usage += all_sum(hits).view_as(self.usage)

    @torch.no_grad()
    def fit_keys(self, features: Tensor, *, epochs: int, batch_size: int, decay: float, key: int) -> None:
        """Fit the keys to unlabelled features, the same on every process, and do not change them any more.

        Args:
            features: ``(n, d)``; without any the keys stay as they are, and can be fitted later.
            epochs: Number of epochs, at least 1.
            batch_size: Features per step, at least 1.
            decay: g, in [0, 1).
            key: Key of the random numbers.
        """
        if not len(features):
            return
        codebooks, count = self.size
        keys = full_precision(self.keys)
        sizes, sums = torch.zeros_like(keys[..., 0]), torch.zeros_like(keys)
        step = max(1, _DISTANCES // (min(batch_size, len(features)) * count))
        for epoch in range(epochs):
            order = torch.randperm(len(features), generator=Draw.of(1, key, _ORDER, epoch).generator())
            for number, rows in enumerate(torch.split(order, batch_size)):
                codes = self.project(features[rows.to(features.device)]).to(keys.dtype)
                drawn = Draw.of(codebooks, key, _FRESH, epoch, number).randint(len(rows), count).to(codes.device)
                for start in range(0, codebooks, step):
                    part = slice(start, start + step)
                    fresh = codes[part].gather(1, drawn[part, :, None].expand(-1, -1, codes.shape[2]))
                    moved = moved_keys(keys[part], sizes[part], sums[part], codes[part], fresh, decay)
                    keys[part], sizes[part], sums[part] = moved
        self.keys.copy_(keys)
        self.fitted.fill_(True)


def array_of_images(path: str) -> str:
    """Name of the array of images in an ``.npz`` file: ``x_train``, ``images`` or ``x_test``, the first that it has.

    Raises:
        ValueError: If the file cannot be read, or has none of them.
    """
    try:
        with np.load(Path(path).expanduser(), allow_pickle=False) as file:
            names = list(file.files)
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"DKVB: key_images {path!r} is no .npz file that can be read: {reason(error)}") from None
    for name in _ARRAYS:
        if name in names:
            return name
    raise ValueError(f"DKVB: key_images {path!r} has {', '.join(names) or 'no arrays'}; call the images {_ARRAYS[0]!r}")


def read_images(path: str) -> Tensor:
    """Images of an ``.npz`` file, uint8 ``(N, C, H, W)``; see :func:`array_of_images`."""
    name = array_of_images(path)
    with np.load(Path(path).expanduser(), allow_pickle=False) as file:
        images = file[name]
    return TensorSource(images, np.zeros(len(images), dtype=np.int64), name=f"DKVB: key_images {path!r}").images


class DKVB(ContinualStrategy):
    """Values of fixed keys in random projections of frozen features: a step changes only what its samples read.

    Args:
        codebooks: C, at least 1.
        keys: K, number of keys of a codebook, at least 1.
        key_dim: Size of a key, at least 1.
        key_images: ``.npz`` file of unlabelled images for the keys, under ``x_train``, ``images`` or ``x_test``, in the
            shape of the images of the stream; None for the training images of the first task.
        key_epochs: Epochs of the key initialisation, at least 0; with 0 the keys are standard normal.
        key_batch: Images per step of the key initialisation, at least 1.
        key_decay: g, in [0, 1).
        label_smoothing: In [0, 1).
        optimizer: Builds the optimizer of the values; None for SGD with learning rate 0.3. Momentum, weight decay and
            Adam change rows that no sample of a step has read, and with them the predictions for earlier classes.
        kwargs: Options of the base class, without ``head``, ``loss_classes`` and ``freeze_backbone``.
    """

    traits = Traits(
        family="pretrained",
        paper="Träuble et al., ICML 2023, arXiv:2207.11240",
        needs_pretrained=True,
        needs_empty_batches=True,
        losses_use_images=False,
    )

    def __init__(
        self,
        *,
        codebooks: int = 256,
        keys: int = 4096,
        key_dim: int = 14,
        key_images: str | None = None,
        key_epochs: int = 10,
        key_batch: int = 256,
        key_decay: float = 0.95,
        label_smoothing: float = 0.1,
        optimizer: OptimizerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        head = functools.partial(KeyValueBottleneck, codebooks=codebooks, keys=keys, key_dim=key_dim)
        at_least(self, 1, codebooks=codebooks, keys=keys, key_dim=key_dim, key_batch=key_batch)
        at_least(self, 0, key_epochs=key_epochs)
        within(self, "[0, 1)", key_decay=key_decay, label_smoothing=label_smoothing)
        sgd = functools.partial(torch.optim.SGD, lr=0.3)
        super().__init__(head=head, optimizer=optimizer or sgd, loss_classes="all", freeze_backbone=True, **kwargs)
        if key_images is not None:
            array_of_images(key_images)  # so that a wrong file raises here
        self.key_images, self.key_epochs, self.key_batch = key_images, key_epochs, key_batch
        self.key_decay, self.label_smoothing = key_decay, label_smoothing
        if key_images is not None or key_epochs == 0:  # nothing is learnt from the first task as a whole
            self.traits = self.traits.but(task_free=True)

    @property
    def bottleneck(self) -> KeyValueBottleneck:
        """The head of the network."""
        return cast(KeyValueBottleneck, self.network.head)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.key_epochs and not self.bottleneck.fitted:  # they are in a fit that is resumed, and in later tasks
            self.bottleneck.fit_keys(
                self._key_features(),
                epochs=self.key_epochs,
                batch_size=self.key_batch,
                decay=self.key_decay,
                key=mix(self.seed, _KEYS),
            )

    def _key_features(self) -> Tensor:
        """Features of the images for the keys, ``(n, d)``, the same on every process."""
        if self.key_images is None:
            return self.passes.all_features()[0]
        found = []
        for raw in torch.split(read_images(self.key_images), self.key_batch):
            nothing = torch.zeros(len(raw), dtype=torch.int64)
            batch = Batch(raw, nothing, nothing, nothing, raw, Draw.of(len(raw), 0)).to(self.device)
            if self.image_shape is not None and raw.shape[1] == self.image_shape[0]:
                batch = self.data.finish(batch)
            if batch.images.shape[1:] != self.image_shape:
                raise ValueError(
                    f"DKVB: key_images {self.key_images!r} has images of shape {tuple(raw.shape[1:])}, the stream has "
                    f"images of shape {self.image_shape}; save them in this shape"
                )
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                found.append(self.network.backbone(batch.images).float())
        return torch.cat(found)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        self.bottleneck.observe(batch.labels)
        weights = self.data.weights_of(batch)
        return {"ce": cross_entropy(output.logits, batch.labels, label_smoothing=self.label_smoothing, weights=weights)}
