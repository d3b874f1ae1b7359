import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.fakes import normal, task_of
from support.runs import plain_net, run
from torch.nn import functional as F

from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP, LinearHead
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.napa_vq import (
    _CLASSES,
    _NEIGHBOURS,
    _SHARES,
    NapaVQ,
    NeighbourGraph,
    neighbour_loss,
    rotation_classes,
    updated_edges,
)
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, TinyDigits, small

ADAM = partial(torch.optim.Adam, lr=1e-3)

SUBJECTS = {
    "NapaVQ": Subject(
        small(NapaVQ, optimizer=ADAM, neighbours=4),
        data=partial(TinyDigits, drop_last=True),  # with one image for two processes, E is not changed
        first_task_is_finetuning=False,
        reason="distances to coding vectors of classes and rotations take the place of logits",
    ),
}

PUBLISHED = {
    "napa_vq_cifar100": {
        "source": "TamashaM/NAPA-VQ: the command for CIFAR-100",
        "backbone": "ResNet18",
        "prototype_weight": 10.0,
        "distill_weight": 10.0,
        "temperature": 0.1,
        "neighbours": 15,
        "decay": 0.9,
        "vector_lr": 5.0,
        "later_vector_lr": 0.5,
        "vector_epochs": 20,
        "first_optimizer": "Adam(lr=0.001, weight_decay=0.0002)",
        "first_scheduler": "StepLR(gamma=0.1, step_size=45)",
        "optimizer": "Adam(lr=0.0001, weight_decay=0.0002)",
        "scheduler": "StepLR(gamma=0.1, step_size=45)",
        "data.scenario": "ClassIncremental(class_order=1993, first=50, increment=10)",
        "data.batch_size": 64,
        "data.transforms": ["RandomCrop(padding=4)", "RandomHorizontalFlip()", "ColorJitter(brightness=0.247)"],
        "trainer.max_epochs": 100,
    },
}


def test_classes_of_rotations_are_next_to_their_class():
    assert rotation_classes(torch.tensor([0, 2])).tolist() == [0, 8, 1, 9, 2, 10, 3, 11]


def one_by_one(edges, gaps, neighbours, decay):
    """E with the decays after all edges of the batch are set: the order of events within a batch is not kept."""
    edges, size = edges.clone(), len(edges)
    lists = [sorted(range(size), key=lambda c, row=row: float(row[c]))[:neighbours] for row in gaps]
    for near in lists:
        edges[near[0], near] = 1.0
    for near in lists:
        others = [c for c in range(size) if c not in near]
        edges[near[0], others] *= decay
    edges[edges < decay**10 - 1e-9] = 0.0
    return edges


def test_edges_of_the_nearest_vector_are_set_and_others_decay():
    edges, gaps = torch.rand(6, 6, generator=torch.Generator().manual_seed(0)).double(), normal(5, 6).abs()
    found = updated_edges(edges, gaps, 2, 0.8, reduce=False)
    torch.testing.assert_close(found, one_by_one(edges, gaps, 2, 0.8))
    assert not torch.equal(found, updated_edges(edges, gaps, 2, 0.9, reduce=False))
    assert torch.equal(updated_edges(edges, gaps, 9, 0.8, reduce=False)[gaps.argmin(1)], torch.ones(5, 6).double())


def test_an_edge_is_removed_after_more_than_ten_decays():
    edges, gap = torch.eye(3), torch.tensor([[0.1, 0.2, 0.3]])
    edges[0, 2] = 1.0
    for _ in range(10):
        edges = updated_edges(edges, gap, 2, 0.9, reduce=False)
    torch.testing.assert_close(edges[0], torch.tensor([1.0, 1.0, 0.9**10]))
    assert torch.equal(edges[1:], torch.eye(3)[1:])
    assert updated_edges(edges, gap, 2, 0.9, reduce=False)[0].tolist() == [1.0, 1.0, 0.0]


def test_the_neighbour_loss_is_its_definition():
    gaps, labels = 30 * normal(4, 5).abs(), torch.tensor([0, 2, 2, 4])
    edges = torch.eye(5).double()
    edges[0, [1, 3]], edges[2, 4] = torch.tensor([0.4, 1.0]).double(), 0.5  # class 4 has no neighbours
    expected = 0.0
    for row, y in zip(gaps.tolist(), labels.tolist(), strict=True):
        near = {0: [1, 3], 2: [4], 4: []}[y]
        powers = {j: math.exp(-0.001 * row[j] ** 2) for j in near}
        pulled = sum(powers[j] / sum(powers.values()) * row[j] ** 2 for j in near)
        expected += max(0.0, row[y] ** 2 - pulled) / 4
    assert float(neighbour_loss(gaps, labels, edges)) == pytest.approx(expected)
    alone = neighbour_loss(gaps, labels, torch.eye(5))
    torch.testing.assert_close(alone, gaps[range(4), labels].square().mean())


def test_shares_of_neighbours_have_no_gradient():
    gaps = torch.tensor([[3.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    neighbour_loss(gaps, torch.tensor([0]), torch.ones(3, 3)).backward()
    a = torch.tensor([-0.001, -0.004], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(
        gaps.grad[0], torch.cat([torch.tensor([6.0]).double(), -2 * a * torch.tensor([1.0, 2.0])])
    )


def test_a_graph_grows_and_takes_the_shape_of_its_state():
    graph, other = NeighbourGraph(), NeighbourGraph()
    graph.grow(2)
    graph.edges[0, 1] = graph.edges[1, 0] = 0.5
    graph.grow(1)
    assert graph.edges.tolist() == [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]
    other.load_state_dict(graph.state_dict())
    assert torch.equal(other.edges, graph.edges)
    assert graph.num_bytes() == 36


def test_terms_are_their_definition():
    seen = []

    class Look(NapaVQ):
        def losses(self, batch, output):
            before = self.graph.edges.clone()
            terms = super().losses(batch, output)
            rows = len(batch) // 4
            labels = torch.tensor([4 * y + k for k in range(4) for y in batch.labels[:rows].tolist()])
            plain, turned = self.network.head.weight(), self.rotation_head.weight()
            vectors = torch.stack(
                [turned[3 * (j // 4) + j % 4 - 1] if j % 4 else plain[j // 4] for j in range(len(before))]
            )
            d = (output.features[:, None] - vectors).norm(dim=2)
            edges = one_by_one(before, d, 3, 0.8)
            expected = {"ce": F.cross_entropy(-d / 0.3, labels), "neighbours": neighbour_loss(d, labels, edges)}
            if not self.task.is_first:
                earlier = self.task.num_seen - self.task.num_new
                old = 4 * batch.draw.fork(_CLASSES).randint(earlier)
                chances, means = batch.draw.fork(_NEIGHBOURS).rand(len(edges)), self.class_means.means
                u, made = batch.draw.fork(_SHARES).rand(1) / 2 + 0.5, []
                for i, a in enumerate(old.tolist()):
                    b = max((j for j in range(len(edges)) if edges[a, j] > 0), key=lambda j, i=i: float(chances[i, j]))
                    made.append(u[i] * means[a] + (1 - u[i]) * means[b])
                d = (torch.stack(made)[:, None] - vectors).norm(dim=2)
                edges = one_by_one(edges, d, 3, 0.8)
                gap = output.features - self.teacher(batch.images).features
                expected |= {
                    "prototypes": 4 * F.cross_entropy(-d / 0.3, old),
                    "prototype_neighbours": neighbour_loss(d, old, edges),
                    "distill": 7 * gap.norm(),
                }
                assert self.class_means.known.all()  # new classes too, by the teacher
            torch.testing.assert_close(terms, expected, rtol=1e-4, atol=1e-4)
            after = self.graph.edges
            torch.testing.assert_close(after, (edges + edges.T) / 2)
            assert 0 <= after.min() <= after.max() <= 1
            assert after.diagonal().min() > 0
            seen.append(self.task.index)
            return terms

    options = {"prototype_weight": 4.0, "distill_weight": 7.0, "temperature": 0.3, "neighbours": 3, "decay": 0.8}
    run(Look(backbone=plain_net, optimizer=ADAM, **options), max_epochs=1)
    assert set(seen) == {0, 1, 2}


def test_new_classes_are_measured_before_and_after_the_task_and_old_vectors_are_frozen():
    kept = {}

    class Look(NapaVQ):
        def on_train_start(self):
            super().on_train_start()
            kept["vectors"], kept["means"] = self._vectors().detach().clone(), self.class_means.means.clone()
            assert self.class_means.known.any() != self.task.is_first

        def end_task(self, task):
            old = 4 * (task.num_seen - task.num_new)
            vectors = self._vectors().detach()
            assert torch.equal(vectors[:old], kept["vectors"][:old])
            assert (vectors[old:] != kept["vectors"][old:]).any(dim=1).all()
            if not task.is_first:
                features, labels = self.passes.features(self.teacher.network)
                own = torch.stack([features[labels == c].mean(0) for c in task.columns])
                torch.testing.assert_close(kept["means"][old::4], own)
            super().end_task(task)
            assert torch.equal(self.class_means.means[:old], kept["means"][:old])
            features, labels = self.passes.features()
            own = torch.stack([features[labels == c].mean(0) for c in task.columns])
            torch.testing.assert_close(self.class_means.means[old::4], own)

    strategy = Look(backbone=plain_net, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1))
    run(strategy, max_epochs=1)
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    f, w = strategy.network.backbone(images), strategy._vectors()[::4]
    gaps = F.normalize(f, dim=1)[:, None] - F.normalize(w, dim=1)
    torch.testing.assert_close(strategy.predict(images), -gaps.norm(dim=2))


@pytest.mark.parametrize("optimizer", [ADAM, partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.1)])
def test_coding_vectors_take_plain_gradient_steps_that_become_shorter(optimizer):
    seen = []

    class Look(NapaVQ):
        def edit_gradients(self, batch):
            newest = [self.network.head.blocks[-1].weight, self.rotation_head.blocks[-1].weight]
            lr = (2.0 if self.task.is_first else 0.3) * (0.1 if self.epoch >= 1 else 1.0)
            self.expected = [(vectors - lr * vectors.grad).detach() for vectors in newest]
            super().edit_gradients(batch)

        def after_step(self, batch):
            newest = [self.network.head.blocks[-1].weight, self.rotation_head.blocks[-1].weight]
            for vectors, expected in zip(newest, self.expected, strict=True):
                torch.testing.assert_close(vectors.detach(), expected)  # the optimizer does not move them
            seen.append((self.task.index, self.epoch))

    options = {"vector_lr": 2.0, "later_vector_lr": 0.3, "vector_epochs": 1}
    run(Look(backbone=plain_net, optimizer=optimizer, **options))
    assert set(seen) == {(task, epoch) for task in range(3) for epoch in range(2)}


def test_a_step_without_finite_gradients_moves_nothing():
    strategy = NapaVQ(backbone=plain_net)
    strategy.build((1, 8, 8))
    strategy.begin_task(task_of(0))
    strategy.task = task_of(0)
    before = strategy._vectors().detach()
    for vectors in strategy._coding_vectors():
        vectors.grad = torch.ones_like(vectors)
    vectors.grad[0, 0] = torch.inf
    strategy._trainer = SimpleNamespace(current_epoch=0)
    strategy.edit_gradients(None)
    assert torch.equal(strategy._vectors(), before)


def test_it_forgets_far_less_than_fine_tuning():
    options = {"data": {"scenario": ClassIncremental(sizes=[6, 2, 2]), "batch_size": 32}, "max_epochs": 6}
    common = {"backbone": partial(MLP, hidden=(64,)), "optimizer": ADAM}
    plain = last_accuracy(run(Finetune(**common), **options).matrix.R_ci)
    ours = last_accuracy(run(NapaVQ(**common), **options).matrix.R_ci)
    # Measured: .88 against .31.
    assert ours > plain + 0.3


def test_another_head_is_an_error():
    with pytest.raises(ValueError, match="NapaVQ: head is LinearHead; use a DistanceHead"):
        NapaVQ(head=LinearHead).build((1, 8, 8))


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"prototype_weight": -1.0}, {"neighbours": 0}, {"decay": 1.0}, {"vector_lr": 0.0}]
)
def test_options_out_of_range_are_errors(options: dict):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"NapaVQ: {name} is {value}"):
        NapaVQ(**options)
