"""A short training on the memory of a strategy, and a function of its samples, outside of the training steps."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cl_lightning.batch import Batch, Draw, mix
from cl_lightning.distributed import all_gather_rows, alone, rank, world_size
from cl_lightning.losses import cross_entropy, logit_matching
from cl_lightning.memory import Memory
from cl_lightning.models import Network, in_eval_mode, uncompiled

_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)


def finetune_on_memory(
    strategy: Any,
    network: nn.Module,
    memory: Memory,
    names: Iterable[str],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    key: int,
    logit_weight: float = 0.0,
    decays: bool = True,
) -> None:
    """Train some parameters of a network on samples of a memory, in place, by plain SGD.

        L = mean CE(f(x), y) + a * mean_c (f_c(x) - z_c)^2,    z the stored logits

    Modules that own a trained parameter are in training mode, all others in eval mode; the modes and ``requires_grad``
    are restored. Each process computes the same steps with all samples, so nothing is exchanged.

    Args:
        strategy: Strategy whose data module augments the samples.
        network: Its network, or a copy of it.
        memory: Memory with samples; with no samples nothing happens.
        names: Names of the parameters to be trained; with none nothing happens.
        steps: Number of steps.
        batch_size: Number of samples per step; all samples if there are fewer.
        lr: Learning rate.
        key: Seed of the draws and of dropout.
        logit_weight: a, at least 0; above 0 the memory must have the field ``logits``.
        decays: Whether the learning rate falls to 0 along a half cosine.
    """
    chosen = set(names)
    trained = {name: value for name, value in network.named_parameters() if name in chosen}
    if not len(memory) or not trained or not steps:
        return
    asked = {name: value.requires_grad for name, value in network.named_parameters()}
    gradients_before = {name: value.grad for name, value in trained.items()}
    modes = {module: module.training for module in network.modules()}
    devices = [value.device for value in list(trained.values())[:1] if value.device.type == "cuda"]
    try:
        network.requires_grad_(False).eval()
        for value in trained.values():
            value.requires_grad_()
        for module in network.modules():
            if any(value.requires_grad for value in module.parameters(recurse=False)):
                module.training = True
        optimizer = torch.optim.SGD(trained.values(), lr=lr)
        with torch.enable_grad(), torch.random.fork_rng(devices), uncompiled(network):
            for step in range(steps):
                torch.manual_seed(mix(key, step))
                with alone():
                    samples = strategy.data.augment(memory.sample(batch_size, Draw.of(batch_size, key, step)))
                logits = network(samples.images).logits
                loss = cross_entropy(logits, samples.labels)
                if logit_weight:
                    loss = loss + logit_weight * logit_matching(logits, samples.extra["logits"])
                for group in optimizer.param_groups:
                    group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2 if decays else lr
                gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
                for value, gradient in zip(trained.values(), gradients, strict=True):
                    value.grad = gradient
                optimizer.step()
    finally:
        for name, value in network.named_parameters():
            value.requires_grad_(asked[name])
            if name in trained:
                value.grad = gradients_before[name]
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def of_memory(strategy: Any, memory: Memory, function: Callable[[Batch], Tensor]) -> Tensor:
    """A function of each sample of a memory, ``(held, ...)``, the same on every process.

    Each process computes the function of its share; the network is in eval mode. Every process must call this.

    Args:
        strategy: Strategy whose data module finishes the images, without augmentation, and gives the size of batches.
        memory: Memory, on the device of the strategy, with a sample at least.
        function: Called with a batch of samples, which may have no rows; returns a tensor with one row per sample. The
            forward pass is in the precision of the Trainer.
    """
    size = max(strategy.data.module.eval_batch_size // world_size(), 1)
    mine = torch.arange(len(memory), device=memory.labels.device).tensor_split(world_size())[rank()]
    found = []
    with in_eval_mode(strategy.network), strategy.trainer.precision_plugin.forward_context():
        for rows in torch.split(mine, size):
            found.append(function(strategy.data.finish(memory.at(rows, Draw.of(len(rows), 0)))))
    return all_gather_rows(torch.cat(found))


def norms_and_head(network: Network) -> list[str]:
    """Names of the parameters of the normalisation layers of the backbone and of the head."""
    norms = {id(value) for layer in network.modules() if isinstance(layer, _NORMS) for value in layer.parameters()}
    head = {id(value) for value in network.head.parameters()}
    return [name for name, value in network.named_parameters() if id(value) in norms | head]


def module_of(name: str) -> str:
    """Module of a parameter, by name: ``backbone.layers.1`` of ``backbone.layers.1.weight``; all blocks of the head are
    the module ``head``."""
    return "head" if name.startswith("head.") else name.rpartition(".")[0]


def sensitivities(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean change per parameter of each module, ``|| theta_l - theta'_l ||_1 / |theta_l|``.

    Args:
        before: theta' by the names of the parameters; parameters of another shape or name are left out.
        after: theta by name.
    """
    sums: dict[str, tuple[float, int]] = {}
    for name, value in after.items():
        if name in before and before[name].shape == value.shape:
            total, size = sums.get(module_of(name), (0.0, 0))
            change = float((value.double() - before[name].double()).abs().sum())
            sums[module_of(name)] = total + change, size + value.numel()
    return {module: total / size for module, (total, size) in sums.items()}
