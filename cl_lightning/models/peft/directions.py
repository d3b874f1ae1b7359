"""Low-rank directions of queries and values whose magnitudes are trained apart (SD-LoRA)."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.models.growing import GrowingParameters
from cl_lightning.models.peft.base import Peft, Site, blocks_of

_PARTS = (0, 2)  # queries and values of q, k, v


class _Directions(Site):
    """Directions of one layer: ``output + sum_i alpha_i m_i B_i A_i x`` on queries and values.

    Attributes:
        downs: A_i, ``(2, r_i, d)``, of norm 1 for earlier tasks.
        ups: B_i, ``(2, d, r_i)``, of norm 1 for earlier tasks.
        sizes: m_i, ``(2,)``; 1 for the present task.
        magnitudes: alpha of all directions, scalars, of the owner.
    """

    def __init__(self, host: nn.Linear, magnitudes: GrowingParameters) -> None:
        super().__init__()
        self.inputs, self.width = host.in_features, host.out_features // 3
        self.downs, self.ups, self.sizes = GrowingParameters(), GrowingParameters(), GrowingParameters()
        self.magnitudes = (magnitudes,)  # in a tuple: registered by the owner
        self.hook_output(host, self.add)

    def grow(self, rank: int) -> None:
        """Add a direction: A from Kaiming's uniform distribution, B = 0."""
        down = torch.empty(len(_PARTS), rank, self.inputs)
        for matrix in down:
            nn.init.kaiming_uniform_(matrix, a=5**0.5)
        self.downs.append(down)
        self.ups.append(torch.zeros(len(_PARTS), self.width, rank))
        self.sizes.append(torch.ones(len(_PARTS)))

    def add(self, inputs: Tensor, output: Tensor) -> Tensor:
        if not len(self.ups):
            return output
        pieces = list(output.chunk(3, dim=-1))
        ranks = [up.shape[-1] for up in self.ups]
        alphas = torch.stack([*self.magnitudes[0]])[:, None] * torch.stack([*self.sizes])  # (directions, 2)
        for number, place in enumerate(_PARTS):
            down = torch.cat([one[number] for one in self.downs])  # (R, d)
            up = torch.cat([one[number] for one in self.ups], dim=1)  # (d, R)
            factors = torch.cat([alpha.expand(rank) for alpha, rank in zip(alphas[:, number], ranks, strict=True)])
            pieces[place] = pieces[place] + F.linear(F.linear(inputs, down) * factors, up).to(output.dtype)
        return torch.cat(pieces, dim=-1)

    def norms(self) -> Tensor:
        """``||B|| ||A||`` of the newest direction, ``(2,)``."""
        found: Tensor = self.ups[-1].detach().flatten(1).norm(dim=1) * self.downs[-1].detach().flatten(1).norm(dim=1)
        return found

    @torch.no_grad()
    def settle(self, sizes: Tensor) -> None:
        """Divide the newest factors by their norms, and set m."""
        for one in (self.ups[-1], self.downs[-1]):
            one.div_(one.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None])
        self.sizes[-1].copy_(sizes)

    def products(self) -> Tensor:
        """Inner products of the changes ``m_i B_i A_i`` of all directions, float64 ``(directions, directions)``."""
        total = torch.zeros(len(self.ups), len(self.ups), dtype=torch.float64)
        for number in range(len(_PARTS)):
            ups = [one[number].detach().double() for one in self.ups]
            downs = [one[number].detach().double() for one in self.downs]
            for i, (up, down) in enumerate(zip(ups, downs, strict=True)):
                for j in range(i + 1):
                    size = self.sizes[i][number].double() * self.sizes[j][number].double()
                    total[i, j] += (size * ((up.T @ ups[j]) * (down @ downs[j].T)).sum()).cpu()
        return total + total.tril(-1).T


class DirectionSets(Peft):
    """Low-rank directions of the queries and values of all attention layers, with a magnitude for each direction.

    Args:
        model: Contains the blocks of a ViT of timm.

    Attributes:
        magnitudes: alpha_i of each direction, scalars.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.magnitudes = GrowingParameters()
        for block in blocks_of(model, None, "SDLoRA"):
            self.sites.append(_Directions(cast(nn.Linear, block.get_submodule("attn.qkv")), self.magnitudes))

    def __len__(self) -> int:
        return len(self.magnitudes)

    @property
    def layers(self) -> list[_Directions]:
        return [cast(_Directions, site) for site in self.sites]

    def grow(self, rank: int, magnitude: float) -> None:
        """Add a direction to each layer."""
        self.magnitudes.append(torch.tensor(magnitude))
        for site in self.layers:
            site.grow(rank)

    def newest(self) -> list[nn.Parameter]:
        """A and B of the newest direction, and all magnitudes."""
        factors = [group[-1] for site in self.layers for group in (site.downs, site.ups)]
        return [*factors, *self.magnitudes]

    @torch.no_grad()
    def settle(self, *, released: bool = False) -> None:
        """Make the newest branch a direction of norm 1; ``released`` keeps its magnitude and loses its size."""
        norms = torch.stack([site.norms() for site in self.layers])  # (layers, 2)
        mean = norms.mean()
        for site, sizes in zip(self.layers, norms / mean.clamp(min=1e-12), strict=True):
            site.settle(torch.ones_like(sizes) if released else sizes)
        if not released:
            self.magnitudes[-1].mul_(mean)

    @torch.no_grad()
    def merge_newest(self, below: float) -> bool:
        """Express the newest direction by the earlier ones, if its relative squared residual is less than ``below``."""
        gram = torch.stack([site.products() for site in self.layers]).sum(dim=0)
        old, across, own = gram[:-1, :-1], gram[:-1, -1], gram[-1, -1]
        if not len(old):
            return False
        found = torch.linalg.lstsq(old, across[:, None], driver="gelsd").solution[:, 0]
        residual = own - 2 * found @ across + found @ old @ found
        if not bool(residual < below * own):
            return False
        for alpha, share in zip(list(self.magnitudes)[:-1], found.tolist(), strict=True):
            alpha.add_(self.magnitudes[-1] * share)
        self.magnitudes.pop()
        for site in self.layers:
            for group in (site.downs, site.ups, site.sizes):
                group.pop()
        return True

    def merge(self) -> None:
        raise ValueError(
            "DirectionSets: its directions are kept apart, since their magnitudes are trained in later tasks; keep them"
        )
