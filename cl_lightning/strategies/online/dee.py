"""Differentiable ensembles with nearest-neighbour routing, DE&E (Wojcik et al. 2022, arXiv:2211.14963).

N experts, linear maps with a bounded output, share the features h of a frozen encoder. Each expert i has a key k_i,
and a sample is seen by the k experts with the nearest keys. A soft choice of the nearest keys, an entropic optimal
transport between the experts and two places, 1 "chosen" and 2 "not chosen", makes the routing differentiable:

    f_i(h) = tau tanh((V_i h + b_i) / tau),   c_i = cos(h, k_i),   s_i = 1 - c_i
    g = N P_.1,   P = argmin <P, D> - eps H(P),   P 1 = 1/N,   P^T 1 = (k/N, 1 - k/N)
    D_i1 = s_i^2 / m,   D_i2 = (s_i - 1)^2 / m,   m such that the largest D is 1
    o = sum_i g_i^2 c_i f_i / sum_i g_i c_i,   g_i = 0 where it is below 0.3
    L = -mean o_y + mean sum_i (1 - c_i) g_i

L has no softmax: only the output of the true class is increased, and tau bounds it. The rows of other classes, and the
experts with g_i = 0, have the gradient 0 and do not change by a bit, which replaces a memory. N -> experts, k ->
neighbours, eps -> epsilon, 0.3 -> threshold. The second term trains the keys (``train_keys``); without, they are random
and fixed. The optimizer (:class:`SignDescent`) changes each weight with a gradient by the same length.

The plan P has one unknown: row i is a softmax over the two places, g_i = sigmoid((1 - 2 s_i) / (eps m) + lambda),
with lambda such that sum_i g_i = k. lambda is found by bisection, and its gradient is the gradient of the equation.
Departs from the authors' code: there P is the result of 400 Sinkhorn iterations, which are too few for eps = 5e-4 (g
may sum to half of k), and m is over a whole batch; here it is over the experts of one sample, so that a prediction
does not depend on other samples. Configurations of the code ask for trained keys, but its optimizer does not have
them; here ``train_keys`` trains them by the same optimizer, with the learning rate ``key_lr``, and c_i in o has a
gradient too. Two further classifiers, trained there on the same features for comparison, share nothing with the
ensemble and are left out. The sign of the second term of :class:`SignDescent` is the code's.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.checks import above, at_least, within
from cl_lightning.losses import full_precision
from cl_lightning.models import Head
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Traits

_STEPS = 70  # bisections: an interval of some thousands is then below the resolution of float64


class SignDescent(torch.optim.Optimizer):
    """Descent along the sign of the gradient, only where it is not 0: ``w += lr (growth w - sign g)``.

    A weight with the gradient 0 does not change. ``growth`` is the weight decay of the released code of DE&E, which
    has this sign.

    Args:
        params: Parameters or groups.
        lr: Learning rate, at least 0.
        growth: Factor of the weight in the update, at least 0.

    Raises:
        ValueError: If an option is negative.
    """

    def __init__(self, params: Any, lr: float = 1e-4, growth: float = 1e-4) -> None:
        at_least(self, 0, lr=lr, growth=growth)
        super().__init__(params, {"lr": lr, "growth": growth})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if (gradient := weight.grad) is not None:
                    change = group["growth"] * weight - gradient.sign()
                    weight.add_(change.where(gradient != 0, 0.0), alpha=group["lr"])
        return loss


def soft_top_k(values: Tensor, k: int, temperature: Tensor) -> Tensor:
    """Smooth indicator of the k largest values: ``sigmoid(v / temperature + lambda)`` with the sum k.

    It is the plan of an entropic optimal transport of n items to two places with the shares k / n and 1 - k / n.

    Args:
        values: v, ``(B, n)``, float64.
        k: In 1 .. n.
        temperature: Above 0, ``(B, 1)``, without gradient.

    Returns:
        ``(B, n)``, in [0, 1], with gradient for the values.
    """
    n = values.shape[1]
    if k == n:
        return torch.ones_like(values)
    scaled = values / temperature
    with torch.no_grad():
        level = math.log(k / (n - k))  # lambda if all values are 0
        low, high = (level - scaled.amax(dim=1, keepdim=True), level - scaled.amin(dim=1, keepdim=True))
        for _ in range(_STEPS):
            middle = (low + high) / 2
            enough = torch.sigmoid(scaled + middle).sum(dim=1, keepdim=True) >= k
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        chosen = torch.sigmoid(scaled + high)
        slopes = chosen * (1 - chosen)
        shares = slopes / slopes.sum(dim=1, keepdim=True).clamp(min=torch.finfo(slopes.dtype).tiny)
    # Of sum_i sigmoid(v_i + lambda) = k: d lambda = -sum_i share_i dv_i.
    moved = (shares * (scaled - scaled.detach())).sum(dim=1, keepdim=True)
    return torch.sigmoid(scaled + (high - moved))


class _ExpertBlock(nn.Module):
    """V and b of new classes, for all experts."""

    def __init__(self, num_new: int, experts: int, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_new, experts, num_features))
        self.bias = nn.Parameter(torch.zeros(num_new, experts))
        std = 1 / (0.87962566 * math.sqrt(num_features))  # 0.8796: deviation of a normal number that is cut at 2
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)


class GatedExpertsHead(Head):
    """Outputs of the experts whose keys are the nearest; the equations are in the docstring of the module.

    Args:
        num_features: Size of a feature vector, d.
        experts: N, at least 1.
        neighbours: k, in 1 .. N.
        tau: Bound of the outputs, above 0.
        epsilon: eps, above 0.
        threshold: Below it g is 0, in [0, 1).
        train_keys: Whether the keys are trained.

    Attributes:
        keys: ``(N, d)``; a parameter.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        num_features: int,
        *,
        experts: int = 128,
        neighbours: int = 16,
        tau: float = 250.0,
        epsilon: float = 5e-4,
        threshold: float = 0.3,
        train_keys: bool = False,
    ) -> None:
        super().__init__(num_features)
        at_least(self, 1, experts=experts)
        within(self, f"[1, {experts}]", neighbours=neighbours)
        above(self, 0, tau=tau, epsilon=epsilon)
        within(self, "[0, 1)", threshold=threshold)
        self.experts, self.neighbours, self.tau = experts, neighbours, tau
        self.epsilon, self.threshold = epsilon, threshold
        self.keys: Tensor
        keys = F.normalize(torch.randn(experts, num_features), dim=1)
        if train_keys:
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)

    def new_block(self, num_new: int) -> nn.Module:
        return _ExpertBlock(num_new, self.experts, self.num_features)

    def gates(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """g and c of features ``(B, d)``, float64 ``(B, N)``."""
        with torch.autocast(features.device.type, enabled=False):
            cosines = F.linear(F.normalize(features.double(), dim=1), F.normalize(self.keys.double(), dim=1))
            scores = 1 - cosines
            largest = torch.maximum(scores.square(), (scores - 1).square()).amax(dim=1, keepdim=True).detach()
            gates = soft_top_k(1 - 2 * scores, self.neighbours, self.epsilon * largest)
            return gates.where(gates >= self.threshold, 0.0), cosines

    def forward(self, features: Tensor) -> Tensor:
        if not self.blocks:
            return features.new_zeros(len(features), 0)
        gates, cosines = self.gates(features)
        total = (gates * cosines).sum(dim=1, keepdim=True)
        total = total.where(total.abs() > 1e-12, 1e-12)
        factors = gates.square() * cosines / total  # (B, N)
        rows = self.weight()
        bias = torch.cat([cast(Tensor, block.bias) for block in self.blocks])
        raw = F.linear(features, rows.flatten(0, 1), bias.flatten()).view(-1, *bias.shape)  # (B, C, N)
        raw = full_precision(raw)
        return torch.einsum("bcn,bn->bc", self.tau * torch.tanh(raw / self.tau), factors.to(raw.dtype))


class DEE(ContinualStrategy):
    """Experts on the features of a frozen encoder, of which those with the nearest keys learn and answer.

    Args:
        experts: N, at least 1; 16, 128 or 1024 in the paper.
        neighbours: k, in 1 .. N; 4, 16 or 32 in the paper.
        tau: Bound of the outputs of an expert, above 0.
        epsilon: Entropic regularisation of the routing, above 0; towards 0 the routing is the k nearest keys.
        threshold: Experts with a smaller g are left out, in [0, 1).
        train_keys: Whether the keys are trained.
        key_lr: Learning rate of the keys, at least 0.
        optimizer: As in the base class; None for ``SignDescent`` with learning rate 1e-4.
        kwargs: Options of the base class, apart from ``freeze_backbone``; a backbone ``MLP`` with ``hidden: []`` takes
            feature vectors as they are.
    """

    traits = Traits(
        family="online",
        paper="Wojcik et al. 2022, arXiv:2211.14963",
        needs_pretrained=True,
        losses_use_images=False,
        task_free=True,
    )

    def __init__(
        self,
        *,
        experts: int = 128,
        neighbours: int = 16,
        tau: float = 250.0,
        epsilon: float = 5e-4,
        threshold: float = 0.3,
        train_keys: bool = False,
        key_lr: float = 5e-5,
        optimizer: OptimizerCallable | None = None,
        **kwargs: Any,
    ) -> None:
        head = functools.partial(
            GatedExpertsHead,
            experts=experts,
            neighbours=neighbours,
            tau=tau,
            epsilon=epsilon,
            threshold=threshold,
            train_keys=train_keys,
        )
        head(1)  # so that an option out of range raises here, not when the network is built
        super().__init__(head=head, optimizer=optimizer or SignDescent, freeze_backbone=True, **kwargs)
        at_least(self, 0, key_lr=key_lr)
        if self.loss_classes != "all":
            raise ValueError(
                f"{type(self).__name__}: loss_classes is {self.loss_classes!r}, but only the output of the true class "
                "is trained; use 'all'"
            )
        self.train_keys, self.key_lr = train_keys, key_lr

    @property
    def expert_head(self) -> GatedExpertsHead:
        """The head of the network."""
        return cast(GatedExpertsHead, self.network.head)

    def parameter_groups(self, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        keys = self.expert_head.keys
        groups: list[dict[str, Any]] = [{"params": [weight for weight in parameters if weight is not keys]}]
        if len(groups[0]["params"]) < len(parameters):
            groups.append({"params": [keys], "lr": self.key_lr, "growth": 0.0, "weight_decay": 0.0})
        return groups

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        labelled = batch.labels >= 0
        count = labelled.sum().clamp(min=1)
        own = output.logits.gather(1, batch.labels.clamp(min=0)[:, None]).squeeze(1)
        terms = {"ensemble": -own.where(labelled, 0.0).sum() / count}
        if self.train_keys:
            gates, cosines = self.expert_head.gates(output.features)
            distance = ((1 - cosines) * gates).sum(dim=1)
            terms["keys"] = distance.where(labelled, 0.0).sum() / count
        return terms


class DomainAgnosticMoE(DEE):
    """The mixture of experts of DE&E with trained keys, for feature vectors of any domain (NAOE, DeDe).

    Args:
        train_keys: Whether the keys are trained.
        kwargs: Options of ``DEE``.
    """

    traits = DEE.traits.but(paper="Wojcik et al. 2023, arXiv:2307.05399")

    def __init__(self, *, train_keys: bool = True, **kwargs: Any) -> None:
        super().__init__(train_keys=train_keys, **kwargs)
