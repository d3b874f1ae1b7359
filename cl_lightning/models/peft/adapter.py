"""Bottleneck adapters."""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from cl_lightning.checks import at_least, one_of, within
from cl_lightning.models.peft.base import Peft, Site, _part, _width, blocks_of


class _Bottleneck(Site):
    """``s W_up Dropout(act(W_down x))``, initially 0."""

    def __init__(self, width: int, bottleneck: int, activation: str, scale: float, learn_scale: bool, p: float) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.down.bias)  # the weight keeps the initialisation of nn.Linear, Kaiming uniform
        self.activation: nn.Module = nn.GELU() if activation == "gelu" else nn.ReLU()
        self.dropout = nn.Dropout(p)
        self.factor: Tensor
        if learn_scale:
            self.factor = nn.Parameter(torch.tensor(float(scale)))
        else:
            self.register_buffer("factor", torch.tensor(float(scale)), persistent=False)
        self._seen: list[Tensor] = []

    def change(self, inputs: Tensor) -> Tensor:
        change: Tensor = self.factor * self.up(self.dropout(self.activation(self.down(inputs))))
        return change

    def see(self, inputs: Tensor) -> Tensor:
        self._seen = [inputs]
        return inputs

    def add_of_seen(self, inputs: Tensor, output: Tensor) -> Tensor:
        change = self.change(self._seen.pop())
        return output + change.to(output.dtype)

    def add_of_input(self, inputs: Tensor, output: Tensor) -> Tensor:
        return output + self.change(inputs).to(output.dtype)

    def add_of_output(self, inputs: Tensor, output: Tensor) -> Tensor:
        return output + self.change(output).to(output.dtype)


class Adapter(Peft):
    """Bottleneck adapters in the blocks of a transformer.

        h(u) = s W_up Dropout(act(W_down u)),   W_down from Kaiming's uniform distribution, W_up = 0, biases 0
        parallel:    y = x' + MLP(LN2(x')) + h(x')       AdaptFormer (Chen et al., NeurIPS 2022, arXiv:2205.13535)
        attention:   x' = x + Attn(u) + h(u), u = LN1(x)  LAE (Gao et al., ICCV 2023, arXiv:2303.10070)
        sequential:  y = x' + m + h(m), m = MLP(LN2(x'))  Houlsby et al. (ICML 2019, arXiv:1902.00751), after the MLP

    s -> scale. Initially the output of the model is unchanged. ``parallel`` reads x' before LN2 and adds h(x') to the
    output of the block, regardless of its layer scale or stochastic depth.

    Args:
        model: Contains the blocks of a ViT of timm.
        place: ``parallel``, ``attention`` or ``sequential``.
        bottleneck: Rows of W_down: 64 in APER and RanPAC, 16 in MOS, 5 in LAE.
        scale: s: 0.1 in APER and RanPAC, 1 in LAE.
        learn_scale: Whether s is a parameter, one per block.
        dropout: Dropout probability in the bottleneck during training, in [0, 1).
        activation: ``relu`` or ``gelu``.
        blocks: Indices of blocks; None for all.

    Raises:
        ValueError: If an option is out of range or the model has no such blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        place: Literal["parallel", "attention", "sequential"] = "parallel",
        bottleneck: int = 64,
        scale: float = 0.1,
        learn_scale: bool = False,
        dropout: float = 0.1,
        activation: Literal["relu", "gelu"] = "relu",
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        one_of(self, ("parallel", "attention", "sequential"), place=place)
        one_of(self, ("relu", "gelu"), activation=activation)
        at_least(self, 1, bottleneck=bottleneck)
        within(self, "[0, 1)", dropout=dropout)
        for block in blocks_of(model, blocks, "Adapter"):
            site = _Bottleneck(_width(block), bottleneck, activation, scale, learn_scale, dropout)
            if place == "parallel":
                site.hook_input(_part(block, "norm2"), site.see)
                site.hook_output(block, site.add_of_seen)
            elif place == "attention":
                site.hook_output(_part(block, "attn"), site.add_of_input)
            else:
                site.hook_output(_part(block, "mlp"), site.add_of_output)
            self.sites.append(site)

    def up_weights(self) -> list[Tensor]:
        """W_up of each block, ``(d, bottleneck)``."""
        return [cast(_Bottleneck, site).up.weight for site in self.sites]
