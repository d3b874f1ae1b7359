from functools import partial

import pytest
import torch
from support.adaptation import adapt, batches, scores, source_network, stream, tiny_resnet, watching
from torch import nn
from torch.nn import functional as F

from cl_lightning.batch import Draw
from cl_lightning.memory import CategoryBalancedMemory
from cl_lightning.strategies.test_time.bn_adapt import BNAdapt
from cl_lightning.strategies.test_time.mean_teacher import move_teacher
from cl_lightning.strategies.test_time.parts import views
from cl_lightning.strategies.test_time.parts.filters import EntropyFilter
from cl_lightning.strategies.test_time.parts.restoration import StochasticRestore, WeightEnsembling
from cl_lightning.strategies.test_time.rotta import RoTTA, timeliness
from cl_lightning.strategies.test_time.source import Source
from cl_lightning.testing import Subject, small

SUBJECTS = {
    "RoTTA": Subject(small(RoTTA, backbone=tiny_resnet, memory_size=9, every=20, teacher_momentum=0.9, momentum=0.3)),
}
WAITS = {"RoTTA": {"arrive"}}  # which items of the memory leave

PUBLISHED = {
    "rotta": {
        "source": "BIT-DA/RoTTA: configs/adapter/rotta.yaml, core/adapter/rotta.py",
        "memory_size": 64,
        "every": 64,
        "momentum": 0.05,
        "teacher_momentum": 0.999,
        "backbone": "CifarResNet(depth=8, width=8)",
        "optimizer": "Adam(lr=0.001)",
    },
}

sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class RobustNorm(nn.BatchNorm2d):
    """Moves its statistics in train mode and normalises with them, in plain torch."""

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.running_mean, self.running_var = self.running_mean.clone(), self.running_var.clone()
            mean = (1 - self.momentum) * self.running_mean + self.momentum * x.mean((0, 2, 3))
            var = (1 - self.momentum) * self.running_var + self.momentum * x.var((0, 2, 3), unbiased=False)
            self.running_mean, self.running_var = mean.detach(), var.detach()
        else:
            mean, var = self.running_mean, self.running_var
        shape = (1, -1, 1, 1)
        scaled = (x - mean.view(shape)) / (var + self.eps).sqrt().view(shape)
        return scaled * self.weight.view(shape) + self.bias.view(shape)


def plain_network(momentum):
    net = source_network("source")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__, module.momentum = RobustNorm, momentum
    return net


def short():
    """Two batches of one domain."""
    return stream(samples=70, corruptions=["contrast"])


def mirrored_views(monkeypatch):
    """Views of a batch are its mirror images, whatever the draw."""
    monkeypatch.setattr(views, "random_view", lambda images, draw, **kind: images.flip(-1))


def test_the_weight_of_an_item_falls_with_its_age():
    found = timeliness(torch.tensor([0, 64, 128]), 64)
    torch.testing.assert_close(found, torch.tensor([0.5, 0.2689414, 0.1192029]))


@pytest.mark.parametrize("every", [60, 110])
def test_it_is_a_mean_teacher_on_the_memory_with_a_step_every_so_many_samples(monkeypatch, every):
    mirrored_views(monkeypatch)
    options = {"memory_size": 33, "every": every, "momentum": 0.2, "teacher_momentum": 0.7}
    strategy = watching(RoTTA, time_weight=0.5, uncertainty_weight=2.0, optimizer=sgd, **options)
    made = adapt(strategy)
    student, teacher = plain_network(0.2), plain_network(0.2)
    memory = CategoryBalancedMemory(33, time_weight=0.5, uncertainty_weight=2.0)
    norms = [value for m in student.modules() if isinstance(m, RobustNorm) for value in m.parameters()]
    optimizer, expected, seen, steps = sgd(norms), [], 0, 0
    for images, _ in batches(made.datamodule):
        with torch.no_grad():
            logits = teacher.eval()(images).logits
        expected.append(logits)
        p = logits.softmax(1)
        entropies = -(p * p.log()).sum(1)
        raw, zeros = (images * 0.376 + 0.305).mul(255).round().byte(), torch.zeros(len(images), dtype=torch.int64)
        memory.arrive(raw, p.argmax(1), zeros, entropies, Draw.of(len(images), 0), 10)
        before, seen = seen, seen + len(images)
        if seen // every > before // every:
            items = (memory.images.float() / 255 - 0.305) / 0.376
            with torch.no_grad():
                target = teacher.train()(items).logits.softmax(1)
            ages = seen - memory.fields["places"]
            weights = torch.exp(-ages / 33) / (1 + torch.exp(-ages / 33))
            loss = (weights * F.cross_entropy(student.train()(items.flip(-1)).logits, target, reduction="none")).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            move_teacher(teacher, student, 0.7)
            steps += 1
    assert steps == (6 if every == 60 else 3)
    close = {"rtol": 2e-3, "atol": 2e-3}
    torch.testing.assert_close(scores(strategy), torch.cat(expected), **close)
    assert not torch.allclose(torch.cat(expected[-3:]), watched_source()[-140:], atol=0.1)
    for network, plain in ((strategy.network, student), (strategy.teacher.network, teacher)):
        found, wanted = network.state_dict(), plain.state_dict()
        for name in ("backbone.bn1.running_mean", "backbone.bn1.running_var", "backbone.bn1.weight"):
            torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-4)
    assert torch.equal(strategy.memory.fields["places"].sort().values, memory.fields["places"].sort().values)


def watched_source():
    source = watching(Source)
    adapt(source)
    return scores(source)


def test_before_the_first_step_it_is_the_source_to_the_bit():
    still = watching(RoTTA, every=401, restoration=[WeightEnsembling(0.0)], optimizer=sgd)
    made = adapt(still)
    assert torch.equal(scores(still), watched_source())
    state, before = made.strategy.network.state_dict(), source_network("source").state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items() if name in state)


def test_a_still_teacher_keeps_the_parameters_of_the_source_and_moves_its_statistics():
    made = adapt(watching(RoTTA, every=60, teacher_momentum=1.0, optimizer=sgd), short()).strategy
    teacher, before = made.teacher.network.state_dict(), source_network("source").state_dict()
    for name, value in before.items():
        if name in teacher:
            assert torch.equal(teacher[name], value) == ("running" not in name)
    assert not torch.equal(made.network.state_dict()["backbone.bn1.weight"], before["backbone.bn1.weight"])


def test_with_accumulated_gradients_a_step_is_taken_if_any_of_its_batches_completes_the_samples():
    data = stream(samples=160, corruptions=["contrast"], batch_size=40)  # only the third batch of four does
    made = adapt(watching(RoTTA, every=120, optimizer=sgd), data, accumulate_grad_batches=2).strategy
    before = source_network("source").state_dict()["backbone.bn1.weight"]
    assert not torch.equal(made.network.state_dict()["backbone.bn1.weight"], before)


@pytest.mark.parametrize("predict_when", ["before", "after"])
def test_a_domain_after_a_reset_is_as_if_it_were_the_first(monkeypatch, predict_when):
    mirrored_views(monkeypatch)
    options = {"reset": "domain", "every": 50, "predict_when": predict_when, "teacher_momentum": 0.5, "optimizer": sgd}
    both, alone = watching(RoTTA, **options), watching(RoTTA, **options)
    adapt(both, stream(samples=110))
    adapt(alone, stream(samples=110, corruptions=["contrast"]))
    assert torch.equal(torch.cat(both.noted[2]), torch.cat(alone.noted[1]))
    assert both.memory.num_seen == 110


def test_filters_choose_items_of_the_memory_and_rules_follow_a_step(monkeypatch):
    mirrored_views(monkeypatch)
    chosen = {"every": 60, "teacher_momentum": 0.5, "optimizer": sgd}
    rows, made = [], {}
    plain = EntropyFilter.forward
    monkeypatch.setattr(EntropyFilter, "forward", lambda *args: rows.append(len(args[2])) or plain(*args))
    for name, options in {
        "all": {},
        "some": {"filters": [EntropyFilter(0.1)], "memory_size": 20},
        "none": {"filters": [EntropyFilter(1e-9)]},
        "restored": {"restoration": [StochasticRestore(1.0)]},
    }.items():
        made[name] = adapt(watching(RoTTA, **chosen, **options), short()).strategy
        if name == "some":
            assert set(rows) <= set(range(1, 21))
    weights = {name: one.network.state_dict()["backbone.bn1.weight"] for name, one in made.items()}
    source = source_network("source").state_dict()["backbone.bn1.weight"]
    assert torch.equal(weights["none"], source)
    assert torch.equal(weights["restored"], source)
    assert not torch.equal(weights["all"], source)
    assert not torch.equal(weights["some"], weights["all"])
    teacher = made["restored"].teacher.network.state_dict()["backbone.bn1.weight"]
    assert not torch.equal(teacher, source)  # it followed the student before the reset


def test_it_adapts_to_a_stream_sorted_by_class_where_statistics_of_the_batch_fail():
    options = {"samples": None, "batch_size": 16, "order": "sorted", "corruptions": ["contrast"]}
    source, batch, robust = (
        adapt(watching(cls, **chosen), stream(**options)).matrix.measures()["mean_online_error"]
        for cls, chosen in ((Source, {}), (BNAdapt, {}), (RoTTA, {"every": 16, "momentum": 0.1}))
    )
    # Measured: errors of .78, .67 and .39.
    assert robust < min(source, batch) - 0.15


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory_size": 0}, "memory_size is 0"),
        ({"every": 0}, "every is 0"),
        ({"time_weight": -1.0}, r"time_weight is -1\.0"),
        ({"uncertainty_weight": -0.1}, r"uncertainty_weight is -0\.1"),
        ({"momentum": 0.0}, r"momentum is 0\.0"),
        ({"teacher_momentum": 1.5}, r"teacher_momentum is 1\.5"),
    ],
)
def test_options_out_of_range_are_errors(options, words):
    with pytest.raises(ValueError, match=f"RoTTA: .*{words}"):
        RoTTA(**options)
