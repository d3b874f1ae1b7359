import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.fakes import task_of
from support.runs import NormNet, assert_resumes, loop, plain_net, run, sgd
from torch.nn import functional as F

from cl_lightning.callback import ContinualCallback
from cl_lightning.callbacks.distillation import Distillation
from cl_lightning.callbacks.drift_compensation import DriftCompensation, spherical_drift
from cl_lightning.measures import last_accuracy
from cl_lightning.memory import PrototypeHead, Prototypes
from cl_lightning.models import MLP
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.stream import ClassIncremental


def finetune(**options):
    return Finetune(**{"backbone": NormNet, "optimizer": sgd, "head": PrototypeHead, **options})


class Look(ContinualCallback):
    """Keeps the network before each task, and the means, the features and the network after it."""

    def __init__(self):
        self.before, self.after = {}, {}

    def on_task_start(self, trainer, strategy, task):
        self.before[task.index] = copy.deepcopy(strategy.network).eval()

    def on_task_end(self, trainer, strategy, task):
        new, labels = strategy.passes.features()
        old, _ = strategy.passes.features(self.before[task.index])
        self.after[task.index] = (strategy.prototypes.means.clone(), old, new, labels)


@pytest.mark.parametrize("normalise", [False, True])
def test_earlier_means_move_by_the_average_drift_around_them(normalise):
    sigma = 0.3 if normalise else 1.0
    first, last = Look(), Look()
    run(finetune(), first, DriftCompensation(sigma=sigma, normalise=normalise), last)
    assert torch.equal(first.after[0][0], last.after[0][0])  # nothing to compensate yet
    for task, (earlier, seen) in ((1, (4, 7)), (2, (7, 10))):
        means, old, new, _ = first.after[task]
        moved = last.after[task][0]
        assert len(means) == seen
        assert torch.equal(means[earlier:], moved[earlier:])
        for column in range(earlier):
            p = means[column].double()
            a, b = old.double(), new.double()
            if normalise:
                a, b = F.normalize(a), F.normalize(b)
            q = p / p.norm() if normalise else p
            weight = (-(a - q).square().sum(1) / (2 * sigma**2)).exp()
            delta = (weight[:, None] * (b - a)).sum(0) / weight.sum()
            expected = p + (p.norm() * delta if normalise else delta)
            torch.testing.assert_close(moved[column].double(), expected, rtol=1e-4, atol=1e-5)


def test_training_does_not_notice():
    plain, ours = run(finetune()), run(finetune(), DriftCompensation())
    for name, parameter in plain.strategy.network.named_parameters():
        assert torch.equal(parameter, ours.strategy.network.get_parameter(name))
    means = [made.strategy.prototypes.means for made in (plain, ours)]
    assert torch.equal(means[0][7:], means[1][7:])
    assert not torch.equal(means[0][:7], means[1][:7])


def test_compensated_means_are_nearer_to_where_the_classes_have_gone():
    def error(*callbacks):
        """Mean angle between each earlier mean and the mean of that class under the network of now."""
        made = run(finetune(backbone=plain_net, loss_classes="current"), Distillation(), *callbacks, max_epochs=5)
        strategy, total = made.strategy, 0.0
        for task in made.stream.tasks[:2]:
            made.datamodule.begin(task)
            features, labels = strategy.passes.features()
            for column in task.columns:
                true = features[labels == column].mean(0)
                total += float(torch.acos(F.cosine_similarity(true, strategy.prototypes.means[column], dim=0)))
        return total / 7

    assert error(DriftCompensation()) < 0.8 * error()


def test_class_means_that_follow_know_the_classes_better():
    options = {"data": {"scenario": ClassIncremental(tasks=5), "batch_size": 32}, "max_epochs": 5}
    common = {"backbone": partial(MLP, hidden=(64,)), "optimizer": partial(torch.optim.Adam, lr=1e-3)}
    plain, ours = (
        last_accuracy(run(finetune(**common, loss_classes="current"), *callbacks, **options).matrix.R_ci)
        for callbacks in ([], [DriftCompensation()])
    )
    assert ours > plain + 0.05


def test_it_resumes_to_the_bit_in_the_middle_of_a_task(tmp_path):
    assert_resumes(lambda: (finetune(), [DriftCompensation()]), tmp_path)


def test_nothing_is_kept_from_task_to_task():
    callback = DriftCompensation()
    run(finetune(), callback)
    assert callback.state_dict() == {}
    assert callback.bytes_kept() == {"teachers": 0}


def test_a_head_without_means_is_reported_before_training():
    made = loop(finetune(head=lambda d: Finetune().build_head(d)), DriftCompensation())
    with pytest.raises(ValueError, match=r"DriftCompensation: .*LinearHead, keeps no class means; use PrototypeHead"):
        made.fit()


def test_a_mean_that_gained_samples_moves_by_the_share_of_the_earlier_ones():
    # Two classes: 30 samples of class 0 and 10 of class 1 before; 20 more of class 0 in this task. All features move by
    # the same vector, which the samples of before must follow and those of now have followed already.
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 3, generator=generator)
    labels = torch.tensor([0] * 30 + [1] * 10 + [0] * 20)
    shift = torch.tensor([1.0, -2.0, 0.5])
    store = Prototypes(3)
    store.update(features[:40], labels[:40], num_classes=2)
    now = features[40:] + shift
    network = torch.nn.Identity()
    strategy = SimpleNamespace(
        prototypes=store,
        network=network,
        device=torch.device("cpu"),
        passes=SimpleNamespace(features=lambda which: (now if which is network else features[40:], labels[40:])),
    )
    callback = DriftCompensation(sigma=1.0, normalise=False)
    callback.on_task_start(None, strategy, task_of(1))
    store.update(now, labels[40:], num_classes=2)
    callback.on_task_end(None, strategy, None)
    for column in (0, 1):
        torch.testing.assert_close(store.means[column], features[labels == column].mean(0) + shift)


def test_the_drift_of_directions_does_not_depend_on_the_scale_of_features():
    generator = torch.Generator().manual_seed(0)
    old, new, prototypes = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (20, 20, 3))
    moved = spherical_drift(old, new, prototypes, 0.3)
    torch.testing.assert_close(spherical_drift(7 * old, 3 * new, 2 * prototypes, 0.3), 2 * moved)
    assert spherical_drift(old, old, prototypes, 0.3).abs().max() == 0


def test_the_kernel_must_have_a_width():
    with pytest.raises(ValueError, match="sigma is 0"):
        DriftCompensation(sigma=0.0)
