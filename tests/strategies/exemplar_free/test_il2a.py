import math
from functools import partial

import numpy as np
import pytest
import torch
from support.fakes import normal
from support.runs import plain_net, run
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.measures import last_accuracy
from cl_lightning.models import MLP, CosineHead
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.il2a import (
    _CLASSES,
    _TARGETS,
    IL2A,
    mixing_shares,
    pair_columns,
    semantic_logits,
)
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import Subject, small

ADAM = partial(torch.optim.Adam, lr=1e-3)

# Small steps: logits are multiplied by ten.
SUBJECTS = {
    "IL2A": Subject(
        small(IL2A, optimizer=ADAM, mix_times=2),
        first_task_is_finetuning=False,
        matches_single_process=False,
        reason="the first task also learns mixtures, and a process mixes its own images",
    ),
}

PUBLISHED = {
    "il2a_cifar100": {
        "source": "LAMDA-CL/PyCIL: exps/il2a.json; strength of the paper",
        "backbone": "ResNet18",
        "semantic_weight": 10.0,
        "distill_weight": 10.0,
        "strength": 2.5,
        "temperature": 0.1,
        "optimizer": "Adam(lr=0.001, weight_decay=0.0002)",
        "scheduler": "StepLR(gamma=0.1, step_size=45)",
        "data.scenario": "ClassIncremental(class_order=1993, first=50, increment=10)",
        "data.batch_size": 64,
        "data.transforms": ["RandomCrop(padding=4)", "RandomHorizontalFlip()", "ColorJitter(brightness=0.247)"],
        "trainer.max_epochs": 101,
    },
}


def test_pairs_are_numbered_without_gaps_in_any_order():
    first, second = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    columns = pair_columns(first, second)
    assert columns.view(5, 5).tolist() == [
        [-1, 0, 1, 3, 6],
        [0, -1, 2, 4, 7],
        [1, 2, -1, 5, 8],
        [3, 4, 5, -1, 9],
        [6, 7, 8, 9, -1],
    ]


def test_shares_are_beta_in_the_middle_and_a_half_outside():
    shares = mixing_shares(Draw.of(20000, 3), 2, 20.0).double()
    assert shares.shape == (20000, 2)
    assert ((shares >= 0.4) & (shares <= 0.6)).all()
    # The mass of Beta(20, 20) outside [.4, .6] is .2008, its variance .25 / 41; both by integration of the density.
    grid = np.linspace(0, 1, 200001)[1:-1]
    density = np.exp(math.lgamma(40) - 2 * math.lgamma(20) + 19 * np.log(grid * (1 - grid))) / 200000
    inside = (grid >= 0.4) & (grid <= 0.6)
    assert float((shares == 0.5).double().mean()) == pytest.approx(1 - density[inside].sum(), abs=0.01)
    assert float(((shares - 0.5) ** 2).mean()) == pytest.approx((density * (grid - 0.5) ** 2)[inside].sum(), rel=0.03)
    half = Draw(Draw.of(20000, 3).key, 5000, 9000, 20000)  # the rows of one of several processes
    assert torch.equal(mixing_shares(half, 2, 20.0).double(), shares[5000:9000])


def test_semantic_logits_are_their_definition_and_keep_the_logit_of_the_class():
    weight, root, mean, bias = normal(4, 3), normal(2, 3, 3, seed=1), normal(2, 3, seed=2), normal(4, seed=3)
    covariances, y = root @ root.mT, torch.tensor([2, 0])
    z = mean @ weight.T + bias
    expected = z.clone()
    for i, own in enumerate(y.tolist()):
        for c in range(4):
            gap = weight[c] - weight[own]
            expected[i, c] += 1.7 / 2 * sum(gap[k] * covariances[i, k, m] * gap[m] for k in range(3) for m in range(3))
    found = semantic_logits(z, weight, covariances, y, 1.7)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[[0, 1], y], z[[0, 1], y])
    assert torch.equal(semantic_logits(z, weight, covariances, y, 0.0), z)


def test_the_loss_of_semantic_logits_bounds_the_expected_loss_from_above_and_the_loss_of_the_mean_from_below():
    weight, root, mean, r = normal(4, 3), normal(1, 3, 3, seed=1), normal(1, 3, seed=2), 0.7
    covariance, y = root @ root.mT, torch.tensor([1])
    # E over N(mu, r Sigma) by Gauss-Hermite quadrature with 24^3 points.
    points, masses = np.polynomial.hermite_e.hermegauss(24)
    grid = torch.tensor(np.stack(np.meshgrid(*[points] * 3), -1).reshape(-1, 3))
    mass = torch.tensor(np.prod(np.meshgrid(*[masses] * 3), 0).reshape(-1)) / (2 * math.pi) ** 1.5
    samples = mean + math.sqrt(r) * grid @ torch.linalg.cholesky(covariance)[0].T
    middle = (mass * F.cross_entropy(samples @ weight.T, y.expand(len(samples)), reduction="none")).sum()
    above = F.cross_entropy(semantic_logits(mean @ weight.T, weight, covariance, y, r), y)
    below = F.cross_entropy(mean @ weight.T, y)
    assert below + 0.01 < middle < above - 0.01
    # For two classes the bound is the softplus of mean + variance / 2, which is the Taylor series for small variances.
    two = semantic_logits(mean @ weight[:2].T, weight[:2], 1e-4 * covariance, y, r)
    z, gap = (mean @ weight[:2].T)[0], weight[0] - weight[1]
    change = F.cross_entropy(two, y) - F.cross_entropy(z[None], y)
    assert float(change) == pytest.approx(
        float((z[0] - z[1]).sigmoid() * r * 5e-5 * gap @ covariance[0] @ gap), rel=1e-2
    )


def test_the_gradient_of_the_rows_is_of_both_terms():
    weight, root, mean = normal(3, 2, requires_grad=True), normal(1, 2, 2, seed=1), normal(1, 2, seed=2)
    covariance, y = root @ root.mT, torch.tensor([0])
    torch.autograd.gradcheck(lambda w: semantic_logits(mean @ w.T, w, covariance, y, 2.0), (weight,))
    [found] = torch.autograd.grad(semantic_logits(mean @ weight.T, weight, covariance, y, 2.0)[0, 2], weight)
    gap = 2 * covariance[0] @ (weight[2] - weight[0])
    torch.testing.assert_close(found, torch.stack([-gap, torch.zeros(2).double(), gap + mean[0]]))


def test_mixtures_are_of_two_images_and_have_the_columns_of_their_pairs():
    seen = []

    class Look(IL2A):
        def prepare_batch(self, batch):
            made = super().prepare_batch(batch)
            rows, columns = len(batch), list(self.task.columns)
            assert len(made) == 4 * rows
            assert torch.equal(made.images[:rows], batch.images)
            targets = made.extra[_TARGETS]
            assert torch.equal(targets[:rows], batch.labels)
            assert torch.equal(made.labels, torch.cat([batch.labels, torch.full((3 * rows,), -1)]))
            own = batch.images.flatten(1)
            places = torch.tensor([columns.index(label) for label in batch.labels.tolist()])
            for mixed, found in zip(made.images.flatten(1).split(rows)[1:], targets.split(rows)[1:], strict=True):
                gaps = own[:, None] - own  # of image and partner, (rows, rows, pixels)
                share = ((mixed[:, None] - own) * gaps).sum(2) / gaps.square().sum(2)  # nan for an image and itself
                share = share.where(share.isfinite(), 0.5)
                far = (mixed[:, None] - own - share[..., None] * gaps).norm(dim=2)
                partners = far.masked_fill((share < 0.399) | (share > 0.601), torch.inf).argmin(dim=1)
                assert sorted(partners.tolist()) == list(range(rows))  # a permutation
                assert far[torch.arange(rows), partners].max() < 1e-4
                high, low = torch.maximum(places, places[partners]), torch.minimum(places, places[partners])
                column = self.task.num_seen + high * (high - 1) // 2 + low
                assert torch.equal(found, torch.where(high == low, -1, column))
            assert self.pair_head.block_sizes() == [len(columns) * (len(columns) - 1) // 2]
            seen.append(self.task.index)
            return made

    strategy = Look(backbone=plain_net, optimizer=ADAM, mix_times=3)
    run(strategy, max_epochs=1, data={"batch_size": 60})
    assert set(seen) == {0, 1, 2}
    assert strategy.pair_head.num_columns == 0


def test_terms_are_their_definition():
    seen, left_out = [], []

    class Look(IL2A):
        def losses(self, batch, output):
            terms = super().losses(batch, output)
            targets, head = batch.extra[_TARGETS], self.network.head
            z = torch.cat([output.logits, self.pair_head(output.features)], dim=1) / 0.3
            counted = targets >= 0
            left_out.append(int((~counted).sum()))
            expected = {"ce": F.cross_entropy(z[counted], targets[counted])}
            if not self.task.is_first:
                earlier = self.task.num_seen - self.task.num_new
                gap = (output.features - self.teacher(batch.images).features)[counted]
                old = batch.draw.fork(_CLASSES).randint(earlier)
                rows, losses = head.weight(), []
                for y in old.tolist():
                    means, covariances = self.prototypes.means, self.prototypes.covariances
                    gaps = rows - rows[y]
                    bound = head(means[y][None])[0] + 0.8 / 2 * torch.einsum("cd,de,ce->c", gaps, covariances[y], gaps)
                    losses.append(-(bound / 0.3).log_softmax(0)[y])
                expected |= {"distill": 7 * gap.norm(), "semantic": 4 * torch.stack(losses).mean()}
            torch.testing.assert_close(terms, expected, rtol=1e-4, atol=1e-5)
            seen.append(self.task.index)
            return terms

    options = {"semantic_weight": 4.0, "distill_weight": 7.0, "temperature": 0.3, "strength": 0.8}
    run(Look(backbone=plain_net, optimizer=ADAM, **options), max_epochs=1)
    assert set(seen) == {0, 1, 2}
    assert sum(left_out) > 0  # mixtures of one class


def test_it_forgets_far_less_than_fine_tuning():
    options = {"data": {"scenario": ClassIncremental(sizes=[6, 2, 2]), "batch_size": 32}, "max_epochs": 6}
    common = {"backbone": partial(MLP, hidden=(64,)), "optimizer": ADAM}
    plain, ours = (last_accuracy(run(cls(**common), **options).matrix.R_ci) for cls in (Finetune, IL2A))
    # Measured: .79 against .31.
    assert ours > plain + 0.25


def test_another_head_is_an_error():
    with pytest.raises(ValueError, match="IL2A: head is CosineHead; use a LinearHead"):
        IL2A(head=CosineHead).build((1, 8, 8))


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"semantic_weight": -1.0}, {"strength": -2.0}, {"mix_times": -1}, {"mix_alpha": 0.0}],
)
def test_options_out_of_range_are_errors(options: dict):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"IL2A: {name} is {value}"):
        IL2A(**options)
