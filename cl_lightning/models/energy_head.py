"""Energies of an image and each class, from hidden layers whose units the class gates (energy-based models)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.checks import at_least, one_of, within
from cl_lightning.models.heads import Head

Gate = Literal["residual", "softmax", "binary"]


class _GateBlock(nn.Module):
    weight: Tensor

    def __init__(self, values: Tensor, *, learnt: bool) -> None:
        super().__init__()
        if learnt:
            self.weight = nn.Parameter(values)
        else:
            self.register_buffer("weight", values)


class EnergyHead(Head):
    """Negative energies as logits: hidden layers with one gate per unit and class, then a linear map to a number.

    With e_c the embedding of class c, f the features and w the output weights (Li et al., CoLLAs 2022,
    arXiv:2011.12216),

        h_0 = f,   h_l = act(W_l h_{l-1} + b_l) * g_l(c),   logit_c = -E(x, c) = -w . h_L
        residual    g = 1 + e_c / ||e_c||       act = relu        relu(a + a * u_c) of the paper, since 1 + u >= 0
        softmax     g = H softmax(e_c)          act = identity    H the number of units
        binary      g in {0, 1}, random, fixed  act = relu

    A class has one embedding, which gates all layers, or for ``binary`` gates of its own in each layer. The first layer
    is computed once, and with one layer all energies are one matrix product; further layers are computed once per
    class. The bias of the energy is left out: a constant changes neither loss nor prediction.
    Embeddings of new classes are standard normal. The embeddings of the classes are the rows of the head.

    Args:
        num_features: Size of a feature vector, d.
        hidden: Units of each layer, at least one layer; as many in each layer, except for ``binary`` gates.
        gate: Kind of the gates: ``residual``, ``softmax`` or ``binary``.
        off: For ``binary``: probability that a unit is switched off for a class, in [0, 1).

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self, num_features: int, *, hidden: Sequence[int] = (400,), gate: Gate = "residual", off: float = 0.85
    ) -> None:
        super().__init__(num_features)
        if not hidden:
            raise ValueError("EnergyHead: hidden is empty; give the units of at least one layer")
        for units in hidden:
            at_least(self, 1, hidden=units)
        one_of(self, get_args(Gate), gate=gate)
        within(self, "[0, 1)", off=off)
        if gate != "binary" and len(set(hidden)) > 1:
            raise ValueError(
                f"EnergyHead: hidden is {list(hidden)}; give the same number of units in each layer, which one "
                "embedding of the class gates, or gate 'binary'"
            )
        self.hidden, self.gate, self.off = tuple(hidden), gate, off
        self.layers = nn.ModuleList(nn.Linear(*sizes) for sizes in pairwise((num_features, *hidden)))
        self.output = nn.Linear(hidden[-1], 1, bias=False)

    def new_block(self, num_new: int) -> nn.Module:
        if self.gate == "binary":
            return _GateBlock((torch.rand(num_new, sum(self.hidden)) >= self.off).float(), learnt=False)
        return _GateBlock(torch.randn(num_new, self.hidden[0]), learnt=True)

    def gates(self) -> list[Tensor]:
        """g_l(c) of each layer l, ``(columns, units)``."""
        rows = self.weight()
        if self.gate == "binary":
            return list(torch.split(rows, list(self.hidden), dim=1))
        gate = 1 + F.normalize(rows, dim=1) if self.gate == "residual" else rows.shape[1] * rows.softmax(dim=1)
        return [gate] * len(self.hidden)

    def forward(self, features: Tensor) -> Tensor:
        if not self.blocks:
            return features.new_zeros(len(features), 0)
        *gates, last = self.gates()
        h = self._layer(0, features)  # (B, units), the same for all classes
        for number, gate in enumerate(gates, start=1):
            h = self._layer(number, (h if h.dim() == 3 else h[:, None]) * gate)  # (B, columns, units)
        rows = self.output.weight * last  # (columns, units)
        return -F.linear(h, rows) if h.dim() == 2 else -(h * rows).sum(dim=2)

    def _layer(self, number: int, values: Tensor) -> Tensor:
        activations: Tensor = self.layers[number](values)
        return activations if self.gate == "softmax" else activations.relu()
