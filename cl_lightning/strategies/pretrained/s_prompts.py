"""S-Prompts with images alone, S-iPrompts (Wang, Huang & Hong, NeurIPS 2022, arXiv:2205.05467).

Each task s, usually a domain, has prompt tokens P_s and a linear head W_s of its own, which no other task changes. The
task of an image is inferred from the features f without prompts of a frozen transformer:

    q = f(x) / ||f(x)||,   M_s = the K centres of k-means over q of the training images of task s
    s(x) = argmin_s min_k || q - M_s,k ||_1,   prediction = argmax W_s f(x; P_s)
    L = CE(W_t f(x; P_t), y over the classes of task t)        in task t

K -> centres. Forgetting is only due to tasks that are inferred wrongly: with the task known, the accuracy on a task
stays as it is. A class that the task of an image does not have gets the score -inf. The tokens are appended to the
sequence without position embedding; their place has no effect. As in the paper's code they are drawn from U(-1 /
sqrt(d), 1 / sqrt(d)). The paper's second form, S-liPrompts, which also learns tokens in the text encoder of CLIP, is
``SLiPrompts``, on stored text. Departs from the code in k-means, which begins with k-means++ centres drawn by seed and
task, and is one run.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import ImageShape, mix
from cl_lightning.checks import at_least
from cl_lightning.losses import full_precision
from cl_lightning.memory import restore_shapes
from cl_lightning.models import DomainHead, GrowingParameters, Network, Output, Prompts, PromptSite, blocks_of, kmeans
from cl_lightning.strategies.pretrained.prompted import PromptedStrategy
from cl_lightning.strategy import Batch, Task


def nearest_domain(points: Tensor, centres: Tensor) -> Tensor:
    """Domain with the nearest centre in the L1 norm, int64 ``(B,)``.

    Args:
        points: ``(B, d)``.
        centres: ``(domains, K, d)``, at least one domain.
    """
    distances: Tensor = torch.cdist(points, centres.flatten(0, 1).to(points), p=1)
    return distances.view(len(points), *centres.shape[:2]).amin(dim=2).argmin(dim=1)


class DomainPrompts(Prompts):
    """Prompt tokens of each domain, and centres of the features of its images.

    In training passes all samples use the tokens of the newest domain.

    Args:
        model: Contains the blocks of a ViT of timm.
        length: Number of tokens of a domain, at least 1.

    Attributes:
        prompts: P_s of each domain, ``(length, d)``.
        centres: M_s, float32 ``(domains, K, d)``, of features of norm 1.
        choice: Domain ``(B,)`` of each sample of the next pass; None to infer it.
        used: Domain ``(B,)`` of each sample of the last pass.
    """

    centres: Tensor

    def __init__(self, model: nn.Module, *, length: int = 10) -> None:
        super().__init__()
        at_least(self, 1, length=length)
        blocks = blocks_of(model, None, "DomainPrompts")
        self.size = (length, cast(nn.LayerNorm, blocks[0].norm1).normalized_shape[-1])
        self.prompts = GrowingParameters()
        self.register_buffer("centres", torch.zeros(0, 0, 0))
        self.choice: Tensor | None = None
        self.used = torch.zeros(0, dtype=torch.int64)
        self.sites.append(PromptSite(blocks[0], blocks[-1]))
        self._enable(False)

    def grow(self) -> None:
        """Add the tokens of a domain, drawn from U(-1 / sqrt(d), 1 / sqrt(d))."""
        bound = self.size[1] ** -0.5
        self.prompts.append(torch.empty(self.size).uniform_(-bound, bound))

    def add_centres(self, centres: Tensor) -> None:
        """Add the centres ``(K, d)`` of a domain."""
        self.centres = torch.cat([self.centres.view(-1, *centres.shape), centres[None].to(self.centres)])

    def settled(self) -> Iterator[nn.Parameter]:
        return iter(list(self.prompts)[:-1])

    def route(self, query: Tensor) -> Tensor:
        """Domains ``(B,)`` of queries ``(B, d)``; before there are centres, the newest one."""
        if not len(self.centres):
            return torch.full((len(query),), len(self.prompts) - 1, device=query.device)
        with torch.autocast(query.device.type, enabled=False):
            return nearest_domain(F.normalize(query, dim=1), self.centres)

    def answer(self, query: Tensor) -> None:
        site = cast(PromptSite, self.sites[0])
        if self.training and torch.is_grad_enabled():
            self.used = torch.full((len(query),), len(self.prompts) - 1, device=query.device)
            site.tokens = self.prompts[-1].expand(len(query), -1, -1)
        else:
            self.used = self.route(query) if self.choice is None else self.choice
            site.tokens = torch.stack(list(self.prompts))[self.used]

    def forget(self) -> None:
        cast(PromptSite, self.sites[0]).tokens = torch.empty(0)
        self.choice = None

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        restore_shapes(self, state_dict, prefix, ("centres",))
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]


class DomainNetwork(Network):
    """A prompted backbone, and the layer of the head of the domain whose prompts each image used."""

    def forward(self, images: Tensor) -> Output:
        features = self.backbone(images)
        return Output(features, self.head(features, self._used()))

    def classify(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        with torch.autocast(features.device.type, enabled=False):
            scores: Tensor = self.head(full_precision(features), self._used())
        return scores

    def _used(self) -> Tensor:
        return cast(DomainPrompts, self.backbone.prompts).used


class SPrompts(PromptedStrategy):
    """Prompts and a linear head for each domain in a frozen transformer; the domain is the one of the nearest centre.

    Args:
        length: Number of prompt tokens of a domain, at least 1.
        centres: K, number of centres of a domain, at least 1.
        kwargs: Options of ``PromptedStrategy``, without ``head``.
    """

    traits = PromptedStrategy.traits.but(
        family="pretrained", paper="Wang et al., NeurIPS 2022, arXiv:2205.05467", task_ids="inferred"
    )

    def __init__(self, *, length: int = 10, centres: int = 5, **kwargs: Any) -> None:
        at_least(self, 1, centres=centres)
        super().__init__(prompts=functools.partial(DomainPrompts, length=length), head=DomainHead, **kwargs)
        self.centres = centres

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        self.network = DomainNetwork(self.network.backbone, self.network.head)

    def begin_task(self, task: Task) -> None:
        self._head.add_domain(task.columns, task.num_seen)
        self._prompts.grow()

    def trainable(self) -> Iterable[nn.Parameter]:
        yield self._prompts.prompts[-1]
        yield from self._head.blocks[-1].parameters()

    def on_train_start(self) -> None:
        super().on_train_start()
        if len(self._prompts.centres) == self.task.index:
            without = Network(self.prompted.base, self.network.head)
            features = F.normalize(self.passes.all_features(without)[0], dim=1)
            self._prompts.add_centres(kmeans(features, self.centres, key=mix(self.seed, self.task.index)))

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        return {"ce": self.classification_loss(output, batch)}

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        self._prompts.choice = tasks
        return super().predict(images)

    def bytes_kept(self) -> dict[str, int]:
        kept = super().bytes_kept()
        return {**kept, "prototypes": kept.get("prototypes", 0) + self._prompts.centres.nbytes}

    @property
    def _prompts(self) -> DomainPrompts:
        return cast(DomainPrompts, self.prompted.prompts)

    @property
    def _head(self) -> DomainHead:
        return cast(DomainHead, self.network.head)
