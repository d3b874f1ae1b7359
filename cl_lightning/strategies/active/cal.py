"""CAL, continual active learning (Das, Bhatt, Bhalerao, Gao, Yang, Bilmes, "Accelerating Batch Active Learning Using
Continual Learning Techniques", TMLR 2023, arXiv:2305.06408).

Each task is a round: the labels of a batch D_t of samples of the pool are queried, the network of the round before is
trained on D_t alone, and samples x' of the history D_1 .. D_{t-1}, which is kept in full, are replayed. z' are the
logits of x' at the end of the round in which it was labelled. With L_c = mean over D_t of CE(f(x), y)

    er   mean over the batch and the replayed samples together of CE
    der  L_c + a mean ||f(x') - z'||^2 + b mean CE(f(x'), y')
    sd   l L_c + (1 - l) ( a mean KL(softmax z' || softmax f(x')) + (1 - a) mean CE(f(x'), y') )

    l = |D_t| / (|D_t| + |D_1| + .. + |D_{t-1}|)

``sds2`` is ``sd`` whose replayed samples S maximise, greedily, among a random set A of candidates

    G(S) = sum_{i in A} max_{j in S} w_ij + c log(1 + sum_{i in S} H_i),   w_ij = exp(-||h_i - h_j||^2 / (2 s^2))

with h the features and H the entropy of the prediction; s^2 is the mean of ||h_i - h_j||^2 over A. ``retrain`` is the
reference: in each round a new network is trained on all labelled samples, without replay.
a -> alpha, b -> beta, c -> diversity, |A| -> candidates.

Queries are chosen among the unlabelled samples of the pool when a round ends:

    random; uncertainty, largest entropy; margin, smallest difference of the two largest probabilities;
    badge, k-means++ on g = (p - onehot(argmax p)) x h (Ash et al., ICLR 2020, arXiv:1906.03671), first the longest g

first_queries -> number of labels of the first round, and of a task with another pool, drawn at random; queries -> of
each later one. Departs from the paper: rounds have fixed numbers of epochs; s is ours. ``mir`` is a method of its own,
MIR. In the summary that we read, alpha and beta are given for sds2 alone; they are used for all variants.
"""

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_lightning.batch import Draw, join, mix
from cl_lightning.checks import at_least, one_of, within
from cl_lightning.distributed import all_gather_together
from cl_lightning.losses import cross_entropy, entropy, full_precision, mean_over_rows
from cl_lightning.memory import GrowingBuffers, Memory, Teacher, valid_columns
from cl_lightning.models import in_eval_mode
from cl_lightning.strategy import Batch, ContinualStrategy, Output, Phase, PhaseOptions, Task, Traits

ReplayBy = Literal["er", "der", "sd", "sds2", "retrain"]
Query = Literal["random", "uncertainty", "margin", "badge"]
_FIRST, _QUERY, _CANDIDATES = 0xCA1, 0xCA2, 0xCA3


def chosen_queries(query: Query, logits: Tensor, features: Tensor, count: int, key: int) -> Tensor:
    """Rows of the samples whose labels are queried, int64 ``(min(count, n),)``.

    Args:
        query: How they are chosen.
        logits: ``(n, C)``.
        features: h, ``(n, d)``.
        count: Number of samples.
        key: Key of the random numbers.
    """
    count = min(count, len(logits))
    p = full_precision(logits).double().softmax(dim=1)
    if query == "badge":
        return badge(p, features.double(), count, key)
    if query == "random":
        values = Draw.of(len(logits), key).rand().to(logits.device)
    elif query == "uncertainty" or p.shape[1] < 2:
        values = entropy(full_precision(logits).double())
    else:
        largest = p.topk(2, dim=1).values
        values = largest[:, 1] - largest[:, 0]
    return values.argsort(descending=True, stable=True)[:count]


def badge(p: Tensor, features: Tensor, count: int, key: int) -> Tensor:
    """Rows by k-means++ on g, without computing g: <g_i, g_j> = <a_i, a_j> <h_i, h_j> with a = p - onehot(argmax p).

    Args:
        p: Probabilities, float64 ``(n, C)``.
        features: h, float64 ``(n, d)``.
        count: Number of rows, at most n.
        key: Key of the random numbers.
    """
    a = p - F.one_hot(p.argmax(dim=1), p.shape[1])
    norms = a.square().sum(dim=1) * features.square().sum(dim=1)
    chosen = [norms.argmax()] if count else []
    nearest = torch.full_like(norms, torch.inf)
    free = torch.ones_like(norms)
    for number in Draw.of(count, key).rand().tolist()[1:]:
        last = chosen[-1]
        products = (a @ a[last]) * (features @ features[last])
        nearest = torch.minimum(nearest, (norms + norms[last] - 2 * products).clamp(min=0))
        free[last] = 0.0
        weights = nearest * free
        weights = torch.where(weights.sum() > 0, weights, free)  # equal samples are drawn uniformly
        bounds = weights.cumsum(dim=0)
        chosen.append(torch.searchsorted(bounds, number * bounds[-1], right=True).clamp(max=len(norms) - 1))
    return torch.stack(chosen) if chosen else torch.zeros(0, dtype=torch.int64, device=p.device)


def diverse_subset(features: Tensor, entropies: Tensor, count: int, diversity: float) -> Tensor:
    """Rows S of candidates that maximise G greedily, int64 ``(count,)``, in the order of choice.

    Args:
        features: h of the candidates, ``(n, d)``.
        entropies: H, ``(n,)``.
        count: Number of rows, at most n.
        diversity: c, at least 0.
    """
    squares = (features[:, None] - features).square().sum(dim=2)
    similarity = torch.exp(-squares / (2 * squares.mean()).clamp(min=1e-12))
    covered, total = torch.zeros_like(entropies), torch.zeros_like(entropies.sum())
    taken, chosen = torch.zeros_like(entropies, dtype=torch.bool), []
    for _ in range(count):
        gains = (similarity - covered).clamp(min=0).sum(dim=1)
        gains = gains + diversity * (torch.log1p(total + entropies) - torch.log1p(total))
        row = gains.masked_fill(taken, -torch.inf).argmax(keepdim=True)
        covered, total = torch.maximum(covered, similarity[row][0]), total + entropies[row][0]
        taken = taken.index_fill(0, row, True)
        chosen.append(row)
    return torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.int64, device=features.device)


class Queries(GrowingBuffers):
    """Samples whose labels have been queried, as indices into the data set, int64.

    Attributes:
        labelled: In all rounds, also the present one.
        current: In the present round.
    """

    kept_as: ClassVar[str] = "queries"
    labelled: Tensor
    current: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("labelled", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("current", torch.zeros(0, dtype=torch.int64))

    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.labelled.nbytes + self.current.nbytes

    def ask(self, indices: Tensor) -> None:
        """Begin a round with these samples."""
        self.current = indices.to(self.labelled)
        self.labelled = torch.cat([self.labelled, self.current])


class ContinualActive(ContinualStrategy):
    """Rounds of active learning that train on the newly labelled samples and replay all earlier ones.

    The memory has as many samples as have been labelled. Labels of other samples of the pool are never used.

    Args:
        replay: Loss and replay of the history: ``er``, ``der``, ``sd``, ``sds2``, or ``retrain`` for the reference.
        query: How queries are chosen: ``random``, ``uncertainty``, ``margin`` or ``badge``.
        first_queries: Number of labels of the first round, at least 1.
        queries: Number of labels of each later round, at least 1.
        first_options: Epochs, optimizer and schedule of the first round; those of the strategy where None.
        replay_size: Number of replayed samples in a step, over all processes; None for twice the size of the batch.
        alpha: a, at least 0; at most 1 for ``sd`` and ``sds2``.
        beta: b, at least 0.
        candidates: |A|, at least 1, of ``sds2``.
        diversity: c, at least 0.
        kwargs: Options of ``ContinualStrategy``.
    """

    traits = Traits(family="active", paper="Das et al., TMLR 2023, arXiv:2305.06408", keeps_exemplars=True)

    def __init__(
        self,
        *,
        replay: ReplayBy = "sd",
        query: Query = "uncertainty",
        first_queries: int = 2500,
        queries: int = 2500,
        first_options: PhaseOptions | None = None,
        replay_size: int | None = None,
        alpha: float = 0.25,
        beta: float = 0.75,
        candidates: int = 200,
        diversity: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.loss_classes != "all":
            raise ValueError(
                f"ContinualActive: loss_classes is {self.loss_classes!r}, but each round has all classes; use 'all'"
            )
        one_of(self, get_args(ReplayBy), replay=replay)
        one_of(self, get_args(Query), query=query)
        at_least(self, 1, first_queries=first_queries, queries=queries, candidates=candidates)
        at_least(self, 1, replay_size=replay_size, optional=True)
        at_least(self, 0, alpha=alpha, beta=beta, diversity=diversity)
        if replay in ("sd", "sds2"):
            within(self, "[0, 1]", alpha=alpha)
        self.replay_by, self.query, self.first_queries, self.count = replay, query, first_queries, queries
        self.first_options = first_options or PhaseOptions()
        self.alpha, self.beta, self.candidates, self.diversity = alpha, beta, candidates, diversity
        self.memory, self.replay_size = Memory(0), replay_size
        self.asked, self.start = Queries(), Teacher(reference=True)

    # ------------------------------------------------------------------ rounds

    def _pool(self, task: Task) -> Tensor:
        return torch.as_tensor(self.data.stream.train[task.index].copy())

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        pool = self._pool(task)
        if task.is_first or not torch.isin(self.asked.current.cpu(), pool).any():
            rest = pool[~torch.isin(pool, self.asked.labelled.cpu())]
            order = Draw.of(len(rest), mix(self.seed, _FIRST, task.index)).rand().argsort()
            self.asked.ask(rest[order[: self.first_queries]])
        if self.replay_by == "retrain":
            if (start := self.start.network) is not None:
                self.network.backbone.load_state_dict(start.backbone.state_dict())
                for block, first in zip(self.network.head.blocks, start.head.blocks, strict=False):
                    block.load_state_dict(first.state_dict())
            self.start.learn_from(self.network)  # with the blocks that this task has added

    def phases(self, task: Task) -> list[Phase]:
        options = self.first_options if task.is_first else PhaseOptions()
        return [Phase(options=options, samples=self._asked)]

    def _asked(self, labels: Tensor, replayed: Tensor) -> Tensor:
        """Samples of the round among the samples of the pool."""
        chosen = self.asked.labelled if self.replay_by == "retrain" else self.asked.current
        return torch.isin(self._pool(self.task), chosen.cpu())

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        super().end_task(task)
        self.memory.resize(len(self.memory) + len(self.asked.current))
        for batch in self.passes.batches(indices=self.asked.current.cpu()):
            logits = self._outputs(batch).logits.float()
            self.memory.add(batch.raw, batch.labels, batch.tasks, batch.draw, logits=logits)
        pool = self._pool(task)
        rest = pool[~torch.isin(pool, self.asked.labelled.cpu())]
        found = [torch.zeros(0, self.network.head.num_columns + self.network.head.num_features, device=self.device)]
        for batch in self.passes.batches(indices=rest):  # their labels are not used
            output = self._outputs(batch)
            found += all_gather_together([torch.cat([output.logits.float(), output.features.float()], dim=1)])
        values, columns = torch.cat(found), self.network.head.num_columns
        key = mix(self.seed, _QUERY, task.index)
        rows = chosen_queries(self.query, values[:, :columns], values[:, columns:], self.count, key)
        self.asked.ask(rest[rows.cpu()])

    def _outputs(self, batch: Batch) -> Output:
        if not len(batch):
            head = self.network.head
            nothing = torch.zeros(0, head.num_columns, device=self.device)
            return Output(torch.zeros(0, head.num_features, device=self.device), nothing)
        with self.trainer.precision_plugin.forward_context():
            output: Output = self.network(batch.images)
        return output

    # ------------------------------------------------------------------ a step

    def prepare_batch(self, batch: Batch) -> Batch:
        drawn = self.draw(batch)
        return join({"stream": batch, "replay": None if drawn is None else self.data.augment(drawn)})

    def draw(self, batch: Batch) -> Batch | None:
        """Samples of the history for a step, without augmentation; None if it has none."""
        if self.replay_by == "retrain" or len(self.memory) == 0:
            return None
        count = self.replay_size or 2 * batch.draw.total
        if self.replay_by != "sds2":
            drawn = self.memory.sample(count, batch.draw)
            return drawn if drawn.draw.total else None
        rows, _ = self.memory.pick(self.candidates, Draw.of(1, batch.draw.key, _CANDIDATES))
        found = self.data.finish(self.memory.at(rows, Draw.of(len(rows), batch.draw.key, _CANDIDATES)))
        with torch.no_grad(), in_eval_mode(self.network):
            output = self._outputs(found)
        features, surprise = full_precision(output.features), entropy(output.logits)
        best = rows[diverse_subset(features, surprise, min(count, len(rows)), self.diversity).to(rows.device)]
        share = batch.draw.share(len(best), _CANDIDATES)
        return self.memory.at(best[share.start : share.stop], share)

    def losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if self.replay_by in ("er", "retrain") or "replay" not in batch.parts:
            return {"ce": self.classification_loss(output, batch)}
        new, of_new, share = batch.part("stream", output)
        ce = share * self.classification_loss(of_new, new)
        past, of_past, share = batch.part("replay", output)
        replayed = share * cross_entropy(of_past.logits, past.labels, weights=self.data.weights_of(past))
        stored, logits = past.extra["logits"], full_precision(of_past.logits)
        known = valid_columns(stored)
        width = known.shape[1]
        if self.replay_by == "der":
            errors = torch.where(known, (logits[:, :width] - stored.nan_to_num()).square(), 0.0).sum(dim=1)
            terms = {"ce": ce, "logits": self.alpha * share * mean_over_rows(errors), "replay": self.beta * replayed}
            return terms
        old = stored.masked_fill(~known, -torch.inf).log_softmax(dim=1)
        present = logits[:, :width].masked_fill(~known, -torch.inf).log_softmax(dim=1)
        divergence = torch.where(known, old.exp() * (old - present).masked_fill(~known, 0.0), 0.0).sum(dim=1)
        part = len(self.asked.current) / len(self.asked.labelled)
        return {
            "ce": part * ce,
            "distill": (1 - part) * self.alpha * share * mean_over_rows(divergence),
            "replay": (1 - part) * (1 - self.alpha) * replayed,
        }
