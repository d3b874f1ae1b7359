"""EAR: Encoder-Adaptor-Reconfigurator (Daniels et al., 2023, arXiv:2308.02084).

A frozen encoder, and for each domain d a shallow adaptor a_d and a linear head W_d (the reconfigurator). New domains
are detected, and the domain of a test image is inferred, in a hyperdimensional space (``HyperDomains``):

    phi_l(x) = output of stage l of the encoder, averaged over its positions,   f(x) = features of the encoder
    h(x) = sign(sum_l sign(P_l phi_l)),   v_d = sum of h(x) over domain d,   s_d(x) = cos(h(x), v_d)
    prediction = argmax W_d a_d(f(x)),   d = argmax_d s_d(x)

Phase ``detect`` passes the images of a task once, without augmentation. They are a new domain if a share of more than
``open_share`` is out of distribution (s_d(x) below q_d, the ``quantile`` of the scores of domain d's own images, with d
the domain with the largest score), or if the domain with most of the images does not have all classes of the task.
Otherwise they belong to this domain, and nothing is trained. A shift that leaves the cosine with v_d as it is, such as
a rotation of natural images, is not detected; with ``open_share=0`` nearly every task is a new domain.
The adaptor of a new domain is the candidate with the largest score of a zero-shot architecture search, on ``probe``
images: the candidates are not trained for it (Mellor et al., ICML 2021, arXiv:2006.04647).

    score = log det(K + 10^-3 I) - cost_weight |parameters|,   K_ij = N - Hamming(c(x_i), c(x_j))
    c(x) = which of the N units of the candidate are above 0

Phase ``train`` trains the adaptor and W_d of a new domain, by cross-entropy over the classes of the task. Earlier
adaptors and heads never change: with the domain known, the accuracy on a task stays as it is. A class that the domain
of an image does not have gets the score -inf.

    identity      f                                                  units f
    scale_shift   gamma f + beta, from gamma = 1, beta = 0           units of the result
    adapter_r     f + U relu(D f), from U = 0, r = 4, 16, 64         units D f
    mlp_1, mlp_2  relu(W f), relu(W' relu(W f)), as wide as f        units W f, and W' relu(W f)

Departs from the paper, of which only the abstract was at hand: the vectors, the thresholds, the search space and its
score, the decision for the images of a task together, and new domains for new classes are our reading. Adaptors act on
the features of the encoder, so that an image passes through it once.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_lightning.batch import ImageShape, mix
from cl_lightning.checks import at_least, matching, one_of, within
from cl_lightning.distributed import all_gather_rows
from cl_lightning.losses import full_precision
from cl_lightning.memory import GrowingBuffers, HyperDomains
from cl_lightning.models import Backbone, DomainHead, Network, Output, built, in_eval_mode
from cl_lightning.strategy import Batch, ContinualStrategy, Phase, PhaseOptions, Task, Traits

DETECT = "detect"
_RIDGE = 1e-3
_CANDIDATES, _PROJECTIONS = 0xEA21, 0xEA22  # salts


class Adaptor(nn.Module):
    """The identity, and the base class of adaptors of features.

    Args:
        width: Number of features, d.
    """

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, features: Tensor) -> Tensor:
        """Adapted features ``(B, d)`` of features ``(B, d)``."""
        return features

    def units(self, features: Tensor) -> Tensor:
        """Units whose signs are the code of a sample in the architecture search, ``(B, N)``."""
        return self.forward(features)


class ScaleShift(Adaptor):
    """``gamma f + beta`` for each feature."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.gamma, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, features: Tensor) -> Tensor:
        return self.gamma * features + self.beta


class BottleneckAdaptor(Adaptor):
    """``f + U relu(D f)``, from U = 0.

    Args:
        width: Number of features, d.
        rank: Rows of D, at least 1.
    """

    def __init__(self, width: int, *, rank: int) -> None:
        super().__init__(width)
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, features: Tensor) -> Tensor:
        change: Tensor = self.up(self.down(features).relu())
        return features + change

    def units(self, features: Tensor) -> Tensor:
        below: Tensor = self.down(features)
        return below


class MLPAdaptor(Adaptor):
    """Fully connected layers with ReLU, as wide as the features.

    Args:
        width: Number of features, d.
        layers: Number of layers, at least 1.
    """

    def __init__(self, width: int, *, layers: int) -> None:
        super().__init__(width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers:
            features = layer(features).relu()
        return features

    def units(self, features: Tensor) -> Tensor:
        found = []
        for layer in self.layers:
            found.append(layer(features))
            features = found[-1].relu()
        return torch.cat(found, dim=1)


ADAPTORS: dict[str, Callable[[int], Adaptor]] = {
    "identity": Adaptor,
    "scale_shift": ScaleShift,
    "adapter_4": functools.partial(BottleneckAdaptor, rank=4),
    "adapter_16": functools.partial(BottleneckAdaptor, rank=16),
    "adapter_64": functools.partial(BottleneckAdaptor, rank=64),
    "mlp_1": functools.partial(MLPAdaptor, layers=1),
    "mlp_2": functools.partial(MLPAdaptor, layers=2),
}
"""The search space, by name: functions of the number of features."""
_NAMES = tuple(ADAPTORS)


@torch.no_grad()
def search_score(units: Tensor) -> Tensor:
    """``log det(K + 10^-3 I)``, float64 scalar: large where samples have different codes.

    Args:
        units: ``(n, N)``; a code is the signs of a row.
    """
    codes = (units > 0).double()
    with torch.autocast(units.device.type, enabled=False):
        kernel = codes @ codes.T + (1 - codes) @ (1 - codes).T  # N - Hamming
    kernel.diagonal().add_(_RIDGE)
    score: Tensor = torch.linalg.slogdet(kernel).logabsdet
    return score


class DomainAdaptors(GrowingBuffers):
    """The adaptor of each domain, and the domain of each task.

    Args:
        width: Number of features, d.

    Attributes:
        kinds: Place of each adaptor's name in ``ADAPTORS``, int64 ``(T,)``.
        domains: Domain of each task whose images were detected, int64 ``(tasks,)``.
        adaptors: The adaptors, in the order of the domains.
    """

    kinds: Tensor
    domains: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        for name in ("kinds", "domains"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64))
        self.adaptors = nn.ModuleList()

    def add(self, name: str, adaptor: Adaptor) -> None:
        """Append an adaptor of this name, on the device of ``kinds``."""
        self.kinds = F.pad(self.kinds, (0, 1), value=_NAMES.index(name))
        self.adaptors.append(adaptor.to(self.kinds.device))

    def note(self, domain: int) -> None:
        """Append the domain of a task."""
        self.domains = F.pad(self.domains, (0, 1), value=domain)

    def forward(self, features: Tensor, domains: Tensor) -> Tensor:
        """Features ``(B, d)``, each by the adaptor of its domain, int64 ``(B,)``."""
        adapted = torch.stack([adaptor(features).to(features.dtype) for adaptor in self.adaptors])
        return adapted[domains, torch.arange(len(features), device=features.device)]

    def restore_buffers(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        saved = state_dict.get(f"{prefix}kinds")
        if saved is not None and saved.tolist() != self.kinds.tolist():
            with torch.random.fork_rng(devices=[]):  # the initial values are overwritten by the state dict
                made = [ADAPTORS[_NAMES[kind]](self.width) for kind in saved.tolist()]
            self.adaptors = nn.ModuleList(made).to(self.kinds.device)
        super().restore_buffers(state_dict, prefix)


def stage_names(backbone: nn.Module) -> list[str]:
    """Names of the modules that are the stages of a backbone, in order; empty if they are not known.

    They are the blocks of a transformer or the stages of a convolutional network: the modules in the outermost sequence
    called ``blocks`` or ``stages``, or the outermost modules called ``layer1``, ``layer2``, ...
    """
    names = [name for name, _ in backbone.named_modules()]
    found: dict[str, list[str]] = {}
    for name in names:
        owner, _, last = name.rpartition(".")
        in_sequence = last.isdigit() and owner.rpartition(".")[2] in ("blocks", "stages")
        if in_sequence or (last[:5] == "layer" and last[5:].isdigit()):
            found.setdefault(owner, []).append(name)
    return min(found.values(), key=lambda group: group[0].count("."), default=[])


class StagedEncoder(Backbone):
    """A backbone that notes the outputs of its stages, averaged over their positions.

    Args:
        image_shape: Channels, height, width.
        backbone: Builds the backbone.
        stages: Patterns of the names of modules, whose outputs are ``(B, C, H, W)``, ``(B, tokens, d)`` or ``(B, d)``;
            None for the blocks or stages of the backbone (``stage_names``), or its features where there are none.

    Attributes:
        base: The backbone.
        pooled: phi_l of the last pass, float ``(B, d_l)`` each.
        widths: d_l of each stage.

    Raises:
        ValueError: If a pattern matches no module, or an output has another shape.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        *,
        backbone: Callable[[ImageShape], Backbone],
        stages: Sequence[str] | None = None,
    ) -> None:
        super().__init__(image_shape)
        self.base = built(backbone, image_shape)
        self.num_features = self.base.num_features
        modules = {name: module for name, module in self.base.named_modules() if name}
        names = stage_names(self.base) if stages is None else matching("EAR", modules, stages=stages)
        self.names = tuple(names)
        self.pooled: list[Tensor] = []
        for name in names:
            modules[name].register_forward_hook(self._note)
        with torch.no_grad(), in_eval_mode(self.base):
            self(torch.zeros(1, *image_shape))
        self.widths = tuple(stage.shape[1] for stage in self.pooled)

    def forward(self, images: Tensor) -> Tensor:
        self.pooled = []
        features: Tensor = self.base(images)
        if not self.names:
            self.pooled = [full_precision(features.detach())]
        return features

    def _note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
            found = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"EAR: stages {', '.join(self.names)}: the output of {type(module).__name__} is {found}; name modules "
                "with the output (B, C, H, W), (B, tokens, d) or (B, d)"
            )
        pooled = full_precision(output.detach())
        if output.ndim > 2:
            pooled = pooled.mean(dim=1) if output.ndim == 3 else pooled.mean(dim=(2, 3))
        self.pooled.append(pooled)


class EARNetwork(Network):
    """Encoder, adaptors and heads of all domains, and the space in which the domain of an image is found.

    Args:
        encoder: The encoder.
        head: A layer for each domain.
        space: Vectors and thresholds of the domains.

    Attributes:
        adaptors: The adaptor of each domain.
        domain: Domain of the samples in training; None while it is not known.
    """

    def __init__(self, encoder: StagedEncoder, head: DomainHead, space: HyperDomains) -> None:
        super().__init__(encoder, head, backbone_is_frozen=True)
        self.space, self.adaptors = space, DomainAdaptors(encoder.num_features)
        self.domain: int | None = None

    @property
    def encoder(self) -> StagedEncoder:
        return cast(StagedEncoder, self.backbone)

    @property
    def layers(self) -> DomainHead:
        """The head."""
        return cast(DomainHead, self.head)

    def forward(self, images: Tensor) -> Output:
        """Adapted features, and logits by the layer of ``domain``; without a domain features, and logits of 0."""
        features = self.backbone(images)
        if self.domain is None:
            return Output(features, features.new_zeros(len(features), self.layers.num_columns))
        adapted = self.adaptors.adaptors[self.domain](features)
        return Output(adapted, self.head(adapted, torch.full((len(images),), self.domain, device=features.device)))

    def classify(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        """Scores ``(B, columns)``.

        Args:
            images: ``(B, C, H, W)``.
            tasks: Task of each image, int64 ``(B,)``; None, or a task whose domain is not known yet, to infer it.
        """
        features = full_precision(self.backbone(images))
        if not len(self.space):
            return features.new_zeros(len(features), self.layers.num_columns)
        domains = self.space.scores(self.space.encode(self.encoder.pooled)).argmax(dim=1)
        if tasks is not None:
            of_tasks = self.adaptors.domains
            known = tasks < len(of_tasks)
            domains = torch.where(known, of_tasks[tasks.clamp(max=len(of_tasks) - 1)], domains)
        with torch.autocast(features.device.type, enabled=False):
            scores: Tensor = self.head(self.adaptors(features, domains), domains)
        return scores


class EAR(ContinualStrategy):
    """A shallow adaptor and a head for each domain, on a frozen encoder; domains are detected hyperdimensionally.

    Args:
        dimensions: D, size of the hyperdimensional vectors, at least 1. The projections take 4 D bytes for each feature
            of each stage: 369 MB for the 12 blocks of a ViT-B.
        quantile: Share of a domain's own images that count as out of distribution, in [0, 1].
        open_share: The images of a task are a new domain if a larger share of them is out of distribution, in [0, 1].
        adaptors: Candidates of the architecture search, names of ``ADAPTORS``; None for all.
        cost_weight: Cost of a parameter of a candidate in the search, at least 0.
        probe: Images of the search, at least 2.
        stages: Patterns of the names of the encoder's modules whose outputs are encoded, such as ``[model.blocks.*]``;
            None for the blocks or stages of the encoder, or its features where there are none.
        kwargs: Options of the base class, without ``head``, ``loss_classes`` and ``freeze_backbone``.
    """

    traits = Traits(
        family="pretrained",
        paper="Daniels et al., 2023, arXiv:2308.02084",
        needs_pretrained=True,
        needs_empty_batches=True,
        task_ids="inferred",
        scenarios=("class-incremental", "domain-incremental"),
        remedy="use a method for streams whose images are seen once, such as SLDA",
    )

    def __init__(
        self,
        *,
        dimensions: int = 10_000,
        quantile: float = 0.05,
        open_share: float = 0.5,
        adaptors: Sequence[str] | None = None,
        cost_weight: float = 1e-6,
        probe: int = 64,
        stages: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(head=DomainHead, loss_classes="current", freeze_backbone=True, **kwargs)
        at_least(self, 1, dimensions=dimensions)
        within(self, "[0, 1]", quantile=quantile, open_share=open_share)
        at_least(self, 0, cost_weight=cost_weight)
        at_least(self, 2, probe=probe)
        chosen = _NAMES if adaptors is None else tuple(adaptors)
        if not chosen:
            raise ValueError(f"EAR: adaptors is empty; name at least one of {', '.join(_NAMES)}")
        for name in chosen:
            one_of(self, _NAMES, adaptors=name)
        self.dimensions, self.quantile, self.open_share = dimensions, quantile, open_share
        self.adaptors, self.cost_weight, self.probe = chosen, cost_weight, probe
        self.build_backbone = functools.partial(StagedEncoder, backbone=self.build_backbone, stages=stages)
        # A fit and DistributedDataParallel need a trained parameter, also in the phase that trains none.
        self.nothing = nn.Parameter(torch.zeros(()))

    def build(self, image_shape: ImageShape) -> None:
        super().build(image_shape)
        encoder = cast(StagedEncoder, self.network.backbone)
        space = HyperDomains(encoder.widths, dimensions=self.dimensions, quantile=self.quantile, key=_PROJECTIONS)
        self.network = EARNetwork(encoder, cast(DomainHead, self.network.head), space)

    @property
    def parts(self) -> EARNetwork:
        """The network."""
        return cast(EARNetwork, self.network)

    def begin_task(self, task: Task) -> None:
        self.parts.layers.see(task.num_seen)
        self.parts.space.begin()

    def phases(self, task: Task) -> list[Phase]:
        detect = Phase(DETECT, PhaseOptions(epochs=1), trains=lambda: [self.nothing], unaugmented=True)
        return [detect, Phase(needed=self._opened)]

    def _opened(self) -> bool:
        """Whether the images of the task are a new domain."""
        *earlier, own = self.parts.adaptors.domains.tolist()
        return own not in earlier

    def begin_phase(self, phase: Phase, origin: int, sources: Sequence[Any] = ()) -> None:
        super().begin_phase(phase, origin, sources)
        self.parts.domain = None if phase.name == DETECT else len(self.parts.space) - 1

    def trainable(self) -> Iterator[nn.Parameter]:
        yield from self.parts.adaptors.adaptors[-1].parameters()
        yield from self.parts.layers.blocks[-1].parameters()

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.phase.name == DETECT:
            if batch.first_pass:
                self.parts.space.observe(self.parts.encoder.pooled)
            return {"nothing": 0.0 * self.nothing}
        return {"ce": self.classification_loss(output, batch)}

    @torch.no_grad()
    def end_phase(self, phase: Phase) -> None:
        parts, space = self.parts, self.parts.space
        if phase.name != DETECT:
            parts.domain = None
        elif self._is_new():
            space.add()
            with in_eval_mode(self.network):
                space.set_threshold(self._gather(self._newest_scores, space.thresholds.new_zeros(0)))
                none = self.nothing.new_zeros(0, parts.encoder.num_features)
                features = all_gather_rows(self._gather(self._features, none, samples=self.probe))
            parts.adaptors.add(*self.search(features))
            parts.layers.add_domain(self.task.columns, self.task.num_seen)
            parts.adaptors.note(len(space) - 1)
        else:
            parts.adaptors.note(int(space.votes.argmax()))

    def _is_new(self) -> bool:
        """Whether the images that were counted are a new domain."""
        space = self.parts.space
        if not len(space) or float(space.outliers) > self.open_share * float(space.samples):
            return True
        position = self.parts.layers.position[space.votes.argmax()]
        return bool(((position < 0) & self.task_columns[-1]).any())

    def search(self, features: Tensor) -> tuple[str, Adaptor]:
        """The candidate with the largest score, with its name; its weights are drawn by seed and domain.

        Args:
            features: Features of the encoder, the same on every process, ``(n, d)``.
        """
        found: list[tuple[float, str, Adaptor]] = []
        for name in self.adaptors:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(
                    mix(self.seed, _CANDIDATES, len(self.parts.space), _NAMES.index(name))
                )
                adaptor = ADAPTORS[name](features.shape[1]).to(features.device)
            cost = self.cost_weight * sum(parameter.numel() for parameter in adaptor.parameters())
            found.append((float(search_score(adaptor.units(features))) - cost, name, adaptor))
        _, name, adaptor = max(found, key=lambda candidate: candidate[0])
        return name, adaptor

    def _features(self, batch: Batch) -> Tensor:
        with self.trainer.precision_plugin.forward_context():
            return full_precision(self.network.backbone(batch.images))

    def _newest_scores(self, batch: Batch) -> Tensor:
        """Scores of images for the newest domain, ``(n,)``."""
        self._features(batch)
        space = self.parts.space
        return space.scores(space.encode(self.parts.encoder.pooled))[:, -1]

    def _gather(self, of: Callable[[Batch], Tensor], none: Tensor, samples: int | None = None) -> Tensor:
        """Rows of a function of this process's share of the un-augmented images of the task.

        Args:
            of: Rows ``(n, ...)`` of a batch of n images.
            none: Rows of no image, ``(0, ...)``.
            samples: Number of images of all processes, drawn by seed and task; None for all.
        """
        return torch.cat([none, *(of(batch) for batch in self.passes.batches(samples=samples) if len(batch))])

    def predict(self, images: Tensor, tasks: Tensor | None = None) -> Tensor:
        return self.parts.classify(images, tasks)
