"""Batch normalisation with statistics of the test batch, of the source data, or of both.

A layer computes ``gamma (x - mean) / sqrt(var + eps) + beta`` with, per channel,

    running   mean and variance of the source data, as in eval mode
    batch     mean and variance of the batch (prediction-time batch normalisation: Nado et al. 2020, arXiv:2006.10963)
    mix       (1 - a) source + a batch; a is given, or n / (n + N) for a batch of n images (Schneider et al.,
              NeurIPS 2020, arXiv:2006.16971)
    collect   mean and variance of the batch, which also update the running statistics
    robust    running statistics updated with the batch, ``r <- (1 - a) r + a batch``; the gradient passes through the
              share of the batch (robust batch normalisation: Yuan et al., CVPR 2023, arXiv:2303.13899)

Variances of a batch are biased, as in training; ``collect`` updates the running ones with unbiased ones. The batch
spans all processes: sums are taken over processes, with gradient. If a channel has a single value in the batch (one
image with a map of one pixel), source statistics are used.
"""

import math
import re
from collections.abc import Iterable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from cl_lightning.batch import Batch
from cl_lightning.distributed import is_distributed, sum_over_processes
from cl_lightning.losses import full_precision
from cl_lightning.models.network import in_eval_mode

Statistics = Literal["running", "batch", "mix", "collect", "robust"]
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


class AdaptiveBatchNorm(_BatchNorm):
    """Batch normalisation layer with a choice of statistics in eval mode; train mode is unchanged.

    Parameters and buffers have the names of the layer that it replaces; :meth:`of` shares the tensors of that layer.

    Attributes:
        statistics: Statistics in eval mode: ``running``, ``batch``, ``mix``, ``collect`` or ``robust``.
        share: a of ``mix``, in [0, 1].
        prior: N of ``mix``, in images; None to use ``share``.
        rate: Weight of the batch in the update of the running statistics with ``collect`` and ``robust``, in [0, 1].
    """

    statistics: Statistics = "running"
    share: float = 1.0
    prior: float | None = None
    rate: float = 0.1

    @classmethod
    def of(cls, layer: _BatchNorm) -> Self:
        """An ``AdaptiveBatchNorm`` that shares the tensors of a layer."""
        made = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        made.weight, made.bias = layer.weight, layer.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            made._buffers[name] = layer._buffers[name]
        for name in ("drop", "act"):  # timm's BatchNormAct2d applies these after the normalisation
            if isinstance(further := getattr(layer, name, None), nn.Module):
                made.add_module(name, further)
        return made.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        result = self._normalized(input)
        for name in ("drop", "act"):
            if name in self._modules:
                result = self._modules[name](result)  # type: ignore[misc]
        return result

    def _normalized(self, x: Tensor) -> Tensor:
        how = "batch" if self.running_mean is None else self.statistics
        if not self.training and how == "running":
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if is_distributed() or (not self.training and how in ("mix", "robust")):
            return self._by_sums(x, how)
        if self.training:
            return super().forward(x)
        if x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        running = (self.running_mean, self.running_var) if how == "collect" else (None, None)
        return F.batch_norm(x, *running, self.weight, self.bias, training=True, momentum=self.rate, eps=self.eps)

    def _by_sums(self, x: Tensor, how: Statistics) -> Tensor:
        values, axes = full_precision(x), (0, *range(2, x.dim()))
        own = values.new_full((1,), x.numel() // x.shape[1])
        sums = sum_over_processes(torch.cat([values.sum(axes), own]))
        count = sums[-1:].detach()
        mean = sums[:-1] / count
        shape = (1, -1, *(1,) * (x.dim() - 2))
        centred = values - mean.view(shape)
        var = sum_over_processes(centred.square().sum(axes)) / count
        if self.training or how == "collect":
            self._move(mean.detach(), var.detach(), count)
        if not self.training and self.running_mean is not None and self.running_var is not None:
            share: float | Tensor = 1.0
            if how == "mix":
                pixels = math.prod(x.shape[2:])
                images = count / pixels
                share = self.share if self.prior is None else images / (images + self.prior)
            elif how == "robust":
                share = self.rate
            share = torch.where(count > 1, torch.as_tensor(share, dtype=mean.dtype, device=mean.device), 0.0)
            mean = torch.lerp(self.running_mean, mean, share)
            var = torch.lerp(self.running_var, var, share)
            if how == "robust":
                with torch.no_grad():
                    self.running_mean.copy_(mean)
                    self.running_var.copy_(var)
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        result: Tensor = (values - mean.view(shape)) * scale.view(shape)
        if self.bias is not None:
            result = result + self.bias.view(shape)
        return result.to(dtype=x.dtype)

    @torch.no_grad()
    def _move(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Update the running statistics with a batch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        rate: float | Tensor = self.rate
        if self.training:
            self.num_batches_tracked.add_(1)
            rate = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        weight = torch.as_tensor(rate, dtype=mean.dtype, device=mean.device)
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(var * count / (count - 1).clamp(min=1), weight)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept feature maps of any dimension."""


def adapt_norms(module: nn.Module) -> list[AdaptiveBatchNorm]:
    """Replace each batch normalisation layer of a module by an ``AdaptiveBatchNorm``; returns the new layers.

    ``SyncBatchNorm`` layers are not replaced.
    """
    made = []
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm | AdaptiveBatchNorm):
                layer = AdaptiveBatchNorm.of(child)
                setattr(parent, name, layer)
                made.append(layer)
    return made


def set_statistics(module: nn.Module, statistics: Statistics, **options: Any) -> None:
    """Set the statistics that the ``AdaptiveBatchNorm`` layers of a module use in eval mode.

    Args:
        module: Any module.
        statistics: ``running``, ``batch``, ``mix``, ``collect`` or ``robust``.
        options: Further attributes of ``AdaptiveBatchNorm``: ``share``, ``prior``, ``rate``.
    """
    for layer in module.modules():
        if isinstance(layer, AdaptiveBatchNorm):
            layer.statistics = statistics
            for name, value in options.items():
                setattr(layer, name, value)


@torch.no_grad()
def refit_norms(network: nn.Module, batches: Iterable[Batch], frozen: Iterable[nn.Module] = ()) -> None:
    """Compute the running statistics of batch normalisation again, for weights that were merged, not trained.

    A running statistic is the mean over the batches, weighted by their sizes, of the mean or the unbiased variance of a
    batch, over all processes. Layers normalise by the statistics of the batch, as in training; all other layers are in
    eval mode. Batches of one sample are left out. Without such layers nothing is read.

    Args:
        network: Maps images to anything; not wrapped for distributed training.
        batches: This process's share of each batch, as many on every process.
        frozen: Modules whose layers keep their statistics.
    """
    kept = {id(layer) for module in frozen for layer in module.modules()}
    places = [
        (parent, name, child)
        for parent in network.modules()
        for name, child in parent.named_children()
        if isinstance(child, _BatchNorm) and child.track_running_stats and id(child) not in kept
    ]
    if not places:
        return
    layers = [AdaptiveBatchNorm.of(child) for _, _, child in places]
    for (parent, name, _), layer in zip(places, layers, strict=True):
        setattr(parent, name, layer)
    count = 0
    try:
        with in_eval_mode(network):
            for batch in batches:
                if batch.draw.total < 2:
                    continue
                count += batch.draw.total
                for layer in layers:
                    layer.statistics, layer.rate = "collect", batch.draw.total / count
                network(batch.images)
    finally:
        for parent, name, child in places:
            setattr(parent, name, child)


def norm_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Scales and shifts of the normalisation layers of a module, by parameter name."""
    return {
        f"{name}.{part}" if name else part: parameter
        for name, layer in module.named_modules()
        if isinstance(layer, _NORMS)
        for part, parameter in layer.named_parameters(recurse=False)
    }


def early_norm_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Scales and shifts of the normalisation layers before the last stage of a network, by parameter name.

    The last stage begins with the last of the modules ``layer1``, ``layer2``, ... or ``stages.0``, ``stages.1``, ...,
    or with the last quarter of the modules ``blocks.0``, ``blocks.1``, ... of a transformer. Layers that come after
    its beginning are left out.

    Args:
        module: A network with stages of these names.

    Raises:
        ValueError: If the network has fewer than two stages of these names.
    """
    names = [name for name, _ in module.named_modules()]
    for pattern, share in ((r"(?:^|\.)(?:layer|stages\.)(\d+)$", 0.0), (r"(?:^|\.)blocks\.(\d+)$", 0.25)):
        stages = [name for name in names if re.search(pattern, name)]
        depth = min((name.count(".") for name in stages), default=0)
        stages = [name for name in stages if name.count(".") == depth]
        if len(stages) > 1:
            first = names.index(stages[-max(round(share * len(stages)), 1)])
            early = set(names[:first])
            return {name: value for name, value in norm_parameters(module).items() if name.rpartition(".")[0] in early}
    kind = type(getattr(module, "backbone", module)).__name__
    raise ValueError(
        f"{kind} has no stages called layer1, stages.0 or blocks.0, so that its last stage is not known; name the "
        "parameters by patterns"
    )
