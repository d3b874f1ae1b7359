"""T3A, test-time template adjuster (Iwasawa and Matsuo, NeurIPS 2021).

The classifier is replaced by templates, means of features that the classifier itself labelled; no parameter changes.
With W and b the weights of the classifier, each row of W is at first a support: its label is the class that the
classifier gives to it, which need not be its own. For each batch z of features, with p = softmax(W z + b),

    supports <- supports + (z, argmax p, H(p));   of each class the K supports of lowest entropy are kept
    template_c = mean direction: normalise(sum of z / |z| over the supports of c)
    score_c = z . template_c

A class without supports has its normalised row of W as template. K -> supports; None for all, whose number grows with
the stream (the authors' code drops the support of highest entropy in this case). ``TemplateAdjuster`` does the same to
the features of any other test-time adaptation method: ``--model Tent --model.output TemplateAdjuster``.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.checks import at_least
from cl_lightning.distributed import all_gather_together
from cl_lightning.losses import entropy, full_precision
from cl_lightning.models import LinearHead
from cl_lightning.strategies.test_time.base import TestTimeAdaptation
from cl_lightning.strategies.test_time.parts.part import Adapting, OutputHead
from cl_lightning.strategy import Output


def most_certain(labels: Tensor, entropies: Tensor, count: int | None) -> Tensor:
    """Indices of the ``count`` entries of lowest entropy of each label, the earlier one first among equals.

    Args:
        labels: int64 ``(n,)``.
        entropies: ``(n,)``.
        count: Number per label; None for all.

    Returns:
        int64 ``(m,)``, increasing.
    """
    if count is None:
        return torch.arange(len(labels), device=labels.device)
    order = entropies.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]
    grouped = labels[order]
    places = torch.arange(len(order), device=order.device)
    first = torch.searchsorted(grouped, grouped)  # place of the first entry of the same label
    return order[places - first < count].sort().values


class TemplateAdjuster(OutputHead):
    """Scores by templates: mean directions of the surest features of each class.

    Args:
        supports: K, at least 1; None to keep all.
    """

    transductive = False  # evaluations do not learn
    weight: Tensor
    start_labels: Tensor
    start_entropies: Tensor
    features: Tensor
    labels: Tensor
    entropies: Tensor

    def __init__(self, supports: int | None = 20) -> None:
        super().__init__()
        at_least(self, 1, supports=supports, optional=True)
        self.supports = supports
        for name in ("weight", "features"):  # W, and directions of the supports, (C, d) and (n, d)
            self.register_buffer(name, torch.zeros(0, 0))
        for name in ("start_labels", "labels"):  # of the rows of W, and of the supports
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64))
        for name in ("start_entropies", "entropies"):
            self.register_buffer(name, torch.zeros(0))

    def check(self, strategy: Adapting) -> None:
        head = strategy.network.head
        if not isinstance(head, LinearHead):
            name = type(head).__name__
            raise ValueError(f"{type(self).__name__}: use a LinearHead, whose rows are templates; the head is a {name}")

    @torch.no_grad()
    def learn_source(self, strategy: Adapting) -> None:
        head = strategy.network.head
        assert isinstance(head, LinearHead)
        weight = head.weight()[: strategy.num_source].detach()
        logits = head.classify(weight)[:, : strategy.num_source].float()
        self.weight = F.normalize(weight.float(), dim=1)
        self.start_labels, self.start_entropies = logits.argmax(dim=1), entropy(logits)
        self.reset()

    def reset(self) -> None:
        chosen = most_certain(self.start_labels, self.start_entropies, self.supports)
        self.features, self.labels = self.weight[chosen], self.start_labels[chosen]
        self.entropies = self.start_entropies[chosen]

    @torch.no_grad()
    def learn(self, output: Output) -> None:
        logits = full_precision(output.logits).float()
        features = F.normalize(full_precision(output.features).float(), dim=1)
        new = all_gather_together([features, logits.argmax(dim=1), entropy(logits)])
        features, labels, entropies = (
            torch.cat([old, rows]) for old, rows in zip((self.features, self.labels, self.entropies), new, strict=True)
        )
        kept = most_certain(labels, entropies, self.supports)
        self.features, self.labels, self.entropies = features[kept], labels[kept], entropies[kept]

    @torch.no_grad()
    def forward(self, output: Output) -> Tensor:
        """Scores ``(B, C)`` of the rows of this process."""
        sums = torch.zeros_like(self.weight).index_add_(0, self.labels, self.features)
        counts = torch.bincount(self.labels, minlength=len(self.weight))
        templates = F.normalize(torch.where(counts[:, None] > 0, sums, self.weight), dim=1)
        scores: Tensor = full_precision(output.features).float() @ templates.T
        return scores


class T3A(TestTimeAdaptation):
    """Templates of the surest features instead of the classifier, without training.

    Args:
        supports: K, at least 1; None to keep all: 1, 5, 20, 50, 100 or all in the paper, chosen on source data.
        statistics: Statistics of batch normalisation, see ``TestTimeAdaptation``.
        reset: When the supports are reset to the classifier, see ``TestTimeAdaptation``.
        kwargs: Options of ``TestTimeAdaptation``.
    """

    traits = TestTimeAdaptation.traits.but(family="test-time", paper="Iwasawa and Matsuo, NeurIPS 2021")

    def __init__(
        self,
        *,
        supports: int | None = 20,
        statistics: Literal["source", "batch", "mix", "moving"] = "source",
        reset: Literal["never", "domain", "batch"] = "never",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            statistics=statistics,
            params=None,
            reset=reset,
            predict_when="before",
            output=TemplateAdjuster(supports),
            **kwargs,
        )
