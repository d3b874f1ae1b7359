from functools import partial

import pytest
import torch
from support.adaptation import (
    adapt,
    batches,
    online_errors,
    scores,
    source_network,
    stream,
    tiny_resnet,
    watching,
)
from support.fakes import normal
from torch import nn
from torch.nn import functional as F

from cl_lightning.strategies.test_time import vida
from cl_lightning.strategies.test_time.bn_adapt import BNAdapt
from cl_lightning.strategies.test_time.source import Source
from cl_lightning.strategies.test_time.vida import ADAPTERS, ViDA, adapter_scales, adapters
from cl_lightning.strategy import PhaseOptions
from cl_lightning.testing import Subject, small

CONV = {"targets": ["*conv*"], "high_rank": 6}
NONE = PhaseOptions(epochs=0)
SLOW = "two phases on the source, and a teacher whose further views run the network three times in a step"
SUBJECTS = {
    "ViDA": Subject(
        small(ViDA, backbone=tiny_resnet, views=2, teacher_momentum=0.9, adapter_momentum=0.8, threshold=0.01, **CONV),
        first_task_is_finetuning=False,
        reason="the adapters are trained after the network",
    ),
}

PUBLISHED = {
    "vida": {
        "source": "Yangsenqiao/vida: cifar/cfgs/cifar10/vida.yaml, cifar/conf.py and cifar/vida.py",
        "low_rank": 1,
        "high_rank": 128,
        "targets": ["*.conv*"],
        "views": 10,
        "threshold": 0.2,
        "teacher_momentum": 0.999,
        "adapter_momentum": 0.999,
        "adapter_rate": 0.1,
        "restore": 0.01,
        "adapter_options": {"epochs": 1},
        "backbone": "CifarResNet(depth=8, width=8)",
        "optimizer": "Adam(lr=0.0001)",
    },
}

sgd = partial(torch.optim.SGD, lr=0.02)
still = partial(torch.optim.SGD, lr=0.0)


@pytest.mark.parametrize(("u", "low", "high"), [(0.3, 0.7, 1.3), (0.2, 0.8, 1.2), (0.1, 1.1, 0.9), (0.0, 1.0, 1.0)])
def test_the_adapter_of_high_rank_weighs_more_where_the_teacher_is_uncertain(u, low, high):
    found = adapter_scales(torch.tensor(u).double(), torch.tensor(0.2).double())
    torch.testing.assert_close(found, torch.tensor([low, high]).double())


def doubled(strategy, batch, draw):
    """Views of a batch: the mirrored images, and the images in half the contrast, by turns."""
    doubled.count = getattr(doubled, "count", 0) + 1
    return batch.images.flip(-1) if doubled.count % 2 else batch.images / 2


class Plain(nn.Module):
    """A source network with adapters that are written out."""

    def __init__(self, start: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.net, self.scales = source_network(), [1.0, 1.0]
        self.sites = nn.ModuleList()
        for number, (name, host) in enumerate((n, m) for n, m in self.net.named_modules() if isinstance(m, nn.Conv2d)):
            values = [start[f"sites.{number}.{part}"].clone() for part in ("down.0", "down.1", "up.0", "up.1")]
            site = nn.ParameterList(nn.Parameter(value) for value in values)
            self.sites.append(site)
            assert "conv" in name
            host.register_forward_hook(partial(self.add, site))

    def add(self, site, host, args, output):
        for place in range(2):
            kernel = torch.einsum("or,rikl->oikl", site[place + 2], site[place])
            output = output + self.scales[place] * F.conv2d(args[0], kernel, None, host.stride, host.padding)
        return output

    def forward(self, images):
        return self.net(images).logits


@pytest.mark.parametrize(("target", "released"), [("views", False), ("image", True)])
def test_the_stream_follows_the_equations(monkeypatch, target, released):
    monkeypatch.setattr(vida, "viewed", doubled)
    doubled.count = 0
    options = {"views": 2, "threshold": 0.6, "teacher_momentum": 0.9, "adapter_momentum": 0.7, "restore": 0.0}
    options |= {"target": target, "released": released, "adapter_rate": 0.5, "adapter_options": NONE}
    strategy, noted = watching(ViDA, **options, **CONV, optimizer=sgd), []
    original, started = strategy.adapt, {}

    def adapting(batch, output):
        noted.append(adapters(strategy.network).scales.clone())
        return original(batch, output)

    strategy.adapt = adapting
    torch.manual_seed(1)
    learn = strategy.teacher.learn_from

    def learning(network):
        peft = adapters(network)
        with torch.no_grad():
            for number, value in enumerate(peft.parameters()):
                value.copy_(0.1 * normal(*value.shape, seed=number))
            started.update({name: value.clone() for name, value in peft.state_dict().items()})
        learn(network)

    strategy.teacher.learn_from = learning
    made = adapt(strategy)
    student, teacher = Plain(started), Plain(started)
    groups = [{"params": student.net.parameters()}, {"params": student.sites.parameters(), "lr": 0.01}]
    optimizer, expected, scales = torch.optim.SGD(groups, lr=0.02), [], []
    for images, _ in batches(made.datamodule):
        with torch.no_grad():
            views = torch.stack([teacher(images.flip(-1)), teacher(images / 2)])
            u = 0.1 * float((views[0] - views[1]).square().mean() / 2)
            low = 1 - u if u >= 0.6 else 1 + u
            student.scales = teacher.scales = [low, 1.0 if released else 2 - low]
            z = teacher(images)
        scales.append(student.scales)
        expected.append(z)
        wanted = views.mean(0) if target == "views" else z
        optimizer.zero_grad()
        F.cross_entropy(student(images), wanted.softmax(1)).backward()
        optimizer.step()
        with torch.no_grad():
            for momentum, mine, theirs in ((0.9, teacher.net, student.net), (0.7, teacher.sites, student.sites)):
                for one, other in zip(mine.parameters(), theirs.parameters(), strict=True):
                    one.mul_(momentum).add_(other, alpha=1 - momentum)
    torch.testing.assert_close(torch.stack(noted), torch.tensor(scales), rtol=1e-3, atol=1e-4)
    assert {bool(scale[0] > 1) for scale in scales} == {True, False}  # both cases occur
    torch.testing.assert_close(scores(strategy), torch.cat(expected), rtol=1e-3, atol=2e-3)


def test_the_adapters_alone_are_trained_on_the_source_after_the_network():
    strategy = watching(ViDA, views=2, optimizer=still, adapter_options=PhaseOptions(epochs=2), restore=0.0, **CONV)
    seen = []
    ending = strategy.end_phase

    def end_phase(phase):
        names = [name for name, value in strategy.network.named_parameters() if value.requires_grad]
        seen.append((phase.name, names))
        ending(phase)

    strategy.end_phase = end_phase
    adapt(strategy, stream(corruptions=["contrast"]))
    assert seen[0][0] == ADAPTERS
    assert all(".peft." in name for name in seen[0][1])
    source = source_network("source").state_dict()
    for name, value in strategy.network.state_dict().items():
        plain = name.replace("backbone.base", "backbone").replace("head.blocks.0", "head")
        assert ".peft." in name or not value.is_floating_point() or torch.equal(value, source.get(plain, value))
    assert all(bool(site.up[0].any()) and bool(site.up[1].any()) for site in adapters(strategy.network).sites)


def test_the_source_network_is_trained_without_adapters():
    options = {"views": 2, "backbone": tiny_resnet, "source_head": None, "adapter_options": NONE, "optimizer": still}
    strategy = watching(ViDA, **options, **CONV)
    adapt(strategy, stream(corruptions=["contrast"]), max_epochs=1)
    assert not any(bool(up.any()) for site in adapters(strategy.network).sites for up in site.up)


def test_before_a_step_adapters_that_were_not_trained_change_nothing():
    mine = watching(ViDA, views=2, optimizer=still, adapter_options=NONE, **CONV)
    plain = watching(BNAdapt)
    adapt(mine)
    adapt(plain)
    torch.testing.assert_close(scores(mine), scores(plain), rtol=1e-5, atol=1e-5)


def test_without_views_in_the_target_student_and_teacher_stay_equal():
    strategy = watching(ViDA, views=2, target="image", optimizer=partial(torch.optim.SGD, lr=0.1), **CONV)
    adapt(strategy)
    for name, value in strategy.network.named_parameters():
        torch.testing.assert_close(value, strategy.teacher.network.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_a_reset_sets_the_scales_to_1():
    strategy = watching(ViDA, views=2, adapter_options=NONE, optimizer=still, **CONV)
    adapt(strategy, stream(corruptions=["contrast"]))
    networks = (strategy.network, strategy.teacher.network)
    assert all(adapters(network).scales[0] != 1 for network in networks)
    strategy.reset()
    assert all(site.scales.tolist() == [1.0, 1.0] for network in networks for site in adapters(network).sites)


def test_all_weights_are_restored_at_random_to_the_source_with_its_adapters():
    strategy = watching(ViDA, views=2, restore=1.0, optimizer=partial(torch.optim.SGD, lr=0.1), **CONV)
    adapt(strategy, stream(corruptions=["contrast"]))
    start, adapted = strategy.start.tensors, strategy.trained_parameters()
    assert any(".peft." in name for name in start)
    assert all(torch.equal(value, start[name]) for name, value in adapted.items())
    assert not torch.equal(strategy.teacher.network.backbone.base.conv1.weight, start["backbone.base.conv1.weight"])


def test_labels_of_test_images_are_not_trained_on():
    with pytest.raises(ValueError, match=r"epochs is 1, but the source images .* give --model\.adapter_options\.epoch"):
        adapt(watching(ViDA, views=2, **CONV), stream(source_part="test"))


def test_it_adapts_to_corruptions():
    options = {"views": 4, "optimizer": partial(torch.optim.Adam, lr=1e-3), **CONV}
    errors = online_errors((Source, {}), (ViDA, options))
    assert errors[1] < errors[0] - 0.15


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"low_rank": 0}, "low_rank is 0"),
        ({"views": 1}, "views is 1"),
        ({"threshold": -1.0}, r"threshold is -1\.0"),
        ({"target": "student"}, "target is 'student'"),
        ({"adapter_rate": -1.0}, r"adapter_rate is -1\.0"),
        ({"adapter_momentum": 2.0}, r"adapter_momentum is 2\.0"),
        ({"restore": -0.1}, r"restore is -0\.1"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=f"ViDA: .*{words}"):
        ViDA(**options)
