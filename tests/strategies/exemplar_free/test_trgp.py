from functools import partial

import pytest
import torch
from support.fakes import normal
from support.runs import NormNet, plain_net, run
from torch import nn

from cl_lightning.callback import ContinualCallback
from cl_lightning.models import MLP, ConvNet, LinearHead, Network
from cl_lightning.strategies.exemplar_free.gpm import GPM
from cl_lightning.strategies.exemplar_free.trgp import TRGP, Regions, ScaledBackbone, scaled_projection
from cl_lightning.stream import PermutedDomains
from cl_lightning.testing import Subject, small

plain_sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)

SUBJECTS = {
    "TRGP": Subject(
        small(TRGP, samples=30, optimizer=plain_sgd),
        first_task_is_finetuning=False,
        reason="the parameters belong to a wrapped backbone, under another name",
    ),
}

PUBLISHED = {
    "trgp_cifar100": {
        "source": "LYang-666/TRGP: main_cifar100.py: its defaults; threshold 0.97 + 0.003 t; 125 samples; top 2 tasks",
        "backbone": "ConvNet",
        "regions": 2,
        "threshold": 0.5,
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


def basis(rows, columns, seed=0):
    return torch.linalg.qr(normal(rows, columns, seed=seed))[0]


@pytest.mark.parametrize("shape", [(5, 12), (5, 3, 2, 2)])
def test_a_weight_is_scaled_within_the_spaces_of_earlier_tasks(shape):
    weight, scales = normal(*shape, seed=3), normal(2, 4, 4, seed=4)
    first, second = basis(12, 4), basis(12, 3, seed=1)
    bases = torch.stack([first, nn.functional.pad(second, (0, 1))])  # a column of zeros
    flat = weight.reshape(5, 12)
    expected = flat + flat @ first @ scales[0] @ first.T - flat @ first @ first.T
    expected = expected + flat @ second @ scales[1][:3, :3] @ second.T - flat @ second @ second.T
    torch.testing.assert_close(scaled_projection(weight, bases, scales), expected.view(shape), rtol=1e-12, atol=1e-12)
    identity = torch.eye(4).double().repeat(2, 1, 1)
    assert torch.equal(scaled_projection(weight, bases, identity), weight)
    inside, outside = flat @ first @ first.T, flat - flat @ first @ first.T
    doubled = scaled_projection(weight, first[None], 2 * identity[:1]).reshape(5, 12)
    torch.testing.assert_close(doubled, outside + 2 * inside)


def test_the_tasks_with_the_largest_share_of_the_gradient_are_chosen():
    axes = torch.eye(6).double()
    bases = [axes[:, :1], axes[:, 1:4], axes[:, 3:5], axes[:, 5:]]
    region = Regions(bases, 2).double()
    assert torch.equal(region.scale.detach(), torch.eye(3).double().repeat(2, 1, 1))
    weight = normal(2, 6)
    assert torch.equal(region(weight), weight)
    gradient = torch.diag(torch.tensor([1.0, 1.0, 1.0, 4.0, 3.0, 1.0]).double())  # of the square 29: 1, 18, 25, 1
    region.choose(gradient, bases, 0.5)
    assert region.source.tolist() == [2, 1]
    assert torch.equal(region.basis[0], nn.functional.pad(axes[:, 3:5], (0, 1)))
    assert torch.equal(region.basis[1], axes[:, 1:4])
    region.choose(gradient, bases, (18 / 29) ** 0.5 + 1e-6)
    assert region.source.tolist() == [2, -1]
    assert region.basis[1].eq(0).all()
    region.choose(gradient, bases, 0.99)
    assert region.source.tolist() == [-1, -1]


class Look(ContinualCallback):
    """Predictions for some images of the first task, of which the inputs are stored, by the weights of each task."""

    def __init__(self):
        self.scores, self.images, self.scales = [], None, []

    def on_task_end(self, trainer, strategy, task):
        if self.images is None:
            self.images = torch.cat([b.images for b in strategy.passes.batches(samples=strategy.samples)])
        strategy.eval()
        with torch.no_grad():
            self.scores.append([strategy.predict_task(self.images, known) for known in range(task.index + 1)])
        self.scales.append(
            {key: value.clone() for key, value in strategy.state_dict().items() if "scale_" in key and "/" in key}
        )


convnet = partial(ConvNet, channels=(4,), kernels=(3,), hidden=(12,), conv_dropout=0.0, dropout=0.0)


@pytest.mark.parametrize("net", [NormNet, convnet])
def test_outputs_of_the_first_task_stay_with_a_full_basis(net):
    look = Look()
    made = run(
        TRGP(backbone=net, optimizer=plain_sgd, energy=1.0, energy_growth=0.0, samples=20, threshold=0.1),
        look,
        max_epochs=2,
    )
    for later in look.scores[1:]:
        torch.testing.assert_close(later[0][:, :4], look.scores[0][0], atol=5e-5, rtol=0)
    assert (look.scores[2][1] - look.scores[2][0])[:, :4].abs().max() > 0.1  # the weights of the tasks differ
    names = {name.partition("scale_")[2].partition("/")[0] for name in look.scales[2]}
    assert names == {"1_0", "2_0", "2_1"}
    assert all(torch.equal(value, look.scales[2][name]) for name, value in look.scales[1].items())
    for name, scale in look.scales[2].items():
        source = int(name.partition("scale_")[2][2])
        layer = name.partition("/")[2].replace("/", ".")
        size = made.strategy.spaces.of(source)[f"backbone.backbone.{layer}"].shape[1]
        assert scale.shape == (size, size)
        assert (scale - torch.eye(size)).abs().max() > 1e-3
    assert not list(made.strategy.backbone.learning.parameters())
    assert made.strategy.bytes_kept()["scales"] == sum(scale.nbytes for scale in look.scales[2].values()) + 8


def test_the_region_is_chosen_by_the_first_gradient_and_kept_when_the_task_ends():
    seen = []

    class Watched(TRGP):
        def edit_gradients(self, batch):
            index, weight = self.task.index, self.backbone.backbone.layers[1].weight
            regions = self.backbone.regions(index)
            gradient = weight.grad.clone()
            super().edit_gradients(batch)
            if index == 2:
                bases = [self.spaces.of(task)["backbone.backbone.layers.1"] for task in (0, 1)]
                shares = [float((gradient @ b @ b.T).norm() / gradient.norm()) for b in bases]
                seen.append((shares, regions["layers.1"].source.tolist(), gradient, weight.grad.clone()))

        def end_task(self, task):
            images = normal(5, 1, 8, 8).float()
            with torch.no_grad():
                before = self.predict_task(images, task.index)
                super().end_task(task)
                torch.testing.assert_close(self.predict_task(images, task.index), before, rtol=0, atol=1e-5)

    made = run(Watched(backbone=plain_net, optimizer=plain_sgd, energy=0.7), max_epochs=1)
    shares, source, *_ = seen[0]
    assert source == [task for task in sorted((0, 1), key=lambda t: -shares[t]) if shares[task] > 0.5] or -1 in source
    assert [task in source for task in (0, 1)] == [share > 0.5 for share in shares]
    assert len({tuple(s) for _, s, *_ in seen}) == 1
    joint = seen[0][3].new_tensor(made.strategy.spaces.bases["backbone.backbone.layers.1"].tolist())
    assert joint.shape[1] > 5
    first = made.strategy.spaces.of(0)["backbone.backbone.layers.1"]
    for _, _, raw, projected in seen:
        assert (projected @ first).abs().max() < 1e-5 * raw.abs().max()
        assert (raw @ first).abs().max() > 1e-2 * raw.abs().max()


def test_without_a_region_the_second_task_is_that_of_gpm():
    options = {"max_epochs": 2, "options": {"stop_after_task": 1}}
    common = {"backbone": plain_net, "optimizer": plain_sgd}
    trgp, gpm = run(TRGP(**common, threshold=1.0), **options), run(GPM(**common), **options)
    assert torch.equal(trgp.strategy.backbone.backbone.layers[1].weight, gpm.strategy.network.backbone.layers[1].weight)
    assert torch.equal(trgp.strategy.network.head.weight(), gpm.strategy.network.head.weight())


def test_it_learns_more_than_gpm_and_forgets_as_little():
    options = {"data": {"scenario": PermutedDomains(tasks=3), "batch_size": 32}, "max_epochs": 3}
    common = {"backbone": partial(MLP, hidden=(64,)), "optimizer": plain_sgd, "energy": 0.95, "loss_classes": "all"}
    trgp, gpm = (run(cls(**common), **options).matrix.R_ti for cls in (TRGP, GPM))
    # Measured: .949 against .927; the first task .93 against .91, of .41 by fine-tuning.
    assert trgp[2].mean() > gpm[2].mean()
    assert trgp[2, 0] > 0.85
    assert trgp.diag().mean() > gpm.diag().mean()


def test_a_state_in_the_middle_of_a_task_is_restored():
    strategy = TRGP(backbone=plain_net)
    strategy.build((1, 8, 8))
    for task in (0, 1):
        part = normal(64, 3 + task, seed=task)
        strategy.spaces.grow({"backbone.backbone.layers.1": part @ part.T}, 1.0, task=task)
    backbone = strategy.backbone
    backbone.scales.store(1, 0, "layers.1", normal(3, 3).float())
    backbone.begin(2, 2)
    with torch.no_grad():
        backbone.regions(2)["layers.1"].choose(normal(16, 64).float(), backbone.bases("layers.1", 2), 0.0)
        backbone.regions(2)["layers.1"].scale += normal(2, 7, 7).float()
    other = TRGP(backbone=plain_net)
    other.build((1, 8, 8))
    other.load_state_dict(strategy.state_dict())
    images = normal(5, 1, 8, 8).float()
    for task in (0, 1, 2):
        assert torch.equal(strategy.predict_task(images, task), other.predict_task(images, task))
    features = []
    for task in (0, 1, 2):
        backbone.task = task
        features.append(backbone(images))
    assert (features[0] - features[1]).abs().max() > 0.01
    assert (features[1] - features[2]).abs().max() > 0.01
    plain = ScaledBackbone(plain_net((1, 8, 8)), strategy.spaces)
    plain.restore_network(Network(plain, LinearHead(16)), {}, "")
    assert not list(plain.learning.parameters())


def test_layers_without_inputs_have_no_region():
    strategy = TRGP(backbone=plain_net)
    strategy.build((1, 8, 8))
    strategy.spaces.grow({"backbone.backbone.layers.1": torch.zeros(64, 64).double()}, 1.0, task=0)
    strategy.backbone.begin(1, 2)
    assert strategy.backbone.regions(1) == {}


def test_predictions_need_the_task():
    with pytest.raises(ValueError, match="TRGP: predictions need the task of each image; give tasks"):
        TRGP().predict(torch.zeros(1, 1, 8, 8))


def test_optimizers_that_leave_the_space_are_refused():
    with pytest.raises(ValueError, match="TRGP: optimizer is Adam, which moves"):
        run(TRGP(backbone=plain_net, optimizer=torch.optim.Adam), max_epochs=1)


@pytest.mark.parametrize("options", [{"regions": 0}, {"threshold": -0.1}, {"threshold": 1.5}, {"energy": 0.0}])
def test_options_outside_their_range_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"TRGP: {name} is {value}; it must be"):
        TRGP(**options)
