"""Refresh learning."""

from types import SimpleNamespace

import pytest
import torch
from support.fakes import batch_of, normal
from support.runs import NormNet, assert_resumes, assert_same_run, plain_net, run, sgd
from torch import nn
from torch.nn import functional as F

from cl_lightning.callbacks.refresh import Refresh
from cl_lightning.memory import fisher_diagonal
from cl_lightning.models import LinearHead, Network
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.rehearsal.derpp import DERpp
from cl_lightning.stream import ClassIncremental
from cl_lightning.testing import check_strategy, small

PUBLISHED = {
    "derpp_refresh_cifar10": {
        "source": "joey-wang123/CL-refresh-learning: models/derpp.py, utils/best_args.py, seq-cifar10, 500",
        "memory_size": 500,
        "logit_weight": 0.1,
        "label_weight": 0.5,
        "optimizer": "SGD(lr=0.03, weight_decay=0.0001)",
        "backbone": "ResNet18",
        "data.scenario": "ClassIncremental(tasks=5)",
        "data.batch_size": 32,
        "data.transforms": ["RandomCrop(padding=4)", "RandomHorizontalFlip()"],
        "trainer.max_epochs": 50,
        "trainer.callbacks": ["Refresh(decay=1e-05, fisher_weight=0.001, noise=0.001, strength=1e-05)"],
    },
}


def refresh():
    return [Refresh(strength=0.01, noise=0.1)]


LABELS = torch.tensor([0, 2, 1, 1, 0])
GENERATOR = torch.Generator()


def case():
    """A linear classifier of 2 x 2 images in three classes, and a batch."""
    network = Network(nn.Flatten(), LinearHead(4))
    network.head.grow(3)
    network.double()
    with torch.no_grad():
        network.head.blocks[0].weight.copy_(normal(3, 4, seed=5))
        network.head.blocks[0].bias.copy_(normal(3, seed=6))
    strategy = SimpleNamespace(
        network=network, classification_loss=lambda output, batch: F.cross_entropy(output.logits, batch.labels)
    )
    return strategy, batch_of(LABELS, images=normal(5, 1, 2, 2, seed=2))


def test_each_tensor_moves_up_the_loss_by_a_share_of_its_norm():
    strategy, batch = case()
    head, x = strategy.network.head.blocks[0], batch.images.flatten(1)
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    difference = ((x @ weight.T + bias).softmax(1) - F.one_hot(LABELS, 3)) / 5
    g, h = difference.T @ x, difference.sum(0)
    fisher = normal(3, 4, seed=7).abs()
    callback = Refresh(strength=0.1, noise=0.0, fisher_weight=0.5)
    callback.fisher = {"head.blocks.0.weight": fisher}
    callback.unlearn(strategy, batch, GENERATOR)
    torch.testing.assert_close(head.weight, weight + 0.1 * weight.norm() * g / g.norm() / (1 + 0.5 * fisher))
    torch.testing.assert_close(head.bias, bias + 0.1 * bias.norm() * h / h.norm())
    assert head.weight.grad is None


def test_noise_is_added_to_each_weight_and_divided_by_the_fisher_information_too():
    moved = []
    for noise in (0.0, 0.3):
        strategy, batch = case()
        callback = Refresh(strength=0.1, noise=noise, fisher_weight=2.0)
        callback.fisher = {"head.blocks.0.weight": torch.ones(3, 4).double()}
        callback.unlearn(strategy, batch, torch.Generator().manual_seed(4))
        moved.append(strategy.network.head.blocks[0].weight.detach())
    xi = torch.randn(3, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    torch.testing.assert_close(moved[1] - moved[0], 0.1 * 0.3 * xi / 3)


def test_the_cross_entropy_of_the_batch_rises():
    strategy, batch = case()
    before = F.cross_entropy(strategy.network(batch.images).logits, LABELS)
    Refresh(strength=0.01, noise=0.0).unlearn(strategy, batch, GENERATOR)
    assert F.cross_entropy(strategy.network(batch.images).logits, LABELS) > before + 1e-3


class Follows(Refresh):
    """Notes the relative moves, and the Fisher information at the end of each task."""

    def __init__(self, **options):
        super().__init__(**options)
        self.moves, self.expected = [], {}

    def unlearn(self, strategy, batch, generator):
        weights = [value.detach().clone() for value in strategy.network.parameters()]
        super().unlearn(strategy, batch, generator)
        after = list(strategy.network.parameters())
        self.moves.append(float((after[0] - weights[0]).norm() / weights[0].norm()))

    def on_task_end(self, trainer, strategy, task):
        before = dict(self.fisher)
        if self.labels != "exact":
            return
        super().on_task_end(trainer, strategy, task)
        parameters = dict(strategy.network.named_parameters())
        found = fisher_diagonal(strategy.network, parameters, strategy.passes.batches(), labels="exact")
        for name, value in found.items():
            expected = value + self.decay * before[name] if name in before else value
            torch.testing.assert_close(self.fisher[name], expected)


def test_a_run_unlearns_once_before_each_step_and_the_fisher_information_decays():
    callback = Follows(strength=1e-3, noise=0.0, fisher_weight=0.1, decay=0.5, labels="exact")
    made = run(Finetune(backbone=plain_net, optimizer=sgd), callback, max_epochs=1)
    assert len(callback.moves) == made.trainer.global_step
    assert max(callback.moves) == pytest.approx(1e-3, rel=1e-3)
    assert callback.fisher.keys() == dict(made.strategy.network.named_parameters()).keys()
    assert callback.bytes_kept()["importance"] == 4 * sum(p.numel() for p in made.strategy.network.parameters())


@pytest.mark.parametrize(("options", "times"), [({"steps": 2}, 2), ({}, 1)])
def test_several_unlearning_steps_and_accumulated_gradients(options, times):
    callback = Follows(**options)
    made = run(Finetune(backbone=plain_net, optimizer=sgd), callback, max_epochs=1, accumulate_grad_batches=2)
    assert len(callback.moves) == times * made.trainer.global_step


def test_without_strength_it_is_its_host_to_the_bit():
    def host():
        return DERpp(backbone=plain_net, optimizer=sgd, memory_size=60)

    plain = run(host(), max_epochs=1)
    assert_same_run(run(host(), Refresh(strength=0.0), max_epochs=1), plain)


def test_its_passes_leave_the_running_statistics_and_the_dropout_of_the_step_alone():
    made = [
        run(Finetune(backbone=NormNet, optimizer=sgd), *callbacks, max_epochs=1, limit_train_batches=1)
        for callbacks in ([], [Refresh(strength=1e-12)])
    ]
    layers = [each.strategy.network.backbone.layers[2] for each in made]
    assert layers[0].num_batches_tracked == layers[1].num_batches_tracked
    torch.testing.assert_close(layers[0].running_mean, layers[1].running_mean)
    torch.testing.assert_close(*(next(each.strategy.parameters()) for each in made))


def test_it_resumes_to_the_bit(tmp_path):
    options = {"strength": 0.01, "noise": 0.1, "fisher_weight": 1.0, "decay": 0.5}
    assert_resumes(lambda: (Finetune(backbone=NormNet, optimizer=sgd), [Refresh(**options)]), tmp_path)


@pytest.mark.slow
def test_two_processes_give_what_one_gives():
    check_strategy(small(Finetune), callbacks=refresh, checks=["processes"], first_task_is_finetuning=False)


def test_its_host_learns_as_well_with_it():
    data = {"scenario": ClassIncremental(tasks=5), "batch_size": 32}
    host, with_it = (
        run(DERpp(backbone=plain_net, memory_size=100), *callbacks, max_epochs=2, data=data).matrix.measures()
        for callbacks in ([], [Refresh(strength=1e-3)])
    )
    # Measured: .63 against .66; the sources have published no figures, and the effect is within the noise.
    assert with_it["average_accuracy"] > host["average_accuracy"] - 0.08


@pytest.mark.parametrize(
    "options", [{"strength": -1}, {"noise": -1}, {"fisher_weight": -1}, {"decay": -1}, {"steps": 0}, {"samples": 0}]
)
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match="Refresh"):
        Refresh(**options)
