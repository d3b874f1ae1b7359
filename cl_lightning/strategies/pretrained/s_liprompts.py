"""S-Prompts with images and text, S-liPrompts (Wang, Huang & Hong, NeurIPS 2022, arXiv:2205.05467), on stored text.

As in ``SPrompts``, each task s has prompt tokens P_s in a frozen image tower f, and the task of an image is the one of
the nearest centre of features without prompts. In place of a linear head, each task has text features of its classes,

    t_s,c = (e_c + R_s,c) / || e_c + R_s,c ||,   logit_c(x) = scale * cos(f(x; P_s), t_s,c)
    L = CE(logits, y over the classes of task t)   over P_t and R_t       in task t

with e_c the stored embedding of the name of class c. A task changes neither prompts nor text of another one.
Departs from the paper, which learns 16 context tokens of each domain in the text encoder of CLIP: an encoder is needed
at each step for this. Here the residual R_s takes their place, a vector for each class that is 0 at first, as in
TaskRes (Yu et al., CVPR 2023, arXiv:2211.10277). Before it is trained, the text side is the zero-shot classifier of
CLIP.
Where features and embeddings are not of one space, the projection of ``TextHead`` is trained in the first task, with
the scale if it is learnt, and both are fixed afterwards.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.losses import full_precision
from cl_lightning.models import DomainHead, Head, LinearHead, TextHead
from cl_lightning.strategies.pretrained.s_prompts import SPrompts
from cl_lightning.strategy import HeadFactory


class Residual(nn.Module):
    """Residuals of the classes of a domain, initially 0, and their columns.

    Attributes:
        weight: ``(classes, D)``.
        columns: int64 ``(classes,)``.
    """

    columns: Tensor

    def __init__(self, num_embedding: int, num_rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_rows, num_embedding))
        self.register_buffer("columns", torch.zeros(num_rows, dtype=torch.int64))


class DomainTextHead(DomainHead):
    """Cosines to embeddings of the class names with a learnt residual for each domain.

    Args:
        text: The embeddings, their projection and scale.
    """

    needs_names = True

    def __init__(self, text: TextHead) -> None:
        super().__init__(text.num_features)
        self.text = text

    def new_block(self, num_new: int) -> nn.Module:
        return Residual(self.text.num_embedding, num_new)

    def see(self, num_seen: int) -> None:
        super().see(num_seen)
        self.text.grow(num_seen - self.text.num_columns)

    def add_domain(self, columns: Sequence[int], num_seen: int) -> None:
        super().add_domain(columns, num_seen)
        cast(Residual, self.blocks[-1]).columns.copy_(torch.tensor(list(columns)))

    def fill_names(self, names: Sequence[str]) -> None:
        self.text.fill_names(names)

    def text_rows(self) -> Tensor:
        """t of the classes of all domains, domain after domain, ``(rows, D)``, of norm 1."""
        columns = torch.cat([cast(Residual, block).columns for block in self.blocks])
        residuals = full_precision(self.weight())
        return F.normalize(self.text.weight().to(residuals)[columns] + residuals, dim=1)

    def forward(self, features: Tensor, domains: Tensor | None = None) -> Tensor:
        if not self.blocks:
            return features.new_zeros(len(features), self.num_columns)
        projected = self.text.embed(features)
        with torch.autocast(features.device.type, enabled=False):  # cosines near 1 differ by less than bf16 resolves
            rows = self.text_rows()
            directions = F.normalize(full_precision(projected), dim=1)
            logits = self.text.scale * F.linear(directions, rows.to(directions))
        return self.of_domains(logits, domains)


def _with_residuals(num_features: int, *, build: HeadFactory) -> Head:
    text = build(num_features)
    if not isinstance(text, TextHead):
        raise ValueError(
            f"SLiPrompts: head is {type(text).__name__}; use a TextHead, whose rows are embeddings of the class names"
        )
    return DomainTextHead(text)


class SLiPrompts(SPrompts):
    """Prompts and text features for each domain; the domain of an image is the one of the nearest centre.

    Args:
        head: Builds a ``TextHead``. The scale of CLIP is ``scale=100`` with ``learn_scale=False``.
        kwargs: Options of ``SPrompts``.
    """

    def __init__(self, *, head: HeadFactory | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.build_head = functools.partial(_with_residuals, build=head or LinearHead)

    def trainable(self) -> Iterable[nn.Parameter]:
        yield from super().trainable()
        if self.task.is_first:
            text = cast(DomainTextHead, self.network.head).text
            yield from text.parameters()
