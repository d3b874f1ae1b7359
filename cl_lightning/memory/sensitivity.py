"""Sensitivity of a network to each weight, measured on data: Fisher information (EWC) and norm of the output (MAS).

Both are sums over samples of a power of per-sample gradients. For linear layers the sums have a closed form,

    d L_i / d W = delta_i a_i^T,  so  sum_i (d L_i / d W)^2 = (delta^2)^T (a^2)

with a the layer's input and delta the gradient with respect to its output: one product per batch. Gradients of the
other weights are computed per sample with ``torch.func``.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from cl_lightning.batch import Batch
from cl_lightning.distributed import all_sum
from cl_lightning.losses import masked_logits
from cl_lightning.models import LinearHead, in_eval_mode, uncompiled

Tensors = Mapping[str, Tensor]
_SAMPLED = 0x5A3D  # salt of the labels that fisher_diagonal draws


@contextmanager
def _as_written(network: nn.Module) -> Iterator[None]:
    """Context with eval mode and without compiled modules, whose layers call no hooks; the end restores both."""
    with in_eval_mode(network), uncompiled(network):
        yield


Labels = Literal["exact", "sampled", "predicted", "empirical"]
Seeds = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (n, C), labels (n,), uniform numbers (n,)) -> K vectors per sample (n, K, C), multiplied by dz/dtheta."""


class _LinearLayers:
    """Linear layers of a network whose sums over samples have a closed form: called once per pass, on vectors.

    Args:
        network: Network whose output has ``features`` and ``logits``.
        parameters: Weights for which sums are computed, by name.
        images: A batch ``(B, C, H, W)``; a forward pass of its first image finds these layers.
    """

    def __init__(self, network: nn.Module, parameters: Tensors, images: Tensor) -> None:
        self.network = network
        uses: dict[str, list[int]] = {}
        layers = {name: module for name, module in network.named_modules() if type(module) is nn.Linear}
        handles = [
            module.register_forward_hook(lambda _, args, __, name=name: uses.setdefault(name, []).append(args[0].dim()))
            for name, module in layers.items()
        ]
        network(images[:1])
        for handle in handles:
            handle.remove()
        self.layers = {
            name: layers[name] for name, dims in uses.items() if dims == [2] and f"{name}.weight" in parameters
        }
        owners = {f"{name}.{part}" for name in self.layers for part, _ in self.layers[name].named_parameters()}
        head = getattr(network, "head", None)
        # A linear head computes one product with all of its blocks, whose inputs are the features.
        self.head = head if head is not None and type(head).forward is LinearHead.forward else None
        if self.head is not None:
            blocks = {f"head.{name}" for name, _ in self.head.blocks.named_parameters(prefix="blocks")}
            owners |= blocks & parameters.keys()
        shared = len({id(value) for value in network.parameters()}) != len(list(network.parameters()))
        self.names = set() if shared else owners & parameters.keys()
        if not self.names:
            self.layers, self.head = {}, None

    @torch.enable_grad()
    def add(
        self, sums: dict[str, Tensor], images: Tensor, labels: Tensor, uniform: Tensor, seeds: "Seeds", power: int
    ) -> None:
        """Add the sums over a batch to ``sums``, for the weights in ``names``."""
        if not self.names:
            return
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def note(name: str, args: tuple[Any, ...], output: Tensor) -> Tensor:
            inputs[name] = args[0].detach()
            # In a frozen network the graph begins at this output.
            outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
            return outputs[name].clone()  # an activation in place must not overwrite the output

        handles = [
            layer.register_forward_hook(lambda _, args, output, name=name: note(name, args, output))
            for name, layer in self.layers.items()
        ]
        output = self.network(images)
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            vectors = seeds(output.logits.detach(), labels, uniform)  # (B, K, C)
        for k in range(vectors.shape[1]):
            deltas: tuple[Tensor, ...] = ()
            if outputs:
                keep = k + 1 < vectors.shape[1]
                deltas = torch.autograd.grad(output.logits, list(outputs.values()), vectors[:, k], retain_graph=keep)
            for (name, entered), delta in zip(inputs.items(), deltas, strict=True):
                self._sum(sums, name, entered, delta, power)
            if self.head is not None:
                start, features = 0, output.features.detach()
                for index, size in enumerate(self.head.block_sizes()):
                    part = vectors[:, k, start : start + size]
                    self._sum(sums, f"head.blocks.{index}", features, part, power)
                    start += size

    def _sum(self, sums: dict[str, Tensor], name: str, entered: Tensor, delta: Tensor, power: int) -> None:
        sized, factors = delta.abs() ** power, entered.abs() ** power
        if f"{name}.weight" in self.names:
            sums[f"{name}.weight"] += (sized.T @ factors).detach()
        if f"{name}.bias" in self.names:
            sums[f"{name}.bias"] += sized.sum(dim=0).detach()


@torch.no_grad()
def _pull_back(
    network: nn.Module,
    parameters: Tensors,
    batches: Iterable[Batch],
    seeds: Seeds,
    power: int,
    *,
    per_sample: bool,
    chunk_size: int | None,
    labels: Labels | None = None,
) -> dict[str, Tensor]:
    """``1/N sum_i sum_k | J_i^T v_ik |^power``, J_i = dz(x_i)/dtheta, over the batches of all processes.

    With ``per_sample=False``, a batch of B samples contributes B times the power of its mean of J_i^T v_i instead.
    """
    if not parameters:
        raise ValueError("importance: parameters is empty; give at least one parameter with a gradient")
    device = next(iter(parameters.values())).device
    sums = {name: torch.zeros_like(value) for name, value in parameters.items()}
    closed: _LinearLayers | None = None
    weights: dict[str, Tensor] = {}
    count = torch.zeros((), dtype=torch.int64, device=device)

    def logits_of(values: dict[str, Tensor], images: Tensor) -> Tensor:
        logits: Tensor = functional_call(network, values, (images,)).logits
        return logits

    def of_sample(image: Tensor, label: Tensor, uniform: Tensor) -> dict[str, Tensor]:
        logits, pull = vjp(lambda values: logits_of(values, image[None]), weights)[:2]
        vectors = seeds(logits, label[None], uniform[None])
        total: dict[str, Tensor] = {}
        for k in range(vectors.shape[1]):  # one vector at a time: memory for one gradient per sample instead of K
            for name, gradient in pull(vectors[:, k])[0].items():
                term = gradient.abs() if power == 1 else gradient.square()
                total[name] = total[name] + term if k else term
        return total

    def of_batch(images: Tensor, labels: Tensor, uniform: Tensor) -> dict[str, Tensor]:
        logits, pull = vjp(lambda values: logits_of(values, images), weights)[:2]
        gradients: dict[str, Tensor] = pull(seeds(logits, labels, uniform)[:, 0] / len(images))[0]
        return {name: len(images) * gradient.abs() ** power for name, gradient in gradients.items()}

    with _as_written(network), torch.autocast(device.type, enabled=False):
        for batch in batches:
            if labels == "empirical":
                batch = batch.select(batch.labels >= 0)
            if not len(batch):
                continue
            count += len(batch)
            uniform = torch.zeros(len(batch), device=device)
            if labels == "sampled":
                uniform = batch.draw.fork(_SAMPLED).rand(device=device)
            if closed is None:
                closed = _LinearLayers(network, parameters if per_sample else {}, batch.images)
                weights = {name: value.detach() for name, value in parameters.items() if name not in closed.names}
                if chunk_size is None:  # about 1 GiB of float32 per set of per-sample gradients
                    chunk_size = max(1, 2**28 // max(1, sum(value.numel() for value in weights.values())))
            if not per_sample:
                for name, term in of_batch(batch.images, batch.labels, uniform).items():
                    sums[name] += term
                continue
            closed.add(sums, batch.images, batch.labels, uniform, seeds, power)
            if not weights:
                continue
            chunks = (torch.split(rows, chunk_size or 1) for rows in (batch.images, batch.labels, uniform))
            for chunk in zip(*chunks, strict=True):
                for name, terms in vmap(of_sample)(*chunk).items():
                    sums[name] += terms.sum(dim=0)
    all_sum(count)
    return {name: all_sum(total) / count.clamp(min=1) for name, total in sums.items()}


def fisher_diagonal(
    network: nn.Module,
    parameters: Tensors,
    batches: Iterable[Batch],
    *,
    labels: Labels = "exact",
    per_sample: bool = True,
    loss_classes: Tensor | None = None,
    target: str = "class",
    chunk_size: int | None = None,
) -> dict[str, Tensor]:
    """Diagonal of the Fisher information of softmax(z(x)), averaged over samples (EWC, arXiv:1612.00796).

        F_j = 1/N sum_i E_y [ (d log p(y | x_i) / d theta_j)^2 ]

    ``labels`` defines y: ``exact`` takes the expectation over p(y | x), with one backward pass per class; ``sampled``
    samples one y from p (unbiased); ``predicted`` takes the y of the largest probability; ``empirical`` takes the true
    label and leaves out samples without one. With C classes ``exact`` needs C backward passes and the others one.
    Gradients are computed per sample in eval mode, since batch statistics would make samples depend on each other.

    Args:
        network: Maps images to an object with ``.logits``; not wrapped for distributed training.
        parameters: Weights theta, by their names in ``network``.
        batches: This process's share of the task's data, normalised and on the network's device. Sums and counts are
            reduced over processes: the result is the mean over all data, the same on every process.
        labels: How y is chosen.
        per_sample: Square the gradient of each sample. False squares the gradient of each batch's mean loss and
            multiplies by the batch size, as FACIL does (there in train mode). That is not the Fisher information: it is
            smaller, and depends on the batch size of a process.
        loss_classes: Classes in the softmax, bool ``(C,)``; None for all.
        target: What y is. Besides ``class``: ``labels``, each of the classes present or not with probability sigmoid(z)
            (the sum over classes of ``p (1 - p) (dz/d theta)^2``), or ``number``, of a normal distribution around z of
            variance 1 (``(dz/d theta)^2``). For these two the expectation over y is exact.
        chunk_size: Number of samples at a time; None for as many as have about 1 GiB of gradients.

    Returns:
        Importances, at least 0, by name, each of the shape of its parameter.

    Raises:
        ValueError: For ``exact`` with ``per_sample=False``, since a batch has no single y, if ``parameters`` is empty,
            and for other targets with ``predicted`` or ``empirical`` labels, or with ``per_sample=False``.
    """
    if target != "class":
        return _fisher_of_targets(network, parameters, batches, labels, per_sample, loss_classes, target, chunk_size)
    if labels == "exact" and not per_sample:
        raise ValueError(
            "fisher_diagonal: labels is 'exact', which needs per_sample=True; with per_sample=False use 'sampled', "
            "'predicted' or 'empirical'"
        )
    columns = None if loss_classes is None else loss_classes.nonzero().squeeze(1)

    def seeds(logits: Tensor, true: Tensor, uniform: Tensor) -> Tensor:
        """Gradients with respect to the logits: ``sqrt(p_y) (e_y - p)`` for each class, or ``e_y - p`` for one."""
        p = (logits if loss_classes is None else masked_logits(logits, loss_classes)).softmax(dim=1)
        every = torch.arange(p.shape[1], device=p.device)
        if labels == "exact":
            some = every if columns is None else columns
            e = (some[:, None] == every).to(p.dtype)  # (K, C)
            return p[:, some, None].sqrt() * (e - p[:, None, :])
        if labels == "sampled":  # y is the number of classes whose cumulative probability is at most u
            # On a GPU a product with ones is deterministic, a cumulative sum is not.
            up_to = torch.ones(p.shape[1], p.shape[1] - 1, dtype=torch.float64, device=p.device).triu()
            y = (p.double() @ up_to <= uniform[:, None]).sum(dim=1)
        else:
            y = true if labels == "empirical" else p.argmax(dim=1)
        return ((y[:, None] == every).to(p.dtype) - p)[:, None, :]

    return _pull_back(
        network, parameters, batches, seeds, 2, per_sample=per_sample, chunk_size=chunk_size, labels=labels
    )


def _fisher_of_targets(
    network: nn.Module,
    parameters: Tensors,
    batches: Iterable[Batch],
    labels: Labels,
    per_sample: bool,
    loss_classes: Tensor | None,
    target: str,
    chunk_size: int | None,
) -> dict[str, Tensor]:
    """:func:`fisher_diagonal` of several labels or a number."""
    if target not in ("labels", "number") or labels not in ("exact", "sampled") or not per_sample:
        raise ValueError(
            f"fisher_diagonal: target is {target!r} with labels {labels!r} and per_sample {per_sample}; for labels and "
            "numbers use 'exact' or 'sampled', and per_sample=True; for pixels there is none"
        )

    def seeds(logits: Tensor, true: Tensor, uniform: Tensor) -> Tensor:
        spread = torch.ones_like(logits)
        if target == "labels":
            p = logits.sigmoid()
            spread = (p * (1 - p)).sqrt()
            if loss_classes is not None:
                spread = spread * loss_classes
        return torch.diag_embed(spread)  # (n, C, C): one vector for each output

    return _pull_back(network, parameters, batches, seeds, 2, per_sample=True, chunk_size=chunk_size)


def output_norm(
    network: nn.Module,
    parameters: Tensors,
    batches: Iterable[Batch],
    *,
    squared: bool = True,
    per_sample: bool = True,
    chunk_size: int | None = None,
) -> dict[str, Tensor]:
    """Sensitivity of the norm of the logits to each weight, without labels (MAS).

        Omega_j = 1/N sum_i | d ||z(x_i)||^2 / d theta_j |

    Memory Aware Synapses (Aljundi et al., ECCV 2018, arXiv:1711.09601). Eval mode and the reduction over processes are
    as in :func:`fisher_diagonal`. Of logits for pixels, ``(C, h, w)``, z is the mean of the norm over the places.

    Args:
        network, parameters, batches, chunk_size: As in :func:`fisher_diagonal`.
        squared: Whether to differentiate the squared norm, as in the paper, or the norm, as in FACIL.
        per_sample: Take the absolute value of the gradient of each sample. False takes the absolute value of each
            batch's mean gradient and multiplies by the batch size, as FACIL does: gradients of opposite sign cancel.

    Returns:
        Importances, at least 0, by name, each of the shape of its parameter.

    Raises:
        ValueError: If ``parameters`` is empty.
    """

    def seeds(logits: Tensor, true: Tensor, uniform: Tensor) -> Tensor:
        gradient = 2 * logits if squared else logits / logits.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return gradient[:, None] / math.prod(logits.shape[2:])

    return _pull_back(network, parameters, batches, seeds, 1, per_sample=per_sample, chunk_size=chunk_size)
