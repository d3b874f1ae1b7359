from functools import partial

import pytest
import torch
from support.runs import NormNet, plain_net, run, sgd

from cl_lightning.callback import ContinualCallback
from cl_lightning.models import MLP
from cl_lightning.strategies.baselines.finetune import Finetune
from cl_lightning.strategies.exemplar_free.gpm import GPM
from cl_lightning.stream import PermutedDomains
from cl_lightning.testing import Subject, small

plain_sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)

SUBJECTS = {"GPM": Subject(small(GPM, samples=30, optimizer=plain_sgd))}

PUBLISHED = {
    "gpm_cifar100": {
        "source": "sahagobinda/GPM: defaults of main_cifar100.py; threshold 0.97 + 0.003 t; 125 samples",
        "backbone": "ConvNet",
        "energy": 0.97,
        "energy_growth": 0.003,
        "samples": 125,
        "optimizer": "SGD(lr=0.01)",
        "scheduler": "ReduceLROnPlateau(factor=0.5, min_lr=1e-05, patience=6)",
        "data.scenario": "ClassIncremental(class_order=1993, tasks=10)",
        "data.batch_size": 64,
        "data.val_fraction": 0.05,
        "trainer.max_epochs": 200,
    },
}


class Features(ContinualCallback):
    """Features of the images of the first task whose inputs were stored, after each task."""

    def __init__(self):
        self.seen, self.images = [], None

    def on_task_end(self, trainer, strategy, task):
        if self.images is None:
            self.images = torch.cat([b.images for b in strategy.passes.batches(samples=strategy.samples)])
        strategy.eval()
        with torch.no_grad():
            self.seen.append(strategy.network(self.images))


@pytest.mark.parametrize("net", [plain_net, NormNet])
def test_outputs_for_the_stored_inputs_stay_with_a_full_basis(net):
    features = Features()
    run(GPM(backbone=net, optimizer=plain_sgd, energy=1.0, energy_growth=0.0, samples=20), features, max_epochs=2)
    for later in features.seen[1:]:
        torch.testing.assert_close(later.features, features.seen[0].features, atol=2e-5, rtol=0)
        torch.testing.assert_close(later.logits[:, :4], features.seen[0].logits, atol=5e-5, rtol=0)


def test_without_projection_they_move():
    features = Features()
    run(
        GPM(backbone=plain_net, optimizer=plain_sgd, energy=1e-6, energy_growth=0.0, samples=20), features, max_epochs=2
    )
    assert (features.seen[2].features - features.seen[0].features).abs().max() > 0.5


def test_the_basis_grows_by_the_energy_of_each_task():
    energies = []

    class Look(GPM):
        def end_task(self, task):
            super().end_task(task)
            images = torch.cat([b.images for b in self.passes.batches(samples=self.samples)]).flatten(1).double()
            basis = self.spaces.bases["backbone.layers.1"].double()
            held = (images @ basis).square().sum() / images.square().sum()
            energies.append((float(held), basis.shape[1]))

    made = run(Look(backbone=plain_net, optimizer=plain_sgd, energy=0.8, energy_growth=0.05), max_epochs=1)
    assert [held >= 0.8 + 0.05 * task - 1e-6 for task, (held, _) in enumerate(energies)] == [True] * 3
    assert energies[0][0] < 0.9
    assert energies[0][1] < energies[1][1] < energies[2][1] < 64
    assert set(made.strategy.spaces.bases) == {"backbone.layers.1", "head"}
    bytes_kept = 4 * sum(basis.numel() for basis in made.strategy.spaces.bases.values()) + 8
    assert made.strategy.bytes_kept() == {"bases": bytes_kept}


def test_later_tasks_train_neither_biases_nor_normalisation():
    states = []

    class Look(ContinualCallback):
        def on_task_end(self, trainer, strategy, task):
            states.append({name: value.clone() for name, value in strategy.network.backbone.state_dict().items()})

    run(GPM(backbone=NormNet, optimizer=plain_sgd, energy=0.9), Look(), max_epochs=1)
    changed = {name for name, value in states[0].items() if not torch.equal(value, states[2][name])}
    assert changed == {"layers.1.weight"}


def test_it_forgets_less_than_finetuning_where_the_head_is_shared():
    options = {"data": {"scenario": PermutedDomains(tasks=3), "batch_size": 32}, "max_epochs": 3}
    common = {"backbone": partial(MLP, hidden=(64,)), "optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9)}
    gpm, finetune = run(GPM(**common, energy=0.95, loss_classes="all"), **options), run(Finetune(**common), **options)
    # Measured: .91 against .41.
    assert gpm.matrix.R_ci[2, 0] > finetune.matrix.R_ci[2, 0] + 0.25


@pytest.mark.parametrize(
    ("optimizer", "said"), [(sgd, "SGD with weight_decay 0.01"), (torch.optim.Adam, "Adam, which moves")]
)
def test_optimizers_that_leave_the_space_are_refused(optimizer, said):
    with pytest.raises(ValueError, match=f"GPM: optimizer is {said}"):
        run(GPM(backbone=plain_net, optimizer=optimizer), max_epochs=1)


@pytest.mark.parametrize("options", [{"energy": 0.0}, {"energy": 1.1}, {"energy_growth": -0.1}, {"samples": 0}])
def test_options_outside_their_range_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"GPM: {name} is {value}; it must be"):
        GPM(**options)
